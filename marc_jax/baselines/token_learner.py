"""TokenLearner (arXiv 2106.11297) as google-research/scenic has it (`projects/token_learner`, module version 1.1).

    token s of a patch = sum_p softmax_p(MLP(LayerNorm(x))_ps) x_p,  s = 1..S
Scenic's own module runs here (the [scenic] extra; importing it needs TensorFlow). It is learned. Without `params` its
gates are random, near uniform, and a token is close to the mean of its patch: that row of a table says what the module
does before any training, and nothing about TokenLearner. Patches are chosen uniformly, as many as the budget needs. A
learned token has no place of its own: token s stands at the s-th place of its patch.
"""

import jax
import jax.numpy as jnp

from marc_jax.baselines import uniform
from marc_jax.baselines.adjacent_merge import scenic
from marc_jax.baselines.kept import KeptTokens, budget, gather


def compress(vis_btpd, mask_bt, event_bt, keep, *, target_b=None, tokens=1, params=None, seed=0) -> KeptTokens:
    """Arguments and result as in `kept`.

    Args:
      tokens: S, learned tokens of a patch.
      params: the module's parameters (Flax Linen); None, random ones drawn from `seed`.
    """
    del event_bt
    b, t, p, d = vis_btpd.shape
    if not 1 <= tokens <= p:
        raise ValueError(f"{tokens} learned tokens of a patch of {p}: must lie between 1 and that")
    module = scenic("projects.token_learner.model").TokenLearnerModuleV11(num_tokens=tokens)
    rows_npd = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0).astype(jnp.float32).reshape(b * t, p, d)
    if params is None:
        params = module.init(jax.random.key(seed), rows_npd[:1], deterministic=True)
    learned_btsd = module.apply(params, rows_npd, deterministic=True).reshape(b, t, tokens, d)
    count_b = jnp.minimum(budget(mask_bt, p, keep, target_b), jnp.sum(mask_bt, axis=1) * tokens)
    slot_bk, valid_bk = uniform.select(None, mask_bt, t, target_b=-(-count_b // tokens))
    read_bt = jnp.any((slot_bk[:, :, None] == jnp.arange(t)) & valid_bk[:, :, None], axis=1)
    chosen_btp = read_bt[:, :, None] & (jnp.arange(p) < tokens)
    first_bm = jnp.cumsum(chosen_btp.reshape(b, t * p), axis=1) <= count_b[:, None]
    filled = jnp.pad(learned_btsd, ((0, 0), (0, 0), (0, p - tokens), (0, 0))).astype(vis_btpd.dtype)
    return gather(filled, chosen_btp & first_bm.reshape(b, t, p), keep)
