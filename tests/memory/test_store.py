"""The memory on disk: bit-identical, refused when stale, safe under a crash and under two writers."""

import multiprocessing
import os
import signal
import time

import ml_dtypes
import numpy as np
import pytest

from marc_jax.memory import store
from marc_jax.memory.entry import ARRAYS

PRINT = store.fingerprint(model="a" * 64, preprocessing={"fps": 2.0, "pixels": 128})


def entry(seed=0, dtype=ml_dtypes.bfloat16, t=6):
    rng = np.random.default_rng(seed)
    return store.MemoryEntry(
        video_sha256=f"{seed:064x}",
        seconds=np.arange(t) / 2,
        event_spans=np.array([[0, 2], [2, t]], np.int32),
        event_seconds=np.array([[0, 1], [1, t / 2]]),
        event_embeddings=rng.normal(size=(2, 8)).astype(np.float32),
        tokens=rng.normal(size=(t, 4, 16)).astype(dtype),
        grid=(2, 2),
        extra={"path": "a/b.mp4"},
    )


def same(a, b):
    for name in ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name
    assert (a.video_sha256, a.grid, a.extra) == (b.video_sha256, b.grid, b.extra)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
def test_read_back_is_bit_identical(tmp_path, dtype):
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        for i in range(5):
            writer.add(f"v{i}", entry(i, dtype, t=3 + i))
    reader = store.MemoryReader(tmp_path, PRINT)
    assert sorted(reader) == [f"v{i}" for i in range(5)] and "v9" not in reader
    for i in (3, 0, 4):
        same(reader[f"v{i}"], entry(i, dtype, t=3 + i))


def test_int8_is_close_and_small(tmp_path):
    big = entry(0, np.float32, t=4096)
    for name in ("int8", "float32"):
        with store.MemoryWriter(tmp_path / name, PRINT, tokens=name) as writer:
            writer.add("v", big)
    got = store.MemoryReader(tmp_path / "int8", PRINT)["v"].tokens
    assert got.dtype == np.float32
    assert np.abs(got - big.tokens).max() <= np.abs(big.tokens).max() / 254 * 1.001
    size = {p: sum(f.stat().st_size for f in (tmp_path / p).iterdir()) for p in ("int8", "float32")}
    assert size["int8"] < 0.5 * size["float32"]


def test_another_model_is_refused_and_named(tmp_path):
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        writer.add("v", entry())
    other = store.fingerprint(model="b" * 64, preprocessing={"pixels": 128, "fps": 2.0})
    for use in (store.MemoryReader, store.MemoryWriter):
        with pytest.raises(store.StaleMemory, match=r"model: a+\.\.\. in the memory, b+\.\.\. wanted") as error:
            use(tmp_path, other)
        assert "preprocessing" not in str(error.value)
    same(store.MemoryReader(tmp_path, None)["v"], entry())


def test_a_changed_video_file_is_refused(tmp_path):
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        writer.add("v", entry(1))
    reader = store.MemoryReader(tmp_path, PRINT)
    same(reader.get_checked("v", entry(1).video_sha256), entry(1))
    with pytest.raises(store.StaleMemory, match="file of video 'v' has changed"):
        reader.get_checked("v", "f" * 64)


def test_the_newest_entry_counts_and_refresh_sees_it(tmp_path):
    writer = store.MemoryWriter(tmp_path, PRINT)
    writer.add("v", entry(1))
    writer.flush()
    reader = store.MemoryReader(tmp_path, PRINT)
    writer.add("v", entry(2))
    same(reader["v"], entry(1))
    writer.flush()
    reader.refresh()
    same(reader["v"], entry(2))
    assert "v" in writer and "w" not in writer and len(reader) == 1


def _write_until_killed(path, ready):
    writer = store.MemoryWriter(path, PRINT)
    writer.add("kept", entry(1))
    writer.flush()
    for i in range(10**6):
        writer.add(f"lost{i}", entry(i))
        if i == 50:
            ready.set()


def test_a_killed_writer_loses_only_what_was_not_flushed(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_write_until_killed, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob("*.tmp"))
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        assert "kept" in writer and "lost0" not in writer and not list(tmp_path.glob("*.tmp"))
        writer.add("next", entry(2))
    assert sorted(store.MemoryReader(tmp_path, PRINT)) == ["kept", "next"]


def _write_and_flush(path, name, begun):
    writer = store.MemoryWriter(path, PRINT)
    for i in range(10**6):
        writer.add(f"{name}{i}", entry(i % 100))
        if i % 3 == 2:
            writer.flush()
            begun.set()


def test_killed_at_any_moment_a_memory_is_whole(tmp_path):
    """Two writers at once, one of them killed while it writes and flushes: what either flushed is there and right."""
    context, rng = multiprocessing.get_context("spawn"), np.random.default_rng(0)
    for turn in range(6):
        begun = context.Event()
        process = context.Process(target=_write_and_flush, args=(tmp_path, f"v{turn}_", begun))
        process.start()
        assert begun.wait(60)
        with store.MemoryWriter(tmp_path, PRINT) as beside:
            beside.add(f"beside{turn}", entry(turn))
            time.sleep(rng.uniform(0, 0.1))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        reader = store.MemoryReader(tmp_path, PRINT)
        assert {f"beside{i}" for i in range(turn + 1)} <= set(reader)
        for name in list(reader):
            if name.startswith(f"v{turn}_"):
                same(reader[name], entry(int(name.split("_")[1]) % 100))
    assert sum(name.startswith("v") for name in reader) > 6
    store.MemoryWriter(tmp_path, PRINT)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_living_writers_shard_is_left_alone(tmp_path):
    writer = store.MemoryWriter(tmp_path, PRINT)
    writer.add("a", entry(1))
    (left,) = tmp_path.glob("*.tmp")
    (tmp_path / "0-dead.arrayrecord.tmp").write_bytes(b"half a shard")
    assert store.remove_leftovers(tmp_path) == ["0-dead.arrayrecord.tmp"] and left.exists()
    writer.flush()
    assert sorted(store.MemoryReader(tmp_path, PRINT)) == ["a"] and store.remove_leftovers(tmp_path) == []


def test_another_machines_shard_is_left_for_a_day(tmp_path):
    """Its lock may not be seen here."""
    for age, name in ((0, "1-a-deadbeef"), (90_000, "2-b-deadbeef"), (0, f"3-c-{store.MACHINE}")):
        path = tmp_path / f"{name}.arrayrecord.tmp"
        path.write_bytes(b"half a shard")
        os.utime(path, (time.time() - age,) * 2)
    assert sorted(store.remove_leftovers(tmp_path)) == [
        "2-b-deadbeef.arrayrecord.tmp", f"3-c-{store.MACHINE}.arrayrecord.tmp",
    ]  # fmt: skip


def test_more_shards_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "OPEN_SHARDS", 2)
    for i in range(6):
        with store.MemoryWriter(tmp_path, PRINT) as writer:
            writer.add(f"v{i}", entry())
    opened = len(os.listdir("/proc/self/fd"))
    reader = store.MemoryReader(tmp_path, PRINT)
    for i in (0, 5, 3, 0, 1, 2, 4):
        same(reader[f"v{i}"], entry())
    assert reader.shards == 6 and len(os.listdir("/proc/self/fd")) <= opened + 2


def test_heads_are_read_without_tokens_and_contents_without_heads(tmp_path):
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        for i in range(3):
            writer.add(f"v{i}", entry(i))
        assert writer.same_content(f"{1:064x}") == "v1" and writer.same_content("f" * 64) is None
        assert writer.bytes > 3 * entry().tokens.nbytes
        writer.add("v0", entry(9))  # v0's file has changed: its former content is nowhere
        assert writer.same_content(f"{0:064x}") is None and writer.same_content(f"{9:064x}") == "v0"
        writer.add("v0", entry(0))
        assert writer.same_content(f"{0:064x}") == "v0"
    reader = store.MemoryReader(tmp_path, PRINT)
    assert reader.contents() == {f"v{i}": f"{i:064x}" for i in range(3)}
    head = reader.head("v2")
    assert head.tokens.size == 0 and head.event_embeddings.tobytes() == entry(2).event_embeddings.tobytes()


def test_entries_read_last_stay_in_memory_until_they_are_replaced(tmp_path):
    size = entry().nbytes
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        for i in range(3):
            writer.add(f"v{i}", entry(i))
    reader = store.MemoryReader(tmp_path, PRINT, keep_bytes=2 * size)
    first = reader["v0"]
    assert reader["v0"] is first and reader["v1"] is reader["v1"]
    assert reader["v2"].tokens.tobytes() == entry(2).tokens.tobytes()
    assert reader["v0"] is not first and reader["v0"].tokens.tobytes() == first.tokens.tobytes()  # it had to go
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        writer.add("v0", entry(7))
    reader.refresh()
    assert reader["v0"].video_sha256 == entry(7).video_sha256
    nothing_kept = store.MemoryReader(tmp_path, PRINT)
    assert nothing_kept["v1"] is not nothing_kept["v1"]


def test_another_version_of_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "VERSION", 1)
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        writer.add("v", entry())
    monkeypatch.undo()
    with pytest.raises(store.StaleMemory, match="format version 1, this program reads 2; index the videos again"):
        store.MemoryReader(tmp_path, PRINT)


def _write_many(path, name):
    with store.MemoryWriter(path, PRINT, flush_bytes=4000) as writer:
        for i in range(20):
            writer.add(f"{name}{i}", entry(i))
            time.sleep(0.001)


def test_two_writers_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    reader = store.MemoryReader(tmp_path, PRINT)
    assert len(reader) == 40
    same(reader["b7"], entry(7))


def test_damage_is_an_error_that_names_the_shard(tmp_path):
    with store.MemoryWriter(tmp_path, PRINT) as writer:
        writer.add("v", entry(t=64))
    (shard,) = tmp_path.iterdir()
    data = bytearray(shard.read_bytes())
    whole = bytes(data)
    data[2000:2010] = bytes(10)
    shard.write_bytes(data)
    with pytest.raises(store.StoreError, match=shard.name):
        assert store.MemoryReader(tmp_path, PRINT)["v"]
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(store.StoreError, match=shard.name):
        store.MemoryReader(tmp_path, PRINT)


def test_missing_folder_missing_video_and_wrong_entries(tmp_path):
    with pytest.raises(store.StoreError, match="no such memory folder"):
        store.MemoryReader(tmp_path / "nothing", PRINT)
    writer = store.MemoryWriter(tmp_path, PRINT)
    with pytest.raises(ValueError, match="6 patches of tokens, 5 seconds"):
        writer.add("v", store.MemoryEntry(**{**vars(entry()), "seconds": np.arange(5.0)}))
    with pytest.raises(KeyError, match="'v' is not in the memory"):
        store.MemoryReader(tmp_path, PRINT)["v"]
    assert list(tmp_path.iterdir()) == []


def test_hashes(tmp_path):
    a, b = {"x": {"w": np.arange(3)}, "y": np.ones(2)}, {"y": np.ones(2), "x": {"w": np.arange(3)}}
    assert store.tree_sha256(a) == store.tree_sha256(b) != store.tree_sha256({"x": {"w": np.arange(3)}})
    (tmp_path / "f").write_bytes(b"abc")
    assert store.file_sha256(tmp_path / "f").startswith("ba7816bf")
