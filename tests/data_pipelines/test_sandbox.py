"""Decoding in child processes: whatever a decoder does, the others and the main process go on."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from fake_decoders import OwnBudget

from data_pipelines import sandbox, video
from data_pipelines.patches import VideoBudget, smart_resize
from data_pipelines.sandbox import Pool, decode_many
from data_pipelines.video import Clip, Limits, VideoError

FAKE = "fake_decoders:decode"
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at /proc")


def children(of: int | None = None) -> set[int]:
    """Process ids of the children, also of those that ended and were not waited for."""
    found = set()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == (of or os.getpid()):
            found.add(int(folder.name))
    return found


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left():
    """Every test ends with the processes, the shared memory and the open files it began with."""
    before, shared, fds = children(), set(os.listdir("/dev/shm")), handles()
    yield
    assert children() <= before
    assert set(os.listdir("/dev/shm")) <= shared
    assert handles() == fds


def outcome(results):
    return {path: got.reason if isinstance(got, VideoError) else got.frames[0, 0, 0, 0] for path, got in results}


def test_a_decoder_that_hangs_or_dies_takes_only_its_file_down():
    kinds = ["hang", "killed", "segfault", "abort", "exits", "memory", "bug", "bad", "deaf"]
    paths = [path for i, kind in enumerate(kinds) for path in (f"{kind}.mp4", f"good{'x' * i}.mp4")]
    got = outcome(decode_many(paths, workers=2, seconds=1.5, decoder=FAKE))
    assert list(got) == paths  # in order, nothing lost
    good = {path: len(path) for path in paths if path.startswith("good")}
    bad = {
        "hang.mp4": "decoding took longer than 1.5 s",
        "killed.mp4": "its decoder died (signal SIGKILL)",
        "segfault.mp4": "its decoder died (signal SIGSEGV)",
        "abort.mp4": "its decoder died (signal SIGABRT)",
        "exits.mp4": "its decoder died (exit code 3: the library gave up)",
        "memory.mp4": "decoding needs more than the 8192 MiB of memory a worker may use",
        "bug.mp4": "the decoder failed (KeyError: 'stream')",
        "bad.mp4": "damaged",
        "deaf.mp4": "decoding took longer than 1.5 s",
    }
    assert got == good | bad


def test_only_workers_that_died_are_replaced():
    with Pool(1, 5, decoder=FAKE) as pool:
        first, again = (pool.decode("pid.mp4").seconds[1] for _ in range(2))
        assert first == again and pool.restarts == 0
        for kind in ("bad", "bug", "memory"):
            with pytest.raises(VideoError):
                pool.decode(f"{kind}.mp4")
        assert pool.decode("pid.mp4").seconds[1] == first
        with pytest.raises(VideoError, match="killed.mp4: its decoder died"):
            pool.decode("killed.mp4")
        assert pool.decode("pid.mp4").seconds[1] != first and pool.restarts == 1


def test_a_worker_ends_after_many_files(monkeypatch):
    monkeypatch.setattr(sandbox, "FILES_PER_WORKER", 2)
    with Pool(1, 5, decoder=FAKE) as pool:
        pids = [pool.decode("pid.mp4").seconds[1] for _ in range(4)]
        assert pids[0] == pids[1] != pids[2] == pids[3] and pool.restarts == 0


def test_workers_load_no_accelerator_code():
    with Pool(1, 5, decoder=FAKE) as pool, pytest.raises(VideoError, match=r"loaded: \[\]"):
        pool.decode("modules.mp4")


@pytest.mark.parametrize("resize", [None, (28, 56), VideoBudget(max_pixels=9999), OwnBudget(most=8), smart_resize])
def test_sampling_arrives_as_it_was_given(resize):
    sampling = {"fps": None, "start": 0.5, "resize": resize, "limits": Limits(max_frames=7), "threads": 3}
    limits = Limits(max_frames=7, decode_seconds=5)
    with Pool(1, 5, decoder=FAKE) as pool, pytest.raises(VideoError) as caught:
        pool.decode("sampling.mp4", sampling)
    there, here = (
        re.sub(" at 0x\\w+", "", text) for text in (caught.value.reason, repr(sampling | {"limits": limits}))
    )
    assert there == here


def test_wrong_calls_are_no_bad_files():
    with pytest.raises(TypeError, match="fqs"):
        list(decode_many(["a.mp4"], {"fqs": 2}, workers=1, decoder=FAKE))
    with pytest.raises(ValueError, match="importable"):
        list(decode_many(["a.mp4"], {"resize": lambda h, w: (h, w)}, workers=1, decoder=FAKE))
    with pytest.raises(RuntimeError, match="cannot start.*no_such_module"):
        list(decode_many(["a.mp4"], workers=1, decoder="no_such_module:decode"))
    with pytest.raises(ValueError, match="positive"):
        Pool(0)
    pool = Pool(1)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.decode("a.mp4")


def test_leaving_early_ends_the_workers():
    paths = iter([*(f"good{i}.mp4" for i in range(5)), "hang.mp4", *(f"more{i}.mp4" for i in range(1000))])
    begun = time.monotonic()
    for _ in decode_many(paths, workers=2, seconds=500, decoder=FAKE):
        break
    assert next(paths) < "more9"  # it did not read the whole list ahead
    assert time.monotonic() - begun < 100  # nor wait for what hangs


def test_frames_are_those_of_this_process(tmp_path):
    from test_video import encode

    path = encode(tmp_path / "a.mp4", 30)
    sampling = {"fps": 5.0, "resize": (28, 56)}
    here = video.read_frames(path, **sampling)
    ((name, there),) = decode_many([path], sampling, workers=1)
    assert name == path and isinstance(there, Clip) and there.info == here.info
    assert (there.frames == here.frames).all() and there.frames.dtype == np.uint8
    assert (there.seconds == here.seconds).all() and (there.index == here.index).all()
    there.frames[0] = 0  # an array like any other


@pytest.mark.parametrize("name", ["av1_video.mkv", "dog.mp4", "newtonscradle.gif", "video_90.mov", "kryp-2.ts"])
def test_real_frames_are_those_of_this_process_whatever_the_threads(test_data, name):
    path, sampling = test_data / "videos" / name, {"fps": 4.0, "max_frames": 28, "resize": (56, 56)}
    here = video.read_frames(path, **sampling)
    with Pool(1) as pool:
        for threads in (None, 3):
            there = pool.read_frames(path, **sampling | ({"threads": threads} if threads else {}))
            assert there.info == here.info and there.seconds.tobytes() == here.seconds.tobytes()
            assert there.frames.tobytes() == here.frames.tobytes() and there.frames.shape == here.frames.shape


def test_a_file_too_large_for_the_workers_memory(tmp_path):
    from test_video import encode

    path = encode(tmp_path / "a.mp4", 30)
    sampling = {"fps": None, "resize": (2000, 3000)}
    ((_, got),) = decode_many([path], sampling, workers=1, memory=512 << 20)
    assert isinstance(got, VideoError) and "memory" in got.reason


def test_a_parent_that_is_killed_leaves_no_workers(tmp_path):
    code = (
        "import sys, threading; from data_pipelines.sandbox import Pool\n"
        f"pool = Pool(2, 2, decoder={FAKE!r}); pool.decode('a.mp4')\n"
        "threading.Thread(target=pool.decode, args=('deaf.mp4',), daemon=True).start()\n"
        "pool.decode('b.mp4'); print('ready', flush=True); sys.stdin.read()\n"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent.stdout, parent.stdin:
        assert parent.stdout.readline() == "ready\n"
        workers = children(parent.pid)
        assert len(workers) == 2
        parent.kill()
        parent.wait()
    bound = time.monotonic() + 60
    while (left := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < bound:
        time.sleep(0.1)
    assert not left
