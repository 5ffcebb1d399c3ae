"""A tiny random Qwen2.5-VL, prompts for it, and a plain replicated forward to compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.models import qwen25_vl
from marc_jax.rl.types import PromptBatch

VOCAB, STOPS, BANNED, PAD = 40, (2, 9, 17, 25), (3, 4, 5, 6), 0
CONFIG = qwen25_vl.tiny(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2)


def params(seed=0):
    """Random parameters with distributions far from uniform; drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name or "bias" in name:
            return jnp.asarray(("norm" in name) + 0.1 * rng.normal(size=leaf.shape), jnp.float32)
        scale = 0.5 if "embedding" in name else leaf.shape[-2] ** -0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, qwen25_vl.abstract(CONFIG))


def prompts(seed=0, b=3, p=9, n=4):
    """B right-padded prompts of different lengths with n visual tokens each, and the visual tokens [B, n, D]."""
    rng = np.random.default_rng(seed)
    length_b = rng.integers(n + 2, p + 1, b)
    length_b[0] = p
    mask = np.arange(p) < length_b[:, None]
    vis_index = np.where((np.arange(p) >= 1) & (np.arange(p) <= n), np.arange(p) - 1, -1)[None].repeat(b, 0)
    tokens = np.where(vis_index >= 0, CONFIG.video_token_id, rng.integers(7, VOCAB, (b, p)))
    # The visual block advances the position by 2 only, so positions and indices differ, as with real M-RoPE.
    order = np.where(np.arange(p) <= n, np.minimum(np.arange(p), 2), np.arange(p) - n + 2)
    pos = np.broadcast_to(order, (3, b, p)).astype(np.int32)
    next_pos = order[length_b - 1] + 1
    vis = rng.normal(size=(b, n, CONFIG.text.hidden_size)).astype(np.float32)
    tokens = np.where(mask, tokens, PAD).astype(np.int32)
    fields = (tokens, mask, pos, vis_index.astype(np.int32), next_pos.astype(np.int32))
    return PromptBatch(*(jnp.asarray(x) for x in fields)), jnp.asarray(vis)


@jax.jit
def _plain(params, tokens, vis, vis_index, pos, mask):
    model = qwen25_vl.bind(CONFIG, params)
    hidden, _ = model.prefill(model.embed(tokens, vis, vis_index), pos, mask)
    return model.logits(hidden)


def replicated_logits(params, vis_bnd, prompt, tokens_bgr, mask_bgr):
    """Logits [B, G, R, V] for the completions' tokens: G full copies of every prompt through one causal forward."""
    tokens_bgr, mask_bgr = np.asarray(tokens_bgr), np.asarray(mask_bgr)
    b, g, r = tokens_bgr.shape
    p = prompt.tokens_bp.shape[1]
    length_b = np.asarray(prompt.mask_bp).sum(1)
    tokens, index = np.zeros((b, g, p + r), np.int32), np.full((b, g, p + r), -1, np.int32)
    mask, pos = np.zeros((b, g, p + r), bool), np.zeros((3, b, g, p + r), np.int32)
    for i, n in enumerate(length_b):
        tokens[i, :, :n], index[i, :, :n] = prompt.tokens_bp[i, :n], prompt.vis_index_bp[i, :n]
        pos[:, i, :, :n] = np.asarray(prompt.pos_3bp)[:, i, None, :n]
        tokens[i, :, n : n + r], pos[:, i, :, n : n + r] = tokens_bgr[i], int(prompt.next_pos_b[i]) + np.arange(r)
        mask[i, :, :n], mask[i, :, n : n + r] = True, mask_bgr[i]
    rows = [x.reshape(*x.shape[:-3], b * g, p + r) for x in (tokens, index, pos, mask)]
    z = _plain(params, rows[0], jnp.repeat(vis_bnd, g, axis=0), rows[1], rows[2], rows[3])
    z = np.asarray(z).reshape(b, g, p + r, -1)
    return np.stack([z[i, :, n - 1 : n - 1 + r] for i, n in enumerate(length_b)])
