"""The currency between rooms: prompts, completions and what a model looks at.

Axes used in names everywhere: b prompt, g rollout of a prompt, p position in the prompt, r position in the
completion, n visual token of a prompt, d model width, t temporal patch, k kept temporal patch, e event.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts, right-padded to P tokens.

    Attributes:
      tokens_bp: int32 [B, P]; visual placeholders hold the model's video (or image) token id.
      mask_bp: bool [B, P]; True on real tokens.
      pos_3bp: int32 [3, B, P]; M-RoPE ids on the axes (t, h, w).
      vis_index_bp: int32 [B, P]; which row of the prompt's visual tokens goes here, -1 for text.
      next_pos_b: int32 [B]; the position id (all three axes) of the first generated token.
    """

    tokens_bp: jax.Array
    mask_bp: jax.Array
    pos_3bp: jax.Array
    vis_index_bp: jax.Array
    next_pos_b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """G completions for each of B prompts, right-padded to R tokens.

    Attributes:
      tokens_bgr: int32 [B, G, R].
      mask_bgr: bool [B, G, R]; True up to and including the stop token.
      logp_bgr: float32 [B, G, R]; the sampler's log-probabilities at sampling temperature; 0 where masked.
    """

    tokens_bgr: jax.Array
    mask_bgr: jax.Array
    logp_bgr: jax.Array
