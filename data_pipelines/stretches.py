"""The frames of one file, decoded by several readers side by side, each its stretch from a key frame on."""

import concurrent.futures
import os
import threading
from collections.abc import Callable

import numpy as np

from data_pipelines.containers import Limits, VideoError
from data_pipelines.patches import MOST_THREADS, VideoBudget, resize_frames, squash

_HELD = 1 << 30  # bytes of packets and pictures that the readers of all stretches may hold
_TAKEN = 8  # frames that are decoded while one is converted to RGB and resized


def cut(starts, wanted: np.ndarray, parts: int) -> list[slice]:
    """Cuts the wanted frames (increasing) into at most `parts` slices that take about as long to decode.

    A slice begins where decoding can begin, at one of `starts`, so nothing is decoded twice.
    """
    starts = np.union1d(starts, 0)
    entry = np.searchsorted(starts, wanted, side="right") - 1
    begin = np.flatnonzero(np.diff(entry, prepend=-1))  # the first wanted frame after each start
    last = np.append(begin[1:], len(wanted)) - 1
    cost = wanted[last] - starts[entry[begin]] + 1 + _TAKEN * (last - begin + 1)
    share = (np.cumsum(cost) - cost / 2) / cost.sum() * parts
    cuts = begin[np.flatnonzero(np.diff(share.astype(int), prepend=-1))]
    return [slice(int(a), int(b)) for a, b in zip(cuts, [*cuts[1:], len(wanted)], strict=True)]


def pictures(starts, wanted: np.ndarray) -> int:
    """How many pictures have to be decoded for the wanted ones (increasing): of each stretch, up to the last."""
    starts = np.union1d(starts, 0)
    entry = np.searchsorted(starts, wanted, side="right") - 1
    last = np.append(np.flatnonzero(np.diff(entry)), len(wanted) - 1)
    return int((wanted[last] - starts[entry[last]] + 1).sum())


def _size(reader, resize, count: int) -> tuple[int, int]:
    """(height, width) that frames are resized to, of `count` sampled ones."""
    height, width = reader.info.height, reader.info.width
    try:
        if isinstance(resize, VideoBudget):
            return resize.size(height, width, count)
        if resize is not None:
            return resize(height, width) if callable(resize) else resize
    except ValueError as error:
        raise VideoError(reader.path, str(error)) from None
    return height, width


def _room(reader, count: int, height: int, width: int, limits: Limits) -> np.ndarray:
    if count * height * width * 3 > limits.max_bytes:
        size = f"{count} frames of {width}x{height}"
        raise VideoError(
            reader.path, f"{size} are over the limit of {limits.max_bytes} bytes: use resize or fewer frames"
        )
    return np.empty((count, height, width, 3), np.uint8)


class _Resizers:
    """Threads that take frames from those that decode; a few frames wait at most."""

    def __init__(self, threads: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._free, self._done = threading.BoundedSemaphore(2 * threads), []

    def put(self, write: Callable, *args) -> None:
        self._free.acquire()
        self._done.append(self._pool.submit(self._run, write, *args))

    def _run(self, write: Callable, *args) -> None:
        try:
            write(*args)
        finally:
            self._free.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, *unused):
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for one in self._done:
                one.result()


def collect(
    reader, index: np.ndarray, resize, limits: Limits, parts: int = 1, threads: int | None = None,
    count: int | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 [T, H, W, 3]: the frames at `index` (increasing, with repeats), resized.

    Args:
      reader: open, of one thread if parts > 1; it is forked then.
      resize, parts, threads: as of `video.read_frames`.
      count: frames that the budget is for; default those of `index`.
    """
    height, width = _size(reader, resize, len(index) if count is None else count)
    out = _room(reader, len(index), height, width, limits)
    unique, place, repeats = np.unique(index, return_index=True, return_counts=True)

    def write(frame, at, times):
        out[at : at + times] = frame if resize is None else resize_frames(frame[None], height, width)

    def fill(reader, rows: slice, put: Callable):
        for (_, frame), at, times in zip(reader.decode(unique[rows]), place[rows], repeats[rows], strict=True):
            put(frame, at, times)

    if parts == 1:
        fill(reader, slice(None), write)
        return out
    # Each reader keeps the file's packets, and its decoder up to twenty pictures of 1.5 bytes a pixel.
    held = os.path.getsize(reader.path) + 30 * reader.info.width * reader.info.height
    shares = cut(reader.starts, unique, max(1, min(parts, _HELD // held)))

    def alone(rows: slice, put: Callable):
        with reader.fork(threads or max(1, parts // len(shares))) as own:
            fill(own, rows, put)

    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool, _Resizers(min(parts, MOST_THREADS)) as resizers:
        put = write if resize is None else lambda *args: resizers.put(write, *args)
        list(pool.map(lambda rows: alone(rows, put), shares))  # the first error in the order of the file is raised
    return out


def key_frames(reader, index: np.ndarray, within: float) -> np.ndarray:
    """int64 [T]: the key frame at or before each of `index`; empty where one is more than `within` seconds before."""
    starts = np.asarray(reader.starts, np.int64)
    at = np.searchsorted(starts, index, side="right") - 1
    if at.min() < 0 or (reader.times[index] - reader.times[starts[at]]).max() > within:
        return np.zeros(0, np.int64)
    return starts[at]


def collect_keys(reader, shown: np.ndarray, side: int, limits: Limits, parts: int = 1) -> np.ndarray:
    """uint8 [T, side, side, 3]: the key frames `shown` (with repeats), each decoded once and alone, squashed."""
    unique, row = np.unique(shown, return_inverse=True)
    _room(reader, len(shown), side, side, limits)
    out = np.empty((len(unique), side, side, 3), np.uint8)

    def fill(reader, rows: np.ndarray):
        for (_, frame), at in zip(reader.decode_starts(unique[rows]), rows, strict=True):
            out[at] = squash(frame[None], side)[0]

    def alone(rows: np.ndarray):
        with reader.fork(1) as own:
            fill(own, rows)

    shares = np.array_split(np.arange(len(unique)), min(parts, len(unique)))
    if len(shares) == 1:
        fill(reader, shares[0])
    else:
        with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(alone, shares))
    return out[row]
