"""Decoding in child processes: a file that hangs or kills its decoder costs only itself.

    for path, clip in decode_many(paths, {"fps": 2.0, "resize": (224, 224)}, workers=2, seconds=60):
        if isinstance(clip, VideoError): ...

A child is a fresh interpreter that imports neither jax nor the caller's `__main__`; it decodes one file at a time under
a deadline and a limit of memory, and is replaced if it does not answer. Frames come back through anonymous shared
memory: no name that could be left behind, no limit by the size of /dev/shm.
"""

import contextlib
import inspect
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from data_pipelines import loader, video
from data_pipelines.containers import VideoError, VideoInfo
from data_pipelines.decode_worker import LINE, pack
from data_pipelines.video import Clip

MEMORY = 8 << 30  # bytes of address space of one worker
STARTS_WITHIN = 120.0  # seconds
FILES_PER_WORKER = 500  # then a fresh one takes over: what a decoder leaks does not add up

_MAIN = "from data_pipelines.decode_worker import serve; serve({}, {!r}, {})"


class _Worker:
    """One child process and our end of its socket; used by one thread at a time."""

    def __init__(self, decoder: str, memory: int):
        self.files, self._rest, self._last_words = 0, b"", ""
        self._stderr = tempfile.TemporaryFile()
        self._sock, theirs = socket.socketpair()
        folders = os.pathsep.join(p or os.getcwd() for p in sys.path)
        # The allocator settings of a training process would keep every freed frame; threads are FFmpeg's alone.
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        env |= {"PYTHONPATH": folders, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN.format(theirs.fileno(), decoder, memory)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
            )

    def wait_until_ready(self):
        """RuntimeError with the child's last words if it cannot start at all."""
        reply, _ = self._receive(time.monotonic() + STARTS_WITHIN)
        if reply is None:
            self.close()
            raise RuntimeError(f"a decoding process cannot start: {self._last_words or self._cause()}")

    def ask(self, path: str, sampling: dict, seconds: float) -> Clip:
        """VideoError with reason; `alive` is False afterwards if the process is of no more use."""
        self.files += 1
        request = json.dumps({"path": path, "sampling": sampling, "seconds": seconds})
        try:
            self._sock.settimeout(seconds)
            self._sock.sendall(request.encode() + b"\n")
            reply, fds = self._receive(time.monotonic() + seconds)
        except OSError:
            reply, fds = None, []
        if reply is None:
            hung = self._process.poll() is None and not self._ended()
            self.close()
            reason = f"decoding took longer than {seconds:g} s" if hung else f"its decoder died ({self._cause()})"
            raise VideoError(path, reason)
        if "error" in reply:
            raise VideoError(path, reply["error"])
        return _clip(path, reply, fds)

    def _receive(self, deadline: float) -> tuple[dict | None, list[int]]:
        """One answer; None after the deadline or when the child is gone."""
        line, handles = self._rest, []
        while b"\n" not in line:
            left = deadline - time.monotonic()
            try:
                self._sock.settimeout(max(left, 1e-3))
                data, fds, _, _ = socket.recv_fds(self._sock, LINE, 4)
            except OSError:  # among them TimeoutError
                data, fds = b"", []
            handles += fds
            if not data or (left <= 0 and b"\n" not in data):
                for fd in handles:
                    os.close(fd)
                return None, []
            line += data
        line, self._rest = line.split(b"\n", 1)
        return json.loads(line), handles

    def _ended(self) -> bool:
        """Whether the process ends by itself at once: its socket may close a moment before it can be waited for."""
        try:
            self._sock.settimeout(0)
            if self._sock.recv(1):
                return False
        except BlockingIOError:
            return False
        except OSError:
            pass
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _cause(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            try:
                return f"signal {signal.Signals(-code).name}"
            except ValueError:
                return f"signal {-code}"
        return f"exit code {code}" + (f": {self._last_words}" if self._last_words else "")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and self._sock.fileno() >= 0

    def kill(self):
        """Ends the process; safe from another thread, whose `ask` then fails."""
        self._process.kill()

    def close(self):
        self._process.kill()
        self._process.wait()
        self._sock.close()
        if not self._stderr.closed:
            size = os.fstat(self._stderr.fileno()).st_size
            tail = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()
            self._last_words = tail.splitlines()[-1][:300] if tail else ""
            self._stderr.close()


def _clip(path: str, reply: dict, fds: list[int]) -> Clip:
    """Reads the frames out of the worker's memory into our own, which a worker cannot take back or change."""
    try:
        height, width = (int(n) for n in reply["shape"][1:3])
        count = int(reply["shape"][0])
        kinds = [np.float64, np.int64] + [np.int64] * bool(reply["shown"])
        arrays = [np.empty((count, height, width, 3), np.uint8), *(np.empty(count, kind) for kind in kinds)]
        with open(fds[0], "rb", closefd=False) as memory:
            if sum(memory.readinto(array.reshape(-1).view(np.uint8)) for array in arrays) < sum(
                array.nbytes for array in arrays
            ):
                raise VideoError(path, "the decoding process returned less than it announced")
    finally:
        for fd in fds:
            os.close(fd)
    frames, seconds, index, *shown = arrays
    return Clip(frames, seconds, VideoInfo(**reply["info"]), index, tuple(reply["warnings"]), *shown)


class Pool:
    """Worker processes that decode files for any number of threads; close it, or use it in a `with`.

    Args:
      workers: processes; started when first needed.
      seconds: how long one file may take [s] once its worker runs.
      memory: bytes of address space one worker may use.
      decoder: "module:function", function(path, **sampling) -> Clip.
    """

    def __init__(
        self,
        workers: int,
        seconds: float = 60.0,
        *,
        memory: int = MEMORY,
        decoder: str = "data_pipelines.video:read_frames",
    ):
        if workers < 1 or not seconds > 0:
            raise ValueError(f"{workers} workers, {seconds} seconds: both must be positive")
        self.workers, self.seconds, self.restarts = workers, seconds, 0
        self._decoder, self._memory, self._closed = decoder, memory, False
        self._lock, self._all = threading.Lock(), set()
        self._idle = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def decode(self, path, sampling: Mapping | None = None) -> Clip:
        """`video.read_frames(path, **sampling)` in a worker; waits for a free one.

        Raises:
          VideoError: as `read_frames`, or: took longer than `seconds`, the decoder died, needed too much memory.
          RuntimeError: no worker can be started, or the pool is closed.
        """
        path, sampling = os.fspath(path), dict(sampling or {})
        inspect.signature(video.read_frames).bind(path, **sampling)  # a misspelt argument is no bad file
        if "parts" not in sampling:
            sampling.setdefault("threads", max(1, (os.cpu_count() or 1) // self.workers))
        packed = pack(sampling)
        worker = self._idle.get()
        try:
            worker = self._ready(worker)
            return worker.ask(os.fsdecode(path), packed, self.seconds)
        finally:
            self._idle.put(self._kept(worker))

    def read_frames(self, path, **sampling) -> Clip:
        """`decode`, to be given in place of `video.read_frames`."""
        return self.decode(path, sampling)

    def _ready(self, worker: _Worker | None) -> _Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if worker is not None:
                return worker
            worker = _Worker(self._decoder, self._memory)
            self._all.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._kept(worker)
            raise
        return worker

    def _kept(self, worker: _Worker | None) -> _Worker | None:
        """The worker if it can go on, else None: the next request starts a fresh one."""
        if worker is None or (worker.alive and worker.files < FILES_PER_WORKER and not self._closed):
            return worker
        self.restarts += not worker.alive
        worker.close()
        with self._lock:
            self._all.discard(worker)
        return None

    def close(self):
        """Ends all workers, also those that are decoding."""
        self._closed = True
        with self._lock:
            for worker in self._all:
                worker.kill()
        for worker in [self._idle.get() for _ in range(self.workers)]:  # waits for the threads that are decoding
            if worker is not None:
                worker.close()
            self._idle.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


def decode_many(
    paths: Iterable, sampling: Mapping | None = None, workers: int | None = None, seconds: float = 60.0, **options
) -> Iterator[tuple[str, Clip | VideoError]]:
    """Decodes files in worker processes, in order, a few ahead of the caller.

    Args:
      paths: files, read as the work proceeds; each is yielded as given.
      sampling: keyword arguments of `video.read_frames`; a `resize` function must be one that can be imported.
      workers: processes; default one per core.
      seconds: how long one file may take [s].
      options: of `Pool`.

    Yields (path, Clip), or (path, VideoError) for a file that cannot be decoded; never raises for a file. At most
    2 x workers decoded clips wait in memory. Leaving the loop early ends all workers.
    """
    workers = workers or os.cpu_count() or 1
    pool = Pool(workers, seconds, **options)

    def one(path):
        try:
            return pool.decode(path, sampling)
        except Exception as error:  # raised below, where the pool ends first
            return error

    work = loader.work_ahead(paths, one, workers, held=2 * workers, in_order=True)
    with contextlib.closing(work), pool:  # left early, the pool ends first: no thread then waits for a file that hangs
        for path, got in work:
            if isinstance(got, Exception) and not isinstance(got, VideoError):
                raise got
            yield path, got
