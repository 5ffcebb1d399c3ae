"""What the drills share: their outcome, and the toy run as a process."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from marc_jax import checkpoint

REPO = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds that any toy run may take; more counts as a hang


@dataclasses.dataclass
class Outcome:
    """Of one kind of fault: attempts, those after which all was as promised, and a line for each other one.

    `note` holds what else was measured.
    """

    fault: str
    promise: str
    attempts: int = 0
    survived: int = 0
    note: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.attempts - self.survived

    def count(self, problem: str | None, times: int = 1) -> None:
        """`times` more attempts, survived where there is no problem."""
        self.attempts += times
        self.survived += 0 if problem else times
        if problem:
            self.problems.append(problem)


def toy(workdir, *arguments: str, **options) -> subprocess.Popen:
    """The toy run in a process of its own; its output comes through pipes. `options`: of Popen."""
    command = [sys.executable, "-m", "tools.faults.toy", f"--workdir={workdir}", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | options.pop("env", {})
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def ready(process: subprocess.Popen) -> None:
    """Returns when the run is about to begin."""
    for line in process.stdout:
        if line == "ready\n":
            return
    raise RuntimeError(f"the toy run did not begin: {process.communicate()[1][-2000:]}")


def ended(process: subprocess.Popen, seconds: float = PATIENCE) -> tuple[int | str, str, float]:
    """(exit code or "hung", stderr, seconds waited); a process that hangs is killed. `final(process)` is its stdout."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        process.said = out
        return "hung", err, seconds
    process.said = out
    return process.returncode, err, time.monotonic() - began


def final(process: subprocess.Popen) -> str | None:
    """SHA-256 of the state a finished run ended with."""
    lines = [line for line in process.said.splitlines() if line.startswith("final ")]
    return lines[-1].split()[1] if lines else None


@functools.cache
def straight(*arguments: str) -> tuple[str, list[dict]]:
    """(SHA-256 of the final state, log) of a run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as workdir:
        process = toy(workdir, *arguments)
        code, err, _ = ended(process)
        if code:
            raise RuntimeError(f"the undisturbed run failed: {err[-2000:]}")
        return final(process), log(workdir)


def log(workdir) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(workdir) / "toy/metrics.jsonl").read_text().splitlines()]


def steps(workdir) -> list[int]:
    return checkpoint.steps(pathlib.Path(workdir) / "toy/checkpoints")


def damaged(workdir) -> str | None:
    """What is wrong with any of the steps that a run would consider."""
    folder = pathlib.Path(workdir) / "toy/checkpoints"
    found = {step: checkpoint.check(folder, step) for step in steps(workdir)}
    return next((f"step {step}: {problem}" for step, problem in found.items() if problem), None)


def difference(process: subprocess.Popen, workdir, truth: tuple[str, list[dict]]) -> str | None:
    """How a run that was disturbed and has ended differs from one that was not."""
    if final(process) != truth[0]:
        return "another final state"
    return None if log(workdir) == truth[1] else "another log"


def plain(err: str) -> str | None:
    """What is wrong with an error message: one line must say it all, and no stack trace stands around it."""
    said = sum(line.startswith("error: ") for line in err.splitlines())
    return None if said == 1 and "Traceback" not in err else f"no clear message: {err[-1500:]!r}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str, *flags: str) -> Iterator[bool]:
    """A file system in memory of `size` at `folder`; False where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ",".join((f"size={size}", *flags))
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
