"""The real thing, small: supervised and reinforcement learning from videos, killed and stopped at any moment."""

import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from marc_jax import checkpoint, manifest
from tools.faults import drill, kills, soak

STAGES = ("teacher", "retriever", "sft", "cgrpo")
STEPS = 4


def disturbed(folder: pathlib.Path, count: int, seed: int = 0) -> list[drill.Outcome]:
    """kill -9 and SIGTERM in turn, `count` of them, over as many runs as it takes."""
    dead = drill.Outcome(
        "kill -9 of a run of four real stages (SFT, retriever, C-GRPO)",
        "every step on disk verifies, none is gone; the resumed run ends bit-equal with the same logs",
    )
    stopped = drill.Outcome(
        "SIGTERM to a run of four real stages",
        f"saved and exit code 0 within {kills.GRACE:g} s once a stage runs; the resumed run ends bit-equal, same logs",
    )
    truth, rng, run, slowest = _straight(folder), random.Random(seed), 0, 0.0
    while dead.attempts + stopped.attempts < count:
        run, done, problems = run + 1, {dead.fault: 0, stopped.fault: 0}, []
        workdir = folder / f"run{run}"
        while True:
            process = _start(folder, workdir)
            had = _steps(workdir)
            while _steps(workdir) == had and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.5))
            left = count - dead.attempts - stopped.attempts - sum(done.values())
            if left <= 0 or _finished(workdir) or process.poll() is not None:
                break
            before = _steps(workdir)
            if sum(done.values()) % 2:
                done[stopped.fault] += 1
                problem, seconds = _stop(process, workdir)
                slowest = max(slowest, seconds)
            else:
                done[dead.fault] += 1
                process.kill()
                process.communicate()
                problem = None
            gone = any(max(_steps(workdir).get(name, [0])) < max(known) for name, known in before.items())
            problems += [p for p in (problem, _damaged(workdir), "a saved step is gone" if gone else None) if p]
        code, err, _ = drill.ended(process)
        problems += [f"exit code {code}: {err[-300:]}"] if code else []
        problems += ["it ends otherwise"] if not problems and _result(workdir) != truth else []
        for outcome in (dead, stopped):
            outcome.count(f"run {run}: {problems[0]}" if problems else None, done[outcome.fault])
        shutil.rmtree(workdir)
    stopped.note = f"slowest end {slowest:.1f} s after the signal"
    return [dead, stopped]


def _straight(folder: pathlib.Path) -> dict:
    process = _start(folder, folder / "straight")
    code, err, _ = drill.ended(process, 10 * drill.PATIENCE)
    if code:
        raise RuntimeError(f"the undisturbed run failed: {err[-2000:]}")
    return _result(folder / "straight")


def _start(folder: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """The quick start's stages on tiny shapes, saved after every step; the runs share one set of videos."""
    told = {"data.train_videos": 8, "data.test_videos": 2, "data.workers": 0, "data.path": folder / "data"}
    told |= {"log_every": 1, "save_every": 1, "only": STAGES, "cgrpo.group": 2}
    told |= {f"{name}.{key}": value for name in STAGES for key, value in (("steps", STEPS), ("videos", 4))}
    changes = [*soak.SMALL_MODEL, "--config.teacher.init=", "--config.teacher.questions=1"]
    changes += [f"--config.{key}={value}" for key, value in told.items()]
    command = [sys.executable, "-m", "marc_jax.train", "--config=experiments/quickstart.py", f"--workdir={workdir}"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(
        command + changes, cwd=drill.REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _stop(process: subprocess.Popen, workdir: pathlib.Path) -> tuple[str | None, float]:
    """SIGTERM: stopped with a word, or at its end already when the signal came; and how long that took."""
    process.send_signal(signal.SIGTERM)
    code, err, seconds = drill.ended(process, kills.GRACE)
    well = code == 0 and ("\nstopped " in err or _finished(workdir))
    return None if well else f"SIGTERM: exit code {code}: {err[-300:]}", seconds


def _finished(workdir: pathlib.Path) -> bool:
    return _steps(workdir).get(STAGES[-1], [0])[-1] == STEPS


def _steps(workdir: pathlib.Path) -> dict[str, list[int]]:
    found = {name: checkpoint.steps(workdir / name / "checkpoints") for name in STAGES}
    return {name: steps for name, steps in found.items() if steps}


def _damaged(workdir: pathlib.Path) -> str | None:
    for name, steps in _steps(workdir).items():
        for step in steps:
            if problem := checkpoint.check(workdir / name / "checkpoints", step):
                return f"{name}, step {step}: {problem}"
    return None


def _result(workdir: pathlib.Path) -> dict:
    """{stage: (SHA-256 of every number of its last step but the key, log)}."""
    result = {}
    for name in STAGES:
        folder = workdir / name / "checkpoints"
        leaves = manifest.read(folder / f"step_{STEPS:08d}")["leaves"]
        numbers = {path: told for path, told in leaves.items() if "key" not in told[1]}
        shapes = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in numbers.items()}
        tree, _ = checkpoint.restore(folder, shapes, STEPS, partial=True)
        digest = hashlib.sha256()
        for path in sorted(tree):
            digest.update(path.encode() + np.asarray(tree[path]).tobytes())
        result[name] = digest.hexdigest(), (workdir / name / "metrics.jsonl").read_text()
    return result
