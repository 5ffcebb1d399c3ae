"""The events of a whole memory on the devices, searched over all of them; it grows in place.

    table = EventTable(jax.devices())
    table.update(reader)                       # reads what was added since
    table.nearest(query_d, 3)                  # [(video, event), ...], best first

Rows lie over all devices in the order in which the reader lists its videos: the winners and their ties are those of one
device. The number of rows is rounded up to one of four sizes per doubling, so that a memory that grows is searched by
the same compiled program until it outgrows its size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from marc_jax.memory import retrieve, store

AXIS = "events"
LEAST = 64  # rows of a device


def rounded(n: int) -> int:
    """The next of 4, 5, 6, 7 times a power of two: at most a quarter more than n."""
    step = 1 << max(n.bit_length() - 3, 0)
    return -(-n // step) * step


class EventTable:
    """Embeddings of every event of a memory. One row is one event, or one frame of an event of "max" embeddings."""

    def __init__(self, devices, *, approx: bool = False):
        """Args:
        devices: the rows are divided among them.
        approx: find nominees by `lax.approx_max_k`, see `retrieve.search`.
        """
        self._mesh = Mesh(np.asarray(devices).ravel(), (AXIS,))
        self._approx = approx
        self._clear()

    def _clear(self) -> None:
        self._shards, self._seen = 0, []  # of the reader, when it was last looked at
        self._videos: list[str] = []
        self._owner_n = self._event_n = np.zeros(0, np.int64)  # of each row: its video, and its event's number there
        self._frames = 1  # rows of one event, at most
        self._emb_nd = None

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._owner_n)

    def update(self, reader: store.MemoryReader) -> None:
        """Adds the videos that `reader` has seen since; all anew where one was replaced, or the table is full."""
        if reader.shards == self._shards:
            return
        seen = list(reader.contents().items())
        if seen[: len(self._seen)] != self._seen:
            self._clear()
        rows_md = self._read(reader, [video for video, _ in seen[len(self._seen) :]])
        if len(rows_md):
            self._put(reader, rows_md)
        self._shards, self._seen = reader.shards, seen

    def _read(self, reader: store.MemoryReader, videos: list[str]) -> np.ndarray:
        """Rows [M, D] of these videos, whose owners are noted."""
        owners, events, rows = [self._owner_n], [self._event_n], []
        for video in videos:
            emb = reader.head(video).event_embeddings
            emb_efd = emb if emb.ndim == 3 else emb[:, None]
            owners.append(np.full(emb_efd[..., 0].size, len(self._videos)))
            events.append(np.repeat(np.arange(len(emb_efd)), emb_efd.shape[1]))
            rows.append(emb_efd.reshape(-1, emb_efd.shape[2]))
            self._frames = max(self._frames, rounded(emb_efd.shape[1]))
            self._videos.append(video)
        self._owner_n, self._event_n = np.concatenate(owners), np.concatenate(events)
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def _put(self, reader: store.MemoryReader, rows_md: np.ndarray) -> None:
        """Onto the devices: behind the rows that are there, or all of them where there is no room."""
        m, ways = len(rows_md), self._mesh.size
        first = len(self) - m
        wide = max(rounded(m), LEAST)
        if self._emb_nd is not None and len(self) <= len(self._emb_nd) and wide * ways <= len(self._emb_nd):
            padded = np.pad(rows_md, ((0, wide - m), (0, 0)))
            self._emb_nd = _append(self._mesh, self._emb_nd, padded, first, m)
            return
        if first:
            videos = self._videos
            self._clear()
            rows_md = self._read(reader, videos)
        size = ways * max(rounded(-(-(len(self) + len(self) // 8) // ways)), LEAST)
        padded = np.pad(rows_md, ((0, size - len(self)), (0, 0)))
        self._emb_nd = jax.device_put(padded, NamedSharding(self._mesh, P(AXIS)))

    def nearest(self, query_d: np.ndarray, k: int) -> list[tuple[str, int]]:
        """(video, number of the event in it, from 0) of the at most k events nearest to a question, best first."""
        if not len(self):
            return []
        best = _search(self._mesh, query_d[None], self._emb_nd, len(self), k * self._frames, self._approx)
        rows = [row for row in np.asarray(best)[0].tolist() if row >= 0]
        events = dict.fromkeys((self._videos[self._owner_n[row]], int(self._event_n[row])) for row in rows)
        return list(events)[:k]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _append(mesh, emb_nd, new_md, first, count):
    """Writes new_md[:count] from row `first` on, each device its part of them; M is at most a device's rows."""

    def local(emb_nd, new_md, first, count):
        n, m = emb_nd.shape[0], new_md.shape[0]
        begin = first - lax.axis_index(AXIS) * n
        at = jnp.clip(begin, 0, n - m)  # a window of m rows that holds all that fall into this device
        new_m = at + jnp.arange(m) - begin
        window_md = lax.dynamic_slice_in_dim(emb_nd, at, m)
        here_m = (new_m >= 0) & (new_m < count)
        window_md = jnp.where(here_m[:, None], new_md[jnp.clip(new_m, 0, m - 1)], window_md)
        return lax.dynamic_update_slice_in_dim(emb_nd, window_md, at, 0)

    specs = P(AXIS), P(), P(), P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)(
        emb_nd, new_md, first, count
    )


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _search(mesh, query_qd, emb_nd, count, k, approx):
    mask_n = jnp.arange(emb_nd.shape[0]) < count
    return retrieve.search_sharded(mesh, AXIS, query_qd, emb_nd, k, mask_n=mask_n, approx=approx)[1]
