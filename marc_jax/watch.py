"""What a person watches while a stage trains: tokens/s, seconds by phase, MFU, memory, samples, a profile.

A `Watch` goes around a stage's `draw` and `step`, and the stage tells it what belongs to which phase:

    draw, step = watch.drawing(draw), watch.around(step)
    done = watch.timed("rollout", sample, state, prompt)     # inside `step`

A phase waits for its result only in steps that are measured (every `every`-th), since the wait keeps the host from
preparing what comes next. All of it are metrics of the step; those of the machine begin with `metrics.SPEED`, so that a
run's metrics.jsonl is the same wherever and however often it runs.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from marc_jax import hardware, metrics
from marc_jax.samples import Table


class Watch:
    """One stage under watch; without arguments it measures nothing and writes nothing.

    Args:
      folder: of the stage; None: nothing is written.
      every: steps between measured ones.
      samples, rows: every so many steps, so many of the step's completions are kept (0: none).
      evaluate: makes (state, step) -> (metrics, rows of completions), asked every `evaluate_every` steps (0: never).
      profile: (first step, how many) under `jax.profiler`, into `<folder>/profile`; (0, n): none.
    """

    def __init__(
        self, folder: Path | None = None, *, every: int = 0, samples: int = 0, rows: int = 8,
        evaluate: Callable | None = None, evaluate_every: int = 0, profile: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.folder, self.every, self._samples, self._rows = folder, every, samples, rows
        self._evaluate, self._evaluate_every, self._profile = evaluate, evaluate_every, profile
        self._weights = (0, 0)
        self._peak = sum(hardware.peak_flops(device) for device in jax.devices()) if folder else 0.0
        self.step, self._sampled, self._before, self._drawn = 0, 0, None, 0.0
        self._seconds: dict[str, float] = {}
        self._table: Table | None = None

    @property
    def measured(self) -> bool:
        """Whether phases wait for their results in this step."""
        return bool(self.every) and (self.step % self.every == 0 or self.step == 1)

    @property
    def due(self) -> bool:
        """Whether this step's completions are wanted: the first of it, not those that refill its dead groups."""
        return bool(self._samples) and self.step % self._samples == 0 and self._sampled != self.step

    def timed(self, phase: str, fn: Callable, *args, **kwargs):
        """fn(*args, **kwargs), its seconds counted with those of the phase."""
        begun = time.monotonic()
        result = fn(*args, **kwargs)
        if self.measured:
            jax.block_until_ready(result)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - begun
        return result

    def completions(self, rows: list[dict]) -> None:
        """Rows of this step's table: flat dicts of texts and numbers. Asked for where `due`."""
        self._sampled = self.step
        if self._table is not None:
            self._table.write(self.step, rows[: self._rows])

    def drawing(self, draw: Callable) -> Callable:
        """`draw`, its seconds told with the step that comes next; it runs ahead, in a thread."""

        def timed(number: int):
            begun = time.monotonic()
            batch = draw(number)
            self._drawn = time.monotonic() - begun
            return batch

        return timed

    def around(self, step_fn: Callable, first) -> Callable:
        """`step_fn` (state, batch) -> (state, metrics), with what is watched among its metrics; `first`: a state."""
        self._weights = multiplied(first.params | first.frozen), multiplied(first.params)

        def watched(state, batch):
            if self._table is None and self.folder is not None:
                self.step = int(state.step)
                self._table = Table(self.folder / "samples", self.step)
            self.step += 1
            self._seconds = {}
            begun = time.monotonic()
            self._trace(begin=True)
            after, values = step_fn(state, batch)
            if self.measured:
                jax.block_until_ready(values)
            values = values | self._told(values, begun)
            self._trace(begin=False, result=values)
            if self._evaluate_every and self.step % self._evaluate_every == 0:
                more, rows = self.timed("evaluation", self._evaluate(), after, self.step)
                self.completions(rows)
                values |= more
                self._before = None  # the evaluation's seconds are not the step's
            return after, values

        return watched if self.folder is not None else step_fn

    def _told(self, values: dict, begun: float) -> dict:
        now, before = time.monotonic(), self._before
        self._before = now
        if before is None:  # this step alone; it may have compiled
            before = begun
        took = now - before
        more = {"step_seconds": took, "decode_seconds": self._drawn, "memory_gib": hardware.peak_gib()}
        if self.measured:
            more |= {f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        work = {name: values.pop(name) for name in ("work/updated", "work/forward") if name in values}
        if "num_tokens" in values:
            more["tokens_per_second"] = (values["num_tokens"], took)
        if work and self._peak and self._weights[0]:
            every, trained = self._weights
            # Forward 2 per weight and token; backward 2 for what comes before, 2 for the weight itself where it trains.
            flops = (4 * every + 2 * trained) * work["work/updated"] + 2 * every * work.get("work/forward", 0.0)
            more["mfu"] = (flops / self._peak, took)
        return {metrics.SPEED + name: value for name, value in more.items()}

    def _trace(self, begin: bool, result=None) -> None:
        first, count = self._profile
        if not first:
            return
        if begin and self.step == first:
            jax.profiler.start_trace(str(self.folder / "profile"))
        if not begin and self.step == first + count - 1:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Ends a profile that the stage was too short for, and the table; safe to call twice."""
        first, count = self._profile
        if first and first <= self.step < first + count - 1:
            jax.profiler.stop_trace()
            self._profile = (0, 1)
        if self._table is not None:
            self._table.close()
            self._table = None


def multiplied(flat: dict) -> int:
    """How many parameters of the decoder every token is multiplied by: all but the table of embeddings.

    `flat`: path -> array, as in `state.TrainState`. A tied table is the output matrix and counts.
    """
    tied = not any(path.startswith("text/head") or "lm_head" in path for path in flat)
    return sum(
        x.size for path, x in flat.items() if path.startswith("text/") and (tied or "embed" not in path)
    )  # fmt: skip
