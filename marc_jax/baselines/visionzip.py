"""VisionZip (arXiv 2412.04467, CVPR 2025): the tokens that the encoder attends to, and the rest merged by its keys.

Per temporal patch with k tokens to keep, of which C = round(10 k / 64) contextual and D = k - C dominant (54 + 10):
    dominant   = the D tokens that receive most attention in the tower
    targets    = of the others, in raster order, numbers 0, s, 2 s, ... (C of them), s = max(1, (P - D) // C)
    assigned   = every other token, to the target with the most similar key (cosine, mean over heads)
    contextual = target + mean of its assigned
Released code: github.com/dvlab-research/VisionZip. It reads the last layer but one of CLIP, attention of the class
token; a Qwen2.5-VL tower has no class token and mixes whole patches only in its full-attention blocks, so the last of
those is read, attention received averaged over heads and queries (`VisionTower.watched_features`). The code adds the
mean to the target, before the projector; after it ("add") a contextual token is twice as long as others.
combine="mean" takes the mean of the target and all its assigned instead.
"""

import jax.numpy as jnp

from marc_jax.baselines.kept import KeptTokens, budget, clean, evenly, gather, smallest, unit

CONTEXTUAL, OF = 10, 64


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, received_btp, key_btph, target_b=None, combine="add"
) -> KeptTokens:  # fmt: skip
    """Arguments and result as in `kept`; the budget is spread evenly over the patches.

    Args:
      received_btp, key_btph: of `Watched`.
      combine: "add" (released) or "mean".
    """
    del event_bt
    if combine not in ("add", "mean"):
        raise ValueError(f"combine must be 'add' or 'mean', not {combine!r}")
    p = vis_btpd.shape[2]
    valid_btp = jnp.broadcast_to(mask_bt[:, :, None], vis_btpd.shape[:3])
    k_bt = evenly(budget(mask_bt, p, keep, target_b), mask_bt)
    contextual_bt = (k_bt * CONTEXTUAL + OF // 2) // OF
    dominant_btp = smallest(-received_btp, valid_btp, k_bt - contextual_bt)
    rest_btp = valid_btp & ~dominant_btp
    rank_btp = jnp.cumsum(rest_btp, axis=2) - 1
    step_bt = jnp.maximum(jnp.sum(rest_btp, axis=2) // jnp.maximum(contextual_bt, 1), 1)[:, :, None]
    target_btp = rest_btp & (rank_btp % step_bt == 0) & (rank_btp // step_bt < contextual_bt[:, :, None])
    key_btph = unit(clean(key_btph, mask_bt))
    similarity_btpq = jnp.einsum("btph,btqh->btpq", key_btph, key_btph, precision="highest")
    nearest_btp = jnp.argmax(jnp.where(target_btp[:, :, None], similarity_btpq, -jnp.inf), axis=3)
    joins_btp = rest_btp & ~target_btp
    joins_btpq = joins_btp[..., None] & target_btp[:, :, None] & (nearest_btp[..., None] == jnp.arange(p))
    merged_btpd = _combine(vis_btpd, mask_bt, joins_btpq.astype(jnp.float32), combine)
    return gather(jnp.where(target_btp[..., None], merged_btpd, vis_btpd), dominant_btp | target_btp, keep)


def _combine(vis_btpd, mask_bt, joins_btpq, combine):
    x_btpd = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0).astype(jnp.float32)
    sum_btqd = jnp.einsum("btpq,btpd->btqd", joins_btpq, x_btpd, precision="highest")
    count_btq = jnp.sum(joins_btpq, axis=2)[..., None]
    if combine == "add":
        return (x_btpd + sum_btqd / jnp.maximum(count_btq, 1)).astype(vis_btpd.dtype)
    return ((x_btpd + sum_btqd) / (1 + count_btq)).astype(vis_btpd.dtype)
