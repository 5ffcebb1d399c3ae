"""results.json -> report.md, report.html and plots. `python -m marc_jax.evaluation.report RESULTS.json [--out FOLDER]`

The schema of results.json (percent everywhere, None or absent where unknown; only `title` and `arms` must be there):

    title, config, hardware, date, seed, command, commit    how the run was made; `command` reproduces it
    split, decoding   str; which questions, disjoint from what; how answers were decoded ("greedy, at most 14 tokens")
    headline      str; optional, replaces the sentence made from the numbers
    apart         question types that the headline numbers leave out, ["order"]
    arms          [{"key", "label", "group": "teacher" | "baseline" | "student", "main": true for the arm of the
                  headline (default: the best student among those with the fewest tokens), "note": str,
                  and everything of `scoring.arm_table`: "n", "unreadable", "accuracy", "ci95": [low, high],
                  "headline": {"n", "accuracy", "ci95", "leaves_out"}, "per_type": {type: {"n", "accuracy", "ci95"}},
                  "format_rate", "truncation_rate", "visual_tokens", "completion_tokens", "tokens_kept_pct",
                  "retention_pct", "retention_ci95", "headline_retention_pct", "headline_retention_ci95"}]
    chance        `scoring.chance` of the questions
    comparisons   [{"a": key, "b": key, and everything of `scoring.compare`}]
    claims        [{"text", "target", "measured", "met": bool}]
    retriever     {"recall@1", "recall@2", "recall@3", "n", "per_type": {type: {"recall@1", ...}}}
    segmentation  {name: number or str}
    timings       {stage: seconds};  memory_gb  peak, in GB
    curves        {stage: path of its metrics.jsonl};  predictions  {arm: path of its JSONL}
    samples       [path, or {"path", "caption"}] of the pictures that `pictures.draw_sample` made
                  (paths are absolute or relative to the report's folder, and written back relative)
    intervals     str; how they were made, where not as usual
    tables        [{"title", "head": [str], "rows": [[str]]}] of anything else in cells
    notes         [str] of anything else a reader must know
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from marc_jax import files
from marc_jax.evaluation import html, plots, summary

GROUPS = ("teacher", "baseline", "student")


class ReportError(ValueError):
    """results.json cannot be reported; the message lists everything that is wrong with it."""


def validate(results: Mapping) -> None:
    """Raises ReportError naming every problem of results.json."""
    wrong = [f"{name!r} is missing" for name in ("title", "arms") if not results.get(name)]
    keys = []
    for i, arm in enumerate(results.get("arms") or []):
        name = f"arms[{i}]"
        wrong += [f"{name} has no {field!r}" for field in ("key", "label", "group") if not arm.get(field)]
        if arm.get("group") and arm["group"] not in GROUPS:
            wrong.append(f"{name} has group {arm['group']!r}, not one of {', '.join(GROUPS)}")
        for block in (arm, arm.get("headline") or {}, *(arm.get("per_type") or {}).values()):
            value, ci95 = block.get("accuracy"), block.get("ci95")
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 100):
                wrong.append(f"{name} has accuracy {value!r}, not a percentage")
            elif value is not None and ci95 is not None and not ci95[0] - 1e-6 <= value <= ci95[1] + 1e-6:
                wrong.append(f"{name} has accuracy {value} outside its interval {list(ci95)}")
        keys.append(arm.get("key"))
    wrong += [f"arm key {key!r} is there twice" for key in sorted({str(k) for k in keys if keys.count(k) > 1})]
    named = [comparison.get(side) for comparison in results.get("comparisons") or [] for side in "ab"]
    wrong += [f"a comparison names the unknown arm {key!r}" for key in named if key not in keys]
    if wrong:
        raise ReportError("results.json: " + "; ".join(wrong))


def write(out: str | os.PathLike, results: Mapping) -> dict[str, Path]:
    """Writes results.json, plots/*.png, report.md and report.html into `out`; the same input gives the same bytes.

    Returns:
      {"results", "markdown", "html"} -> path.
    Raises:
      ReportError: see `validate`. Nothing has been written then.
    """
    validate(results)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, missing = _relative(results, out)
    figures = _figures(results, out)
    files.write_whole(out / "results.json", json.dumps(_finite(results), indent=1, ensure_ascii=False) + "\n")
    files.write_whole(out / "report.md", markdown(results, figures, missing))
    files.write_whole(out / "report.html", html.page(results, figures, missing, out))
    return {"results": out / "results.json", "markdown": out / "report.md", "html": out / "report.html"}


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The lines of a JSONL file; a last line that a crash cut short is left out.

    Raises:
      ReportError: another line is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")  # texts hold U+2028
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ReportError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def _finite(value):
    """The same tree with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _relative(results: Mapping, out: Path) -> tuple[dict, list[str]]:
    """results with every path relative to `out`, and the paths at which there is no file."""
    missing = []

    def local(path: str) -> str | None:
        full = Path(path) if os.path.isabs(path) else out / path
        short = Path(os.path.relpath(full, out)).as_posix()
        if not full.is_file():
            missing.append(short)
            return None
        return short

    curves = {stage: local(path) for stage, path in (results.get("curves") or {}).items()}
    samples = [dict(s) if isinstance(s, Mapping) else {"path": s, "caption": ""} for s in results.get("samples") or []]
    samples = [{**sample, "path": local(sample["path"])} for sample in samples]
    predictions = {arm: local(path) for arm, path in (results.get("predictions") or {}).items()}
    return {
        **results,
        "curves": {stage: path for stage, path in curves.items() if path},
        "samples": [sample for sample in samples if sample["path"]],
        "predictions": {arm: path for arm, path in predictions.items() if path},
    }, missing


def _figures(results: Mapping, out: Path) -> dict[str, str]:
    """Draws every figure in light and dark: {name: path of the light one relative to out}."""
    drawn = {}
    curves = {stage: read_jsonl(out / path) for stage, path in results["curves"].items()}
    levels = (results.get("chance") or {}).get("headline") or (results.get("chance") or {}).get("accuracy") or {}
    for theme in (plots.LIGHT, plots.DARK):
        figures = {
            "accuracy": plots.accuracy_bars(results["arms"], levels.get("uniform"), theme),
            "types": plots.type_heat(results["arms"], results.get("chance"), results.get("apart") or (), theme),
            "tokens": plots.pareto(results["arms"], levels.get("uniform"), theme),
            "recall": plots.recall_bars(results.get("retriever") or {}, theme),
        }
        for stage, rows in curves.items():
            figures[f"curve_{_slug(stage)}"] = plots.stage_curves(rows, theme)
        for name, fig in figures.items():
            if fig is not None:
                plots.save(fig, out / "plots" / f"{name}{'_dark' if theme is plots.DARK else ''}.png")
                drawn[name] = f"plots/{name}.png"
    return drawn


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in str(text))


def markdown(results: Mapping, figures: Mapping[str, str], missing: list[str]) -> str:
    """report.md as text."""
    lines = [f"# {_md(results['title'])}", "", f"**{_md(summary.headline(results))}.**", ""]
    apart = ", ".join(results.get("apart") or [])
    lines += ["## Accuracy", ""]
    if apart:
        lines += [f"Headline numbers leave {_md(apart)} questions out; those are reported apart.", ""]
    lines += _table(["arm", *summary.ARM_COLUMNS], [[arm["label"], *summary.arm_cells(arm)] for arm in results["arms"]])
    types, rows = summary.type_rows(results)
    if types:
        cells = [[label, *map(summary.number, values)] for label, values in rows]
        lines += ["", "## By question type", "", *_table(["arm", *types], cells)]
    for title, head, rows in summary.tables(results):
        lines += ["", f"## {_md(title)}", "", *_table(head, rows)]
    lines += ["", "## Plots", ""]
    lines += [f"![{_md(summary.figure_title(name))}]({path})\n" for name, path in figures.items()]
    if results["samples"]:
        lines += ["## What happened on single questions", ""]
        lines += [f"![{_md(s.get('caption') or 'sample')}]({_link(s['path'])})\n" for s in results["samples"]]
    lines += ["## How it was measured", "", *(f"- {_md(text)}" for text in summary.method(results))]
    lines += [*(f"- No file at {_md(path)}" for path in missing), ""]
    if results.get("command"):
        lines += ["## How to reproduce", "", "```", str(results["command"]).replace("```", ""), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: list[str], rows: list[list]) -> list[str]:
    lines = ["| " + " | ".join(map(_md, head)) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(_md, row)) + " |" for row in rows]


def _md(text) -> str:
    text = re.sub(r"[ \t\r\n]+", " ", str(text)).strip(" ")
    for mark, spelled in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`")):
        text = text.replace(mark, spelled)
    return text


def _link(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the report was written, 2 when results.json cannot be reported."""
    parser = argparse.ArgumentParser(prog="marc_jax.evaluation.report", description="results.json -> report")
    parser.add_argument("results", type=Path, help="results.json")
    parser.add_argument("--out", type=Path, help="folder to write into; the one of results.json by default")
    arguments = parser.parse_args(argv)
    try:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
        written = write(arguments.out or arguments.results.parent, results)
    except (OSError, ValueError) as error:
        print(f"{arguments.results}: {error}", file=sys.stderr)
        return 2
    print(f"{summary.headline(results)}\n{written['html']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
