"""What the stage times of tools.bench.efficiency say: end to end at any answer length, ceilings, MARC's own metrics."""

# MARC's paper (arXiv 2510.07915): one GPU, its own baseline; reductions in per cent.
PAPER = {"peak GPU memory": 72.0, "LLM generation": 23.9, "end to end": 11.1}
COLD_LOWER, WARM_TIMES = 35.0, 10.0  # to reach on one H200
STAGES = ("open + decode", "memory", "events", "embed", "retrieve", "patchify", "vision", "compress", "prefill",
          "decode")  # fmt: skip
TOUCHED = ("patchify", "vision", "prefill")  # stages that looking at less makes cheaper
HOST = ("open + decode", "patchify")  # what a user of transformers waits for too


def per_token(row: dict, way: str) -> float:
    """Milliseconds of one decoded token of every stream."""
    return row["stages"][way]["decode"] / row["new"]


def stages_of(row: dict, way: str, answer: int) -> dict[str, float]:
    """Milliseconds of every stage with an answer of so many tokens."""
    return row["stages"][way] | {"decode": answer * per_token(row, way)}


def end_to_end(row: dict, way: str, answer: int) -> float:
    """Milliseconds from the file (or the memory) and the question to the last of so many tokens."""
    return sum(stages_of(row, way, answer).values())


def generation(row: dict, way: str, answer: int) -> float:
    """Milliseconds inside the language model: prefill and so many tokens."""
    stages = stages_of(row, way, answer)
    return stages["prefill"] + stages["decode"]


def lower(now: float, before: float) -> float:
    """Per cent by which `now` is below `before`."""
    return 100 * (1 - now / before)


def if_free(row: dict, stages: tuple[str, ...], answer: int) -> float:
    """How many times faster the uncompressed run could be if these stages cost nothing (Amdahl); inf for all of it."""
    times = stages_of(row, "uncompressed", answer)
    rest = sum(ms for stage, ms in times.items() if stage not in stages)
    return sum(times.values()) / rest if rest else float("inf")


def peer_total(row: dict, peer: dict, answer: int) -> float:
    """Transformers end to end: our reading of the same frames, its first token, its further tokens."""
    host = sum(row["stages"]["uncompressed"][stage] for stage in HOST)
    return host + peer["first"] + (answer - 1) * peer["per_token"]


def cells(*values) -> str:
    return "| " + " | ".join(v if isinstance(v, str) else f"{v:,.4g}" for v in values) + " |"


def stage_table(row: dict, peer: dict | None, answer: int) -> list[str]:
    """Every stage of the three ways; its share of the uncompressed run, and what it could give at most."""
    ways = {way: stages_of(row, way, answer) for way in row["stages"]}
    total = sum(ways["uncompressed"].values())
    lines = [cells("ms", "uncompressed", "share", "at most, x", "MARC cold", "alone, x", "MARC warm", "transformers"),
             "|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    theirs = dict(peer or {})
    if peer:
        theirs |= {stage: ways["uncompressed"][stage] for stage in HOST} | {"prefill": peer["first"] - peer["vision"]}
    for stage in (stage for stage in STAGES if any(stage in times for times in ways.values())):
        full, cold = (ways[way].get(stage, 0.0) for way in ("uncompressed", "cold"))
        shown = [per_token(row, way) if stage == "decode" else ways[way].get(stage, "") for way in ways]
        other = theirs.get("per_token" if stage == "decode" else stage, "")
        free = f"{if_free(row, (stage,), answer):.2f}" if full else ""
        alone = f"{total / (total - full + cold):.2f}" if full or cold else ""
        name, share = "decode, per token" if stage == "decode" else stage, f"{full / total:.1%}" if full else ""
        lines.append(cells(name, shown[0], share, free, shown[1], alone, shown[2], other))
    return lines


def answer_table(row: dict, peer: dict | None, answers: list[int]) -> list[str]:
    """End to end by length of the answer; with each gain, the most that its stages could give."""
    lines = [cells("answer, tokens", "uncompressed, ms", "MARC cold, ms", "lower by", "at most", f">= {COLD_LOWER:g} %",
                   "MARC warm, ms", "x", "at most, x", f">= {WARM_TIMES:g} x", "transformers, ms", "x uncompressed",
                   "x cold", "x warm"), "|" + "--:|" * 14]  # fmt: skip
    for answer in answers:
        full, cold, warm = (end_to_end(row, way, answer) for way in ("uncompressed", "cold", "warm"))
        gain, most = lower(cold, full), 100 * (1 - 1 / if_free(row, TOUCHED, answer))
        every = tuple(stage for stage in row["stages"]["uncompressed"] if stage != "decode")
        other = peer_total(row, peer, answer) if peer else None
        beside = [other, other / full, other / cold, other / warm] if other else [""] * 4
        lines.append(cells(
            str(answer), full, cold, f"{gain:.1f} %", f"{most:.1f} %", "yes" if gain >= COLD_LOWER else "NO",
            warm, full / warm, if_free(row, every, answer), "yes" if full / warm >= WARM_TIMES else "NO", *beside,
        ))  # fmt: skip
    return lines


def paper_table(row: dict, answers: list[int]) -> list[str]:
    """MARC's own metrics, computed its way, beside its figures; reductions in per cent."""
    peak = {way: row["peak_bytes"][way] for way in row["stages"]}
    lines = [cells("lower by, %", "paper", *(f"{way}, {n} tokens" for way in ("cold", "warm") for n in answers)),
             "|---|" + "--:|" * (1 + 2 * len(answers))]  # fmt: skip
    measures = {
        "peak GPU memory": lambda way, _: peak[way],
        "LLM generation": lambda way, n: generation(row, way, n),
        "end to end": lambda way, n: end_to_end(row, way, n),
    }
    for name, of in measures.items():
        ours = [f"{lower(of(w, n), of('uncompressed', n)):.1f}" for w in ("cold", "warm") for n in answers]
        lines.append(cells(name, f"{PAPER[name]:g}", *ours))
    return lines


def memory_table(row: dict, peer: dict | None) -> list[str]:
    lines = [cells("bytes", "uncompressed", "MARC cold", "MARC warm", "transformers"), "|---|--:|--:|--:|--:|"]
    ways, mib, gib = list(row["stages"]), 2**20, 2**30
    state, full = row["state_bytes"], sum(row["state_bytes"]["uncompressed"].values())
    lines.append(cells("keys and values of a stream, MiB", *(state[way]["kv"] / mib for way in ways), ""))
    lines.append(cells("visual tokens of a stream, MiB", *(state[way]["visual"] / mib for way in ways), ""))
    gains = [f"{lower(sum(state[way].values()), full):.1f} %" for way in ways[1:]]
    lines.append(cells("both: lower by", "", *gains, ""))
    theirs = peer["peak_bytes"] / gib if peer and peer.get("peak_bytes") else ""
    lines.append(cells("peak on the device, GiB", *(row["peak_bytes"][way] / gib for way in ways), theirs))
    stored = f"memory of the video, MiB ({row['disk_ms']:.1f} ms from disk)"
    lines.append(cells(stored, "", "", row["stored"] / mib, ""))
    return lines


def section(key: str, row: dict, peer: dict | None, answers: list[int]) -> str:
    """One row as Markdown."""
    tokens, grid = row["visual_tokens"], "x".join(map(str, row["grid"]))
    share, shown = tokens["cold"] / tokens["uncompressed"], answers[len(answers) // 2]
    lines = [
        f"### {key}: {row['cap']} tokens per frame pair, batch {row['batch']}", "",
        f"{row['patches']} temporal patches of {grid}, {row['events']} events; {tokens['uncompressed']:,} visual"
        f" tokens, MARC {tokens['cold']:,} ({share:.1%}), {row['encoded']} patches through the vision tower when cold."
        f" Medians of {row['repeats']} passes, {row['new']} tokens decoded in each; the batch as a whole."
        f" Cold and warm say {'the same' if row['same_answer'] else 'different things'}.", "",
        f"Shares with an answer of {shown} tokens:", "",
        *stage_table(row, peer, shown), "", *answer_table(row, peer, answers), "",
        *paper_table(row, answers), "", *memory_table(row, peer), "",
    ]  # fmt: skip
    return "\n".join(lines)
