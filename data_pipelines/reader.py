"""What both decoders share: a video file's facts, its limits, and the frames asked for in one forward pass."""

import copy
import os
import time

import numpy as np

from data_pipelines.containers import MOV, Limits, VideoError, VideoInfo

ANNOUNCES = (MOV, "avi", "gif")  # containers whose header counts the frames exactly


def quarter_turns(degrees: int) -> int:
    """Counter-clockwise quarter turns; angles that are no multiple of 90 (broken headers) turn nothing."""
    return int(degrees) // 90 % 4 if degrees % 90 == 0 else 0


class Reader:
    """Common part: `info`, `times` (seconds [T] from the first frame on, increasing), `decode(indices)`."""

    def __init__(self, path, limits: Limits):
        self.path, self.limits = os.fspath(path), limits
        self._deadline = time.monotonic() + limits.decode_seconds

    def _finish(self, width, height, times, fps, codec, turns):
        self._check_size(width, height)
        if width <= 0 or height <= 0:
            raise VideoError(self.path, "the video stream has no picture size")
        self._check_count(len(times))
        span = float(times[-1])
        measured = (len(times) - 1) / span if span > 0 else 0.0
        if not fps or fps <= 0 or (measured and abs(measured - fps) > 0.1 * fps):
            fps = measured or 1.0
        duration = span + 1.0 / fps
        if duration > self.limits.max_seconds:
            raise VideoError(self.path, f"{duration:.0f} s are over the limit of {self.limits.max_seconds:.0f} s")
        if turns % 2:
            width, height = height, width
        self.times, self._turns = times, turns
        self.info = VideoInfo(width, height, float(fps), len(times), duration, codec, turns * 90)

    def _check_size(self, width, height):
        if width * height > self.limits.max_pixels:
            raise VideoError(self.path, f"{width}x{height} pixels are over the limit of {self.limits.max_pixels}")

    def _check_count(self, count):
        if count == 0:
            raise VideoError(self.path, "the video stream holds no frame")
        if count > self.limits.max_frames:
            raise VideoError(self.path, f"more than the limit of {self.limits.max_frames} frames")

    def _check_clock(self):
        if time.monotonic() > self._deadline:
            raise VideoError(self.path, f"decoding took longer than {self.limits.decode_seconds:.0f} s")

    def _rotate(self, frame: np.ndarray) -> np.ndarray:
        return np.rot90(frame, self._turns) if self._turns else frame

    def facts(self) -> "Reader":
        """What is known of the file, to be forked later: nothing is open, the time to decode begins anew."""
        other = copy.copy(self)
        other._deadline = time.monotonic() + self.limits.decode_seconds
        return other

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()
