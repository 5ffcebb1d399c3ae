"""Runs of two processes: the same numbers as one, and what happens when one of them dies."""

import pathlib
import signal
import time

from tools.faults import drill

SILENCE = 4.0
MESH = ("--devices=2", "--mesh=2,1,2")


def pair(workdir, *arguments: str) -> list:
    """The toy run in two processes of two simulated devices each."""
    told = (*MESH, f"--coordinator=127.0.0.1:{drill.free_port()}", "--processes=2", f"--silence={SILENCE}", *arguments)
    return [drill.toy(workdir, *told, f"--process={i}") for i in range(2)]


def equal(folder: pathlib.Path, count: int) -> drill.Outcome:
    """Two processes of two devices train what one of four trains."""
    outcome = drill.Outcome("two processes instead of one", "the same losses, parameters and moments, bit for bit")
    truth = drill.straight("--steps=8", "--devices=4", "--mesh=2,1,2")
    for i in range(count):
        runs = pair(folder / f"run{i}", "--steps=8")
        ends = [drill.ended(run) for run in runs]
        bad = [f"process {j}: exit code {code}: {err[-300:]}" for j, (code, err, _) in enumerate(ends) if code]
        outcome.count(bad[0] if bad else drill.difference(runs[0], folder / f"run{i}", truth))
    return outcome


def dead(folder: pathlib.Path, count: int) -> list[drill.Outcome]:
    """Kills the second process, the first (the coordinator), or stops the second from answering."""
    cases = [
        ("kill -9 of one process of two", 1, signal.SIGKILL, 5.0),
        ("kill -9 of process 0 of two", 0, signal.SIGKILL, 5.0),
        ("a process of two that no longer answers (SIGSTOP)", 1, signal.SIGSTOP, SILENCE + 5.0),
    ]
    outcomes = []
    for fault, victim, number, bound in cases[:count]:
        promise = f"the other ends within {bound:g} s with one line, exit code 1; both resume and end bit-equal"
        outcome = drill.Outcome(fault, promise)
        slowest = 0.0
        for i in range(max(1, count // len(cases))):
            problem, seconds = _survives(folder / f"{victim}{number}{i}", victim, number, bound)
            outcome.count(problem)
            slowest = max(slowest, seconds)
        outcome.note = f"slowest end {slowest:.1f} s"
        outcomes.append(outcome)
    return outcomes


def _survives(workdir: pathlib.Path, victim: int, number: int, bound: float) -> tuple[str | None, float]:
    truth = drill.straight("--steps=8", "--devices=4", "--mesh=2,1,2")
    runs = pair(workdir, "--steps=8", "--pause=0.1")
    _begun(runs[0], workdir)
    runs[victim].send_signal(number)
    code, err, seconds = drill.ended(runs[1 - victim], 60)
    runs[victim].kill()
    drill.ended(runs[victim])
    problem = None if code == 1 else f"exit code {code}: {err[-300:]}"
    if problem is None and f"error: process {victim} of 2" not in err:
        problem = f"no clear message: {err[-300:]}"
    if problem is None and seconds > bound:
        problem = f"took {seconds:.1f} s"
    problem = problem or drill.damaged(workdir)
    if problem is None:
        runs = pair(workdir, "--steps=8")
        ends = [drill.ended(run) for run in runs]
        bad = [f"resumed process {j}: exit code {end[0]}: {end[1][-300:]}" for j, end in enumerate(ends) if end[0]]
        problem = bad[0] if bad else drill.difference(runs[0], workdir, truth)
    return problem, seconds


def one_signalled(folder: pathlib.Path, count: int) -> drill.Outcome:
    """SIGTERM to one of the two."""
    outcome = drill.Outcome(
        "SIGTERM to one process of two",
        "both stop after the same step, saved, exit code 0; both resume and end bit-equal",
    )
    truth, slowest = drill.straight("--steps=8", "--devices=4", "--mesh=2,1,2"), 0.0
    for i in range(count):
        workdir = folder / f"run{i}"
        runs = pair(workdir, "--steps=8", "--pause=0.2")
        _begun(runs[0], workdir)
        runs[i % 2].send_signal(signal.SIGTERM)
        ends = [drill.ended(run, 30) for run in runs]
        slowest = max(slowest, *(seconds for _, _, seconds in ends))
        words = f"stopped after step {drill.steps(workdir)[-1]}, which is saved"
        bad = [f"process {j}: {end[0]}: {end[1][-300:]}" for j, end in enumerate(ends) if end[0] or words not in end[1]]
        if not bad:
            runs = pair(workdir, "--steps=8")
            bad = [f"resumed: {end[1][-300:]}" for end in map(drill.ended, runs) if end[0]]
        outcome.count(bad[0] if bad else drill.difference(runs[0], workdir, truth))
    outcome.note = f"slowest end {slowest:.1f} s"
    return outcome


def _begun(process, workdir) -> None:
    """Returns when the run has saved a step."""
    while not drill.steps(workdir) and process.poll() is None:
        time.sleep(0.02)
