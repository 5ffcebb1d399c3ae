"""Sampled frames on disk, by the content of the video: what was decoded once is not decoded again.

    frames = Frames("FRAMES")
    clip = frames.read("clip.mp4", fps=2.0, max_frames=64, resize=budget)      # as video.read_frames, bit by bit

An entry is found by the file's SHA-256 and by how it was sampled, so copies, renamed files and every run, stage or
model that samples alike share it. Frames are kept as PNG, without loss; where they were read in the file's own size,
any smaller size is made from those. The folder may be removed at any time, and shared by processes and machines.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable

import numpy as np

from data_pipelines import patches, video
from data_pipelines.containers import VideoError, VideoInfo

FORMAT = 1  # of an entry; another one is another name
_IGNORED = ("limits", "threads", "backend", "sha256")  # they decide whether a file is read, not what comes out
_DEFAULTS = {"fps": 2.0, "max_frames": 64, "min_frames": 4, "num_frames": None, "start": None, "end": None}


class Frames:
    """A folder of sampled frames. Safe in threads and processes."""

    def __init__(self, folder, read: Callable = video.read_frames):
        """`read`: called for what is not there. Raises OSError: the folder cannot be made."""
        self.folder, self._read = os.fspath(folder), read
        self._warned, self._hashes, self._lock = False, {}, threading.Lock()
        os.makedirs(self.folder, exist_ok=True)

    def sha256(self, path) -> str:
        """Of a file's content; read once while its size and time stay. Raises VideoError: it cannot be read."""
        try:
            stat = os.stat(path)
            key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
            if key not in self._hashes:
                with open(path, "rb") as file:
                    self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise VideoError(path, error.strerror or str(error)) from None
        return self._hashes[key]

    def read(self, path, *, resize=None, **how) -> video.Clip:
        """`video.read_frames`, from the folder where it is there. Raises VideoError as it does."""
        place = functools.partial(self._place, self.sha256(path), how)
        clip = None if resize is None else _opened(place(resize))
        whole = None if clip is not None else _opened(place(None))
        if whole is not None:
            return whole if resize is None else _resized(path, whole, resize)
        if clip is None:
            clip = self._read(path, resize=resize, **how)
            self._keep(place(resize), clip)
        return clip

    def _place(self, sha256: str, how: dict, resize) -> str:
        told = {**_DEFAULTS, **{k: v for k, v in how.items() if k not in _IGNORED}}
        unknown = sorted(set(told) - set(_DEFAULTS))
        if unknown:
            raise TypeError(f"frames sampled by {unknown[0]!r} are not kept")
        size = None if resize is None else [patches.RESIZE, _words(resize)]
        text = json.dumps([FORMAT, told, size], sort_keys=True)
        name = f"{sha256}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.zip"
        return os.path.join(self.folder, sha256[:2], name)

    def _keep(self, place: str, clip: video.Clip) -> None:
        """Frames are worth a second decoding, not a run: a disk that is full is said once, and the run goes on."""
        part = None
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            handle, part = tempfile.mkstemp(dir=os.path.dirname(place), suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(_packed(clip))
            os.replace(part, place)
            part = None
        except OSError as error:
            with self._lock:
                if not self._warned:
                    print(f"warning: {self.folder}: frames are not kept ({error.strerror})", file=sys.stderr)
                self._warned = True
        finally:
            if part is not None:
                os.unlink(part)


def _words(resize) -> str:
    """A size or a budget in words that stand for it. TypeError: a function, of which nobody knows what it does."""
    if callable(resize):
        raise TypeError("frames resized by a function are not kept; give a size or a budget")
    return repr(tuple(resize) if isinstance(resize, list | tuple) else resize)


def _resized(path, whole: video.Clip, resize) -> video.Clip:
    height, width = whole.frames.shape[1:3]
    try:
        size = resize.size(height, width, len(whole.frames)) if isinstance(resize, patches.VideoBudget) else resize
    except ValueError as error:
        raise VideoError(path, str(error)) from None
    return dataclasses.replace(whole, frames=patches.resize_frames(whole.frames, *size))


def _packed(clip: video.Clip) -> bytes:
    import cv2

    head = {
        "info": dataclasses.asdict(clip.info), "seconds": clip.seconds.tolist(), "index": clip.index.tolist(),
        "warnings": list(clip.warnings), "shape": clip.frames.shape,
    }  # fmt: skip
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr("clip.json", json.dumps(head))
        for i, frame in enumerate(clip.frames):
            coded = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
            file.writestr(f"{i:05d}.png", coded.tobytes())
    return content.getvalue()


def _opened(place: str) -> video.Clip | None:
    """The entry, whose every part has a checksum; None where there is none, or a damaged one."""
    import cv2

    try:
        with zipfile.ZipFile(place) as file:
            head = json.loads(file.read("clip.json"))
            frames = np.empty(head["shape"], np.uint8)
            for i, frame in enumerate(frames):
                coded = np.frombuffer(file.read(f"{i:05d}.png"), np.uint8)
                frame[:] = cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        seconds, index = np.array(head["seconds"], np.float64), np.array(head["index"], np.int64)
        return video.Clip(frames, seconds, VideoInfo(**head["info"]), index, tuple(head["warnings"]))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, cv2.error):
        return None
