"""Rotary position embeddings: 2-D for the vision tower, M-RoPE (t, h, w sections) for the decoder.

Both rotate half-split pairs: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the two halves of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(size: int, theta: float) -> np.ndarray:
    """theta ** (-(0, 2, .., size-2) / size), float32 [size / 2]."""
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))).astype(np.float32)


def vision_cos_sin(rows: np.ndarray, cols: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation tables of patches at absolute patch coordinates, float32 [n, head_dim / 2] each.

    The first quarter of a head turns with the row, the second with the column (theta 10000); source: Qwen2.5-VL.
    """
    inv = inverse_frequencies(head_dim // 2, 10000.0)
    angles = np.concatenate([np.outer(rows.astype(np.float32), inv), np.outer(cols.astype(np.float32), inv)], axis=1)
    return np.cos(angles), np.sin(angles)


def mrope_cos_sin(pos_3: jax.Array, head_dim: int, theta: float, sections, dtype) -> tuple[jax.Array, jax.Array]:
    """Rotation tables [..., head_dim / 2] of position ids [3, ...] (axes t, h, w).

    Angle j belongs to the axis whose section it falls in; `sections` sum to head_dim / 2. Angles are float32, the
    tables are cast to the activation dtype (as the reference does).
    """
    inv = inverse_frequencies(head_dim, theta)
    bounds = np.cumsum((0, *sections))
    pos_3 = pos_3.astype(jnp.float32)
    angles = [pos_3[a][..., None] * inv[bounds[a] : bounds[a + 1]] for a in range(3)]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [..., heads, head_dim] by tables [..., head_dim / 2], in the wider dtype of the two, back in x's."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
