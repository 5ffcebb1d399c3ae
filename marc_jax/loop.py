"""The one training loop: resume, step, log, save, stop cleanly. Every stage runs through `fit`."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from marc_jax import checkpoint, locks, metrics
from marc_jax.interrupt import Interrupt
from marc_jax.state import TrainState

SHOWN = ("loss", "accuracy", "reward", "recall@3")


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a stage runs and how often it speaks and saves; all in steps."""

    steps: int
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2


def fit(
    name: str,
    workdir: Path,
    state: TrainState,
    draw: Callable,
    step_fn: Callable,
    pace: Pace,
    *,
    stop: Interrupt | None = None,
    meta: dict | None = None,
) -> tuple[TrainState, float]:
    """Runs a stage from its newest good checkpoint to its last step. One process at a time may run a stage.

    Args:
      name: stage; checkpoints go to `<workdir>/<name>/checkpoints`, metrics to `<workdir>/<name>/metrics.jsonl`.
      state: the initial state; also the restore target (shapes, dtypes, shardings).
      draw: step -> batch, a function of the step number alone, so a resumed run repeats and skips nothing; the next
        batch is drawn in a thread while the device computes.
      step_fn: (state, batch) -> (state, metrics dict).
      stop: signal handler; when it asks, the loop saves at the step border and raises `config.Stopped`.
      meta: stored beside the arrays (the config, the stage it started from).

    Returns:
      the final state and the seconds spent here.

    Raises:
      LockedError: another process runs this stage in this workdir.
      CheckpointError: there are checkpoints and none is whole; another state's; the disk is full.
    """
    first = jax.process_index() == 0
    lock = locks.held(Path(workdir) / name / ".lock", f"stage {name!r} in {workdir}")
    with lock if first else contextlib.nullcontext():
        return _fit(name, workdir, state, draw, step_fn, pace, stop, meta or {})


def _fit(name, workdir, state, draw, step_fn, pace: Pace, stop: Interrupt | None, meta: dict):
    folder = Path(workdir) / name / "checkpoints"
    state = resumed(folder, state)
    begin = int(state.step)
    started = time.monotonic()
    if begin >= pace.steps:
        return state, 0.0
    with (
        metrics.Writer(workdir, name, resume_step=begin) as writer,
        metrics.Progress(name, total=pace.steps, start=begin) as progress,
        ThreadPoolExecutor(1) as ahead,
    ):
        pending, coming = [], ahead.submit(draw, begin)
        for step in range(begin, pace.steps):
            batch = coming.result()
            if step + 1 < pace.steps:
                coming = ahead.submit(draw, step + 1)
            state, values = step_fn(state, batch)
            pending.append(values)
            last = step + 1 == pace.steps
            if (step + 1) % pace.log_every == 0 or last:
                row = metrics.merge(*pending)
                pending = []
                metrics.check_finite(row, step + 1)
                row = writer.write(step + 1, row)
                progress.update(step + 1, **{k: row[k] for k in SHOWN if k in row})
            asked = stop is not None and stop.requested()
            if (step + 1) % pace.save_every == 0 or last or asked:
                checkpoint.save(folder, step + 1, state, {"stage": name, **meta}, keep=pace.keep)
            if asked:
                stop.stop(step + 1)
    return state, time.monotonic() - started


def resumed(folder: Path, state: TrainState) -> TrainState:
    """The newest checkpoint of `folder` that verifies, or `state` where there is none yet.

    Raises:
      CheckpointError: all are damaged: work is never thrown away without a word.
    """
    if not checkpoint.steps(folder):
        return state
    try:
        return checkpoint.restore(folder, state)[0]
    except checkpoint.DamagedError as e:
        raise checkpoint.DamagedError(f"{e}; delete {folder} to start this stage again") from None
