"""The one training loop: resume, step, log, save, stop cleanly. Every stage runs through `fit`."""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from marc_jax import checkpoint, guard, locks, metrics, optim
from marc_jax.interrupt import Interrupt
from marc_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a stage runs and how often it speaks and saves; all in steps.

    `skip`: so many steps in a row may be held back (`guard`) before the stage stops.
    """

    steps: int
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2
    skip: int = 0


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
    samples: Callable[[int], dict] | None = None,
) -> tuple[TrainState, float]:
    """Runs a stage from its newest good checkpoint to its last step. One process at a time may run a stage.

    Args:
      name: stage; checkpoints go to `<workdir>/<name>/checkpoints`, metrics to `<workdir>/<name>/metrics.jsonl`.
      state: the initial state; also the restore target (shapes, dtypes, shardings). Used up: `step_fn` may donate it,
        and where the stage resumes its memory is given back before the checkpoint is read.
      draw: step -> batch, a function of the step number alone, so a resumed run repeats and skips nothing; the next
        batch is drawn in a thread while the device computes.
      step_fn: (state, batch) -> (state, metrics dict).
      stop: signal handler; when it asks, the loop saves at the step border and raises `config.Stopped`; where it has
        asked before the first step, that is not begun.
      meta: stored beside the arrays (the config, the stage it started from).
      samples: step as for `draw` -> {sample id: what it is made of, JSON-serialisable}, asked when a step went wrong.

    Returns:
      the final state and the seconds spent here.

    Raises:
      LockedError: another process runs this stage in this workdir.
      CheckpointError: there are checkpoints and none is whole; another state's; the disk is full.
      NonFiniteError: a metric of a step, or a parameter about to be saved, is NaN or infinite, or more steps in a row
        were held back than may be. The samples are in `<workdir>/<name>/nonfinite.json`; such a state is never saved.
        Those of steps that were left out are in `skipped.jsonl` beside it.
    """
    first = jax.process_index() == 0
    lock = locks.held(Path(workdir) / name / ".lock", f"stage {name!r} in {workdir}")
    with lock if first else contextlib.nullcontext():
        return _fit(name, workdir, state, draw, step_fn, pace, stop, meta or {}, samples)


def _fit(name, workdir, state, draw, step_fn, pace: Pace, stop: Interrupt | None, meta: dict, samples):
    folder = Path(workdir) / name / "checkpoints"
    state, saved = resumed(folder, state)
    begin = int(state.step)
    started = time.monotonic()
    if begin >= pace.steps:
        return state, 0.0
    if jax.process_index() == 0:
        metrics.cut(folder.parent / "skipped.jsonl", begin)
    with (
        metrics.Writer(workdir, name, resume_step=begin) as writer,
        metrics.Progress(name, total=pace.steps, start=begin) as progress,
        ThreadPoolExecutor(1) as ahead,
        _Saving(folder, pace.keep) as saving,
    ):
        coming = ahead.submit(draw, begin)
        rows = [{key: tuple(pair) for key, pair in saved.get("metrics", {}).items()}]  # since the last line of the log
        checked = functools.partial(_checked, folder=folder, samples=samples, skip=pace.skip, settle=saving.settle)
        unchecked = {}  # metrics of steps that nobody has looked at yet
        if stop is not None and stop.requested():  # since the stage before: the first step may compile for minutes
            stop.stop(begin)
        for step in range(begin, pace.steps):
            batch = coming.result()
            if step + 1 < pace.steps:
                coming = ahead.submit(draw, step + 1)
            state, values = step_fn(state, batch)
            unchecked[step + 1] = values | guard.told(state.opt_state)
            last = step + 1 == pace.steps
            asked = stop is not None and stop.requested()
            logs = (step + 1) % pace.log_every == 0 or last
            saves = (step + 1) % pace.save_every == 0 or last or asked
            if logs or saves:
                rows += checked(unchecked)
                unchecked = {}
            if logs:
                row = writer.write(step + 1, metrics.merge(*rows))
                rows = []
                progress.update(step + 1, **metrics.shown(row))
            if saves:
                checked({step + 1: _soundness(state)})
                told = {"stage": name, **meta, "metrics": metrics.merge(*rows)}
                saving.save(step + 1, state, told, wait=last or asked)
            saving.check()
            if asked:
                stop.stop(step + 1)
    return state, time.monotonic() - started


def resumed(folder: Path, state: TrainState) -> tuple[TrainState, dict]:
    """The newest checkpoint of `folder` that verifies and its meta, or (state, {}) where there is none yet.

    Raises:
      CheckpointError: all are damaged: work is never thrown away without a word.
    """
    if not checkpoint.steps(folder):
        return state, {}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for x in jax.tree.leaves(state):
        x.delete()
    try:
        return checkpoint.restore(folder, shapes)
    except checkpoint.DamagedError as e:
        raise checkpoint.DamagedError(f"{e}; delete {folder} to start this stage again") from None


@jax.jit
def _soundness(state: TrainState) -> dict:
    """1 for every trained parameter and each of its moments, NaN where one of its numbers is NaN or infinite."""
    flat = jax.tree_util.tree_flatten_with_path({"parameter": state.params, "optimizer": state.opt_state})[0]
    floats = {optim.name(path): x for path, x in flat if jnp.issubdtype(x.dtype, jnp.floating)}
    return {path: jnp.where(jnp.isfinite(x).all(), 1.0, jnp.nan) for path, x in floats.items()}


class _Saving:
    """The checkpoints of a stage, written while it trains on: one at a time, and nothing is left open at its end."""

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep, self._pending = folder, keep, None

    def save(self, step: int, state: TrainState, meta: dict, wait: bool) -> None:
        """Copies the state to the host, after the copy before it is on the disk: the host holds one at most."""
        self.wait()
        self._pending = checkpoint.save(self._folder, step, state, meta, keep=self._keep, wait=wait)

    def check(self) -> None:
        """Raises CheckpointError where the last save has failed meanwhile."""
        if self._pending is not None:
            self._pending.check()

    def wait(self) -> None:
        """Until what was saved is committed. Raises CheckpointError where it never will be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def settle(self) -> None:
        """As `wait`, where another error is on its way: a save that failed is only told."""
        try:
            self.wait()
        except checkpoint.CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.wait() if kind is None else self.settle()


def _checked(
    values: dict[int, dict], folder: Path, samples: Callable | None, skip: int, settle: Callable
) -> list[dict]:
    """The metrics of these steps, on the host; of one that was held back, only that. NonFiniteError as `fit` says.

    `settle` waits for a save under way: it counts among the steps on disk.
    """
    rows = []
    for step, row in jax.device_get(values).items():
        held, in_a_row = int(row.pop("held", -1)), int(row.pop("in_a_row", 0))
        bad, how = metrics.non_finite(row), "not finite"
        if held == guard.SPIKE:
            bad, how = ["loss"], "far above the last ones"
        elif held == guard.NOT_FINITE and not bad:
            bad = ["gradient"]
        if not bad:
            rows.append(row if held < 0 else row | {"skipped": (0.0, 1.0)})
            continue
        batch = samples(step - 1) if samples is not None else {}
        told = {"step": step, "names": bad, "how": how, "metrics": {k: str(v) for k, v in row.items()}, "batch": batch}
        if held > guard.APPLIED and in_a_row <= skip:
            _tell(folder.parent / "skipped.jsonl", json.dumps(told) + "\n", "a")
            rows.append({"skipped": (1.0, 1.0)})
            continue
        settle()
        multihost_utils.sync_global_devices(f"settled_{step}")  # process 0 commits last, and must not be left before
        path, good = folder.parent / "nonfinite.json", checkpoint.steps(folder)
        _tell(path, json.dumps(told, indent=1) + "\n", "w")
        note = f" (all of it in {path})" if jax.process_index() == 0 else ""
        note += f"; the last of {in_a_row} such steps in a row" if in_a_row > 1 else ""
        note += f"; step {good[-1]} in {folder} is intact" if good else "; no step was saved before it"
        raise metrics.NonFiniteError(step, bad, batch, note, how)
    return rows


def _tell(path: Path, text: str, mode: str) -> None:
    if jax.process_index() == 0:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
