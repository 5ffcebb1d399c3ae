"""Frames to the rows a Qwen2.5-VL vision tower reads: sizes, antialiased bicubic resizing, patch order.

A patch is 2 frames x 14 x 14 pixels x RGB = 1176 numbers in the order (channel, frame, row, column). Four patches
that the merger joins lie next to each other ("merge-block-major"): block row, block column, row in block, column in
block. Source: Qwen2.5-VL's published processor and qwen-vl-utils 0.0.14.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

PATCH = 14  # pixels
TEMPORAL = 2  # frames
MERGE = 2  # patches
FACTOR = PATCH * MERGE
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PATCH_MEAN = np.repeat(MEAN, TEMPORAL * PATCH * PATCH)  # [1176], one value per number of a patch
PATCH_STD = np.repeat(STD, TEMPORAL * PATCH * PATCH)

# Part of a memory's fingerprint: change it whenever `resize_frames` gives other pixels (test_patches.py notices).
RESIZE = "antialiased bicubic -0.5, rounded once"

MOST_THREADS = 8  # that resize: numpy's many short calls take turns at the interpreter's lock

IMAGE_MIN_PIXELS = 4 * 28 * 28
IMAGE_MAX_PIXELS = 16384 * 28 * 28
VIDEO_MIN_PIXELS = 128 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28


def smart_resize(
    height: int,
    width: int,
    factor: int = FACTOR,
    min_pixels: int = VIDEO_MIN_PIXELS,
    max_pixels: int = VIDEO_MAX_PIXELS,
) -> tuple[int, int]:
    """The size (height, width) to resize to: multiples of `factor`, within the pixel limits, near the aspect ratio.

    qwen-vl-utils' rule: round half to even; enlarging may pass `max_pixels` by less than a row of factors. ValueError
    for sides under one pixel or an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} is no picture")
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"the aspect ratio of {width}x{height} is above 200")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    return h, w


@dataclasses.dataclass(frozen=True)
class VideoBudget:
    """How many pixels of a video are kept, in qwen-vl-utils' words.

    Attributes:
      min_pixels, max_pixels: of one frame; max_pixels None leaves the limit to the other two.
      total_pixels: of all frames. A frame's share of it may not fall under 1.05 min_pixels.
      frame_limit: the library's own limit of a frame (its VIDEO_MAX_TOKEN_NUM); the 1.05 rule goes before it.
    """

    min_pixels: int = VIDEO_MIN_PIXELS
    max_pixels: int | None = None
    total_pixels: float = 90_316_800  # 0.9 of 128000 tokens
    frame_limit: int = VIDEO_MAX_PIXELS

    def size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """(height, width) of each of `num_frames` sampled frames; ValueError as `smart_resize`."""
        cap = min(self.frame_limit, self.total_pixels / num_frames * TEMPORAL)
        cap = max(cap, int(self.min_pixels * 1.05))
        most = cap if self.max_pixels is None else min(self.max_pixels, cap)
        return smart_resize(height, width, FACTOR, self.min_pixels, most)


@dataclasses.dataclass(frozen=True)
class FrameBudget(VideoBudget):
    """qwen-vl-utils' sizes, never of more than `most` visual tokens (small frames of odd shapes would be)."""

    most: int = 144

    def size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        h, w = super().size(height, width, num_frames)
        area = FACTOR**2
        if h * w > self.most * area:
            h, w = smart_resize(height, width, min_pixels=area, max_pixels=self.most * area)
        return h, w


# Video-R1 trains with the library's limit set to 128 tokens: 134.4 after the 1.05 rule. (A user's max_pixels of 128
# tokens would be kept strictly.) Its evaluation uses 256.
VIDEO_R1_BUDGET = VideoBudget(frame_limit=128 * 28 * 28)


@functools.lru_cache(maxsize=256)
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Weights float32 [target, source] of PIL's and torchvision's antialiased bicubic filter (a = -0.5) on one axis."""
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    low = np.maximum((centre - 2.0 * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + 2.0 * stretch + 0.5).astype(np.int64), source)
    at = np.arange(source)
    x = np.abs((at - centre[:, None] + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weight = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weight *= (at >= low[:, None]) & (at < high[:, None])
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _bands(source: int, target: int, rows: int = 16) -> list[tuple[slice, slice, np.ndarray]]:
    """The matrix cut into bands of target rows with the source columns they touch: most of it is zero."""
    matrix, bands = bicubic_matrix(source, target), []
    for first in range(0, target, rows):
        part = matrix[first : first + rows]
        used = np.flatnonzero(part.any(0))
        columns = slice(used[0], used[-1] + 1)
        bands.append((slice(first, first + rows), columns, np.ascontiguousarray(part[:, columns])))
    return bands


def _resize_height(x_hwc: np.ndarray, height: int) -> np.ndarray:
    """[H, W, C] of any type -> float32 [height, W, C]."""
    if len(x_hwc) == height:
        return x_hwc
    flat = x_hwc.reshape(len(x_hwc), -1)
    out = np.empty((height, flat.shape[1]), np.float32)
    for rows, columns, weights in _bands(len(x_hwc), height):
        np.matmul(weights, flat[columns].astype(np.float32), out=out[rows])
    return out.reshape(height, *x_hwc.shape[1:])


def _resize_width(x_hwc: np.ndarray, width: int) -> np.ndarray:
    """[H, W, C] of any type -> float32 [H, width, C]."""
    return _resize_height(np.ascontiguousarray(x_hwc.transpose(1, 0, 2)), width).transpose(1, 0, 2)


def _whole(x: np.ndarray, like: str) -> np.ndarray:
    """Rounds to values of a pixel in place: Pillow adds a half and cuts, torch rounds a half to the even value."""
    x = np.floor(np.add(x, 0.5, out=x), out=x) if like == "pillow" else np.rint(x, out=x)
    return np.clip(x, 0.0, 255.0, out=x)


def _each(frames: np.ndarray, out: np.ndarray, one: Callable, threads: int) -> np.ndarray:
    """out[i] = one(frames[i]), in so many threads; returns `out`."""

    def run(i):
        out[i] = one(frames[i])

    if threads < 2 or len(frames) < 2:
        for i in range(len(frames)):
            run(i)
        return out
    with concurrent.futures.ThreadPoolExecutor(min(threads, len(frames), MOST_THREADS)) as pool:
        list(pool.map(run, range(len(frames))))
    return out


def squash(frames: np.ndarray, size: int, threads: int = 1) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, size, size, 3] by PIL's antialiased bilinear filter, whatever the aspect ratio."""
    from PIL import Image

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3]")
    if frames.shape[1:3] == (size, size):
        return frames

    def one(frame):
        return Image.fromarray(np.ascontiguousarray(frame)).resize((size, size), Image.Resampling.BILINEAR)

    return _each(frames, np.empty((len(frames), size, size, 3), np.uint8), one, threads)


def resize_frames(
    frames: np.ndarray, height: int, width: int, like: str = "torchvision", threads: int = 1
) -> np.ndarray:
    """Antialiased bicubic resizing of uint8 [T, H, W, C] to uint8 [T, height, width, C].

    Args:
      frames: uint8 [T, H, W, C].
      height, width: the new size.
      like: "torchvision" rounds once at the end, as qwen-vl-utils resizes videos; "pillow" goes width first and rounds
        in between too, as it resizes images. The two differ in 1 to 13 % of the values, nearly always by 1.
      threads: that share the frames; more than one where a single file is waited for.

    Four frames each of three files at Video-R1's sizes, mean and largest difference in levels of 255
    (`python -m tools.bench.resize VIDEO...`); test_published_vision.py holds the bounds:

                                 bikes 640x272 -> 476x196   counter 1920x1080 -> 420x224   dog 256x256 -> 336x336
      this to torchvision        0.0001, 1                  0.00003, 1                     0.0017, 1
      this to Pillow             0.0006, 2                  0.00001, 1                     0.0001, 1
      OpenCV INTER_CUBIC to tv   0.46, 16                   0.63, 125                      0.11, 5

    What remains are sums that lie on a half. Pillow 13 goes height first where it shrinks the height more than the
    width (up to 12 % of the values then differ by 1), earlier versions never do: nor does this. OpenCV's bicubic has
    no antialiasing and another coefficient (-0.75). A picture of 1920x1080 takes 15 ms of one core (Pillow 21) with
    OPENBLAS_NUM_THREADS=1; more threads of BLAS only get in each other's way here.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, C]")
    if like not in ("torchvision", "pillow"):
        raise ValueError(f"like {like!r} is not one of torchvision, pillow")
    if frames.shape[1:3] == (height, width):
        return frames

    def one(source):
        if like == "pillow":
            wide = source if len(source[0]) == width else _whole(_resize_width(source, width), like)
            both = wide if len(wide) == height else _resize_height(wide, height)
        elif height < len(source):  # unrounded, the order is free: shrink what lies together in memory first
            both = _resize_width(_resize_height(source, height), width)
        else:
            both = _resize_height(_resize_width(source, width), height)
        return _whole(np.array(both, np.float32), like)

    return _each(frames, np.empty((len(frames), height, width, frames.shape[-1]), np.uint8), one, threads)


def frames_to_pixel_patches(frames: np.ndarray, threads: int = 1) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [T, H, W, 3] -> uint8 patches [t, n, 1176] and grid (t, h, w) in patches; n = h * w.

    `threads` share the temporal patches. An odd T repeats its last frame. ValueError unless H, W are multiples of 28.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3]")
    if len(frames) % TEMPORAL:
        frames = np.concatenate([frames, frames[-1:]])
    count, height, width, _ = frames.shape
    if height % FACTOR or width % FACTOR or not height or not width:
        raise ValueError(f"{width}x{height} is no multiple of {FACTOR}: use smart_resize and resize_frames first")
    t, rows, cols = count // TEMPORAL, height // FACTOR, width // FACTOR
    blocks = frames.reshape(t, TEMPORAL, rows, MERGE, PATCH, cols, MERGE, PATCH, 3)
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, block row, block col, row, col, C, frame, y, x
    out = np.empty((t, rows * cols * MERGE**2, PATCH_MEAN.size), np.uint8)
    _each(patches, out, lambda patch: patch.reshape(out.shape[1:]), threads)
    return out, (t, rows * MERGE, cols * MERGE)


def normalise_patches(patches):
    """uint8 [..., 1176] -> float32 (x / 255 - mean) / std. `x * A + B` with vectors A, B gives the same on a device."""
    return np.asarray(patches, np.float32) * (1.0 / (255.0 * PATCH_STD)) - PATCH_MEAN / PATCH_STD


def frames_to_patches(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [T, H, W, 3] -> normalised float32 patches [t, n, 1176] and grid; see `frames_to_pixel_patches`."""
    patches, grid = frames_to_pixel_patches(frames)
    return normalise_patches(patches), grid
