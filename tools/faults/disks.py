"""Disks that are full, read-only, limited or cleared under a run."""

import pathlib
import resource
import shutil
import subprocess
import time

from tools.faults import drill

STEPS = ("--steps=12", "--width=20000")  # about 2 MB a step


def full(folder: pathlib.Path, count: int) -> drill.Outcome:
    """A file system that fills up during the run, and has room again afterwards."""
    outcome = drill.Outcome(
        "disk full during the run, space again afterwards",
        "one line, exit code 1, every step on disk verifies; the resumed run ends bit-equal",
    )
    truth = drill.straight(*STEPS)
    for i in range(count):
        place = folder / f"disk{i}"
        with drill.small_disk(place, f"{2400 + 500 * (i % 6)}k") as mounted:  # room for one step to two
            if not mounted:
                outcome.note = "no mounting here: a limit on the size of a file instead"
                return _limited(folder, count, outcome, truth)
            run = place / "run"
            problem = _stops(run, 1, "no space left on the disk")
            grown = subprocess.run(["mount", "-o", "remount,size=100m", str(place)], capture_output=True)
            problem = problem or (grown.returncode and "cannot make room") or None
            outcome.count(problem or _resumes(run, truth))
    return outcome


def _limited(folder: pathlib.Path, count: int, outcome: drill.Outcome, truth) -> drill.Outcome:
    """Where nothing may be mounted: no file may grow beyond a limit."""
    for i in range(count):
        limit = 20_000 * (i + 1)
        run = folder / f"limited{i}"
        problem = _stops(run, 1, "was not saved", lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)))
        outcome.count(problem or _resumes(run, truth))
    return outcome


def limited(folder: pathlib.Path, count: int) -> drill.Outcome:
    """A limit on the size of a file, as quotas and `ulimit -f` set it."""
    promise = "one line, exit code 1; the resumed run ends bit-equal"
    outcome = drill.Outcome("a file may not grow beyond a limit", promise)
    return _limited(folder, count, outcome, drill.straight(*STEPS))


def read_only(folder: pathlib.Path, count: int) -> drill.Outcome:
    """A directory that cannot be written to; a file where the directory should be."""
    promise = "one line before the first step, exit code > 0"
    outcome = drill.Outcome("directory read-only, or a file in its place", promise)
    for i in range(count):
        place = folder / f"place{i}"
        if i % 2:
            place.write_text("a file")
            outcome.count(_stops(place / "run", None))
            continue
        with drill.small_disk(place, "1m", "ro") as mounted:
            if not mounted:
                place.chmod(0o500)  # root may write there all the same
            outcome.count(_stops(place / "run", None))
            if not mounted:
                place.chmod(0o700)
    return outcome


def cleared(folder: pathlib.Path, count: int) -> drill.Outcome:
    """Somebody removes the run's directory while it runs."""
    promise = "ends by itself, with one line and exit code 1 if it could not save; what is on disk verifies"
    outcome = drill.Outcome("the directory is removed during the run", promise)
    for i in range(count):
        run = folder / f"run{i}"
        process = drill.toy(run, *STEPS)
        drill.ready(process)
        while len(drill.steps(run)) < 2 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.03 * i)
        shutil.rmtree(run, ignore_errors=True)
        code, err, _ = drill.ended(process)
        problem = None if code == 0 else drill.plain(err) if code == 1 else f"exit code {code}: {err[-600:]}"
        outcome.count(problem or drill.damaged(run))
    return outcome


def _stops(run: pathlib.Path, code: int | None, words: str = "", before=None) -> str | None:
    """A run that must end by itself with exit code `code` (None: any but 0) and one line holding `words`."""
    process = drill.toy(run, *STEPS, preexec_fn=before)
    got, err, _ = drill.ended(process)
    if got in (0, "hung") or code not in (None, got):
        return f"exit code {got}: {err[-300:]}"
    if words not in err:
        return f"{words!r} is not in {err[-300:]!r}"
    return drill.plain(err) or drill.damaged(run)


def _resumes(run: pathlib.Path, truth) -> str | None:
    process = drill.toy(run, *STEPS)
    code, err, _ = drill.ended(process)
    return f"exit code {code}: {err[-300:]}" if code else drill.difference(process, run, truth)
