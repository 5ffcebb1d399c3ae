"""Frames of a video file, chosen by time: what every model, trainer and tool reads videos through.

    clip = read_frames("clip.mp4", fps=2.0, max_frames=64)      # uint8 [T, H, W, 3], seconds [T]

The number of frames and their places follow qwen-vl-utils 0.0.14 (fps 2, at least 4, an even number, both ends
included); a variable frame rate is sampled by its timestamps, never by counting frames.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines import looked, stretches
from data_pipelines.containers import DEFAULT_LIMITS, Limits, VideoError, VideoInfo, check_sha256
from data_pipelines.decoders import open_reader
from data_pipelines.patches import VideoBudget

__all__ = [
    "Clip", "Limits", "VideoError", "VideoInfo", "probe", "read_folder", "read_frames", "read_image", "sample_indices",
]  # fmt: skip


FEWEST_KEYS = 4  # key frames of a first look; with fewer there is nothing to choose from


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
      frames: uint8 [T, H, W, 3], RGB, upright, T even.
      seconds: float64 [T]; when each frame is shown, counted from the first frame of the file.
      info: the whole file's size, rate, length, codec.
      index: int64 [T]; each frame's number in the file, from 0.
      warnings: what the decoder complained of though it returned every frame; only `sandbox` hears it.
      shown: int64 [T]; where key frames stand for the frames at `index` (`read_frames(keys_within=...)`), their
        numbers; else None.
    """

    frames: np.ndarray
    seconds: np.ndarray
    info: VideoInfo
    index: np.ndarray
    warnings: tuple[str, ...] = ()
    shown: np.ndarray | None = None

    @property
    def seconds_per_patch(self) -> float:
        """Time from one temporal patch (pair of frames) to the next [s], the model's second_per_grid_t.

        qwen-vl-utils' 2 / sample_fps, from the number of frames passed over and the file's mean rate; where the
        frames' own timestamps say otherwise by half a frame or more (variable rate), from the timestamps.
        """
        count, shown = len(self.index), int(self.index[-1] - self.index[0]) + 1
        span = float(self.seconds[-1] - self.seconds[0]) + 1.0 / self.info.fps
        if abs(span - shown / self.info.fps) < 0.5 / self.info.fps:
            return 2.0 / (count / shown * self.info.fps)  # in the published order of operations: it is cut to ids
        return 2.0 * span / count


def _spread(low: int, high: int, n: int) -> np.ndarray:
    """round(linspace(low, high, n)), both ends included, in float32 from both ends as torch computes it."""
    if n == 1:
        return np.array([low], np.int64)
    step = float(np.float32(high - low) / np.float32(n - 1))
    i = np.arange(n)
    places = np.where(i < n // 2, low + step * i, high - step * (n - 1 - i))
    return np.rint(places.astype(np.float32)).astype(np.int64)


def _count(total: int, video_fps: float, fps: float, min_frames: int, max_frames: int) -> int:
    """How many of `total` frames: qwen-vl-utils' smart_nframes (0.0.14); 1 only if there is but one."""
    n = total / video_fps * fps
    n = min(max(n, -(-min_frames // 2) * 2), max_frames // 2 * 2, total)
    return max(int(n // 2 * 2), min(2, total))


def sample_indices(
    times,
    video_fps: float,
    *,
    fps: float | None = 2.0,
    max_frames=64,
    min_frames=4,
    num_frames=None,
    start=None,
    end=None,
) -> np.ndarray:
    """Which frames to take: int64 [n], increasing (with repeats only if `num_frames` asks for more than there are).

    Args:
      times: float64 [T], seconds of every frame, increasing, from 0.
      video_fps: mean rate of the file [1/s].
      fps: frames per second to take, between `min_frames` and `max_frames`; None takes every frame.
      num_frames: take exactly this many instead.
      start, end: only frames with start <= time <= end [s].

    For a constant frame rate this is round(linspace(first, last, n)), qwen-vl-utils' rule; otherwise the frames
    nearest to n times spread evenly from the first to the last. ValueError for impossible arguments or if no frame
    lies between start and end.
    """
    times = np.asarray(times, np.float64)
    low = 0 if start is None else int(np.searchsorted(times, start - 1e-6))
    high = len(times) - 1 if end is None else int(np.searchsorted(times, end + 1e-6, side="right")) - 1
    if low > high:
        raise ValueError(f"no frame between {start} and {end} s (the last is at {times[-1]:.3f} s)")
    if num_frames is None and fps is None:
        return np.arange(low, high + 1)
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"num_frames {num_frames} is not positive")
        n = int(num_frames)
    else:
        if not fps > 0 or max_frames < 2 or min_frames > max_frames:
            raise ValueError(f"fps {fps}, min_frames {min_frames}, max_frames {max_frames} is impossible")
        n = _count(high - low + 1, video_fps, fps, min_frames, max_frames)
    even = times[low] + (times[high] - times[low]) * np.arange(high - low + 1) / max(1, high - low)
    step = (times[high] - times[low]) / max(1, high - low)
    if np.abs(times[low : high + 1] - even).max() <= 0.25 * step:
        return _spread(low, high, n)
    targets = np.linspace(times[low], times[high], n)
    after = np.clip(np.searchsorted(times, targets), low + 1, high)
    return np.where(targets - times[after - 1] <= times[after] - targets, after - 1, after)


def read_frames(
    path,
    *,
    fps: float | None = 2.0,
    max_frames: int = 64,
    min_frames: int = 4,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    resize: tuple[int, int] | Callable[[int, int], tuple[int, int]] | VideoBudget | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    parts: int = 1,
    sha256: str | None = None,
    rows: Sequence[int] | None = None,
    keys_within: float | None = None,
    keys_side: int = 224,
) -> Clip:
    """Reads frames of a video file in one forward pass.

    Args:
      path: a regular file; only its content decides what it is.
      fps, max_frames, min_frames, num_frames, start, end: see `sample_indices`. `fps=None` reads every frame.
      backend: "auto" (PyAV), "pyav" or "opencv".
      resize: (height, width), a function from the upright (height, width) to it such as `patches.smart_resize`, or a
        budget that also looks at the number of frames; antialiased bicubic, done while decoding so that full-size
        frames are not all held at once.
      limits: sizes beyond which a file is refused.
      threads: decoding threads of one file; default 1 for small pictures, else FFmpeg's choice.
      parts: at most so many readers decode and resize stretches of the file side by side, each from a key frame on;
        more than one where a single file is waited for. The same frames.
      sha256: of the file's content [hexadecimal]. Most codecs have no checksum, so a flipped bit may decode to a wrong
        picture; with the hash every change is an error.
      rows: take these alone of the frames that would be taken, increasing from 0 on; the same frames.
      keys_within: a first look that decodes key frames alone. Where none of the frames to take is more than so many
        seconds after its key frame, the key frame at or before each stands for it, squashed to keys_side x keys_side;
        `Clip.shown` has their numbers. As without, where those are fewer than `FEWEST_KEYS`, or not half as many as
        the frames to take: little would be left out.

    Returns:
      A Clip of an even number of frames; after an odd number the last is repeated, so one frame gives two.

    Raises:
      VideoError: missing, not a video, no picture, damaged or shorter than it announces, beyond a limit.
    """
    with _opened(path, backend, limits, threads, parts, rows is not None) as reader:
        if sha256 is not None:
            check_sha256(path, sha256)
        try:
            index = sample_indices(
                reader.times,
                reader.info.fps,
                fps=fps,
                max_frames=max_frames,
                min_frames=min_frames,
                num_frames=num_frames,
                start=start,
                end=end,
            )
        except ValueError as error:
            raise VideoError(path, str(error)) from None
        if len(index) % 2:
            index = np.append(index, index[-1])
        if keys_within is not None:
            shown = stretches.key_frames(reader, index, keys_within)
            if FEWEST_KEYS <= len(np.unique(shown)) <= len(np.unique(index)) // 2:
                frames = stretches.collect_keys(reader, shown, keys_side, limits, parts)
                looked.keep(reader, path, backend, limits)
                return Clip(frames, reader.times[index], reader.info, index, shown=shown)
        count = len(index)
        if rows is not None:
            index = _chosen(path, index, rows)
        frames = stretches.collect(reader, index, resize, limits, parts, threads, count)
        return Clip(frames, reader.times[index], reader.info, index)


def _opened(path, backend: str, limits: Limits, threads: int | None, parts: int, chosen: bool):
    """A reader; of a file that was looked at before, and now `chosen` rows are read, without scanning it again."""
    known = looked.take(path, backend, limits) if chosen else None
    if known is None:
        return open_reader(path, backend, limits, threads if parts == 1 else threads or 1)
    return known.fork(threads) if parts == 1 else known


def _chosen(path, index: np.ndarray, rows) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or not len(rows) or rows[0] < 0 or (np.diff(rows) <= 0).any():
        raise ValueError("rows are not numbers that increase from 0 on")
    if rows[-1] >= len(index):
        raise VideoError(path, f"row {rows[-1]} is asked for, {len(index)} frames are taken")
    return index[rows]


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """The pictures of a folder, read like the frames of a file."""

    path: str
    names: list[str]
    info: VideoInfo
    limits: Limits

    def decode(self, index):
        for i in index:
            picture = read_image(self.names[i], limits=self.limits)
            if picture.shape[:2] != (self.info.height, self.info.width):
                size = f"{picture.shape[1]}x{picture.shape[0]}"
                raise VideoError(self.names[i], f"is {size}, the first picture {self.info.width}x{self.info.height}")
            yield i, picture


def read_folder(
    path, *, rate: float, fps: float | None = 2.0, max_frames: int = 64, min_frames: int = 4,
    start: float | None = None, end: float | None = None, resize=None, limits: Limits = DEFAULT_LIMITS,
) -> Clip:  # fmt: skip
    """`read_frames` of a folder of pictures named by their number (00001.jpg and on), `rate` per second.

    Links are not followed. Raises VideoError: no such pictures, one that cannot be read, sizes that differ.
    """
    if not os.path.isdir(path):
        raise VideoError(path, "no folder of pictures")
    files = [entry.path for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    stems = {os.path.splitext(os.path.basename(file))[0]: file for file in files}
    names = [stems[stem] for stem in sorted((s for s in stems if s.isascii() and s.isdigit()), key=int)]
    if not names:
        raise VideoError(path, "holds no pictures named by numbers")
    height, width = read_image(names[0], limits=limits).shape[:2]
    info = VideoInfo(width, height, rate, len(names), len(names) / rate, "pictures")
    times = np.arange(len(names)) / rate
    try:
        index = sample_indices(times, rate, fps=fps, max_frames=max_frames, min_frames=min_frames, start=start, end=end)
    except ValueError as error:
        raise VideoError(path, str(error)) from None
    if len(index) % 2:
        index = np.append(index, index[-1])
    reader = _Pictures(os.fspath(path), names, info, limits)
    return Clip(stretches.collect(reader, index, resize, limits), times[index], info, index)


def probe(path, *, backend: str = "auto", limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Size, rate, length and codec of a video; decodes one frame only. VideoError as `read_frames`."""
    with open_reader(path, backend, limits) as reader:
        return reader.info


def read_image(path, *, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """A JPEG, PNG, WebP or BMP file as uint8 [H, W, 3] RGB, upright by its EXIF tag; VideoError if it is none.

    What is transparent (a PNG or WebP of RGBA) becomes white, as in qwen-vl-utils, which ignores the EXIF tag.
    """
    import cv2

    if not os.path.isfile(path):
        raise VideoError(path, "a directory, not a file" if os.path.isdir(path) else "no such file")
    with open(path, "rb") as file:
        data = file.read()
    kinds = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")
    if not data.startswith(kinds) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise VideoError(path, "the file is empty" if not data else "not a JPEG, PNG, WebP or BMP image")
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise VideoError(path, f"cannot be decoded ({error.err})") from None
    if bgr is None:
        raise VideoError(path, "damaged: the image cannot be decoded")
    if bgr.shape[0] * bgr.shape[1] > limits.max_pixels:
        raise VideoError(path, f"{bgr.shape[1]}x{bgr.shape[0]} pixels are over the limit of {limits.max_pixels}")
    return cv2.cvtColor(_on_white(data, bgr), cv2.COLOR_BGR2RGB)


def _on_white(data: bytes, bgr: np.ndarray) -> np.ndarray:
    """The picture over white where the file has an alpha channel (no palette, no grey), rounded as Pillow pastes."""
    import cv2

    if not data.startswith(b"RIFF") and not (data.startswith(b"\x89PNG") and data[24:26] == b"\x08\x06"):
        return bgr  # only WebP and PNG of 8 bits and colour type 6 are opened as RGBA
    bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.shape != (*bgr.shape[:2], 4):
        return bgr
    alpha = bgra[..., 3:].astype(np.uint16)
    mixed = 255 * (255 - alpha) + bgra[..., :3] * alpha + 128
    return (((mixed >> 8) + mixed) >> 8).astype(np.uint8)
