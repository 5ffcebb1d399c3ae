"""HoliTom (arXiv 2505.21334, NeurIPS 2025), the part before the language model.

1. Windows of time: m[t, p] = cos(x_tp, x_(t+1)p) > tau. A window a..b has the static places S = {p: m[t, p] for every t
   in a..b-1} and the gain (b - a) |S|; dynamic programming divides the video so that the sum of gains is largest.
2. A window's static tokens become one each, their mean, at its first patch; the others stay with their patches.
3. Static tokens of a window: k DPC-kNN centres (`density`, 7 neighbours), each beta x centre + (1 - beta) x mean of the
   tokens nearest to it. Others, patch by patch: the k that receive most attention (a part of them, `contextual`, may be
   centres instead).
Released code (github.com/cokeshao/HoliTom): tau 0.8, beta 0.6, contextual 0, and k = ceil or round of each set's size
times one ratio. Here the budget is divided among the sets in proportion to their sizes, so that it is met exactly. Its
merging inside the language model (layer 18) is not done.
"""

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax.baselines import density
from marc_jax.baselines.kept import KeptTokens, budget, clean, compact, gather, smallest, unit
from marc_jax.memory.budget import share

NEIGHBOURS = 7


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, received_btp, key_btph=None, target_b=None, tau=0.8, beta=0.6, contextual=0.0
) -> KeptTokens:  # fmt: skip
    """Arguments and result as in `kept`; `received_btp` of `Watched`."""
    del event_bt, key_btph
    b, t, p, d = vis_btpd.shape
    count_b = budget(mask_bt, p, keep, target_b)
    vis_btpd, mask_bt, received_btp, order_bt = compact(mask_bt, vis_btpd, received_btp)
    start_bt, static_btp = jax.vmap(_windows, in_axes=(0, 0, None))(clean(vis_btpd, mask_bt), mask_bt, tau)
    whole_btpd = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0).astype(jnp.float32)
    same_btt = (start_bt[:, None, :] == jnp.arange(t)[:, None]) & mask_bt[:, None]  # window, patch
    mean_btpd = jnp.einsum("bst,btpd->bspd", same_btt.astype(jnp.float32), whole_btpd, precision="highest")
    mean_btpd /= jnp.maximum(jnp.sum(same_btt, axis=2), 1)[:, :, None, None]
    # 2T rows: the dynamic tokens of every patch, then the static ones of the window that begins at it.
    first_btp = (start_bt == jnp.arange(t))[:, :, None] & static_btp
    valid_brp = jnp.concatenate([mask_bt[:, :, None] & ~static_btp, mask_bt[:, :, None] & first_btp], axis=1)
    rows_brpd = jnp.concatenate([whole_btpd, mean_btpd], axis=1)
    size_br = jnp.sum(valid_brp, axis=2, dtype=jnp.int32)
    k_br = share(count_b, size_br.astype(jnp.float32), size_br, p, least=0)
    centres_br = jnp.where(jnp.arange(2 * t) < t, jnp.rint(k_br * contextual).astype(jnp.int32), k_br)
    received_brp = jnp.concatenate([received_btp, received_btp], axis=1)
    flat = lambda x: x.reshape(b * 2 * t, *x.shape[2:])  # noqa: E731
    chosen, merged = _choose(*map(flat, (rows_brpd, valid_brp, received_brp, k_br - centres_br, centres_br)), beta)
    chosen, merged = chosen.reshape(b, 2, t, p), merged.reshape(b, 2, t, p, d)
    tokens_btpd = jnp.where(chosen[:, 1][..., None], merged[:, 1], merged[:, 0]).astype(vis_btpd.dtype)
    kept = gather(tokens_btpd, chosen[:, 0] | chosen[:, 1], keep)
    at_bn = jnp.take_along_axis(order_bt, kept.at_bn // p, axis=1) * p + kept.at_bn % p
    return KeptTokens(kept.tokens_bnd, jnp.where(kept.mask_bn, at_bn, 0), kept.mask_bn)


def _windows(x_tpd, mask_t, tau):
    """The first patch of each patch's window int32 [T], and its static places bool [T, P] (none in windows of one)."""
    t, p = x_tpd.shape[:2]
    x = unit(x_tpd)
    like_tp = (jnp.sum(x[:-1] * x[1:], axis=-1) > tau) & (mask_t[:-1] & mask_t[1:])[:, None]
    since_tp = lax.associative_scan(jnp.add, jnp.pad(~like_tp, ((1, 0), (0, 0))).astype(jnp.int32))
    # static[a, b, p]: nothing changed between a and b
    static_ttp = (since_tp[None] == since_tp[:, None]) & (jnp.arange(t)[None, :] > jnp.arange(t)[:, None])[..., None]
    length_tt = jnp.arange(t)[None, :] - jnp.arange(t)[:, None]
    gain_tt = jnp.sum(static_ttp, axis=2) * jnp.maximum(length_tt, 0)

    def best(i, state):
        most_t, begin_t = state  # most_t[j]: of the patches before j
        total_t = jnp.where(jnp.arange(t) <= i, most_t[:t] + gain_tt[:, i], -1)
        j = t - 1 - jnp.argmax(total_t[::-1])  # the shortest of equal windows
        return most_t.at[i + 1].set(total_t[j]), begin_t.at[i].set(j)

    _, begin_t = lax.fori_loop(0, t, best, (jnp.zeros(t + 1, gain_tt.dtype), jnp.zeros(t, jnp.int32)))

    def back(after, i):
        start = jnp.where(after > i, begin_t[i], after)  # `after`: where the window of patch i + 1 begins
        return start, start

    _, start_t = lax.scan(back, jnp.int32(t), jnp.arange(t), reverse=True)
    last_t = jnp.max(jnp.where(start_t[:, None] == start_t[None], jnp.arange(t)[None], 0), axis=1)
    return start_t, static_ttp[start_t, last_t]


def _choose(x_rpd, valid_rp, received_rp, dominant_r, centres_r, beta):
    """Rows of tokens: (which are kept bool [R, P], the tokens with their merges [R, P, D])."""
    dominant_rp = smallest(-received_rp, valid_rp, dominant_r)
    rest_rp = valid_rp & ~dominant_rp
    distance_rpp = density.distances(x_rpd)
    centre_rp = density.centres(distance_rpp, rest_rp, centres_r, jnp.minimum(centres_r, NEIGHBOURS))
    nearest_rp = jnp.argmin(jnp.where(centre_rp[:, None], distance_rpp, jnp.inf), axis=2)
    joins_rpq = (rest_rp & ~centre_rp)[:, :, None] & centre_rp[:, None]
    joins_rpq &= nearest_rp[:, :, None] == jnp.arange(x_rpd.shape[1])
    count_rq = jnp.sum(joins_rpq, axis=1)[:, :, None]
    mean_rqd = jnp.einsum("rpq,rpd->rqd", joins_rpq.astype(jnp.float32), x_rpd, precision="highest")
    merged_rpd = beta * x_rpd + (1 - beta) * mean_rqd / jnp.maximum(count_rq, 1)
    return dominant_rp | centre_rp, jnp.where(count_rq > 0, merged_rpd, x_rpd)
