"""Runs the drills and writes their table; see the package."""

import argparse
import datetime
import os
import pathlib
import platform
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import logging  # noqa: E402

from tools import fuzz_decode  # noqa: E402
from tools.faults import damage, disks, drill, kills, numbers, peers, soak, stages  # noqa: E402

PAGE = drill.REPO / "docs" / "reliability.md"
BEGIN, END = "<!-- table of tools.faults -->\n", "<!-- end of the table -->\n"
HEAD = "| what goes wrong | what must hold | attempts | survived | lost | measured |\n|---|---|--:|--:|--:|---|\n"

# name: (drill, attempts)
DRILLS = {
    "killed": (kills.killed, 50),
    "commit": (kills.killed_in_commit, len(kills.POINTS)),
    "sigterm": (kills.signalled, 20),
    "ctrl-c": (kills.interrupted_twice, 20),
    "full": (disks.full, 6),
    "limited": (disks.limited, 3),
    "read-only": (disks.read_only, 4),
    "cleared": (disks.cleared, 6),
    "checkpoints": (damage.checkpoints, 200),
    "memories": (damage.memories, 1000),
    "annotations": (damage.annotations, 3000),
    "nan": (numbers.spoilt, 12),
    "nan-rows": (numbers.too_many, 6),
    "meshes": (numbers.resharded, 9),
    "two": (peers.equal, 3),
    "dead": (peers.dead, 9),
    "four": (peers.four, 3),
    "stages": (stages.disturbed, 24),
    "two-sigterm": (peers.one_signalled, 6),
}


def videos(folder: pathlib.Path, count: int) -> drill.Outcome:
    """Damaged real videos, through `tools.fuzz_decode`."""
    outcome = drill.Outcome(
        "video changed: bits, header, zeroed, cut, removed, swapped pieces",
        "refused, warned of, right, or told by its SHA-256; a decoder that hangs or dies costs its file",
    )
    counts, notes = fuzz_decode.fuzz(folder, count)
    found = {name: sum(n for (_, o), n in counts.items() if o == name) for name in fuzz_decode.OUTCOMES}
    outcome.attempts = sum(found.values())
    outcome.survived = outcome.attempts - found["failed"] - found["unseen+hash"]
    outcome.problems, outcome.note = notes, ", ".join(f"{n} {name}" for name, n in found.items() if n)
    return outcome


def row(outcome: drill.Outcome, today: str) -> str:
    measured = "; ".join(filter(None, (outcome.note, today)))
    cells = (outcome.fault, outcome.promise, outcome.attempts, outcome.survived, outcome.lost, measured)
    return f"| {' | '.join(map(str, cells))} |\n"


def write(rows: list[str]) -> None:
    """Puts the rows into the page, each in the place of its last measurement."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {line.split(" | ")[0]: line for line in table.removeprefix(HEAD).splitlines(keepends=True)}
    known |= {line.split(" | ")[0]: line for line in rows}
    PAGE.write_text(before + BEGIN + HEAD + "".join(known.values()) + END + after, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__.splitlines()[0])
    names = [*DRILLS, "soak", "soak-unsaved", "videos"]
    parser.add_argument("--only", default=",".join(names), help="of these, comma separated (default: all)")
    parser.add_argument("--effort", type=float, default=1.0, help="scales the attempts")
    parser.add_argument("--minutes", type=float, default=120.0, help="of the soak; a quarter of it without saves")
    parser.add_argument("--videos", type=pathlib.Path, help="folder of real videos; without it none are damaged")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(drill.REPO)}")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := sorted({*chosen} - {*names}):
        parser.error(f"--only={unknown[0]}: known are {', '.join(names)}")
    logging.set_verbosity(logging.ERROR)  # every damaged checkpoint would be a warning
    today, rows, lost = datetime.date.today().isoformat(), [], 0
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            place = pathlib.Path(folder)
            if name in ("soak", "soak-unsaved"):
                saves = name == "soak"
                found = soak.soak(place, max(1, int(5 * args.effort)), args.minutes / (1 if saves else 4), saves)
            elif name == "videos":
                if args.videos is None or not args.videos.is_dir():
                    print(f"videos: left out, --videos={args.videos} is no folder", file=sys.stderr)
                    continue
                found = videos(args.videos, max(1, int(2000 * args.effort)))
            else:
                function, count = DRILLS[name]
                found = function(place, max(1, round(count * args.effort)))
        for outcome in found if isinstance(found, list) else [found]:
            rows.append(row(outcome, today))
            lost += outcome.lost
            print(rows[-1], end="", flush=True)
            print("".join(f"  lost: {problem}\n" for problem in outcome.problems), end="", file=sys.stderr)
            if args.write:
                write(rows[-1:])
    print(f"{lost} lost; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
