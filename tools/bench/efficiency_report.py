"""What the stage times of tools.bench.efficiency say: end to end at any answer length, ceilings, MARC's own metrics."""

# MARC's paper (arXiv 2510.07915): one GPU, its own baseline; reductions in per cent.
PAPER = {"peak GPU memory": 72.0, "LLM generation": 23.9, "end to end": 11.1}
COLD_LOWER, WARM_TIMES = 35.0, 10.0  # to reach on one H200
STAGES = ("look", "open + decode", "memory", "events", "embed", "retrieve", "patchify", "vision", "compress", "prefill",
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


def title(way: str) -> str:
    """Of a column."""
    return {"uncompressed": way, "key frames": "MARC cold, key frames"}.get(way, f"MARC {way}")


def most_lower(row: dict, way: str, answer: int) -> float:
    """Per cent: the ceiling of a cold way, patchify, vision and prefill for nothing.

    With key frames reading costs the share of the pictures that still has to be decoded.
    """
    least = end_to_end(row, "uncompressed", answer) / if_free(row, TOUCHED, answer)
    if way == "key frames":
        least -= (1 - decoded_share(row)) * row["stages"]["uncompressed"]["open + decode"]
    return lower(least, end_to_end(row, "uncompressed", answer))


def decoded_share(row: dict) -> float:
    """Pictures decoded for the look and the chosen events, of those for all sampled frames."""
    said = row["bounds"]
    return (said["key_frames"] + said["decoded_of_chosen"]) / said["decoded"]


def cells(*values) -> str:
    return "| " + " | ".join(v if isinstance(v, str) else f"{v:,.4g}" for v in values) + " |"


def stage_table(row: dict, peer: dict | None, answer: int) -> list[str]:
    """Every stage of every way; its share of the uncompressed run, and what it could give at most."""
    ways = {way: stages_of(row, way, answer) for way in row["stages"]}
    total = sum(ways["uncompressed"].values())
    cold = [way for way in ways if way != "uncompressed"]
    lines = [cells("ms", "uncompressed", "share", "at most, x", *(x for way in cold for x in (title(way), "alone, x")),
                   "transformers"), "|---|" + "--:|" * (4 + 2 * len(cold))]  # fmt: skip
    theirs = dict(peer or {})
    if peer:
        theirs |= {stage: ways["uncompressed"][stage] for stage in HOST} | {"prefill": peer["first"] - peer["vision"]}
    for stage in (stage for stage in STAGES if any(stage in times for times in ways.values())):
        full, shown = ways["uncompressed"].get(stage, 0.0), []
        for way in cold:
            spent = ways[way].get(stage, 0.0)
            shown.append(per_token(row, way) if stage == "decode" else ways[way].get(stage, ""))
            shown.append(f"{total / (total - full + spent):.2f}" if (full or spent) and way != "warm" else "")
        other = theirs.get("per_token" if stage == "decode" else stage, "")
        free = f"{if_free(row, (stage,), answer):.2f}" if full else ""
        name, share = "decode, per token" if stage == "decode" else stage, f"{full / total:.1%}" if full else ""
        own = per_token(row, "uncompressed") if stage == "decode" else ways["uncompressed"].get(stage, "")
        lines.append(cells(name, own, share, free, *shown, other))
    return lines


def answer_table(row: dict, peer: dict | None, answers: list[int]) -> list[str]:
    """End to end by length of the answer; with each gain, the most that its stages could give."""
    cold = [way for way in row["stages"] if way not in ("uncompressed", "warm")]
    every = tuple(stage for stage in row["stages"]["uncompressed"] if stage != "decode")
    head = [x for way in cold for x in (f"{title(way)}, ms", "lower by", "at most", f">= {COLD_LOWER:g} %")]
    head += ["MARC warm, ms", "x", "at most, x", f">= {WARM_TIMES:g} x", "transformers, ms"]
    head += [f"x {way}" for way in row["stages"]]
    lines = [cells("answer, tokens", "uncompressed, ms", *head), "|" + "--:|" * (2 + len(head))]
    for answer in answers:
        times = {way: end_to_end(row, way, answer) for way in row["stages"]}
        full, warm, shown = times["uncompressed"], times["warm"], []
        for way in cold:
            gain = lower(times[way], full)
            most = most_lower(row, way, answer)
            shown += [times[way], f"{gain:.1f} %", f"{most:.1f} %", "yes" if gain >= COLD_LOWER else "NO"]
        shown += [warm, full / warm, if_free(row, every, answer), "yes" if full / warm >= WARM_TIMES else "NO"]
        other = peer_total(row, peer, answer) if peer else None
        beside = [other, *(other / spent for spent in times.values())] if other else [""] * (1 + len(times))
        lines.append(cells(str(answer), full, *shown, *beside))
    return lines


def paper_table(row: dict, answers: list[int]) -> list[str]:
    """MARC's own metrics, computed its way, beside its figures; reductions in per cent."""
    peak = {way: row["peak_bytes"][way] for way in row["stages"]}
    ways = [way for way in row["stages"] if way != "uncompressed"]
    lines = [cells("lower by, %", "paper", *(f"{way}, {n} tokens" for way in ways for n in answers)),
             "|---|" + "--:|" * (1 + len(ways) * len(answers))]  # fmt: skip
    measures = {
        "peak GPU memory": lambda way, _: peak[way],
        "LLM generation": lambda way, n: generation(row, way, n),
        "end to end": lambda way, n: end_to_end(row, way, n),
    }
    for name, of in measures.items():
        ours = [f"{lower(of(w, n), of('uncompressed', n)):.1f}" for w in ways for n in answers]
        lines.append(cells(name, f"{PAPER[name]:g}", *ours))
    return lines


def memory_table(row: dict, peer: dict | None) -> list[str]:
    ways, mib, gib = list(row["stages"]), 2**20, 2**30
    lines = [cells("bytes", *map(title, ways), "transformers"), "|---|" + "--:|" * (1 + len(ways))]
    state, full = row["state_bytes"], sum(row["state_bytes"]["uncompressed"].values())
    lines.append(cells("keys and values of a stream, MiB", *(state[way]["kv"] / mib for way in ways), ""))
    lines.append(cells("visual tokens of a stream, MiB", *(state[way]["visual"] / mib for way in ways), ""))
    gains = [f"{lower(sum(state[way].values()), full):.1f} %" for way in ways[1:]]
    lines.append(cells("both: lower by", "", *gains, ""))
    theirs = peer["peak_bytes"] / gib if peer and peer.get("peak_bytes") else ""
    lines.append(cells("peak on the device, GiB", *(row["peak_bytes"][way] / gib for way in ways), theirs))
    stored = f"memory of the video, MiB ({row['disk_ms']:.1f} ms from disk)"
    lines.append(cells(stored, *[""] * (len(ways) - 1), row["stored"] / mib, ""))
    return lines


def reading(row: dict) -> list[str]:
    """What bounds the reading of the file."""
    said = row["bounds"]
    said_of = [
        f"Of the file's {said['pictures']:,} pictures ({said['codec']}, a key frame every {said['gap']:.1f} s, at most"
        f" {said['longest_gap']:.1f} s) {said['decoded']:,} have to be decoded for all sampled frames"
    ]
    if "key frames" not in row["stages"]:
        return ["".join(said_of) + "; key frames are too sparse for a first look."]
    spent = [
        sum(row["stages"][way].get(stage, 0.0) for stage in ("look", *HOST)) for way in ("uncompressed", "key frames")
    ]
    said_of += [
        f", {said['key_frames']} for the look and {said['decoded_of_chosen']:,} for the chosen events:"
        f" {decoded_share(row):.0%}.",
        f" Reading (look, open + decode, patchify) takes {spent[0]:,.4g} and {spent[1]:,.4g} ms,",
        f" opening {said['open_ms']:.3g} ms.",
    ]
    return ["".join(said_of)]


def section(key: str, row: dict, peer: dict | None, answers: list[int]) -> str:
    """One row as Markdown."""
    tokens, grid = row["visual_tokens"], "x".join(map(str, row["grid"]))
    share, shown = tokens["cold"] / tokens["uncompressed"], answers[len(answers) // 2]
    lines = [
        f"### {key}: {row['cap']} tokens per frame pair, batch {row['batch']}", "",
        f"{row['patches']} temporal patches of {grid}, {row['events']['one']} events (by key frames"
        f" {row['events'].get('keys', 0)}); {tokens['uncompressed']:,} visual tokens, MARC {tokens['cold']:,}"
        f" ({share:.1%}), {row['encoded']['one']} patches through the vision tower when cold."
        f" Medians of {row['repeats']} passes, {row['new']} tokens decoded in each; the batch as a whole."
        f" Cold and warm say {'the same' if row['same_answer'] else 'different things'}.", "",
        *reading(row), "",
        f"Shares with an answer of {shown} tokens:", "",
        *stage_table(row, peer, shown), "", *answer_table(row, peer, answers), "",
        *paper_table(row, answers), "", *memory_table(row, peer), "",
    ]  # fmt: skip
    return "\n".join(lines)
