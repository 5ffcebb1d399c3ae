"""From judged predictions to tables: accuracy with intervals, retention of the teacher, paired tests. Pure, numpy only.

A prediction is a plain dict, one per question and arm, as written to `predictions/<arm>.jsonl`:

    problem_id      int or str, unique within the arm
    question_type   str, the row of the per-type table ("colour", "order", ...)
    problem_type    str, Video-R1's type ("multiple choice", "numerical", "regression", ...); optional
    correct         bool; or `score`, a float in [0, 1] (OCR, free-form, regression), which wins when both are there
    solution        str, the true answer; used for chance levels only
    options         list of str; optional, for chance levels
    format_ok, truncated                 bool; optional
    visual_tokens, completion_tokens     numbers; optional
    video           str; optional, the unit that is resampled when `by_video=True`
    error           str; the question could not be asked (unreadable video): counted as unreadable, never scored

Answer extraction and accuracy per problem type live in `marc_jax.rl.answers`, one code for training and evaluation;
`judging` adds what Video-R1's evaluation does differently from its training.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from marc_jax.evaluation import intervals

Row = Mapping


def row_score(row: Row) -> float:
    """The score of one judged prediction in [0, 1].

    Raises:
      ValueError: neither `score` nor `correct` there, or a score outside [0, 1] (NaN included).
    """
    value = row["score"] if row.get("score") is not None else row.get("correct")
    if value is None:
        raise ValueError(f"prediction {row.get('problem_id')!r} has neither 'score' nor 'correct'")
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"prediction {row.get('problem_id')!r} has score {value}, outside [0, 1]")
    return value


def asked(rows: Iterable[Row]) -> list[Row]:
    """Rows whose question could be asked, in the order given. Raises ValueError on a problem_id met twice."""
    kept = [row for row in rows if not row.get("error")]
    twice = [key for key, count in Counter(row["problem_id"] for row in kept).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} problem_id met more than once in one arm, the first {twice[0]!r}")
    return kept


def summarise(rows: Sequence[Row], *, by_video: bool = False, seed: int = 0) -> dict:
    """n, accuracy and 95 % interval of some asked rows, in percent.

    Returns:
      {"n", "accuracy", "ci95": [low, high]}; accuracy and ci95 are None when there are no rows.
    """
    if not rows:
        return {"n": 0, "accuracy": None, "ci95": None}
    scores = np.asarray([row_score(row) for row in rows])
    if by_video or not set(np.unique(scores)) <= {0.0, 1.0}:
        clusters = np.asarray([str(row.get("video", row["problem_id"])) for row in rows]) if by_video else None
        low, high = intervals.bootstrap_ratio(scores, clusters=clusters, seed=seed)
    else:
        low, high = intervals.wilson(int(scores.sum()), len(scores))
    return {"n": len(rows), "accuracy": 100 * float(scores.mean()), "ci95": [100 * low, 100 * high]}


def by_type(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every question_type, types in alphabetical order."""
    types = sorted({str(row["question_type"]) for row in rows})
    return {name: [row for row in rows if str(row["question_type"]) == name] for name in types}


def arm_table(
    rows: Sequence[Row],
    *,
    teacher: Sequence[Row] | None = None,
    apart: Sequence[str] = ("order",),
    by_video: bool = False,
    seed: int = 0,
) -> dict:
    """Every number of one arm of the report (all rates in percent).

    Args:
      rows: the arm's predictions.
      teacher: the predictions that retention and tokens kept are measured against; None leaves those out.
      apart: question types that the headline leaves out, because the arm's budget cannot answer them by construction.
      by_video: resample videos rather than questions (several questions about one video are not independent).
      seed: of every bootstrap.
    Returns:
      {"n", "unreadable", "accuracy", "ci95", "headline": {"n", "accuracy", "ci95", "leaves_out"}, "per_type": {type:
      {"n", "accuracy", "ci95"}}, "format_rate", "truncation_rate", "visual_tokens", "completion_tokens",
      "tokens_kept_pct", "retention_pct", "retention_ci95", "headline_retention_pct", "headline_retention_ci95"};
      a number whose field is missing from the rows is None.
    """
    kept = asked(rows)
    options = {"by_video": by_video, "seed": seed}
    headline = [row for row in kept if row["question_type"] not in apart]
    present = sorted({str(row["question_type"]) for row in kept} & set(apart))
    table = {
        **summarise(kept, **options),
        "unreadable": len(rows) - len(kept),
        "headline": {**summarise(headline, **options), "leaves_out": present},
        "per_type": {name: summarise(group, **options) for name, group in by_type(kept).items()},
        "format_rate": _mean(kept, "format_ok", 100),
        "truncation_rate": _mean(kept, "truncated", 100),
        "visual_tokens": _mean(kept, "visual_tokens"),
        "completion_tokens": _mean(kept, "completion_tokens"),
        "tokens_kept_pct": None,
    }
    for prefix, chosen in (("", kept), ("headline_", headline)):
        point, ci95 = retention(chosen, teacher, **options) if teacher is not None else (None, None)
        table[f"{prefix}retention_pct"], table[f"{prefix}retention_ci95"] = point, ci95
    if teacher is not None and table["visual_tokens"] is not None:
        full = _mean(asked(teacher), "visual_tokens")
        table["tokens_kept_pct"] = 100 * table["visual_tokens"] / full if full else None
    return table


def tables(
    predictions: Mapping[str, Sequence[Row]], *, teacher: str | None = "teacher", **options
) -> dict[str, dict]:
    """`arm_table` of every arm, in the order given; `teacher` names the arm that the others are measured against."""
    reference = predictions.get(teacher) if teacher is not None else None
    return {key: arm_table(rows, teacher=reference, **options) for key, rows in predictions.items()}


def _mean(rows: Sequence[Row], field: str, scale: float = 1.0) -> float | None:
    values = [float(row[field]) for row in rows if row.get(field) is not None]
    return scale * float(np.mean(values)) if values else None


def paired(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores of two arms on the questions both were asked, a's order: (a [n], b [n], video labels [n])."""
    found_b = {row["problem_id"]: row for row in asked(rows_b)}
    both = [(row, found_b[row["problem_id"]]) for row in asked(rows_a) if row["problem_id"] in found_b]
    a = np.asarray([row_score(x) for x, _ in both], np.float64)
    b = np.asarray([row_score(y) for _, y in both], np.float64)
    return a, b, [str(x.get("video", x["problem_id"])) for x, _ in both]


def retention(
    student: Sequence[Row], teacher: Sequence[Row], *, by_video: bool = False, seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """100 * accuracy(student) / accuracy(teacher) on the questions both were asked, and its 95 % interval.

    The interval resamples questions together for both arms, so the luck of the draw cancels. (None, None) when the
    teacher has nothing right, or no question is shared.
    """
    a, b, videos = paired(student, teacher)
    if not len(a) or b.sum() == 0:
        return None, None
    low, high = intervals.bootstrap_ratio(a, b, clusters=np.asarray(videos) if by_video else None, seed=seed)
    return 100 * float(a.sum() / b.sum()), [100 * low, 100 * high]


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, apart: Sequence[str] = (), by_video: bool = False, seed: int = 0
) -> dict:
    """Is arm a better than arm b? Paired, on the questions both were asked, without the types named in `apart`.

    Returns:
      {"n", "leaves_out" (the types of `apart` that occur), "difference" and "ci95" in points (a - b), "only_a" and
      "only_b" (questions that one arm alone got fully right), "p", "test"}; the test is exact McNemar for 0/1 scores of
      independent questions, else a paired bootstrap.
    Raises:
      ValueError: the arms share no question.
    """
    a, b, videos = paired([row for row in rows_a if row.get("question_type") not in apart], rows_b)
    if not len(a):
        raise ValueError("the two arms share no question, so they cannot be compared")
    clusters = np.asarray(videos) if by_video else None
    low, high = intervals.bootstrap_ratio(a - b, clusters=clusters, seed=seed)
    only_a, only_b = int(np.sum((a == 1) & (b < 1))), int(np.sum((b == 1) & (a < 1)))
    exact = not by_video and set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}
    return {
        "n": len(a),
        "leaves_out": sorted({str(row.get("question_type")) for row in rows_a} & set(apart)),
        "difference": 100 * float(np.mean(a - b)),
        "ci95": [100 * low, 100 * high],
        "only_a": only_a,
        "only_b": only_b,
        "p": intervals.mcnemar_exact(only_a, only_b)
        if exact
        else intervals.paired_bootstrap(a, b, clusters=clusters, seed=seed),
        "test": "exact McNemar" if exact else "paired bootstrap",
    }


def chance(rows: Sequence[Row], *, apart: Sequence[str] = ("order",)) -> dict:
    """What answering without looking would score, in percent, from the questions themselves.

    uniform: a blind draw among the options (among the distinct solutions of the type, where rows have no options).
    majority: always the most frequent solution of the type; an upper line, since it peeks at the held-out answers.

    Returns:
      {"per_type": {type: {"uniform", "majority"}}, "accuracy": {...} over all, "headline": {...} without `apart`},
      the last two weighted by the number of questions.
    """
    groups = by_type(asked(rows))
    levels = {}
    for name, group in groups.items():
        solutions = Counter(str(row["solution"]) for row in group)
        draws = [1 / len(row["options"]) if row.get("options") else 1 / len(solutions) for row in group]
        levels[name] = {
            "uniform": 100 * float(np.mean(draws)),
            "majority": 100 * max(solutions.values()) / len(group),
        }

    def over(names: list[str]) -> dict | None:
        total = sum(len(groups[name]) for name in names)
        if not total:
            return None
        kinds = ("uniform", "majority")
        return {kind: sum(levels[name][kind] * len(groups[name]) for name in names) / total for kind in kinds}

    return {
        "per_type": levels,
        "accuracy": over(list(groups)),
        "headline": over([name for name in groups if name not in apart]),
    }


def benchmark_score(rows: Sequence[Row]) -> dict:
    """Video-R1's score of a benchmark: mean of exact types, mean of regression (MRA), and their mean when both occur.

    Source: Video-R1's eval script; VSI-Bench is (mean_acc + mean_mra) / 2, not the benchmark's own macro average.
    """
    kept = asked(rows)
    soft = [row for row in kept if row.get("problem_type") == "regression"]
    hard = [row for row in kept if row.get("problem_type") != "regression"]
    mean_acc, mean_mra = summarise(hard)["accuracy"], summarise(soft)["accuracy"]
    known = [value for value in (mean_acc, mean_mra) if value is not None]
    return {"mean_acc": mean_acc, "mean_mra": mean_mra, "score": sum(known) / len(known) if known else None}
