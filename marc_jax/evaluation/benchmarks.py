"""The video benchmarks: what each is called, how its answers make one number, the paper's numbers beside ours.

    rows = judged("vsibench", records, predictions, "published")     # one per question, as `scoring` knows them
    table("vsibench", rows, "published")["accuracy"], ["ci95"], ["per_type"], ["per_duration"], ["extraction_rate"]

Three rules score every prediction, whichever way it was made:

    videor1     Video-R1's src/eval_bench.py: the first answer block, or the whole text; VSI-Bench is the mean of the
                mean accuracy and the mean MRA, everything else the mean over questions
    strict      one answer block or no answer, letters in any spelling (`judging.strict`); VSI-Bench: macro average
    published   the benchmark's own code on the body of the one answer block, or on the whole text (`official`); what it
                leaves to a judge model or out of its mean has no score here and is counted

A prediction is a dict with `problem_id` and `completion`; also `truncated`, `visual_tokens`, `completion_tokens`,
`seconds`, and `error` in place of a completion. Questions without a prediction are left out, and n says so.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from marc_jax.evaluation import intervals, judging, official, scoring
from marc_jax.rl import answers

RULES = ("videor1", "strict", "published")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """`questions` in the published set; `paper`: its column of MARC's table, in the order of PAPER."""

    title: str
    questions: int
    paper: tuple[float, ...] = ()


BENCHMARKS = {
    "vsibench": Benchmark("VSI-Bench", 5130, (32.93, 27.63, 28.96, 26.83, 21.33, 25.14, 25.50, 27.55)),
    "videommmu": Benchmark("VideoMMMU", 900, (35.33, 30.78, 33.33, 26.78, 22.33, 25.78, 23.89, 33.11)),
    "mmvu": Benchmark("MMVU", 1000, (48.64, 45.28, 47.51, 41.76, 28.63, 39.35, 31.08, 51.99)),
    "mvbench": Benchmark("MVBench", 4000, (44.77, 43.89, 44.71, 36.82, 22.56, 37.10, 29.88, 45.82)),
    "tempcompass": Benchmark("TempCompass", 7540, (38.05, 37.95, 58.34, 55.04, 35.55, 38.79, 35.23, 55.34)),
    "videomme": Benchmark("Video-MME", 2700, (53.55, 44.37, 39.15, 46.00, 22.70, 26.41, 21.48, 39.44)),
    "nextqa": Benchmark("NExT-QA", 4996),
    "qvhighlights": Benchmark("QVHighlights", 1550),
}
# The models of the paper's table (arXiv 2510.07915) and their visual tokens, where it states them.
PAPER = (
    ("Qwen2.5-VL-3B, 64 frames", 2589.93), ("Qwen2.5-VL-3B, 16 frames", None), ("InternVL3.5-4B, 64 frames", None),
    ("Gemma-3-4B, 64 frames", None), ("ByteVideoLLM-3B, 64 frames", None), ("MovieChat-3B, 1 frame", None),
    ("VidCom2-3B, 64 frames", None), ("MARC-3B, 1 frame", 122.69),
)  # fmt: skip
_DIRECTIONS = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
_DURATIONS = ((60, "under 1 min"), (300, "1 to 5 min"), (1800, "5 to 30 min"), (float("inf"), "over 30 min"))


def judged(benchmark: str, records: Iterable, predictions: Iterable[Mapping], rule: str) -> list[dict]:
    """One row per question that has a prediction, in the order of the records.

    A row has the fields that `scoring` names, `score` None where the rule has none; `duration`; `extracted`, whether
    an answer was found; `answer`, what it was.

    Args:
      records: `sources.Record`s of `data_pipelines.benchmarks.read`.
      predictions: see above; of two for one question the later counts.
    Raises:
      ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    found = {row["problem_id"]: row for row in predictions}
    return [_row(benchmark, r, found[r.problem_id], rule) for r in records if r.problem_id in found]


def _row(benchmark: str, record, said: Mapping, rule: str) -> dict:
    row = {
        **said, "problem_id": record.problem_id, "question_type": record.extra["question_type"], "video": record.path,
        "problem_type": record.problem_type, "solution": record.solution, "options": list(record.options),
        "duration": record.extra.get("duration") or _length(said.get("video_seconds")),
    }  # fmt: skip
    if said.get("error"):
        return row
    text = said["completion"]
    if rule == "videor1":
        score = judging.judge(text, record.solution, record.problem_type, rule="benchmark")["score"]
        answer = answers.extract_answer(text) or None
    elif rule == "strict":
        score, answer = judging.strict(text, record.solution, record.problem_type, record.options)
        if benchmark == "tempcompass" and record.extra.get("task") == "captioning":
            score = None  # a caption is judged by a model
    else:
        score, answer = official.rule(benchmark)(as_published(benchmark, record, text), record.extra["published"])
    return row | {
        "score": score, "extracted": answer is not None, "answer": answer, "format_ok": answers.has_format(text),
    }  # fmt: skip


def _length(seconds: float | None) -> str:
    return "" if seconds is None else next(name for limit, name in _DURATIONS if seconds < limit)


def as_published(benchmark: str, record, completion: str) -> str:
    """The text that a benchmark's own code is given: the body of the one answer block, else the whole completion.

    Where the question was put with letters that the benchmark does not use (TempCompass: yes or no, captions), the
    letter is spelled as the benchmark does.
    """
    text = judging.answer_block(completion) or completion
    task = record.extra.get("task")
    if benchmark == "tempcompass" and task in ("yes_no", "caption_matching"):
        letter = judging.option_letter(text, record.options)
        if letter is None:
            return text
        if task == "yes_no":
            return "yes" if "yes" in record.options[ord(letter) - ord("A")].lower() else "no"
        return record.extra["published"]["question"].split("\n")[1:][ord(letter) - ord("A")]
    return text


def _weights(benchmark: str, rows: Sequence[Mapping], rule: str) -> tuple[list[str], dict[str, float]]:
    """(group of every row, weight of every group) of the mean that is the benchmark's number."""
    if benchmark == "vsibench" and rule == "videor1":
        groups = ["MRA" if row["problem_type"] == "regression" else "accuracy" for row in rows]
        return groups, {"MRA": 1.0, "accuracy": 1.0}
    if benchmark == "vsibench":
        groups = [str(row["question_type"]) for row in rows]
        return groups, {name: 1 / 3 if name in _DIRECTIONS else 1.0 for name in groups}
    return ["all"] * len(rows), {"all": 1.0}


def table(
    benchmark: str, rows: Sequence[Mapping], rule: str, *, teacher: Sequence[Mapping] | None = None, seed: int = 0
) -> dict:
    """Every number of one set of predictions: an arm of the report.

    Args:
      rows: of `judged` with the same rule.
      teacher: rows of the arm that retention is measured against.
    Returns:
      `scoring.arm_table`, with `accuracy` and `ci95` of the benchmark's own mean (bootstrap over videos, in percent),
      "per_duration" like "per_type", "extraction_rate", "unscored" rows.
    """
    scored = _scored(rows)
    out = scoring.arm_table(scored, teacher=None if teacher is None else _scored(teacher), apart=(), by_video=True,
                            seed=seed)  # fmt: skip
    kept = scoring.asked(scored)
    if kept:
        value = _mean(benchmark, kept, [scoring.row_score(row) for row in kept], rule, seed)
        out["accuracy"], out["ci95"] = 100 * value.value, [100 * bound for bound in value.ci95]
        out["headline"] = {"n": len(kept), "accuracy": out["accuracy"], "ci95": out["ci95"], "leaves_out": []}
    if kept and teacher is not None and len(_weights(benchmark, kept, rule)[1]) > 1:
        out |= _macro_retention(benchmark, kept, scoring.asked(_scored(teacher)), rule)
    lengths = {row["duration"]: row for row in kept if row["duration"]}
    groups = {name: [row for row in kept if row["duration"] == name] for name in lengths}
    out["per_duration"] = {name: scoring.summarise(group, by_video=True, seed=seed) for name, group in groups.items()}
    asked = [row for row in rows if not row.get("error")]
    out["extraction_rate"] = 100 * float(np.mean([row["extracted"] for row in asked])) if asked else None
    out["unscored"] = len(rows) - len(scored)
    return out


def _scored(rows: Sequence[Mapping]) -> list[Mapping]:
    return [row for row in rows if row.get("error") or row["score"] is not None]


def _mean(benchmark: str, rows: Sequence[Mapping], values, rule: str, seed: int) -> intervals.Macro:
    groups, weights = _weights(benchmark, rows, rule)
    videos = np.asarray([str(row["video"]) for row in rows])
    return intervals.macro(np.asarray(values), np.asarray(groups), weights, clusters=videos, seed=seed)


def _macro_retention(benchmark: str, rows, teacher, rule: str) -> dict:
    """Of numbers that are no plain mean: their ratio on the shared questions, without an interval."""
    both = {row["problem_id"] for row in rows} & {row["problem_id"] for row in teacher}
    means = []
    for arm in (rows, teacher):
        shared = [row for row in arm if row["problem_id"] in both]
        means.append(_mean(benchmark, shared, [scoring.row_score(row) for row in shared], rule, 0).value if both else 0)
    kept = 100 * means[0] / means[1] if means[1] else None
    return dict.fromkeys(("retention_pct", "headline_retention_pct"), kept) | dict.fromkeys(
        ("retention_ci95", "headline_retention_ci95")
    )


def compare(
    benchmark: str, rows_a: Sequence[Mapping], rows_b: Sequence[Mapping], rule: str, *, seed: int = 0
) -> dict | None:
    """Is a better than b, on the questions both were asked? As `scoring.compare`, of the benchmark's own mean.

    None where they share no question that the rule scores.

    A paired bootstrap over videos; exact McNemar where scores are 0 or 1, one question per video and a plain mean.
    """
    kept = {row["problem_id"]: row for row in scoring.asked(_scored(rows_a))}
    kept_b = {row["problem_id"]: row for row in scoring.asked(_scored(rows_b))}
    both = [key for key in kept if key in kept_b]
    if not both:
        return None
    out = scoring.compare([kept[key] for key in both], [kept_b[key] for key in both], by_video=True, seed=seed)
    rows = [kept[key] for key in both]
    scores = np.array([[scoring.row_score(arm[key]) for arm in (kept, kept_b)] for key in both])
    if len({row["video"] for row in rows}) == len(rows) and len(_weights(benchmark, rows, rule)[1]) == 1:
        if set(np.unique(scores)) <= {0.0, 1.0}:
            return out | {"p": intervals.mcnemar_exact(out["only_a"], out["only_b"]), "test": "exact McNemar"}
    value = _mean(benchmark, rows, scores[:, 0] - scores[:, 1], rule, seed)
    return out | {"difference": 100 * value.value, "ci95": [100 * bound for bound in value.ci95], "p": value.p}


def paper_arms(benchmark: str) -> list[dict]:
    """The paper's numbers as arms of a report; retention and tokens kept are of its 64 frames."""
    column, full = BENCHMARKS[benchmark].paper, PAPER[0][1]
    return [
        {"key": f"paper {label}", "label": f"{label} (paper)", "group": "baseline", "accuracy": value, "ci95": None,
         "visual_tokens": tokens, "tokens_kept_pct": None if tokens is None else 100 * tokens / full,
         "retention_pct": 100 * value / column[0], "note": "MARC's paper, table 1", "cited": True}
        for (label, tokens), value in zip(PAPER, column, strict=False)
    ]  # fmt: skip
