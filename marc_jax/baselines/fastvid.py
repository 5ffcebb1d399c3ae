"""FastVID (arXiv 2503.11187, NeurIPS 2025): segments of the video, each with salient tokens and merged context tokens.

1. Segments: cut after patch i where s_i = cos(mean token of i, of i + 1) is below tau or among the c - 1 lowest.
2. A segment's budget is its part of the video's: max(1, floor(d B)) context tokens, the others salient. Within it, only
   the last of a run of patches with s_i >= ignore carries any.
3. Salient: in each carrying patch, the tokens that receive most attention in the tower, divided evenly.
4. Context: in every p-th carrying patch, counted from the last, DPC-kNN centres (`density`, 4 neighbours) of what is
   left, at most half of the patch. Each token of the segment that is neither salient nor a centre of that patch joins
   its most similar centre there: out = b a + (1 - b) mean(joined), b = max(beta, 1 / (n + 1)).
Released code for Qwen2.5-VL (github.com/LunarShen/FastVID): c 8, tau 0.84, ignore 0.95, d 0.4, p 4, beta 0.6, and
floor(R P) tokens times the segment's length as its budget. Here segments divide the exact budget in proportion to their
length; what a patch cannot hold is lost, as there.
"""

import jax.numpy as jnp

from marc_jax.baselines import density
from marc_jax.baselines.kept import KeptTokens, budget, clean, compact, gather, smallest, unit
from marc_jax.memory.budget import share

NEIGHBOURS = 4


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, received_btp, key_btph=None, target_b=None, segments=8, tau=0.84, ignore=0.95,
    context=0.4, every=4, beta=0.6,
) -> KeptTokens:  # fmt: skip
    """Arguments and result as in `kept`; `received_btp` of `Watched`."""
    del event_bt, key_btph
    b, t, p, d = vis_btpd.shape
    count_b = budget(mask_bt, p, keep, target_b)
    vis_btpd, mask_bt, received_btp, order_bt = compact(mask_bt, vis_btpd, received_btp)
    x_btpd = clean(vis_btpd, mask_bt)
    segment_bt, carries_bt = _segments(x_btpd, mask_bt, segments, tau, ignore)
    salient_bt, context_bt = _counts(segment_bt, carries_bt, mask_bt, count_b, p, context, every)
    valid_btp = jnp.broadcast_to(mask_bt[:, :, None], (b, t, p))
    salient_btp = smallest(-received_btp, valid_btp, salient_bt)
    rest_btp = valid_btp & ~salient_btp
    flat = lambda x: x.reshape(b * t, *x.shape[2:])  # noqa: E731
    distance_rpp, context_r = density.distances(flat(x_btpd)), flat(context_bt)
    centre_rp = density.centres(distance_rpp, flat(rest_btp), context_r, jnp.full(b * t, NEIGHBOURS))
    centre_btp = centre_rp.reshape(b, t, p)
    same_btt = (segment_bt[:, :, None] == segment_bt[:, None]) & mask_bt[:, :, None] & mask_bt[:, None]
    merged_btpd = _merged(vis_btpd, mask_bt, rest_btp, centre_btp, same_btt, beta)
    tokens_btpd = jnp.where(centre_btp[..., None], merged_btpd, vis_btpd)
    kept = gather(tokens_btpd, salient_btp | centre_btp, keep)
    at_bn = jnp.take_along_axis(order_bt, kept.at_bn // p, axis=1) * p + kept.at_bn % p
    return KeptTokens(kept.tokens_bnd, jnp.where(kept.mask_bn, at_bn, 0), kept.mask_bn)


def _segments(x_btpd, mask_bt, segments, tau, ignore):
    """Number of each patch's segment int32 [B, T], and which patches carry tokens, bool [B, T]."""
    frame_btd = unit(jnp.mean(x_btpd, axis=2))
    similar_bt = jnp.sum(frame_btd[:, :-1] * frame_btd[:, 1:], axis=-1)
    inner_bt = mask_bt[:, :-1] & mask_bt[:, 1:]
    cut_bt = smallest(similar_bt, inner_bt, segments - 1) | (inner_bt & (similar_bt < tau))
    segment_bt = jnp.cumsum(jnp.pad(cut_bt, ((0, 0), (1, 0))), axis=1)
    ends_bt = jnp.pad(cut_bt | (similar_bt < ignore) | ~inner_bt, ((0, 0), (0, 1)), constant_values=True)
    return segment_bt, ends_bt & mask_bt


def _counts(segment_bt, carries_bt, mask_bt, count_b, p, context, every):
    """Salient and context tokens of each patch, int32 [B, T]."""
    t = mask_bt.shape[1]
    member_bst = (segment_bt[:, None] == jnp.arange(t)[:, None]) & mask_bt[:, None]  # segment, patch
    length_bs = jnp.sum(member_bst, axis=2, dtype=jnp.int32)
    total_bs = share(count_b, length_bs.astype(jnp.float32), length_bs * p, t * p, least=0)
    context_bs = jnp.minimum(jnp.maximum(jnp.floor(total_bs * context + 1e-6).astype(jnp.int32), 1), total_bs)
    carriers_bst = member_bst & carries_bt[:, None]
    carriers_bs = jnp.sum(carriers_bst, axis=2)
    of_patch = lambda x_bs: jnp.take_along_axis(x_bs, segment_bt, axis=1)  # noqa: E731
    number_bt = _number(carriers_bst, segment_bt)
    late_bt = of_patch(carriers_bs) - 1 - number_bt  # counted from the segment's last carrying patch
    anchors_bt = (of_patch(carriers_bs) + every - 1) // every
    context_bt = _portion(of_patch(context_bs), anchors_bt, late_bt // every)
    alone_bt = of_patch(length_bs) == 1
    context_bt = jnp.where(alone_bt, of_patch(context_bs), jnp.minimum(context_bt, p // 2))
    context_bt = jnp.where(carries_bt & (late_bt % every == 0), context_bt, 0)
    salient_bt = _portion(of_patch(total_bs - context_bs), of_patch(carriers_bs), number_bt)
    return jnp.where(carries_bt, jnp.minimum(salient_bt, p - context_bt), 0), context_bt


def _number(carriers_bst, segment_bt):
    """How many carrying patches of its segment come before each patch, int32 [B, T]."""
    before_bst = jnp.cumsum(carriers_bst, axis=2) - carriers_bst
    return jnp.take_along_axis(before_bst, segment_bt[:, None], axis=1)[:, 0]


def _portion(total, parts, number):
    """Part `number` of a total divided evenly, the first ones larger."""
    parts = jnp.maximum(parts, 1)
    return total // parts + (number < total % parts)


def _merged(vis_btpd, mask_bt, rest_btp, centre_btp, same_btt, beta):
    """Tokens [B, T, P, D] with each centre merged; see 4. of the module."""
    x_btpd = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0).astype(jnp.float32)
    u_btpd = unit(clean(vis_btpd, mask_bt))
    p = x_btpd.shape[2]
    similar = jnp.einsum("bupd,btqd->buptq", u_btpd, u_btpd, precision="highest")  # token (u, p), centre (t, q)
    nearest_bupt = jnp.argmax(jnp.where(centre_btp[:, None, None], similar, -jnp.inf), axis=4)
    own = jnp.eye(len(mask_bt[0]), dtype=bool)[None, :, None, :] & centre_btp[..., None]  # a centre of that very patch
    joins_bupt = rest_btp[..., None] & same_btt[:, :, None] & ~own & jnp.any(centre_btp, axis=2)[:, None, None]
    joins = (joins_bupt[..., None] & (nearest_bupt[..., None] == jnp.arange(p))).astype(jnp.float32)
    count_btq = jnp.sum(joins, axis=(1, 2))[..., None]
    mean_btqd = jnp.einsum("buptq,bupd->btqd", joins, x_btpd, precision="highest") / jnp.maximum(count_btq, 1)
    own_btq = jnp.maximum(beta, 1 / (count_btq + 1))
    return (own_btq * x_btpd + (1 - own_btq) * mean_btqd).astype(vis_btpd.dtype)
