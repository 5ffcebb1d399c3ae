"""Runs that are killed, stopped or interrupted at any moment."""

import os
import pathlib
import random
import shutil
import signal
import time

from tools.faults import drill

STEPS = ("--steps=20",)
GRACE = 30.0  # seconds a preempted machine leaves


def killed(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """kill -9 at random moments, `count` of them, over as many runs as it takes."""
    outcome = drill.Outcome(
        "kill -9 at a random moment of training or saving",
        "every step on disk verifies, none that was saved is gone, the resumed run ends bit-equal with the same log",
    )
    truth, rng, halves, run = drill.straight(*STEPS), random.Random(seed), 0, 0
    while outcome.attempts < count:
        run, kills, problem = run + 1, 0, None
        workdir = folder / f"killed{run}"
        while True:
            process = drill.toy(workdir, *STEPS)
            drill.ready(process)
            had = drill.steps(workdir)
            while drill.steps(workdir) == had and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.5))
            if outcome.attempts + kills < count and process.poll() is None:
                before = drill.steps(workdir)
                process.kill()
                process.communicate()
                kills += 1
                halves += any(workdir.glob("toy/checkpoints/.*.partial"))
                gone = before and max(before) > max(drill.steps(workdir), default=0)
                problem = problem or drill.damaged(workdir) or ("a saved step is gone" if gone else None)
                continue
            code, err, _ = drill.ended(process)
            problem = problem or (f"exit code {code}: {err[-300:]}" if code else None)
            problem = problem or drill.difference(process, workdir, truth)
            break
        outcome.count(problem and f"run {run} after {kills} kills: {problem}", kills)
        shutil.rmtree(workdir)
    outcome.note = f"{run} runs; {halves} kills fell into a save"
    return outcome


POINTS = [
    f"{name}:{when}:{n}" for n in (1, 2, 4) for name in ("manifest", "rename", "rmtree", "fsync")
    for when in ("before", "after")
]  # fmt: skip


def killed_in_commit(folder: pathlib.Path, count: int) -> drill.Outcome:
    """kill -9 right before or after the manifest is written, a folder renamed or removed, a file flushed."""
    outcome = drill.Outcome(
        "kill -9 inside a commit: before and after manifest, rename, removal, flush",
        "the newest step that verifies is used; the resumed run ends bit-equal",
    )
    truth = drill.straight("--steps=6")
    for point in POINTS[:count]:
        workdir = folder / point.replace(":", "_")
        process = drill.toy(workdir, "--steps=6", f"--die={point}")
        code, err, _ = drill.ended(process)
        problem = None if code == -signal.SIGKILL else f"was not killed (exit code {code}): {err[-300:]}"
        problem = problem or drill.damaged(workdir)
        if problem is None:
            process = drill.toy(workdir, "--steps=6")
            code, err, _ = drill.ended(process)
            problem = f"exit code {code}: {err[-300:]}" if code else drill.difference(process, workdir, truth)
        outcome.count(problem and f"{point}: {problem}")
    return outcome


def signalled(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """SIGTERM at a random moment."""
    outcome = drill.Outcome(
        "SIGTERM at a random moment",
        f"saved and exit code 0 within {GRACE:g} s; the resumed run ends bit-equal with the same log",
    )
    rng, slowest = random.Random(seed), 0.0
    truth = drill.straight(*STEPS)
    for i in range(count):
        workdir = folder / f"run{i}"
        process = drill.toy(workdir, *STEPS, "--pause=0.02")
        drill.ready(process)
        time.sleep(rng.uniform(0.0, 2.0))
        process.send_signal(signal.SIGTERM)
        code, err, seconds = drill.ended(process, GRACE)
        slowest = max(slowest, seconds)
        problem = None if code == 0 else f"exit code {code}: {err[-300:]}"
        if problem is None and drill.final(process) is None:
            saved = drill.steps(workdir)
            words = f"after step {saved[-1]}, which is saved" if saved else "before the first step"
            problem = None if f"stopped {words}" in err else f"no clear message: {err[-300:]}"
            process = drill.toy(workdir, *STEPS)
            code, err, _ = drill.ended(process)
            problem = problem or (f"exit code {code}: {err[-300:]}" if code else None)
        outcome.count(problem or drill.damaged(workdir) or drill.difference(process, workdir, truth))
    outcome.note = f"slowest end {slowest:.1f} s after the signal"
    return outcome


def interrupted_twice(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """Ctrl-C, and again while the run saves a large step."""
    outcome = drill.Outcome(
        "Ctrl-C twice, the second while it saves",
        "ends within 2 s with exit code 130; the last step verifies; the resumed run ends bit-equal",
    )
    rng, slowest, big = random.Random(seed), 0.0, ("--steps=4", "--width=400000")
    truth = drill.straight(*big)
    for i in range(count):
        workdir = folder / f"run{i}"
        process = drill.toy(workdir, *big)
        drill.ready(process)
        while not drill.steps(workdir) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(rng.uniform(0.0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        code, err, seconds = drill.ended(process)
        slowest = max(slowest, seconds)
        problem = None if code == 130 else f"exit code {code}: {err[-300:]}"
        problem = problem or (f"took {seconds:.1f} s" if seconds > 2 else drill.damaged(workdir))
        if problem is None:
            process = drill.toy(workdir, *big)
            code, err, _ = drill.ended(process)
            problem = f"exit code {code}: {err[-300:]}" if code else drill.difference(process, workdir, truth)
        outcome.count(problem)
        shutil.rmtree(workdir)
    outcome.note = f"slowest end {slowest:.2f} s"
    return outcome


def die_at(point: str) -> None:
    """Makes this process kill itself: "rename:before:2" right before the second rename."""
    from marc_jax import manifest

    name, when, number = point.split(":")
    where = {
        "manifest": (manifest, "write"), "rename": (pathlib.Path, "rename"), "rmtree": (shutil, "rmtree"),
        "fsync": (os, "fsync"),
    }  # fmt: skip
    owner, attribute = where[name]
    real, calls = getattr(owner, attribute), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        mine = calls[0] == int(number)
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, deadly)
