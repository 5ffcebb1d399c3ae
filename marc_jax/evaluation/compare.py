"""Two finished evaluations of one benchmark, question by question: python -m marc_jax.evaluation.compare OUT_A OUT_B

Each folder is the --out of `marc_jax.eval`. Arms of one name are compared by the paired tests of the reports, on the
questions that both were asked; --arms=A,B names one arm of each folder instead. No model is loaded.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.benchmarks.read import read
from marc_jax.config import ConfigError
from marc_jax.evaluation import benchmarks, report


def finished(folder) -> tuple[dict, dict[str, list[dict]]]:
    """(results.json, {arm: its predictions}) of a finished evaluation. Raises ConfigError: there is none."""
    folder = Path(folder)
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found = {arm: report.read_jsonl(folder / path) for arm, path in results["predictions"].items()}
        if "benchmark" in results:
            return results, found
        raise KeyError("benchmark")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: no finished evaluation there ({error})") from None


def compared(a, b, rule: str = "", pairs: Sequence[tuple[str, str]] = ()) -> list[dict]:
    """[{"a", "b": arms, and everything of `benchmarks.compare`}] of two folders.

    Args:
      rule: of `benchmarks.RULES`; default the one that leads a's report.
      pairs: (arm of a, arm of b); default those of one name.
    Raises:
      ConfigError: no finished evaluations of one benchmark, an unknown arm, nothing in common.
    """
    (results, said_a), (other, said_b) = finished(a), finished(b)
    name, config = results["benchmark"], results["config"]
    if other["benchmark"] != name:
        raise ConfigError(f"{a} is of {name}, {b} of {other['benchmark']}")
    pairs = pairs or [(arm, arm) for arm in said_a if arm in said_b]
    for arm_a, arm_b in pairs:
        for arm, said, folder in ((arm_a, said_a, a), (arm_b, said_b, b)):
            if arm not in said:
                raise ConfigError(f"{folder} has no arm {arm!r}, only {', '.join(said)}")
    if not pairs:
        raise ConfigError(f"no arm of {a} ({', '.join(said_a)}) is one of {b} ({', '.join(said_b)}); name --arms=A,B")
    rule, records = rule or config["eval"]["scoring"], _records(name, config["data"]["test"])
    found = []
    for arm_a, arm_b in pairs:
        rows = (benchmarks.judged(name, records, said, rule) for said in (said_a[arm_a], said_b[arm_b]))
        row = benchmarks.compare(name, *rows, rule, seed=config["seed"])
        if row is None:
            raise ConfigError(f"{a} and {b} share no question that the rule {rule!r} scores (arm {arm_a})")
        found.append({"a": arm_a, "b": arm_b, "rule": rule, **row})
    return found


def _records(name: str, test: str) -> list:
    try:
        return read(name, test, skip_bad=True).records
    except ValueError as error:
        raise ConfigError(f"the annotations are needed again: {error}") from None


def line(row: Mapping) -> str:
    low, high = row["ci95"]
    arms = row["a"] if row["a"] == row["b"] else f"{row['a']} - {row['b']}"
    return (
        f"{row['difference']:+6.2f} points ({low:+.2f} to {high:+.2f})  p {row['p']:.4f}  n {row['n']}  "
        f"only the first right {row['only_a']}, only the second {row['only_b']}  {row['test']}  {arms}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="marc_jax.evaluation.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="--out of one evaluation")
    parser.add_argument("b", type=Path, help="and of the other")
    parser.add_argument("--rule", default="", choices=["", *benchmarks.RULES])
    parser.add_argument("--arms", default="", help="A,B: one arm of each")
    args = parser.parse_args(argv)
    names = args.arms.split(",") if args.arms else []
    if len(names) not in (0, 2):
        parser.error(f"--arms={args.arms}: two names, one of each folder")
    try:
        rows = compared(args.a, args.b, args.rule, [tuple(names)] if names else ())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.a} minus {args.b}, by the rule '{rows[0]['rule']}':")
    print("\n".join(line(row) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
