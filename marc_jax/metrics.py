"""What a run tells about itself: (sum, count) metrics, the non-finite guard, JSONL and TensorBoard, progress."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax import files
from marc_jax.config import UserError

_SHOWN = 8
SPEED = "speed/"  # what begins so depends on the machine, and has a file of its own
PROGRESS = ("loss", "accuracy", "reward", "recall@3", "speed/tokens_per_second", "speed/mfu", "speed/memory_gib")


class NonFiniteError(UserError):
    """A metric or parameter became NaN or infinite, or is not as it should (`how`). `note` ends the message.

    Attributes: step, names, batch_ids.
    """

    exit_code = 1

    def __init__(self, step: int, names: list[str], batch_ids: Iterable = (), note: str = "", how="not finite"):
        self.step, self.names, self.batch_ids = step, names, list(batch_ids)
        batch = f"; batch: {_listed(self.batch_ids)}" if self.batch_ids else ""
        super().__init__(f"step {step}: {_listed(names)} {how}{batch}{note}")


def _listed(names: list) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


def masked_sum(values, mask=None) -> tuple[jax.Array, jax.Array]:
    """(sum, count) in float32 of the values under a mask of the same shape; masked values may be anything, even NaN."""
    values = jnp.asarray(values, jnp.float32)
    if mask is None:
        return values.sum(), jnp.asarray(values.size, jnp.float32)
    return jnp.where(mask, values, 0.0).sum(), jnp.asarray(mask, jnp.float32).sum()


def merge(*rows: Mapping) -> dict[str, tuple[float, float]]:
    """The metrics of several batches together: sums and counts add up, a plain number counts once.

    One transfer from the device for all rows; a name that some rows lack is merged over the others.
    """
    total: dict[str, tuple[float, float]] = {}
    for host, row in zip(jax.device_get([dict(row) for row in rows]), rows, strict=True):
        for name in row:  # device_get sorts the names; a log keeps them as they were given.
            x, n = host[name] if isinstance(host[name], tuple) else (host[name], 1.0)
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + float(x), before[1] + float(n))
    return total


def reduce(metrics: Mapping) -> dict[str, float]:
    """Metrics as floats: (sum, count) -> sum / count (NaN where the count is 0), a scalar as it is.

    One transfer from the device for the whole dict.
    """
    host = jax.device_get(dict(metrics))
    values = {}
    for name in metrics:  # device_get sorts the names; a log keeps them as they were given.
        x = host[name]
        if isinstance(x, tuple):
            values[name] = float(x[0]) / float(x[1]) if float(x[1]) else math.nan
        else:
            values[name] = float(x)
    return values


def check_finite(metrics: Mapping, step: int, batch_ids: Iterable = ()) -> None:
    """Raises NonFiniteError naming step, metrics and batch. An empty mean (count 0) is no failure.

    Args:
      metrics: name -> scalar or (sum, count), on device or host.
      step: of these metrics.
      batch_ids: what identifies the rows of the batch, for the message.
    """
    if bad := non_finite(metrics):
        raise NonFiniteError(step, bad, batch_ids)


def non_finite(metrics: Mapping) -> list[str]:
    """Names of the metrics, scalars or (sum, count), that hold a NaN or an infinity."""
    host = jax.device_get(dict(metrics))
    return [name for name in metrics if not np.isfinite(np.asarray(host[name], np.float64)).all()]


class Writer:
    """Writes `<workdir>/<stage>/metrics.jsonl`, one line per step, and TensorBoard events beside it.

    Metrics of the machine ("speed/...") go into `speed.jsonl`, so that metrics.jsonl of two equal runs are equal.
    A run that resumes at step s continues the file: lines after s, and a line cut short by a crash, are dropped
    first, so every step is there exactly once. NaN and infinities are written as null.

    Args:
      workdir: of the run.
      stage: name of the stage, a folder of `workdir`.
      resume_step: the last step that is kept; 0 starts afresh.
      tensorboard: also write TensorBoard events.
      enabled: False writes nothing anywhere; by default only process 0 writes.
    """

    def __init__(self, workdir, stage: str, resume_step: int = 0, *, tensorboard=True, enabled: bool | None = None):
        self._file = self._board = None
        self.last_step = resume_step
        self.folder = pathlib.Path(workdir) / stage
        if not (jax.process_index() == 0 if enabled is None else enabled):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "speed.jsonl"):
            cut(self.folder / name, resume_step)
        self._file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        if tensorboard:
            self._board = summary_writer()(str(self.folder), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping) -> dict[str, float]:
        """Appends one step; returns the values as floats. Raises ValueError unless `step` is after the last one."""
        if step <= self.last_step:
            raise ValueError(f"metrics of step {step} after those of step {self.last_step}")
        self.last_step = step
        values = reduce(metrics)
        if self._file is not None:
            finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
            fast = {name: x for name, x in finite.items() if name.startswith(SPEED)}
            slow = {name: x for name, x in finite.items() if name not in fast}
            self._file.write(json.dumps({"step": step, **slow}) + "\n")
            self._file.flush()
            if fast:
                with (self.folder / "speed.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **fast}) + "\n")
        if self._board is not None:
            for name, x in values.items():
                if math.isfinite(x):
                    self._board.add_scalar(name, x, step)
        return values

    def close(self) -> None:
        """Flushes and closes both files; safe to call twice."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()
        self._file = self._board = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def summary_writer() -> type:
    """tensorboardX.SummaryWriter; it imports torch where torch is installed, which a training process must not."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # An import of it now raises ImportError, which tensorboardX expects.
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def read(path) -> list[dict]:
    """The lines of a metrics.jsonl, up to the first incomplete one."""
    lines = []
    for line in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def cut(path: pathlib.Path, last_step: int) -> None:
    """Of a file of JSON lines, keeps those of steps <= last_step; the file is replaced in one move."""
    if not path.exists():
        return
    kept = [line for line in read(path) if line["step"] <= last_step]
    files.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


class Progress:
    """A bar with the time left on a terminal, a plain line now and then elsewhere; silent on processes other than 0.

        with Progress("teacher", total=600, start=state_step) as progress:
            progress.update(step, loss=loss, accuracy=accuracy)

    Args:
      stage: shown first.
      total: the last step.
      start: steps done by an earlier run; they do not count in the speed.
      every: seconds between plain lines.
      stream: where to; stderr by default.
      enabled: False is silent.
    """

    def __init__(self, stage: str, total: int, start=0, *, every=15.0, stream=None, enabled: bool | None = None):
        self.stage, self.total, self.start, self.every = stage, total, start, every
        self.stream = sys.stderr if stream is None else stream
        self.enabled = jax.process_index() == 0 if enabled is None else enabled
        self._bar = self._task = None
        self._step, self._shown = start, ""
        self._began = self._told = time.monotonic()

    def __enter__(self):
        if self.enabled and self.stream.isatty():
            from rich import console, progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description:<10}"),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[shown]}"),
                console=console.Console(file=self.stream),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.start, shown="")
        return self

    def update(self, step: int, **shown: float) -> None:
        """`step` steps are done; `shown` (floats, or anything with a str) stands beside the bar."""
        if not self.enabled:
            return
        first = self._step == self.start
        self._step = step
        self._shown = "  ".join(f"{name} {_short(x)}" for name, x in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=self._shown)
        elif first or step >= self.total or time.monotonic() - self._told >= self.every:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        speed = (self._step - self.start) / max(now - self._began, 1e-9)
        left = _clock((self.total - self._step) / speed) if speed else "?"
        line = f"{self.stage}: {self._step}/{self.total}  {_clock(now - self._began)} gone, {left} left  {self._shown}"
        print(line.rstrip(), file=self.stream, flush=True)
        self._told = now

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def shown(row: Mapping[str, float]) -> dict:
    """What the progress line says of a row of metrics: the usual ones, and the seconds of a step by phase."""
    line = {name.removeprefix(SPEED): row[name] for name in PROGRESS if name in row}
    seconds = {
        name[len(SPEED) :].removesuffix("_seconds"): x for name, x in row.items()
        if name.startswith(SPEED) and name.endswith("_seconds") and math.isfinite(x)
    }  # fmt: skip
    if "step" in seconds:
        parts = ", ".join(f"{name} {x:.3g}" for name, x in seconds.items() if name != "step")
        line["s/step"] = f"{seconds['step']:.3g} ({parts})" if parts else f"{seconds['step']:.3g}"
    return line


def _short(x) -> str:
    return f"{float(x):.4g}" if isinstance(x, int | float | np.number | np.ndarray | jax.Array) else str(x)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
