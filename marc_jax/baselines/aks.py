"""AKS (arXiv 2502.21271, CVPR 2025): adaptive keyframes, halving the video until the best frames of a part stand out.

Scores are scaled to 0..1. A part of the video at depth d, with n frames wanted of the whole:
    if mean of its n best - its mean > t1, or d = depth:  take its n / 2^d best frames
    else:                                                 halve it, each half at depth d + 1
Released code (github.com/ncTimTang/AKS): t1 = 0.8, depth 5, and a condition on the standard deviation that is switched
off. There a part deeper than log2(n) gives no frame at all, which few frames would run into: here no part goes deeper.
A video of at most n frames is taken whole. A part that is shorter than its budget leaves places empty.
"""

import jax.numpy as jnp

from marc_jax.memory.retrieve import in_time_order


def select(score_bt, mask_bt, keep, *, target_b=None, t1=0.8, depth=5):
    """Arguments and result as in `topk`."""
    b, t = mask_bt.shape
    n_b = jnp.full(b, keep) if target_b is None else target_b
    score_bt = _scaled(score_bt, mask_bt)
    rank_bt = jnp.cumsum(mask_bt, axis=1) - 1  # time among the valid patches
    length_b = jnp.sum(mask_bt, axis=1)
    start_bt, end_bt = jnp.zeros((b, t), jnp.int32), jnp.broadcast_to(length_b[:, None], (b, t))
    before_btt = _before(score_bt)
    done_bt, chosen_bt = jnp.zeros((b, t), bool), jnp.zeros((b, t), bool)
    for d in range(depth + 1):
        same_btt = (start_bt[:, :, None] == start_bt[:, None]) & mask_bt[:, None] & mask_bt[:, :, None]
        place_bt = jnp.sum(before_btt & same_btt, axis=2)  # how many of its part are better
        top_btt = same_btt & (place_bt < n_b[:, None])[:, None]
        stands_out_bt = _mean(score_bt, top_btt) - _mean(score_bt, same_btt) > t1
        last_b = (n_b >> (d + 1) == 0) | (d == depth)
        take_bt = mask_bt & ~done_bt & (stands_out_bt | last_b[:, None])
        chosen_bt |= take_bt & (place_bt < (n_b >> d)[:, None])
        done_bt |= take_bt
        middle_bt = start_bt + (end_bt - start_bt) // 2
        late_bt = rank_bt >= middle_bt
        split_bt = ~done_bt
        start_bt = jnp.where(split_bt & late_bt, middle_bt, start_bt)
        end_bt = jnp.where(split_bt & ~late_bt, middle_bt, end_bt)
    chosen_bt = jnp.where((length_b <= n_b)[:, None], mask_bt, chosen_bt)
    slot_bt, valid_bt = in_time_order(jnp.broadcast_to(jnp.arange(t), (b, t)), chosen_bt)
    more = max(keep - t, 0)
    return tuple(jnp.pad(a, ((0, 0), (0, more)))[:, :keep] for a in (slot_bt, valid_bt))


def _scaled(score_bt, mask_bt):
    low_b = jnp.min(jnp.where(mask_bt, score_bt, jnp.inf), axis=1, keepdims=True)
    high_b = jnp.max(jnp.where(mask_bt, score_bt, -jnp.inf), axis=1, keepdims=True)
    spread_b = jnp.where(high_b > low_b, high_b - low_b, 1)
    return jnp.where(mask_bt, (score_bt - low_b) / spread_b, 0)


def _before(score_bt):
    """bool [B, T, T]: is patch u (last axis) taken before patch t: better, or as good and earlier."""
    t = score_bt.shape[1]
    earlier = jnp.arange(t)[None, :] < jnp.arange(t)[:, None]
    here, other = score_bt[:, :, None], score_bt[:, None]
    return (other > here) | ((other == here) & earlier)


def _mean(score_bt, member_btt):
    """Mean score of the patches that are marked for each patch."""
    total_bt = jnp.sum(jnp.where(member_btt, score_bt[:, None], 0), axis=2)
    return total_bt / jnp.maximum(jnp.sum(member_btt, axis=2), 1)
