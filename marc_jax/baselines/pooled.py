"""More frames, less space: K * s uniform patches, each pooled to P / s tokens, s to a row (B0 a + c).

A kept patch has P = h w tokens. Its P places hold s = P / m patches of the video, each averaged over space to m
tokens, so the number of tokens is that of K whole patches. m = 1: P uniform frames, one token each, the strongest
equal-token rival on small frames. x_j = mean of the j-th of m equal runs of the patch's tokens (runs of rows for
raster order).
"""

import dataclasses

import jax.numpy as jnp

from marc_jax.baselines import uniform
from marc_jax.baselines.kept import KeptTokens, budget, gather
from marc_jax.baselines.uniform import uniform_weights
from marc_jax.memory.compress import Compressed, apply_weights


def compress(vis_btpd, mask_bt, event_bt, keep, *, tokens_per_patch=1, t_bt=None) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`.

    Row k holds `s = P // tokens_per_patch` frames in time order; `weights_bkt` is 1/s on each and `t_bk` their mean
    time. With fewer than keep * s valid patches, frames repeat, so every place is filled.
    """
    del event_bt
    b, _, p, d = vis_btpd.shape
    if p % tokens_per_patch:
        raise ValueError(f"{p} tokens of a patch do not divide into {tokens_per_patch} pooled tokens")
    s = p // tokens_per_patch
    small_btmd = vis_btpd.reshape(b, -1, tokens_per_patch, s, d).astype(jnp.float32).mean(3).astype(vis_btpd.dtype)
    weights_bnt = _spread_weights(mask_bt, keep * s)
    frames = apply_weights(small_btmd, mask_bt, weights_bnt, t_bt)
    any_b = jnp.any(mask_bt, axis=1)
    weights_bkt = weights_bnt.reshape(b, keep, s, -1).mean(2)
    return dataclasses.replace(
        frames,
        tokens_bkpd=frames.tokens_bkpd.reshape(b, keep, p, d),
        t_bk=frames.t_bk.reshape(b, keep, s).mean(2),
        size_bk=jnp.sum(weights_bkt > 0, axis=2, dtype=jnp.int32),
        weights_bkt=weights_bkt,
        mask_bk=jnp.broadcast_to(any_b[:, None], (b, keep)),
    )


def compress_tokens(vis_btpd, mask_bt, event_bt, keep, *, grid_hw, side=2, target_b=None) -> KeptTokens:
    """Uniform patches, each pooled in blocks of side x side tokens; arguments and result as in `kept`.

    As many patches as the budget needs, the last cut short if it does not divide. `grid_hw`: a patch's tokens (h, w),
    of which `side` must divide both. A pooled token stands at its block's upper left one.
    """
    del event_bt
    (h, w), (b, t, p, d) = grid_hw, vis_btpd.shape
    if h % side or w % side:
        raise ValueError(f"{h} x {w} tokens do not divide into blocks of {side} x {side}")
    each = p // side**2
    count_b = jnp.minimum(budget(mask_bt, p, keep, target_b), jnp.sum(mask_bt, axis=1) * each)
    slot_bk, valid_bk = uniform.select(None, mask_bt, t, target_b=-(-count_b // each))
    read_bt = jnp.any((slot_bk[:, :, None] == jnp.arange(t)) & valid_bk[:, :, None], axis=1)
    blocks = vis_btpd.reshape(b, t, h // side, side, w // side, side, d).astype(jnp.float32)
    small = jnp.where(mask_bt[:, :, None, None, None], blocks.mean((3, 5)), 0).astype(vis_btpd.dtype)
    corner = jnp.pad(small[:, :, :, None, :, None], [(0, 0)] * 3 + [(0, side - 1), (0, 0), (0, side - 1), (0, 0)])
    at_corner = ((jnp.arange(h) % side == 0)[:, None] & (jnp.arange(w) % side == 0)).reshape(p)
    chosen_btp = read_bt[:, :, None] & at_corner
    first_btp = (jnp.cumsum(chosen_btp.reshape(b, t * p), axis=1) <= count_b[:, None]).reshape(b, t, p)
    return gather(corner.reshape(b, t, p, d), chosen_btp & first_btp, keep)


def _spread_weights(mask_bt, rows):
    """`uniform_weights`, but the valid patches are repeated when there are fewer than `rows`."""
    valid_b = jnp.sum(mask_bt, axis=1, keepdims=True)
    rank_bt = jnp.where(mask_bt, jnp.cumsum(mask_bt, axis=1) - 1, -1)
    repeated_bk = (2 * jnp.arange(rows)[None, :] + 1) * valid_b // (2 * rows)
    repeated = (repeated_bk[:, :, None] == rank_bt[:, None, :]).astype(jnp.float32)
    return jnp.where((valid_b < rows)[:, :, None], repeated, uniform_weights(mask_bt, rows))
