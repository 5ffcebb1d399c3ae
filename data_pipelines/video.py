"""Frames of a video file, chosen by time: what every model, trainer and tool reads videos through.

    clip = read_frames("clip.mp4", fps=2.0, max_frames=64)      # uint8 [T, H, W, 3], seconds [T]

The number of frames and their places follow qwen-vl-utils 0.0.14 (fps 2, at least 4, an even number, both ends
included); a variable frame rate is sampled by its timestamps, never by counting frames.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from data_pipelines.containers import DEFAULT_LIMITS, Limits, VideoError, VideoInfo, check_sha256
from data_pipelines.decoders import open_reader
from data_pipelines.patches import VideoBudget, resize_frames

__all__ = [
    "Clip", "Limits", "VideoError", "VideoInfo", "probe", "read_folder", "read_frames", "read_image", "sample_indices",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
      frames: uint8 [T, H, W, 3], RGB, upright, T even.
      seconds: float64 [T]; when each frame is shown, counted from the first frame of the file.
      info: the whole file's size, rate, length, codec.
      index: int64 [T]; each frame's number in the file, from 0.
      warnings: what the decoder complained of though it returned every frame; only `sandbox` hears it.
    """

    frames: np.ndarray
    seconds: np.ndarray
    info: VideoInfo
    index: np.ndarray
    warnings: tuple[str, ...] = ()

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

    Returns:
      A Clip of an even number of frames; after an odd number the last is repeated, so one frame gives two.

    Raises:
      VideoError: missing, not a video, no picture, damaged or shorter than it announces, beyond a limit.
    """
    reopen = functools.partial(open_reader, path, backend, limits)
    with reopen(threads if parts == 1 else threads or 1) as reader:
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
        frames = _collect(reader, index, resize, limits, parts, reopen, threads)
        return Clip(frames, reader.times[index], reader.info, index)


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
    return Clip(_collect(reader, index, resize, limits), times[index], info, index)


_HELD = 1 << 30  # bytes of packets and pictures that the readers of all stretches may hold
_TAKEN = 8  # frames that are decoded while one is converted to RGB and resized


def stretches(starts, wanted: np.ndarray, parts: int) -> list[slice]:
    """Cuts the wanted frames (increasing) into at most `parts` slices that take about as long to decode.

    A slice begins where decoding can begin, at one of `starts`, so nothing is decoded twice.
    """
    starts = np.union1d(starts, 0)
    entry = np.searchsorted(starts, wanted, side="right") - 1
    begin = np.flatnonzero(np.diff(entry, prepend=-1))  # the first wanted frame after each start
    last = np.append(begin[1:], len(wanted)) - 1
    cost = wanted[last] - starts[entry[begin]] + 1 + _TAKEN * (last - begin + 1)
    share = (np.cumsum(cost) - cost / 2) / cost.sum() * parts
    cuts = begin[np.flatnonzero(np.diff(share.astype(int), prepend=-1))]
    return [slice(int(a), int(b)) for a, b in zip(cuts, [*cuts[1:], len(wanted)], strict=True)]


def _collect(reader, index, resize, limits, parts=1, reopen=None, threads=None) -> np.ndarray:
    height, width = reader.info.height, reader.info.width
    try:
        if isinstance(resize, VideoBudget):
            height, width = resize.size(height, width, len(index))
        elif resize is not None:
            height, width = resize(height, width) if callable(resize) else resize
    except ValueError as error:
        raise VideoError(reader.path, str(error)) from None
    if len(index) * height * width * 3 > limits.max_bytes:
        size = f"{len(index)} frames of {width}x{height}"
        raise VideoError(
            reader.path, f"{size} are over the limit of {limits.max_bytes} bytes: use resize or fewer frames"
        )
    out = np.empty((len(index), height, width, 3), np.uint8)
    unique, place, repeats = np.unique(index, return_index=True, return_counts=True)

    def fill(reader, rows: slice):
        for (_, frame), at, count in zip(reader.decode(unique[rows]), place[rows], repeats[rows], strict=True):
            out[at : at + count] = frame if resize is None else resize_frames(frame[None], height, width)

    def alone(rows: slice):
        with reopen(threads or max(1, parts // len(shares))) as own:
            fill(own, rows)

    if parts == 1:
        fill(reader, slice(None))
    else:
        # Each reader keeps the file's packets, and its decoder up to twenty pictures of 1.5 bytes a pixel.
        held = os.path.getsize(reader.path) + 30 * reader.info.width * reader.info.height
        shares = stretches(reader.starts, unique, max(1, min(parts, _HELD // held)))
        with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(alone, shares))  # the first error in the order of the file is raised
    return out


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
