"""Prefill, a group's one pass and decode_step are one model: all give the hidden states of the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.models import attention, qwen25_vl

B, P, G, R = 3, 11, 2, 6
LENGTHS = np.array([11, 7, 4])


def _case(kv_heads=2, **kw):
    cfg = qwen25_vl.tiny(num_layers=3, num_kv_heads=kv_heads, **kw)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: ((w.init == "ones") + 0.1 * rng.standard_normal(w.shape)).astype(np.float32), qwen25_vl.describe(cfg)
    )
    return {
        "cfg": cfg,
        "params": params,
        "prompt_bp": rng.integers(0, 320, (B, P)),
        "mask_bp": np.arange(P) < LENGTHS[:, None],
        "pos_3bp": np.sort(rng.integers(0, 9, (3, B, P)), -1),
        "suffix_bgr": rng.integers(0, 320, (B, G, R)),
        "pos_3bgr": np.broadcast_to(10 + np.arange(R), (3, B, G, R)),
    }


def _group(params, case, mask_bgr=None, prompt_bp=None, **bind):
    """Prompts and their completions as one pass."""
    mask_bgr = np.ones((B, G, R), bool) if mask_bgr is None else mask_bgr
    prompt_bp = case["prompt_bp"] if prompt_bp is None else prompt_bp

    def run(params):
        model = qwen25_vl.bind(case["cfg"], params, **bind)
        prompts = model.embed(prompt_bp), case["pos_3bp"], case["mask_bp"], LENGTHS - 1
        return model.prefill_group(*prompts, model.embed(case["suffix_bgr"]), case["pos_3bgr"], mask_bgr)[1]

    return jax.jit(run)(params)


def _full(params, case):
    """The same hidden states with the prompt repeated for every completion: one plain causal pass per row."""
    tokens, mask = np.zeros((B, G, P + R), int), np.zeros((B, G, P + R), bool)
    pos = np.zeros((3, B, G, P + R), int)
    for b, n in enumerate(LENGTHS):
        mask[b, :, : n + R] = True
        tokens[b, :, :n], tokens[b, :, n : n + R] = case["prompt_bp"][b, :n], case["suffix_bgr"][b]
        pos[:, b, :, :n], pos[:, b, :, n : n + R] = case["pos_3bp"][:, b, None, :n], case["pos_3bgr"][:, b]

    def run(params):
        model = qwen25_vl.bind(case["cfg"], params)
        flat = (tokens.reshape(B * G, -1), pos.reshape(3, B * G, -1), mask.reshape(B * G, -1))
        hidden, _ = model.prefill(model.embed(flat[0]), *flat[1:])
        hidden = hidden.reshape(B, G, P + R, -1)
        return jnp.stack([hidden[b, :, n : n + R] for b, n in enumerate(LENGTHS)])

    return jax.jit(run)(params)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_group_equals_the_replicated_forward(kv_heads):
    case = _case(kv_heads)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(_group(case["params"], case), _full(case["params"], case), atol=2e-5)


def test_gradients_of_a_group_equal_the_replicated_forward():
    case = _case()
    target = np.random.default_rng(5).standard_normal((B, G, R, 64))
    with jax.default_matmul_precision("highest"):
        shared, remat, replicated = (
            jax.jit(jax.grad(lambda p, hidden=hidden: jnp.sum(hidden(p, case) * target)))(case["params"])
            for hidden in (_group, functools.partial(_group, remat=True), _full)
        )
    for path, want in jax.tree_util.tree_leaves_with_path(replicated):
        for name, grads in (("shared", shared), ("remat", remat)):
            got = dict(jax.tree_util.tree_leaves_with_path(grads))[path]
            np.testing.assert_allclose(got, want, atol=1e-4 * (1 + np.abs(want).max()), err_msg=f"{name} {path}")


@pytest.mark.parametrize("separate", [False, True])
def test_decode_steps_equal_a_group_on_a_forced_sequence(separate):
    case = _case()

    @jax.jit
    def decode(params):
        model = qwen25_vl.bind(case["cfg"], params)
        _, prefix = model.prefill(model.embed(case["prompt_bp"]), case["pos_3bp"], case["mask_bp"])
        loop = model.for_decoding() if separate else model

        def step(cache, r):
            x = jnp.take(model.embed(case["suffix_bgr"]), r, axis=2)
            pos = jnp.take(jnp.asarray(case["pos_3bgr"]), r, axis=3)
            hidden, cache = loop.decode_step(x, pos, r, prefix, case["mask_bp"], cache)
            return cache, hidden

        return jax.lax.scan(step, model.empty_cache(B, G, R), jnp.arange(R))[1]

    with jax.default_matmul_precision("highest"):
        got = jnp.moveaxis(decode(case["params"]), 0, 2)
        np.testing.assert_allclose(got, _group(case["params"], case), atol=2e-5)


def test_padding_changes_nothing():
    case = _case()

    @jax.jit
    def prefill(params, prompt_bp):
        model = qwen25_vl.bind(case["cfg"], params)
        return model.prefill(model.embed(prompt_bp), case["pos_3bp"], case["mask_bp"])

    other_bp = np.where(case["mask_bp"], case["prompt_bp"], 7)
    hidden, hidden2 = (prefill(case["params"], prompt_bp)[0] for prompt_bp in (case["prompt_bp"], other_bp))
    np.testing.assert_array_equal(np.asarray(hidden)[case["mask_bp"]], np.asarray(hidden2)[case["mask_bp"]])
    mask_bgr = np.broadcast_to(np.arange(R) < 4, (B, G, R))
    got = _group(case["params"], case, mask_bgr=mask_bgr, prompt_bp=other_bp)[:, :, :4]
    np.testing.assert_allclose(got, _group(case["params"], case)[:, :, :4], atol=2e-5)


def test_attention_reads_key_head_j_over_group():
    """float64 numpy, query head j reads key head j // (n / k)."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 5, n, 8)) for n in (4, 2, 2))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    got = attention.causal(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(mask), "xla")
    for b in range(2):
        for i in range(int(mask[b].sum())):
            for j in range(4):
                s = k[b, : i + 1, j // 2] @ q[b, i, j] / np.sqrt(8)
                p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
                np.testing.assert_allclose(got[b, i, j], p @ v[b, : i + 1, j // 2], atol=1e-5)


def _plain_joint(q_bgrnh, k, v, mask_bgr, k_bpkh, v_bpkh, prefix_mask_bp):
    """One softmax over repeated keys, prefix copied to every completion: what the shared form must equal."""
    b, g, r, n, h = q_bgrnh.shape
    p, heads = k_bpkh.shape[1], n // k.shape[3]
    keys, values = (
        jnp.repeat(jnp.concatenate([jnp.broadcast_to(a[:, None], (b, g, *a.shape[1:])), c], 2), heads, 3)
        for a, c in ((k_bpkh, k), (v_bpkh, v))
    )
    ok = jnp.concatenate(
        [
            jnp.broadcast_to(prefix_mask_bp[:, None, None], (b, g, r, p)),
            jnp.tril(jnp.ones((r, r), bool)) & mask_bgr[:, :, None],
        ],
        -1,
    )
    scores = jnp.einsum("bgrnh,bgsnh->bgnrs", q_bgrnh, keys) / h**0.5
    return jnp.einsum("bgnrs,bgsnh->bgrnh", jax.nn.softmax(jnp.where(ok[:, :, None], scores, -1e30), -1), values)


def test_shared_prefix_attention_and_its_gradients_equal_one_plain_softmax():
    rng = np.random.default_rng(4)
    shapes = [(B, G, R, 4, 8), (B, G, R, 2, 8), (B, G, R, 2, 8), (B, P, 2, 8), (B, P, 2, 8)]
    q, k, v, kp, vp = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    mask_bgr = jnp.asarray(np.arange(R) < rng.integers(1, R + 1, (B, G, 1)))
    prefix_mask = jnp.asarray(np.arange(P) < LENGTHS[:, None])
    weight = rng.standard_normal((B, G, R, 4, 8)).astype(np.float32)

    def value(attend):
        def loss(q, k, v, kp, vp):
            out = attend(q, k, v, mask_bgr, kp, vp, prefix_mask)
            return jnp.sum(jnp.where(mask_bgr[..., None, None], out, 0) * weight)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(q, k, v, kp, vp)

    with jax.default_matmul_precision("highest"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5),
            value(attention.prefix_causal),
            value(_plain_joint),
        )


def test_visual_tokens_go_where_the_index_says():
    case = _case()
    model = qwen25_vl.bind(case["cfg"], case["params"])
    vis_bnd = np.random.default_rng(0).standard_normal((B, 4, 64)).astype(np.float32)
    index = np.full((B, P), -1)
    index[:, 2:6] = np.arange(4)
    x = np.asarray(model.embed(case["prompt_bp"], vis_bnd, index))
    np.testing.assert_array_equal(x[:, 2:6], vis_bnd)
    np.testing.assert_array_equal(x[:, 6:], np.asarray(model.embed(case["prompt_bp"]))[:, 6:])


def test_unknown_attention_backend_is_an_error():
    with pytest.raises(ValueError, match="attention='flash'"):
        attention.backend("flash", jnp.float32)
