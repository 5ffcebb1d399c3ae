"""Plain mean over all valid patches: H = (1/T) sum_t H_t.

With keep > 1, the mean of each of `keep` equal runs of valid patches. Events are ignored. The floor every merging
scheme has to beat at the same number of tokens (a prototype found the paper's unweighted pairwise mean below it).
"""

import jax.numpy as jnp

from marc_jax.memory.compress import Compressed, apply_weights


def compress(vis_btpd, mask_bt, event_bt, keep, *, t_bt=None) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`."""
    del event_bt
    valid_b = jnp.sum(mask_bt, axis=1, keepdims=True)
    rank_bt = jnp.cumsum(mask_bt, axis=1) - 1
    runs_b = jnp.clip(valid_b, 1, keep)
    run_bt = jnp.where(mask_bt, rank_bt * runs_b // jnp.maximum(valid_b, 1), -1)
    hit_bkt = (run_bt[:, None, :] == jnp.arange(keep)[None, :, None]).astype(jnp.float32)
    return apply_weights(vis_btpd, mask_bt, hit_bkt / jnp.maximum(hit_bkt.sum(2, keepdims=True), 1), t_bt)
