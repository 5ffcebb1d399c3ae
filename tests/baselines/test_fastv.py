"""FastV inside the decoder, against layers in plain numpy, and its decoding against a prefill of prompt and answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.baselines import fastv
from marc_jax.models import qwen25_vl, rope
from marc_jax.rl import rollout
from marc_jax.rl.types import PromptBatch

CFG = qwen25_vl.tiny(num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2)
PARAMS = qwen25_vl.init(CFG, jax.random.key(0))
PARAMS["text"]["layers"]["attn"] = jax.tree.map(lambda w: 8 * w, PARAMS["text"]["layers"]["attn"])
B, TEXT, VIS = 2, 7, 12


@pytest.fixture(scope="module")
def prompt():
    """Two tokens of text, the visual slots (some empty), text of two lengths."""
    rng = np.random.default_rng(0)
    index = np.concatenate([[-1, -1], np.arange(VIS), [-1] * (TEXT - 2)])
    mask = np.ones((B, TEXT + VIS), bool)
    mask[0, -1] = mask[1, 4] = mask[1, 5] = False
    pos = np.stack([np.arange(TEXT + VIS)] * 3)
    return PromptBatch(
        jnp.asarray(rng.integers(7, 300, (B, TEXT + VIS)), jnp.int32), jnp.asarray(mask),
        jnp.asarray(np.repeat(pos[:, None], B, 1), jnp.int32), jnp.asarray(np.repeat(index[None], B, 0), jnp.int32),
        jnp.full(B, TEXT + VIS),
    ), rng.normal(size=(B, VIS, 32)).astype(np.float32)  # fmt: skip


def numpy_decoder(x, pos_3, layers, keep_after=None):
    """Last hidden state of tokens [L, D] at positions [3, L]; `keep_after(i, attention of the last row)` -> rows."""
    c = CFG.text
    norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * w  # noqa: E731
    dense = lambda x, w: x @ w["kernel"] + w.get("bias", 0)  # noqa: E731
    for i in range(c.num_layers):
        w = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), layers)
        cos, sin = rope.mrope_cos_sin(jnp.asarray(pos_3), c.head_dim, c.rope_theta, c.mrope_section, jnp.float32)
        turn = lambda a, t=(cos, sin): np.asarray(rope.rotate(jnp.asarray(a, jnp.float32), *t), np.float64)  # noqa: E731
        y = norm(x, w["norm1"]["scale"])
        q, k, v = (dense(y, w["attn"][n]).reshape(len(x), -1, c.head_dim) for n in "qkv")
        q, k, v = turn(q), np.repeat(turn(k), 2, 1), np.repeat(v, 2, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) * c.head_dim**-0.5
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1), w["attn"]["o"])
        y = norm(x, w["norm2"]["scale"])
        gate = dense(y, w["mlp"]["gate"])
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(y, w["mlp"]["up"]), w["mlp"]["down"])
        if keep_after and (rows := keep_after(i, weights[:, -1].mean(0))) is not None:
            x, pos_3 = x[rows], pos_3[:, rows]
    return norm(x, np.asarray(PARAMS["text"]["norm"]["scale"], np.float64))[-1]


def run(prompt, count, layer):
    batch, vis = prompt

    @jax.jit
    def prefix():
        model = qwen25_vl.bind(CFG, PARAMS)
        return fastv.prefill(model, vis, batch, jnp.asarray(count), layer=layer, length=TEXT + max(count))

    with jax.default_matmul_precision("highest"):
        return prefix()


@pytest.mark.parametrize("layer", [1, 2])
def test_the_last_hidden_state_is_that_of_a_decoder_that_drops(prompt, layer):
    count = (5, 2)
    out = run(prompt, count, layer)
    batch, vis = prompt
    table = np.asarray(PARAMS["text"]["embed"]["embedding"], np.float64)
    for b in range(B):
        real = np.asarray(batch.mask_bp)[b]
        index = np.asarray(batch.vis_index_bp)[b][real]
        x = np.where((index >= 0)[:, None], vis[b][index], table[np.asarray(batch.tokens_bp)[b][real]])

        def keep(i, attention, index=index, n=count[b]):
            if i != layer - 1:
                return None
            best = np.argsort(-np.where(index >= 0, attention, -1), kind="stable")[:n]
            return np.flatnonzero((index < 0) | np.isin(np.arange(len(index)), best))

        want = numpy_decoder(x, np.asarray(batch.pos_3bp)[:, b][:, real], PARAMS["text"]["layers"], keep)
        np.testing.assert_allclose(out.last_bd[b], want, atol=1e-4)
        used = np.asarray(out.mask_bp).sum(2)[:, b]
        assert used.tolist() == [len(index)] * layer + [(index < 0).sum() + count[b]] * (4 - layer)


def test_keeping_everything_is_no_pruning(prompt):
    batch, vis = prompt
    out = run(prompt, (VIS, VIS), 2)
    plain = rollout.prefill(qwen25_vl.bind(CFG, PARAMS), vis, batch)
    np.testing.assert_allclose(out.last_bd, plain.last_bd, atol=1e-5)
    np.testing.assert_array_equal(out.mask_bp, np.broadcast_to(plain.mask_bp, out.mask_bp.shape))


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_reads_each_layers_own_tokens(prompt, packed):
    """The second token's hidden state is that of the prompt with the first token behind it, the same tokens dropped."""
    batch, vis = prompt
    out = run(prompt, (5, 2), 2)
    model = qwen25_vl.bind(CFG, PARAMS)
    how = rollout.Sampling(3, (1,), 0, 0.0)
    drawn = jax.jit(lambda p: rollout.decode(model, p, rollout.rollout_keys(0, 0, jnp.arange(B), 1), how))(out)
    for_decoding, token = model.for_decoding(), drawn.tokens_bgr[:, :, 0]
    if packed:
        for_decoding = qwen25_vl.bind(CFG, qwen25_vl.pack(CFG, PARAMS, jnp.float32))
    cache = for_decoding.empty_cache(B, 1, 2)
    pos = jnp.broadcast_to(out.next_pos_b[:, None], (3, B, 1))
    step = jax.jit(lambda x: for_decoding.decode_step(x, pos, 0, out.cache, out.mask_bp, cache)[0])
    with jax.default_matmul_precision("highest"):
        hidden = np.asarray(step(model.embed(token)))[:, 0]
    table = np.asarray(PARAMS["text"]["embed"]["embedding"], np.float64)
    for b in range(B):
        real = np.asarray(batch.mask_bp)[b]
        index = np.append(np.asarray(batch.vis_index_bp)[b][real], -1)
        tokens = np.append(np.asarray(batch.tokens_bp)[b][real], token[b, 0])
        x = np.where((index >= 0)[:, None], vis[b][index], table[tokens])
        pos_3 = np.append(np.asarray(batch.pos_3bp)[:, b][:, real], np.full((3, 1), TEXT + VIS), 1)
        dropped = {}

        def choose(i, attention, index=index[:-1], n=(5, 2)[b], dropped=dropped):
            if i == 1:
                best = np.argsort(-np.where(index >= 0, attention, -1), kind="stable")[:n]
                dropped["rows"] = np.flatnonzero((index < 0) | np.isin(np.arange(len(index)), best))
            return None

        numpy_decoder(x[:-1], pos_3[:, :-1], PARAMS["text"]["layers"], choose)
        rows = np.append(dropped["rows"], len(x) - 1)
        want = numpy_decoder(x, pos_3, PARAMS["text"]["layers"], lambda i, _, rows=rows: rows if i == 1 else None)
        np.testing.assert_allclose(hidden[b], want, atol=1e-4)
