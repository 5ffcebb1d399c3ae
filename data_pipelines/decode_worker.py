"""The child process of `data_pipelines.sandbox`: decodes one file after another and hands the frames back.

Requests are JSON lines on a Unix socket. The answer is one JSON line; with it travels the file descriptor of an
anonymous piece of memory that holds the frames. It has no name, so nothing is left behind however a process ends.
"""

import dataclasses
import json
import os
import pkgutil
import re
import resource
import signal
import socket
import tempfile

import numpy as np

from data_pipelines.containers import Limits, VideoError

GRACE = 2  # seconds after the deadline at which a worker ends by itself, should its parent be gone
LINE = 1 << 16  # bytes of an answer at most


def pack(sampling: dict) -> dict:
    """Keyword arguments of `video.read_frames` as JSON values.

    ValueError for a `resize` function, or the class of a budget, that a process cannot import.
    """
    packed = dict(sampling)
    resize = packed.get("resize")
    budget = dataclasses.is_dataclass(resize)
    if budget or callable(resize):
        made = type(resize) if budget else resize
        if "<" in made.__qualname__ or made.__module__ == "__main__":
            raise ValueError(f"resize {made.__qualname__} is nothing of an importable module")
        packed["resize"] = {"name": f"{made.__module__}:{made.__qualname__}"}
        if budget:
            packed["resize"]["fields"] = dataclasses.asdict(resize)
    if packed.get("limits") is not None:
        packed["limits"] = dataclasses.asdict(packed["limits"])
    if packed.get("rows") is not None:
        packed["rows"] = np.asarray(packed["rows"]).tolist()
    return packed


def unpack(packed: dict) -> dict:
    """The inverse of `pack`; sizes come back as tuples."""
    sampling = dict(packed)
    resize = sampling.get("resize")
    if isinstance(resize, dict):
        made = pkgutil.resolve_name(resize["name"])
        sampling["resize"] = made(**resize["fields"]) if "fields" in resize else made
    elif resize is not None:
        sampling["resize"] = tuple(resize)
    if sampling.get("limits") is not None:
        sampling["limits"] = Limits(**sampling["limits"])
    return sampling


def _shared(*arrays: np.ndarray) -> int:
    """A file descriptor of anonymous memory that holds the arrays one after the other."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("frames")
    else:  # a file without a name does the same on other systems
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        with open(fd, "wb", closefd=False) as memory:
            for array in arrays:
                memory.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        os.lseek(fd, 0, os.SEEK_SET)  # the place in a file is shared with who receives it
    except BaseException:
        os.close(fd)
        raise
    return fd


def _listen() -> None:
    """FFmpeg writes its errors to our stderr, a file of this process alone, by its own code (PyAV's can deadlock)."""
    import av

    av.logging.set_libav_level(av.logging.ERROR)
    av.logging.restore_default_callback()


def _heard() -> list[str]:
    """The different lines on stderr, at most 20, without addresses."""
    text = os.pread(2, LINE // 8, 0).decode(errors="replace")
    lines = (re.sub(r"^\[(\S+) @ 0x\w+\] *", r"\1: ", line).strip()[:200] for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line))[:20]


def _answer(decode, request: dict, memory: int) -> tuple[dict, list[int]]:
    path, sampling, seconds = request["path"], unpack(request["sampling"]), request["seconds"]
    limits = sampling.get("limits") or Limits(decode_seconds=seconds)
    sampling["limits"] = dataclasses.replace(limits, decode_seconds=min(limits.decode_seconds, seconds))
    try:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        clip = decode(path, **sampling)
        warnings = _heard()
        numbers = [np.asarray(x, np.int64) for x in (clip.index, clip.shown) if x is not None]
        fd = _shared(clip.frames, np.asarray(clip.seconds, np.float64), *numbers)
        told = {"shape": clip.frames.shape, "info": dataclasses.asdict(clip.info), "warnings": warnings}
        return told | {"shown": clip.shown is not None}, [fd]
    except VideoError as error:
        return {"error": error.reason}, []
    except MemoryError:
        return {"error": f"decoding needs more than the {memory >> 20} MiB of memory a worker may use"}, []
    except Exception as error:  # whatever a decoder does with hostile bytes concerns this file alone
        return {"error": f"the decoder failed ({type(error).__name__}: {str(error)[:300]})"}, []


def serve(fd: int, decoder: str, memory: int) -> None:
    """Answers requests on the socket `fd` until the parent closes it.

    Args:
      decoder: "module:function", called as function(path, **sampling) -> Clip.
      memory: bytes of address space this process may use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    decode = pkgutil.resolve_name(decoder)
    _listen()
    with socket.socket(fileno=fd) as sock, sock.makefile("r", encoding="ascii") as requests:
        try:
            sock.sendall(b'{"ready": true}\n')
            for line in requests:
                request = json.loads(line)
                signal.alarm(int(request["seconds"]) + 1 + GRACE)
                reply, fds = _answer(decode, request, memory)
                signal.alarm(0)
                socket.send_fds(sock, [json.dumps(reply).encode() + b"\n"], fds)
                for handle in fds:
                    os.close(handle)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the parent is gone
