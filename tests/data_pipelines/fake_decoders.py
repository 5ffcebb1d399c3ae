"""Decoders for the tests of the sandbox, chosen by the file's name: they hang, die, eat memory, leak."""

import ctypes
import dataclasses
import os
import signal
import sys
import time

import numpy as np

from data_pipelines.patches import VideoBudget
from data_pipelines.video import Clip, VideoError, VideoInfo, read_frames

INFO = VideoInfo(8, 6, 25.0, 2, 0.08, "fake")


@dataclasses.dataclass(frozen=True)
class OwnBudget(VideoBudget):
    """A budget with a rule of its own."""

    most: int = 9


def decode(path, **sampling):
    """What the file's name says."""
    kind = os.path.basename(path).split(".")[0]
    if kind == "hang":
        time.sleep(1000)
    if kind == "deaf":  # holds the interpreter lock: no Python code of the worker can notice anything
        ctypes.PyDLL(None).sleep(1000)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    if kind == "exits":
        print("the library gave up", file=sys.stderr, flush=True)
        os._exit(3)
    if kind == "memory":
        np.ones(1 << 40, np.uint8)
    if kind == "bug":
        raise KeyError("stream")
    if kind == "bad":
        raise VideoError(path, "damaged")
    if kind == "pid":
        return Clip(np.full((2, 6, 8, 3), 7, np.uint8), np.array([0.0, os.getpid()]), INFO, np.arange(2))
    if kind == "modules":
        found = [m for m in ("jax", "jaxlib", "marc_jax", "torch", "tensorflow") if m in sys.modules]
        raise VideoError(path, f"loaded: {found}")
    if kind == "sampling":
        raise VideoError(path, repr(sampling))
    return Clip(np.full((2, 6, 8, 3), len(path), np.uint8), np.array([0.0, 0.04]), INFO, np.arange(2))


def read_or_fail(path, **sampling):
    """`read_frames`, but a file named hang, segfault or the like does what its name says."""
    kind = os.path.basename(path).split(".")[0]
    return (decode if kind in ("hang", "killed", "segfault", "exits") else read_frames)(path, **sampling)
