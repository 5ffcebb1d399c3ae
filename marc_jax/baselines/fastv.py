"""FastV (arXiv 2403.06764, ECCV 2024): visual tokens leave the decoder after layer K.

    a = mean over heads of layer K - 1's attention from the last token of the prompt (K = 2)
    layers 0..K-1 see all tokens, the later ones all text and the visual tokens with the largest a, in their positions
Released code: github.com/pkunlp-icler/FastV (its form that drops tokens; "layer K" of the paper counts from one). The
attention of the last token is one row of products, so nothing is materialised and the published memory overhead does
not arise. The later layers run on the shorter sequence. Their cache is padded to the length of the first ones', so
decoding reads as many keys as without it: the saving is in the prefill. Visual tokens are counted as those that go on.
"""

import jax.numpy as jnp

from marc_jax.baselines.kept import smallest
from marc_jax.rl.rollout import Prefix, closed_up
from marc_jax.rl.types import PromptBatch


def prefill(model, vis_bnd, prompt: PromptBatch, count_b, *, layer: int = 2, length: int) -> Prefix:
    """As `rl.rollout.prefill`, with `count_b` (int32 [B]) visual tokens after `layer` layers.

    Args:
      length: static; the most tokens of a prompt that go on, text included. Fewer visual tokens fit than count_b where
        it is too short: never less than the text.

    Returns:
      A prefix with a mask for every layer, [layers, B, P]; for `rollout.decode`.
    """
    prompt = closed_up(prompt)
    visual_bp = prompt.mask_bp & (prompt.vis_index_bp >= 0)
    text_bp = prompt.mask_bp & ~visual_bp
    fits_b = jnp.clip(count_b, 0, length - jnp.sum(text_bp, axis=1))
    x_bpd = model.embed(prompt.tokens_bp, vis_bnd, prompt.vis_index_bp)
    last_b = jnp.maximum(prompt.mask_bp.sum(axis=1) - 1, 0)

    def keep(attention_bp):
        return text_bp | smallest(-attention_bp, visual_bp, fits_b)

    last_bd, cache, masks = model.prefill_pruned(x_bpd, prompt.pos_3bp, prompt.mask_bp, last_b, layer, keep, length)
    return Prefix(last_bd, cache, masks, prompt.next_pos_b)
