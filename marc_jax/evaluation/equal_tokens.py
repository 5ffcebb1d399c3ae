"""An adaptive budget against fixed ones at the same mean number of visual tokens.

Fixed budgets hit an adaptive one's mean only by chance, so its rival is the coin that reads each question at the next
fixed budget below the mean or the next above it, in the mixture that has the same mean: a question's expected score is
that mixture of its two scores, and differences stay paired. Pure Python.
"""

from collections.abc import Mapping, Sequence

from marc_jax.evaluation import benchmarks, scoring


def rival(adaptive: Sequence[Mapping], fixed: Mapping[str, Sequence[Mapping]]) -> tuple[list[dict], dict] | None:
    """The mixture of fixed budgets at the adaptive arm's mean tokens.

    Args:
      adaptive: judged rows of the arm; fixed: {arm: judged rows} of fixed budgets. Only questions that all were asked
        count.
    Returns:
      (rows, {arm: its weight}), or None where all fixed budgets lie on one side of the mean, or no question is shared.
    """
    kept = {arm: {row["problem_id"]: row for row in scoring.asked(rows)} for arm, rows in fixed.items()}
    own = [row for row in scoring.asked(adaptive) if all(row["problem_id"] in rows for rows in kept.values())]
    if not own:
        return None
    ids = [row["problem_id"] for row in own]
    mean = {arm: sum(rows[i]["visual_tokens"] for i in ids) / len(ids) for arm, rows in kept.items()}
    target = sum(row["visual_tokens"] for row in own) / len(own)
    below = max((arm for arm in mean if mean[arm] <= target), key=mean.get, default=None)
    above = min((arm for arm in mean if mean[arm] >= target), key=mean.get, default=None)
    if below is None or above is None:
        return None
    part = 0.0 if mean[above] == mean[below] else (target - mean[below]) / (mean[above] - mean[below])
    rows = []
    for i in ids:
        a, b = kept[below][i], kept[above][i]
        if a["score"] is not None and b["score"] is not None:
            rows.append({**a, "score": (1 - part) * a["score"] + part * b["score"]})
    return rows, {below: 1 - part} | ({above: part} if part else {})


def tables(
    benchmark: str, rows: Mapping[str, Sequence[Mapping]], arms: Mapping, views: Mapping, rule: str, seed: int = 0
) -> list[dict]:
    """The table of the report; none without an adaptive arm that fixed ones surround.

    Args:
      rows: {arm: judged rows}. arms, views: of the config; an arm is adaptive by its view, its fixed rivals are those
        of the same stage that select and merge alike.
    """
    found = []
    for key, fixed in rivals(arms, views).items():
        alike = {other: rows[other] for other in fixed if other in rows}
        mixed = rival(rows[key], alike) if alike and key in rows else None
        compared = mixed and benchmarks.compare(benchmark, rows[key], mixed[0], rule, seed=seed)
        if compared:
            low, high = compared["ci95"]
            coin = " + ".join(f"{100 * part:.0f} % {arms[arm].label or arm}" for arm, part in mixed[1].items())
            tokens = scoring.arm_table(rows[key], apart=())["visual_tokens"]
            difference = f"{compared['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
            found.append([arms[key].label or key, f"{tokens:.1f}", coin, difference, f"{compared['p']:.4f}"])
    head = ["adaptive", "mean visual tokens", "fixed budgets with that mean", "difference, points (95 %)", "p"]
    return [{"title": "At equal mean tokens", "head": head, "rows": found}] if found else []


def rivals(arms: Mapping, views: Mapping) -> dict[str, list[str]]:
    """{adaptive arm: arms of the same stage with fixed budgets that select and merge alike}; of the config."""

    def adaptive(view) -> bool:
        return bool(view.adaptive or view.rule)

    def kind(view) -> tuple:
        return view.select, view.method, view.represent, view.weighted, view.share is None

    looks = {key: views[arm.view] for key, arm in arms.items()}
    return {
        key: [
            other for other, fixed in looks.items()
            if arms[other].stage == arms[key].stage and kind(fixed) == kind(view) and not adaptive(fixed)
        ]
        for key, view in looks.items() if adaptive(view)
    }  # fmt: skip
