"""Frames to the rows a Qwen2.5-VL vision tower reads: sizes, antialiased bicubic resizing, patch order.

A patch is 2 frames x 14 x 14 pixels x RGB = 1176 numbers in the order (channel, frame, row, column). Four patches
that the merger joins lie next to each other ("merge-block-major"): block row, block column, row in block, column in
block. Source: Qwen2.5-VL's published processor and qwen-vl-utils 0.0.14.
"""

import functools
import math

import numpy as np

PATCH = 14  # pixels
TEMPORAL = 2  # frames
MERGE = 2  # patches
FACTOR = PATCH * MERGE
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PATCH_MEAN = np.repeat(MEAN, TEMPORAL * PATCH * PATCH)  # [1176], one value per number of a patch
PATCH_STD = np.repeat(STD, TEMPORAL * PATCH * PATCH)

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


def video_size(
    height: int,
    width: int,
    num_frames: int,
    *,
    min_pixels=VIDEO_MIN_PIXELS,
    max_pixels=VIDEO_MAX_PIXELS,
    total_pixels: int = 90_316_800,
) -> tuple[int, int]:
    """`smart_resize` as qwen-vl-utils calls it for a video of `num_frames` sampled frames: the limit on pixels per
    frame is the smaller of `max_pixels` and the frame's share of `total_pixels`, but at least 1.05 min_pixels."""
    cap = max(min(VIDEO_MAX_PIXELS, total_pixels / num_frames * TEMPORAL), int(min_pixels * 1.05))
    return smart_resize(height, width, FACTOR, min_pixels, max(min(max_pixels, cap), int(min_pixels * 1.05)))


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


def _resize_first_axis(x_sm: np.ndarray, target: int) -> np.ndarray:
    """float32 [source, m] -> [target, m], rounded and clipped to whole values of a pixel."""
    out = np.empty((target, x_sm.shape[1]), np.float32)
    for rows, columns, weights in _bands(len(x_sm), target):
        np.matmul(weights, x_sm[columns], out=out[rows])
    out += 0.5
    np.floor(out, out=out)
    return np.clip(out, 0.0, 255.0, out=out)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resizing of uint8 [T, H, W, C] to uint8 [T, height, width, C].

    As PIL does it: first along the width, rounded to whole values, then along the height. Against PIL at most one
    value in some ten thousand differs, by 1 (float32 sums here, fixed point there).
    """
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, C]")
    count, old_h, old_w, channels = frames.shape
    if (old_h, old_w) == (height, width):
        return frames
    out = np.empty((count, height, width, channels), np.uint8)
    for source, result in zip(frames, out, strict=True):
        if old_w != width:
            wide = np.ascontiguousarray(source.transpose(1, 0, 2), np.float32).reshape(old_w, -1)
            source = _resize_first_axis(wide, width).reshape(width, old_h, channels).transpose(1, 0, 2)
        if old_h != height:
            tall = np.ascontiguousarray(source, np.float32).reshape(old_h, -1)
            source = _resize_first_axis(tall, height).reshape(height, width, channels)
        result[...] = source
    return out


def frames_to_pixel_patches(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [T, H, W, 3] -> uint8 patches [t, n, 1176] and grid (t, h, w) in patches; n = h * w.

    An odd T repeats its last frame. ValueError unless H and W are multiples of 28.
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
    return patches.reshape(t, rows * cols * MERGE**2, -1), (t, rows * MERGE, cols * MERGE)


def normalise_patches(patches):
    """uint8 [..., 1176] -> float32 (x / 255 - mean) / std. `x * A + B` with vectors A, B gives the same on a device."""
    return np.asarray(patches, np.float32) * (1.0 / (255.0 * PATCH_STD)) - PATCH_MEAN / PATCH_STD


def frames_to_patches(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [T, H, W, 3] -> normalised float32 patches [t, n, 1176] and grid; see `frames_to_pixel_patches`."""
    patches, grid = frames_to_pixel_patches(frames)
    return normalise_patches(patches), grid
