"""Checkpoint leaves that never exist whole: an array known by shape, dtype and a function that gives any part of it.

Orbax holds every numpy array of a save, and its compressed copy, at once. A `Streamed` leaf is asked for one chunk
after another instead, each written before the next few are read, in the same format on disk as any other array.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

CHUNK_BYTES = 2**24
IN_FLIGHT = 4  # chunks read and not yet on disk


class Streamed(np.ndarray):
    """Looks like an array of this shape and dtype; holds no numbers. Only `checkpoint.save` can use it.

    Attributes:
      part: (index: tuple of slices) -> the numbers there.
      layered: axis 0 is layers, which are never in one chunk together.
      written: chunks that were written; the save fails where it is not all of them.
    """

    part: Callable[[tuple[slice, ...]], np.ndarray]
    layered: bool
    written: int

    def __new__(cls, shape: tuple[int, ...], dtype, part: Callable, layered: bool = False):
        self = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        self.part, self.layered, self.written = part, layered, 0
        return self

    def __deepcopy__(self, memo):
        return self

    @property
    def complete(self) -> bool:
        return self.written == len(list(indices(self.shape, chunk_shape(self))))


def chunk_shape(leaf: Streamed, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """At most `limit` bytes: single layers, then the first axes halved as often as needed: shards fall on chunks."""
    shape = [1, *leaf.shape[1:]] if leaf.layered else list(leaf.shape)
    for axis in range(int(leaf.layered), len(shape)):
        while math.prod(shape) * leaf.dtype.itemsize > limit and shape[axis] > 1:
            shape[axis] = -(-shape[axis] // 2)
    return tuple(shape)


def indices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The index of every chunk, in order."""
    starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, chunk, shape, strict=True))


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, with streamed ones written chunk by chunk, one leaf after another."""

    def __init__(self):
        super().__init__()
        self._turn = asyncio.Semaphore(1)

    async def _open_and_write(self, value, tspec, ts_context):
        if not isinstance(value, Streamed):
            return await super()._open_and_write(value, tspec, ts_context)
        chunk = chunk_shape(value)
        metadata = tspec.get("base", tspec)["metadata"]
        if metadata["chunks"] != list(value.shape) and tuple(metadata["chunks"]) != tuple(value.shape):
            raise ValueError(f"chunks {metadata['chunks']} of a streamed array of shape {value.shape}")
        metadata["chunks"] = list(chunk)
        async with self._turn:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            todo = indices(value.shape, chunk)
            while group := list(itertools.islice(todo, IN_FLIGHT)):
                part = lambda index: np.asarray(value.part(index), value.dtype, order="C")  # noqa: E731
                await asyncio.gather(*[store[index].write(part(index)) for index in group])
                value.written += len(group)


def handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, for trees with streamed leaves."""
    kinds = ((np.ndarray, _Handler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry(*kinds))
