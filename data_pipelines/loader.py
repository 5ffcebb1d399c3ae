"""Batches of records by their number, in Grain worker processes, with bad rows masked and reported.

The position in the data is ONE integer, the number of the next batch: order, epoch and host slice are functions of
it, so a run resumes exactly with other workers, on other hosts, after any interruption.

Grain imports jax (without starting a backend), so it is imported only where batches are made.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.containers import VideoError

UNREADABLE = (VideoError, OSError, ValueError)  # what makes a row bad; anything else is a bug and stops the run


class BadRowsError(RuntimeError):
    """More rows are unreadable than allowed; the message names the last one."""


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of `size` rows in one epoch: int64 [size], the same everywhere for the same seed and epoch."""
    if not shuffle:
        return np.arange(size)
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(size)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Position in this process's stream of examples -> row of the records."""

    size: int
    seed: int
    shuffle: bool
    batch_size: int
    part: int
    parts: int

    def __call__(self, position: int) -> int:
        local = self.batch_size // self.parts
        batch, within = divmod(int(position), local)
        epoch, at = divmod(batch * self.batch_size + self.part * local + within, self.size)
        return int(epoch_order(self.size, self.seed, epoch, self.shuffle)[at])


@dataclasses.dataclass(frozen=True)
class _Load:
    records: Sequence
    load: Callable

    def __call__(self, row: int) -> dict:
        record = self.records[row]
        try:
            return {"row": row, "value": self.load(record), "bad": None}
        except UNREADABLE as error:
            return {"row": row, "value": None, "bad": describe_error(record, row, error)}


def describe_error(record, row: int, error: BaseException) -> dict:
    """{row, path, reason}, a line of bad_samples.jsonl. The row is the one in the source file where it is known."""
    path = getattr(error, "path", None) or getattr(record, "path", None) or (record if isinstance(record, str) else "")
    known = getattr(record, "row", -1)
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return {"row": known if known >= 0 else row, "path": str(path), "reason": reason}


@dataclasses.dataclass(frozen=True)
class _Collate:
    blank: Any

    def __call__(self, items: Sequence[dict]) -> dict:
        """Stacks values leaf by leaf; a bad row's place holds the blank value, or zeros."""
        good = [item["value"] for item in items if item["bad"] is None]
        blank = self.blank if self.blank is not None else _zeros(good[0]) if good else None
        values = [blank if item["bad"] is not None else item["value"] for item in items]
        batch = {
            "row": np.array([item["row"] for item in items], np.int64),
            "mask": np.array([item["bad"] is None for item in items]),
            "bad": json.dumps([item["bad"] for item in items if item["bad"] is not None]),
        }
        return batch | ({} if blank is None and not good else {"value": _stack(values)})


def _zeros(value):
    if isinstance(value, dict):
        return {key: _zeros(part) for key, part in value.items()}
    return np.zeros_like(value) if isinstance(value, np.ndarray | np.generic | int | float | bool) else type(value)()


def _stack(values):
    """Arrays and numbers of equal shape become one array, dicts are stacked by key, the rest stays a list."""
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], np.ndarray | np.generic | int | float | bool):
        if len({np.shape(value) for value in values}) == 1:
            return np.stack([np.asarray(value) for value in values])
    return list(values)


def dataset(
    records: Sequence,
    load: Callable,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: float | None = None,
    process_index: int = 0,
    process_count: int = 1,
    blank: Any = None,
):
    """A grain.MapDataset of batches; `dataset(...)[k]` is batch k, `[k:]` the rest.

    Args:
      records: the rows; pickled to workers.
      load: record -> a value of arrays, numbers, texts or a dict of them (equal shapes are stacked). A VideoError,
        OSError or ValueError makes the row bad. A module-level function or object, because workers are spawned.
      batch_size: of all processes together; each process gets its contiguous slice of every batch.
      epochs: None repeats without end. Epochs follow each other without a gap: a batch may hold the end of one and the
        beginning of the next; a last incomplete batch is dropped.
      blank: the value that stands in for a bad row; default zeros like a good one of the batch.

    Batches are {"row" int64 [b], "mask" bool [b] (False on bad rows), "bad" (JSON list of {row, path, reason}),
    "value"}; "value" is missing from a batch of bad rows only, where no blank was given.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
    if len(records) == 0:
        raise ValueError("there are no records")
    batches = 2**40 // batch_size if epochs is None else int(len(records) * epochs) // batch_size
    if batches == 0:
        raise ValueError(f"{len(records)} records x {epochs} epochs are fewer than one batch of {batch_size}")
    local = batch_size // process_count
    place = _Place(len(records), seed, shuffle, batch_size, process_index, process_count)
    rows = grain.MapDataset.range(batches * local).map(place).map(_Load(records, load))
    return rows.batch(local, drop_remainder=True, batch_fn=_Collate(blank))


def iterate(
    records: Sequence,
    load: Callable,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    threads: int | None = None,
    on_bad: str = "mask",
    max_bad_fraction: float = 0.01,
    report: str | os.PathLike | None = None,
    **options,
) -> Iterator[dict]:
    """Yields batches `start`, `start + 1`, ... of `dataset(records, load, batch_size=batch_size, **options)`.

    The same batches in the same order for any number of worker processes (0: `threads` of this one, default
    `prefetch`). `batch["number"]` is the batch's number: keep `number + 1` in the checkpoint. `batch["bad"]` is a list
    of {row, path, reason}; each row is appended once to the JSON-lines file `report`.

    Raises:
      BadRowsError: a row is unreadable and on_bad is "error", or more than `max_bad_fraction` of all records were.
    """
    if on_bad not in ("mask", "error"):
        raise ValueError(f"on_bad {on_bad!r} is not one of mask, error")
    import grain

    source = dataset(records, load, batch_size=batch_size, **options)[start:]
    threads = grain.ReadOptions(
        num_threads=0 if workers else threads or prefetch, prefetch_buffer_size=max(1, prefetch) * batch_size
    )
    batches = source.to_iter_dataset(threads)
    if workers:
        _mark_flags_parsed()
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # inherited by workers: each is one of many already
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    known: set[int] = set()
    logged = _logged_rows(report)
    for number, batch in enumerate(batches, start):
        bad = json.loads(batch["bad"])
        for line in bad:
            if report is not None and line["row"] not in logged:
                with open(report, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            logged.add(line["row"])
            known.add(line["row"])
            if on_bad == "error" or len(known) > max_bad_fraction * len(records):
                allowed = "" if on_bad == "error" else f", more than {max_bad_fraction:.1%} of {len(records)}"
                text = f"row {line['row']}: {line['path']}: {line['reason']} ({len(known)} bad rows so far{allowed})"
                raise BadRowsError(text)
        yield batch | {"number": number, "bad": bad}


def _mark_flags_parsed():
    """Grain's worker processes read absl flags, which a script or pytest never parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _logged_rows(report) -> set[int]:
    if report is None or not os.path.exists(report):
        return set()
    with open(report, encoding="utf-8") as file:
        return {json.loads(line)["row"] for line in file if line.endswith("\n")}


def _guarded(fn: Callable, numbered: tuple[int, Any]) -> tuple[Any, dict | None]:
    """(fn(item), None), or (None, the line of bad_samples.jsonl), of (row, item)."""
    row, item = numbered
    try:
        return fn(item), None
    except UNREADABLE as error:
        return None, describe_error(item, row, error)


def work_ahead(
    items: Iterable, fn: Callable, workers: int, *, held: int | None = None, in_order: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, fn(item)), computed in threads ahead of who takes them; what fn raises is raised here.

    Args:
      items: read as the work proceeds.
      workers: threads (decoding releases the GIL); below 1 everything runs here.
      held: at most so many items are begun and not yet taken from the iterator, so memory is bounded however slowly
        they are taken; default workers + 1.
      in_order: as the items come, otherwise as they are done.

    Left early, it waits for the items that are being worked on and begins no other.
    """
    if workers < 1:
        yield from ((item, fn(item)) for item in items)
        return
    held, items = held or workers + 1, iter(items)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        begun: dict = {}
        try:
            while True:
                for item in itertools.islice(items, held - len(begun)):
                    begun[pool.submit(fn, item)] = item
                if not begun:
                    return
                awaited = list(begun)[: 1 if in_order else None]
                done = concurrent.futures.wait(awaited, return_when=concurrent.futures.FIRST_COMPLETED).done
                for future in sorted(done, key=awaited.index):
                    yield begun.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def decode_many(
    paths: Sequence, fn: Callable, workers: int = 0, *, progress: Callable[[int, int], None] | None = None
) -> tuple[list, list[dict]]:
    """fn(path) for every path, in order; `progress` is called with (done, total) after each.

    Returns:
      Results in the order of `paths`, None where it failed, and the failures as {row, path, reason}, in the same order.
      Errors other than VideoError, OSError and ValueError stop everything and are raised.
    """
    results: list = [None] * len(paths)
    work = work_ahead(enumerate(paths), functools.partial(_guarded, fn), workers)
    for done, ((row, _), result) in enumerate(work, 1):
        results[row] = result
        if progress:
            progress(done, len(paths))
    return [value for value, _ in results], [bad for _, bad in results if bad is not None]


def decode_ahead(paths: Iterable, fn: Callable, workers: int = 2) -> Iterator[tuple[Any, Any, dict | None]]:
    """Yields (path, fn(path), None), or (path, None, {row, path, reason}) where it failed, as they are done.

    At most workers + 1 paths are begun and not yet taken, see `work_ahead`. Errors other than VideoError, OSError and
    ValueError are raised.
    """
    for (_, path), (value, bad) in work_ahead(enumerate(paths), functools.partial(_guarded, fn), workers):
        yield path, value, bad
