"""Random frames, or random tokens, at the token budget: drawn without replacement, kept in time order (B0 d)."""

import jax
import jax.numpy as jnp

from marc_jax.baselines.kept import KeptTokens, budget, gather, real_tokens, smallest
from marc_jax.memory.compress import Compressed, apply_weights


def compress(vis_btpd, mask_bt, event_bt, keep, *, key, t_bt=None) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`, with a jax.random key."""
    del event_bt
    draw_bt = jnp.where(mask_bt, jax.random.uniform(key, mask_bt.shape), jnp.inf)
    place_bt = jnp.argsort(jnp.argsort(draw_bt, axis=1), axis=1)
    chosen_bt = mask_bt & (place_bt < keep)
    row_bt = jnp.where(chosen_bt, jnp.cumsum(chosen_bt, axis=1) - 1, -1)
    hit_bkt = row_bt[:, None, :] == jnp.arange(keep)[None, :, None]
    return apply_weights(vis_btpd, mask_bt, hit_bkt.astype(jnp.float32), t_bt)


def compress_tokens(vis_btpd, mask_bt, event_bt, keep, *, key, target_b=None, tokens_b=None) -> KeptTokens:
    """Single tokens of the whole video; arguments and result as in `kept`, with a jax.random key."""
    del event_bt
    b, t, p, _ = vis_btpd.shape
    draw_bm = jax.random.uniform(key, (b, t * p))
    count_b = budget(mask_bt, p if tokens_b is None else tokens_b, keep, target_b)
    chosen_bm = smallest(draw_bm, real_tokens(mask_bt, p, tokens_b).reshape(b, t * p), count_b)
    return gather(vis_btpd, chosen_bm.reshape(b, t, p), keep)
