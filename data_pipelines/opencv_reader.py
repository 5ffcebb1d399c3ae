"""OpenCV's decoder, for machines without PyAV: it tells no damage, no key frames and no times ahead."""

import copy
import os
from collections.abc import Iterator

import numpy as np

from data_pipelines.containers import DEFAULT_LIMITS, Limits, VideoError, check_file
from data_pipelines.reader import ANNOUNCES, Reader, quarter_turns


class OpenCVReader(Reader):
    """OpenCV's FFmpeg. It reports no damage, so frames are counted; it knows no timestamps ahead, so it reads twice."""

    starts = (0,)  # it does not tell key frames

    def __init__(self, path, limits: Limits = DEFAULT_LIMITS, threads: int | None = None):
        super().__init__(path, limits)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # damage is reported by VideoError, not on stderr
        import cv2

        self._cv2, self._threads = cv2, threads or 1
        self._full, _, self._demuxers = check_file(path)
        capture = self._open()
        size = [int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        self._check_size(*size)
        times = []
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3)
            self._check_clock()
            if len(times) > limits.max_frames:
                break
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT) if self._demuxers in ANNOUNCES else 0
        self._check_count(len(times))
        if len(times) < announced:
            raise VideoError(path, f"damaged: {len(times)} of {announced:.0f} frames decoded")
        rate = capture.get(cv2.CAP_PROP_FPS)
        seconds = np.asarray(times) - times[0]
        if self._demuxers == "avi" or (len(times) > 1 and not (np.diff(seconds) > 0).all()):
            seconds = np.arange(len(times)) / (rate if rate > 0 else 25.0)
        code = int(capture.get(cv2.CAP_PROP_FOURCC))
        codec = "".join(chr(code >> 8 * i & 0xFF) for i in range(4)).strip("\0 ")
        turns = -quarter_turns(int(capture.get(cv2.CAP_PROP_ORIENTATION_META))) % 4
        capture.release()
        self._finish(*size, seconds, rate, codec, turns)

    def _open(self):
        cv2 = self._cv2
        capture = cv2.VideoCapture(self._full, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, self._threads])
        if not capture.isOpened():
            raise VideoError(self.path, "cannot be opened as video (OpenCV gives no reason)")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        return capture

    def fork(self, threads: int | None) -> "OpenCVReader":
        """As `PyAVReader.fork`."""
        other = copy.copy(self)
        other._threads = threads or 1
        return other

    def decode(self, indices) -> Iterator[tuple[int, np.ndarray]]:
        """As `PyAVReader.decode`."""
        capture, at = self._open(), -1
        try:
            for index in (int(i) for i in indices):
                while at < index and capture.grab():
                    at += 1
                    self._check_clock()
                good, bgr = capture.retrieve() if at == index else (False, None)
                if not good:
                    raise VideoError(self.path, f"damaged: {at + 1} of {self.info.num_frames} frames decoded")
                yield index, self._rotate(self._cv2.cvtColor(bgr, self._cv2.COLOR_BGR2RGB))
        finally:
            capture.release()
