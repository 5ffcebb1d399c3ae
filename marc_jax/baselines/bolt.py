"""BOLT (arXiv 2503.21483, CVPR 2025): frames by inverse transform sampling of their similarity to the question.

    s <- ((s - min s) / (max s - min s))^power;  F = cumulative sum of s / sum s
    frame i of n: the first t with F(t) >= u_i, u_i evenly spaced from 1/n to 1 - 1/n (n = 1: 1/2)
Many frames where the question is answered, some elsewhere. A frame may be taken several times and is then read several
times, as in the released code (github.com/sming256/BOLT, power 3). Equal scores everywhere count as one.
"""

import jax.numpy as jnp


def select(score_bt, mask_bt, keep, *, target_b=None, power=3.0):
    """Arguments and result as in `topk`."""
    b, t = mask_bt.shape
    has_b = jnp.any(mask_bt, axis=1)
    n_b = jnp.full(b, keep) if target_b is None else target_b
    low_b = jnp.min(jnp.where(mask_bt, score_bt, jnp.inf), axis=1, keepdims=True)
    high_b = jnp.max(jnp.where(mask_bt, score_bt, -jnp.inf), axis=1, keepdims=True)
    spread_b = high_b - low_b
    share_bt = jnp.where(spread_b > 0, (score_bt - low_b) / jnp.where(spread_b > 0, spread_b, 1), 1) ** power
    share_bt = jnp.where(mask_bt, share_bt, 0)
    total_bt = jnp.cumsum(share_bt, axis=1)
    n_bk = jnp.maximum(n_b, 1)[:, None]
    step_bk = (1 - 2 / n_bk) / jnp.maximum(n_bk - 1, 1)
    place_bk = jnp.where(n_bk == 1, 0.5, 1 / n_bk + jnp.arange(keep) * step_bk) * total_bt[:, -1:]
    slot_bk = jnp.sum(total_bt[:, None, :] < place_bk[:, :, None], axis=2)
    last_b = t - 1 - jnp.argmax(mask_bt[:, ::-1], axis=1, keepdims=True)
    valid_bk = (jnp.arange(keep) < n_b[:, None]) & has_b[:, None]
    return jnp.where(valid_bk, jnp.minimum(slot_bk, last_b), 0).astype(jnp.int32), valid_bk
