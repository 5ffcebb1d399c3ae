"""What the report says, in words and cells: shared by report.md and report.html, so both say the same."""

import math
from collections.abc import Mapping

from marc_jax.evaluation import plots

ARM_COLUMNS = ("visual tokens", "tokens kept, %", "accuracy, % (95 %)", "retention, % (95 %)", "all types, %",
               "format, %", "cut off, %", "n")  # fmt: skip
_TITLES = {
    "accuracy": "Accuracy of every arm",
    "types": "Accuracy by question type",
    "tokens": "Accuracy against visual tokens",
    "recall": "Events found by the retriever",
}


def figure_title(name: str) -> str:
    """The heading of a plot."""
    return _TITLES.get(name, "Training: " + name.removeprefix("curve_").replace("_", " "))


def number(value, digits: int = 1) -> str:
    """A number for people; a dash when there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def count(value) -> str:
    """A mean of counts: whole when it is whole."""
    return number(value, 0 if isinstance(value, float) and value == round(value) else 1)


def interval(value, ci95) -> str:
    """ "82.1 (80.3 – 83.9)", or a dash."""
    return number(value) if value is None or not ci95 else f"{number(value)} ({ci95[0]:.1f} – {ci95[1]:.1f})"


def seconds(value: float) -> str:
    """ "48 s", or "5 min 01 s" from two minutes on."""
    return f"{value:.0f} s" if value < 120 else f"{int(value // 60)} min {int(value % 60):02d} s"


def main_arm(results: Mapping) -> Mapping | None:
    """The student that the headline is about."""
    students = [a for a in results["arms"] if a["group"] == "student" and plots.headline(a).get("accuracy") is not None]
    marked = [arm for arm in students if arm.get("main")]
    if marked or not students:
        return marked[0] if marked else None
    fewest = min(arm.get("visual_tokens") or math.inf for arm in students)
    frugal = [arm for arm in students if (arm.get("visual_tokens") or math.inf) == fewest]
    return max(frugal, key=lambda arm: plots.headline(arm)["accuracy"])


def headline(results: Mapping) -> str:
    """One sentence: what the student reads and what it keeps."""
    if results.get("headline"):
        return results["headline"]
    teacher = next((arm for arm in results["arms"] if arm["group"] == "teacher"), None)
    student = main_arm(results)
    if student is None:
        return f"{len(results['arms'])} arms, no student"
    reads = student.get("visual_tokens")
    start = "The student" if reads is None else f"The student reads {reads:,.0f} visual tokens"
    if teacher is not None and reads is not None and teacher.get("visual_tokens"):
        start += f" where the teacher reads {teacher['visual_tokens']:,.0f}"
    kept = retention(student)
    if kept is None:
        return f"{start}, and answers {plots.headline(student)['accuracy']:.0f}\u00a0% of the questions"
    subject = "its" if teacher is not None and "teacher" in start else "the teacher's"
    return f"{start}, and keeps {kept:.0f}\u00a0% of {subject} accuracy"


def retention(arm: Mapping) -> float | None:
    """Retention of the headline questions, or of all when the arm has no headline block."""
    value = arm.get("headline_retention_pct")
    return arm.get("retention_pct") if value is None else value


def retention_ci95(arm: Mapping) -> list | None:
    """The interval of `retention`."""
    return arm.get("retention_ci95" if arm.get("headline_retention_pct") is None else "headline_retention_ci95")


def arm_cells(arm: Mapping) -> list[str]:
    """The cells of ARM_COLUMNS for one arm."""
    block = plots.headline(arm)
    teacher = arm["group"] == "teacher" and retention(arm) == 100
    return [
        count(arm.get("visual_tokens")),
        number(arm.get("tokens_kept_pct")),
        interval(block.get("accuracy"), block.get("ci95")),
        "100" if teacher else interval(retention(arm), retention_ci95(arm)),
        number(arm.get("accuracy")),
        number(arm.get("format_rate")),
        number(arm.get("truncation_rate")),
        number(arm.get("n")),
    ]


def type_rows(results: Mapping) -> tuple[list[str], list[tuple[str, list]]]:
    """(types, [(label, accuracy of every type)]), types that are reported apart last, chance as the last row."""
    apart = results.get("apart") or []
    names = {name for arm in results["arms"] for name in arm.get("per_type") or {}}
    types = sorted(names, key=lambda name: (name in apart, name))
    rows = []
    for arm in results["arms"]:
        cells = arm.get("per_type") or {}
        if not cells:
            continue
        rows.append((arm["label"], [cells.get(name, {}).get("accuracy") for name in types]))
    levels = (results.get("chance") or {}).get("per_type") or {}
    if levels:
        rows.append(("chance (blind guess)", [levels.get(name, {}).get("uniform") for name in types]))
    return types, rows


def tables(results: Mapping) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of the smaller tables: claims, paired comparisons, retriever, segmentation, any others."""
    found = []
    claims = results.get("claims") or []
    if claims:
        head = ["claim", "target", "measured", "met"]
        rows = [
            [c.get("text", ""), number(c.get("target")), number(c.get("measured")), "yes" if c.get("met") else "NO"]
            for c in claims
        ]
        found.append(("Claims", head, rows))
    names = {arm["key"]: arm["label"] for arm in results["arms"]}
    comparisons = results.get("comparisons") or []
    if comparisons:
        head = ["arm", "against", "questions", "difference, points (95 %)", "p", "only the first right",
                "only the second", "test"]  # fmt: skip
        rows = [
            [names[c["a"]], names[c["b"]], _asked(c), interval(c.get("difference"), c.get("ci95")), _p(c.get("p")),
             number(c.get("only_a")), number(c.get("only_b")), c.get("test", "")]
            for c in comparisons
        ]  # fmt: skip
        found.append(("Paired comparisons", head, rows))
    retriever = results.get("retriever") or {}
    ks = sorted((k for k in retriever if k.startswith("recall@")), key=lambda k: int(k.split("@")[1]))
    if ks:
        lines = {"all questions": retriever, **(retriever.get("per_type") or {})}
        rows = [[label, *(number(cells.get(k)) for k in ks)] for label, cells in lines.items()]
        found.append(("Retriever: all needed events found, %", ["questions", *ks], rows))
    if results.get("segmentation"):
        rows = [[name.replace("_", " "), number(value)] for name, value in results["segmentation"].items()]
        found.append(("Event boundaries", ["measure", "value"], rows))
    return found + [(t["title"], t["head"], t["rows"]) for t in results.get("tables") or []]


def _asked(comparison: Mapping) -> str:
    left = ", ".join(comparison.get("leaves_out") or [])
    return number(comparison.get("n")) + (f" (no {left})" if left else "")


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def method(results: Mapping) -> list[str]:
    """How it was measured, as sentences."""
    words = []
    asked = sorted({arm["n"] for arm in results["arms"] if arm.get("n")})
    if asked:
        many = f"{asked[0]:,}" if len(asked) == 1 else f"{asked[0]:,} to {asked[-1]:,}"
        words.append(f"{many} questions per arm." + (f" {results['split']}." if results.get("split") else ""))
    if results.get("decoding"):
        words.append(f"Answers: {results['decoding']}.")
    lost = {arm["label"]: arm["unreadable"] for arm in results["arms"] if arm.get("unreadable")}
    words += [f"{label}: {count:,} questions not asked (unreadable video)." for label, count in lost.items()]
    if results.get("apart"):
        types = ", ".join(results["apart"])
        words.append(f"Headline accuracy and retention leave {types} questions out; the tables by type show them.")
    usual = "Wilson's for right or wrong; a bootstrap for soft scores and ratios of arms"
    words.append(f"Intervals are 95 %: {results.get('intervals') or usual}.")
    words.append("Retention is accuracy divided by the teacher's, on the same questions, resampled together.")
    chance = (results.get("chance") or {}).get("headline")
    if chance:
        words.append(
            f"Chance: {chance['uniform']:.1f} % for a blind draw among the options, {chance['majority']:.1f} % for "
            "always giving the most frequent answer of the type."
        )
    setting = [("hardware", "hardware"), ("seed", "seed"), ("commit", "commit")]
    known = [f"{label} {results[key]}" for label, key in setting if results.get(key) is not None]
    if known:
        words.append("Run: " + ", ".join(known) + ".")
    if results.get("memory_gb") is not None:
        words.append(f"Peak memory: {number(results['memory_gb'])} GB.")
    timings = results.get("timings") or {}
    if timings:
        words.append(f"Time: {seconds(sum(timings.values()))} in all.")
    return words + [str(note) for note in results.get("notes") or []]
