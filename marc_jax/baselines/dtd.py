"""Differential token drop of TimeChat-Online (arXiv 2504.17343): drop what did not change since the patch before.

    absolute: token (t, p) goes if its change is below 1 - tau, change_tp = 1 - cos(x_tp, x_(t-1)p)
    relative: of every patch after the first the same number of tokens stays, those with the largest change
The first patch stays whole. Both forms and the pixel measure (mean |difference| of the earlier frame of one pair and
the later frame of the next, 2 x 2 patches of a token together) are the released code's
(github.com/yaolinli/TimeChat-Online). The pixel measure could spare the vision tower the dropped patches; that is not
done here.
"""

import jax.numpy as jnp

from marc_jax.baselines.kept import KeptTokens, budget, change, evenly, gather, real_tokens, smallest


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, target_b=None, tokens_b=None, tau=None, change_btp=None
) -> KeptTokens:
    """Arguments and result as in `kept`.

    Args:
      tau: similarity above which a token goes, with the largest changes first if more than the budget stay; None, the
        relative form with the budget spread evenly over the patches after the first.
      change_btp: float [B, T, P] in place of 1 - cos, e.g. of `pixel_change`; the first valid patch's is not looked at.
    """
    del event_bt
    b, t, p, _ = vis_btpd.shape
    own_b = p if tokens_b is None else tokens_b
    count_b = budget(mask_bt, own_b, keep, target_b)
    first_bt = mask_bt & (jnp.cumsum(mask_bt, axis=1) == 1)
    change_btp = change(vis_btpd, mask_bt) if change_btp is None else change_btp
    least_btp = jnp.where(first_bt[:, :, None], -1e9, -change_btp)
    valid_btp = real_tokens(mask_bt, p, tokens_b)
    if tau is not None:
        valid_bm = (valid_btp & (first_bt[:, :, None] | (change_btp >= 1 - tau))).reshape(b, t * p)
        return gather(vis_btpd, smallest(least_btp.reshape(b, t * p), valid_bm, count_b).reshape(b, t, p), keep)
    first_b = jnp.minimum(count_b, own_b)
    k_bt = jnp.where(first_bt, first_b[:, None], evenly(count_b - first_b, mask_bt & ~first_bt))
    return gather(vis_btpd, smallest(least_btp, valid_btp, k_bt), keep)


def pixel_change(pixels_btnc) -> jnp.ndarray:
    """float32 [B, T, n / 4] of patches [B, T, n, 1176] (channel, frame, row, column); 0 in the first."""
    b, t, n, c = pixels_btnc.shape
    x = pixels_btnc.astype(jnp.float32).reshape(b, t, n // 4, 4, 3, 2, c // 6)
    moved = jnp.mean(jnp.abs(x[:, :-1, ..., 0, :] - x[:, 1:, ..., 1, :]), axis=(3, 4, 5))
    return jnp.pad(moved, ((0, 0), (1, 0), (0, 0)))
