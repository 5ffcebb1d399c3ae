"""Uniform frames at the token budget: the patches in the middles of `keep` equal runs, as they are.

Patch of row k among n valid ones: floor((k + 1/2) n / K). The first of compression.md's trivial baselines (B0 a).
"""

import jax.numpy as jnp

from marc_jax.memory.compress import Compressed, apply_weights


def compress(vis_btpd, mask_bt, event_bt, keep, *, t_bt=None) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`; every weight is 0 or 1."""
    del event_bt
    return apply_weights(vis_btpd, mask_bt, uniform_weights(mask_bt, keep), t_bt)


def select(score_bt, mask_bt, keep, *, target_b=None):
    """The same patches as a frame selector (see `topk`), blind to the question: `score_bt` is not looked at."""
    del score_bt
    valid_b = jnp.sum(mask_bt, axis=1, keepdims=True)
    rows_b = jnp.clip(keep if target_b is None else target_b[:, None], 1, jnp.clip(valid_b, 1, keep))
    rank_bt = jnp.where(mask_bt, jnp.cumsum(mask_bt, axis=1) - 1, -1)
    k = jnp.arange(keep)[None, :]
    chosen_bk = jnp.where(k < rows_b, (2 * k + 1) * valid_b // (2 * rows_b), -2)
    hit_bkt = chosen_bk[:, :, None] == rank_bt[:, None, :]
    return jnp.argmax(hit_bkt, axis=2).astype(jnp.int32), jnp.any(hit_bkt, axis=2)


def uniform_weights(mask_bt, keep):
    """One-hot weights float32 [B, keep, T]; with fewer valid patches than `keep`, all of them in the first rows."""
    slot_bk, valid_bk = select(None, mask_bt, keep)
    return (valid_bk[:, :, None] & (slot_bk[:, :, None] == jnp.arange(mask_bt.shape[1]))).astype(jnp.float32)
