"""Lower resolution: every frame shrunk before the vision tower sees it (B0 b).

A frame of h x w patches becomes one of h / f x w / f, each pixel the mean of f x f: area resizing by a whole factor, on
the device, from the pixels that were decoded. The tower then reads 1 / f^2 of the patches, so this baseline saves its
time too. Not by the processor's bicubic filter, which differs little where f is whole.
"""

import jax.numpy as jnp

PATCH, MERGE, TEMPORAL = 14, 2, 2


def shrink(pixels_bsnc, grid_hw: tuple[int, int], factor: int):
    """Patches [B, S, n, 1176] of a grid (h, w) in patches -> (patches [B, S, n / f^2, 1176], the new grid).

    Merge-block-major in and out; the dtype is kept (uint8 rounds to nearest). ValueError: h or w is no multiple of 2 f.
    """
    (h, w), (b, s, _, c) = grid_hw, pixels_bsnc.shape
    if h % (MERGE * factor) or w % (MERGE * factor):
        raise ValueError(f"a grid of {h} x {w} patches cannot be shrunk by {factor}: no multiple of {MERGE * factor}")
    if factor == 1:
        return pixels_bsnc, grid_hw
    rgb = c // (TEMPORAL * PATCH**2)
    x = pixels_bsnc.reshape(b, s, h // MERGE, w // MERGE, MERGE, MERGE, rgb, TEMPORAL, PATCH, PATCH)
    x = x.transpose(0, 1, 6, 7, 2, 4, 8, 3, 5, 9)  # b, s, C, frame, then the rows and the columns of the picture
    high, wide = h // factor, w // factor
    x = x.reshape(b, s, rgb, TEMPORAL, high * PATCH, factor, wide * PATCH, factor).astype(jnp.float32).mean((5, 7))
    x = x.reshape(b, s, rgb, TEMPORAL, high // MERGE, MERGE, PATCH, wide // MERGE, MERGE, PATCH)
    x = x.transpose(0, 1, 4, 7, 5, 8, 2, 3, 6, 9).reshape(b, s, high * wide, c)
    x = jnp.rint(x) if jnp.issubdtype(pixels_bsnc.dtype, jnp.integer) else x
    return x.astype(pixels_bsnc.dtype), (high, wide)
