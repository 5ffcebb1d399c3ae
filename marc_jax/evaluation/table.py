"""Several benchmarks in one table, beside the paper's: `python -m marc_jax.evaluation.table OUT/vsibench OUT/mmvu ...`

Each folder is the --out of `marc_jax.eval` on one benchmark. A row is an arm, met in at least one of them; a mean is
given only where all benchmarks of the table have a number. --rule chooses the scoring, --out=FILE.md keeps the table.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from marc_jax import files
from marc_jax.evaluation import benchmarks


def rows_of(results: Sequence[Mapping], rule: str) -> list[tuple[str, list[float | None], float | None]]:
    """(label, accuracy per benchmark, visual tokens) of every arm of ours, then of the paper's models."""
    found: dict[str, dict[str, tuple]] = {}
    for result in results:
        labels = {arm["key"]: arm["label"] for arm in result["arms"]}
        for key, table in result["scores"][rule].items():
            if not key.startswith("against "):
                cell = table["accuracy"], table["ci95"], table.get("visual_tokens")
                found.setdefault(labels[key], {})[result["benchmark"]] = cell
    names = [result["benchmark"] for result in results]
    rows = []
    for label, cells in found.items():
        tokens = [cell[2] for cell in cells.values() if cell[2] is not None]
        mean = sum(tokens) / len(tokens) if tokens else None
        rows.append((label, [cells.get(name, (None,))[0] for name in names], mean))
    paper = [benchmarks.BENCHMARKS[name].paper for name in names]
    for i, (label, tokens) in enumerate(benchmarks.PAPER):
        rows.append((f"{label} (paper)", [column[i] if column else None for column in paper], tokens))
    return rows


def markdown(results: Sequence[Mapping], rule: str) -> str:
    """The table. `n of N` under a benchmark's name where questions are missing."""
    head = []
    for result in results:
        known = benchmarks.BENCHMARKS[result["benchmark"]]
        n = max((table["n"] for table in result["scores"][rule].values()), default=0)
        head.append(known.title + ("" if n == known.questions else f" ({n} of {known.questions})"))
    lines = ["| | visual tokens | " + " | ".join(head) + " | mean |", "|---|" + "--:|" * (len(head) + 2)]
    for label, values, tokens in rows_of(results, rule):
        mean = None if None in values else sum(values) / len(values)
        cells = [_number(tokens, 1), *(_number(value, 2) for value in values), _number(mean, 2)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Accuracy in percent by the rule '{rule}'.", ""])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 where a folder holds no finished evaluation."""
    parser = argparse.ArgumentParser(prog="marc_jax.evaluation.table", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rule", choices=benchmarks.RULES, default="videor1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    results = {}
    for folder in args.folders:
        try:
            result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if result["benchmark"] in results or "scores" not in result:
                raise ValueError(f"{result['benchmark']} is there twice, or has no accuracies")
            results[result["benchmark"]] = result
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {folder}: no finished evaluation of one more benchmark ({error})", file=sys.stderr)
            return 2
    order = [results[name] for name in benchmarks.BENCHMARKS if name in results]
    text = markdown(order, args.rule)
    if args.out:
        files.write_whole(args.out, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
