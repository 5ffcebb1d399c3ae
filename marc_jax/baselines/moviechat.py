"""MovieChat's memory consolidation (arXiv 2307.16449, section 3.2; released code): MARC's ancestor.

Repeat until `keep` frames are left: s_i = mean_p metric(F_i^p, F_{i+1}^p) over the whole video, no events; merge the
pair with the largest s into its unweighted mean. The released code's metric is the raw dot product, the paper's the
cosine. With metric="cosine" this is stage 2 of `marc_jax.memory.compress` alone.
"""

from marc_jax.memory.compress import Compressed, apply_weights, merge_weights


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, metric="dot", weighted=False, target_b=None, t_bt=None
) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`."""
    weights_bkt = merge_weights(
        vis_btpd, mask_bt, event_bt, keep, weighted=weighted, target_b=target_b, metric=metric
    )  # fmt: skip
    return apply_weights(vis_btpd, mask_bt, weights_bkt, t_bt)
