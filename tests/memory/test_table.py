"""The events of a growing memory: the same winners on one device and on eight, without compiling for each size."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_jax.memory import store, table
from marc_jax.memory.encoders import nearest_frames

PRINT = store.fingerprint(model="x")
WIDTH = 16


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def entry(emb, sha="x"):
    events = len(emb)
    spans = np.stack([np.arange(events), np.arange(events) + 1], 1).astype(np.int32)
    return store.MemoryEntry(sha, np.arange(events) / 2, spans, spans / 2, emb, np.zeros((events, 1, 2), np.float32),
                             (1, 1))  # fmt: skip


def write(folder, videos: dict, sha="x"):
    with store.MemoryWriter(folder, PRINT) as writer:
        for name, emb in videos.items():
            writer.add(name, entry(emb, sha + name))


def expected(reader, query_d, k):
    """Plain reference: the best first, the earlier video and event on a tie."""
    every = []
    for place, name in enumerate(reader):
        emb_ed = nearest_frames(reader.head(name).event_embeddings, query_d)
        every += [(-float(np.round(s, 6)), place, i, name) for i, s in enumerate(emb_ed @ query_d)]
    return [(name, i) for _, _, i, name in sorted(every)[:k]]


def growing(folder, seed: int, rounds: int = 6):
    """Yields a reader after each of some writes; rows repeat, within a video and between videos."""
    rng, reader = np.random.default_rng(seed), None
    common = unit(rng, 1, WIDTH)
    for step in range(rounds):
        videos = {}
        for i in range(int(rng.integers(1, 5))):
            emb = unit(rng, int(rng.integers(1, 60)), WIDTH)
            emb[rng.random(len(emb)) < 0.2] = common
            videos[f"{step}-{i}"] = emb
        write(folder, videos)
        reader = reader or store.MemoryReader(folder, PRINT)
        reader.refresh()
        yield reader, np.concatenate([common, unit(rng, 2, WIDTH)])


@pytest.mark.parametrize("ways", [1, 3, 8])
def test_a_growing_memory_gives_the_same_winners_on_any_number_of_devices(tmp_path, ways):
    if len(jax.devices()) < ways:
        pytest.skip(f"needs {ways} (simulated) devices")
    events = table.EventTable(jax.devices()[:ways])
    assert events.nearest(np.ones(WIDTH, np.float32), 3) == []
    for reader, queries in growing(tmp_path, 3):
        events.update(reader)
        for query in queries:
            assert events.nearest(query, 7) == expected(reader, query, 7)
    assert len(events) == sum(len(reader.head(name).event_embeddings) for name in reader)


def test_growing_compiles_for_few_sizes(tmp_path):
    events, sizes = table.EventTable(jax.devices()[:2]), set()
    rng = np.random.default_rng(0)
    table._search.clear_cache()
    reader = None
    for step in range(40):
        write(tmp_path, {str(step): unit(rng, 20, WIDTH)})
        reader = reader or store.MemoryReader(tmp_path, PRINT)
        reader.refresh()
        events.update(reader)
        assert events.nearest(unit(rng, WIDTH), 3)
        sizes.add(len(events._emb_nd))
    assert len(events) == 800 and table._search._cache_size() == len(sizes) <= 10


def test_a_replaced_video_is_forgotten(tmp_path):
    rng = np.random.default_rng(1)
    first = {name: unit(rng, 5, WIDTH) for name in "abc"}
    write(tmp_path, first)
    reader, events = store.MemoryReader(tmp_path, PRINT), table.EventTable(jax.devices())
    events.update(reader)
    old = first["b"][3]
    assert events.nearest(old, 1) == [("b", 3)]
    write(tmp_path, {"b": unit(rng, 2, WIDTH)}, sha="other")
    reader.refresh()
    events.update(reader)
    assert len(events) == 12 and events.nearest(old, 12) == expected(reader, old, 12)
    before = events._emb_nd
    events.update(reader)
    assert events._emb_nd is before


def test_an_event_is_as_near_as_its_nearest_frame(tmp_path):
    rng = np.random.default_rng(2)
    write(tmp_path, {"short": unit(rng, 6, 2, WIDTH), "long": unit(rng, 4, 9, WIDTH)})
    reader, events = store.MemoryReader(tmp_path, PRINT), table.EventTable(jax.devices(), approx=True)
    events.update(reader)
    for query in unit(rng, 5, WIDTH):
        assert events.nearest(query, 3) == expected(reader, query, 3)
    assert len(events.nearest(unit(rng, WIDTH), 99)) == 10


@settings(max_examples=30)
@given(st.integers(1, 10**7))
def test_sizes_are_rounded_up_by_a_quarter_at_most(n):
    up = table.rounded(n)
    assert n <= up <= max(1.25 * n, 4) and table.rounded(up) == up
