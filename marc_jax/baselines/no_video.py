"""No video at all: the text prior (B0 e). Every row is masked and every token zero."""

import jax.numpy as jnp

from marc_jax.memory.compress import Compressed, apply_weights


def compress(vis_btpd, mask_bt, event_bt, keep, *, t_bt=None) -> Compressed:
    """Arguments and result as `marc_jax.memory.compress.compress`."""
    del event_bt
    return apply_weights(vis_btpd, mask_bt, jnp.zeros((len(mask_bt), keep, mask_bt.shape[1])), t_bt)
