"""Runs of several processes: the same numbers as one, and what happens when one of them dies."""

import pathlib
import signal
import time

from tools.faults import drill

SILENCE = 4.0
STRAIGHT = ("--steps=8", "--devices=4", "--mesh=2,1,2")


def begun(workdir, *arguments: str, processes: int = 2) -> list:
    """The toy run on four simulated devices in so many processes."""
    together = (f"--coordinator=127.0.0.1:{drill.free_port()}", f"--processes={processes}", f"--silence={SILENCE}")
    told = (f"--devices={4 // processes}", "--mesh=2,1,2", *together, *arguments)
    return [drill.toy(workdir, *told, f"--process={i}") for i in range(processes)]


def equal(folder: pathlib.Path, count: int) -> drill.Outcome:
    """Two processes of two devices train what one of four trains."""
    outcome = drill.Outcome("two processes instead of one", "the same losses, parameters and moments, bit for bit")
    truth = drill.straight(*STRAIGHT)
    for i in range(count):
        runs = begun(folder / f"run{i}", "--steps=8")
        ends = [drill.ended(run) for run in runs]
        bad = [f"process {j}: exit code {code}: {err[-300:]}" for j, (code, err, _) in enumerate(ends) if code]
        outcome.count(bad[0] if bad else drill.difference(runs[0], folder / f"run{i}", truth))
    return outcome


def dead(folder: pathlib.Path, count: int, processes: int = 2) -> list[drill.Outcome]:
    """Kills the last process, the first (the coordinator), or stops the last from answering."""
    number_of, last = {2: "two", 4: "four"}[processes], processes - 1
    cases = [
        (f"kill -9 of one process of {number_of}", last, signal.SIGKILL, 5.0),
        (f"kill -9 of process 0 of {number_of}", 0, signal.SIGKILL, 5.0),
        (f"a process of {number_of} that no longer answers (SIGSTOP)", last, signal.SIGSTOP, SILENCE + 5.0),
    ]
    outcomes = []
    for fault, victim, number, bound in cases[:count]:
        promise = f"the others end within {bound:g} s with one line, exit code 1; all resume and end bit-equal"
        outcome = drill.Outcome(fault, promise)
        slowest = 0.0
        for i in range(max(1, count // len(cases))):
            problem, seconds = _survives(folder / f"{victim}{number}{i}", processes, victim, number, bound)
            outcome.count(problem)
            slowest = max(slowest, seconds)
        outcome.note = f"slowest end {slowest:.1f} s"
        outcomes.append(outcome)
    return outcomes


def four(folder: pathlib.Path, count: int) -> list[drill.Outcome]:
    """`dead`, of four processes."""
    return dead(folder, count, processes=4)


def _survives(
    workdir: pathlib.Path, processes: int, victim: int, number: int, bound: float
) -> tuple[str | None, float]:
    runs = begun(workdir, "--steps=8", "--pause=0.1", processes=processes)
    _saved(runs[0], workdir)
    runs[victim].send_signal(number)
    since, problems = time.monotonic(), []
    for i, run in enumerate(runs):
        if i != victim:
            code, err, _ = drill.ended(run, 60)
            problems += [f"process {i}: exit code {code}: {err[-300:]}"] if code != 1 else []
            if f"error: process {victim} of {processes}" not in err:
                problems.append(f"process {i}: no clear message: {err[-300:]}")
    seconds = time.monotonic() - since
    runs[victim].kill()
    drill.ended(runs[victim])
    problem = problems[0] if problems else f"took {seconds:.1f} s" if seconds > bound else drill.damaged(workdir)
    if problem is None:
        truth = drill.straight(*STRAIGHT)
        runs = begun(workdir, "--steps=8", processes=processes)
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
    truth, slowest = drill.straight(*STRAIGHT), 0.0
    for i in range(count):
        workdir = folder / f"run{i}"
        runs = begun(workdir, "--steps=8", "--pause=0.2")
        _saved(runs[0], workdir)
        runs[i % 2].send_signal(signal.SIGTERM)
        ends = [drill.ended(run, 30) for run in runs]
        slowest = max(slowest, *(seconds for _, _, seconds in ends))
        words = f"stopped after step {drill.steps(workdir)[-1]}, which is saved"
        bad = [f"process {j}: {end[0]}: {end[1][-300:]}" for j, end in enumerate(ends) if end[0] or words not in end[1]]
        if not bad:
            runs = begun(workdir, "--steps=8")
            bad = [f"resumed: {end[1][-300:]}" for end in map(drill.ended, runs) if end[0]]
        outcome.count(bad[0] if bad else drill.difference(runs[0], workdir, truth))
    outcome.note = f"slowest end {slowest:.1f} s"
    return outcome


def _saved(process, workdir) -> None:
    """Returns when the run has saved a step."""
    while not drill.steps(workdir) and process.poll() is None:
        time.sleep(0.02)
