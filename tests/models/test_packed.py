"""The packed decoder decodes as the plain one does; its Hopper kernels equal plain numpy (in Pallas' interpreter)."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax import hopper
from marc_jax.hopper import attention, stream
from marc_jax.models import packed, qwen25_vl
from marc_jax.models.cache import KV


def f32(a):
    return np.asarray(a, np.float32)


def draw(seed, shape, dtype=jnp.bfloat16, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def parameters(cfg, dtype=jnp.float32):
    """Random values everywhere: norms near one, biases not zero."""

    def leaf(path, a):
        name = jax.tree_util.keystr(path)
        return draw(len(name), a.shape, dtype, 0.05) + jnp.asarray("scale" in name, dtype)

    return jax.tree_util.tree_map_with_path(leaf, qwen25_vl.abstract(cfg))


def decoded(cfg, params, b, g, steps, dtype=jnp.float32, **options):
    """Logits [steps, B, G, V] of a forced sequence after a prompt of 16 places, the last 3 of them padding."""
    d = cfg.text.hidden_size
    mask = jnp.arange(16)[None] < jnp.full((b, 1), 13)
    pos = jnp.broadcast_to(jnp.arange(16), (3, b, 16))

    @jax.jit  # op by op it would compile every one of them
    def run(params, x):
        model = qwen25_vl.bind(cfg, params, dtype=dtype, **options)
        _, prefix = model.prefill(x, pos, mask)
        cache, out = model.empty_cache(b, g, steps), []
        for t in range(steps):
            x, at = draw(10 + t, (b, g, d), dtype), jnp.full((3, b, g), 13 + t)
            hidden, cache = model.decode_step(x, at, jnp.int32(t), prefix, mask, cache)
            out.append(model.logits(hidden))
        return jnp.stack(out)

    return f32(run(params, draw(1, (b, 16, d), dtype)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_decodes_as_the_plain_one(tied):
    cfg = qwen25_vl.tiny(num_layers=3, tie_word_embeddings=tied)
    params = parameters(cfg)
    served = qwen25_vl.pack(cfg, params, jnp.float32)
    np.testing.assert_allclose(decoded(cfg, served, 2, 3, 3), decoded(cfg, params, 2, 3, 3), atol=2e-5)
    see = jax.jit(lambda p, x: qwen25_vl.bind(cfg, p).vision(x, (4, 4)))
    pixels = draw(5, (2, 16, cfg.vision.patch_dim), jnp.float32)
    np.testing.assert_allclose(f32(see(served, pixels)), f32(see(params, pixels)), atol=1e-6)


def test_8_bit_weights_stay_close():
    cfg = qwen25_vl.tiny(hidden_size=128, num_layers=2)
    params = parameters(cfg)
    want = decoded(cfg, params, 1, 2, 2)
    got = decoded(cfg, qwen25_vl.pack(cfg, params, jnp.float32, bits=8), 1, 2, 2)
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02


def test_quantised_rows_are_within_half_a_step():
    w = draw(0, (6, 40), jnp.float32)
    q = packed.quantise(w)
    assert q.values.dtype == jnp.int8
    assert np.all(np.abs(f32(q.values) * f32(q.scale)[:, None] - f32(w)) <= 0.5001 * f32(q.scale)[:, None])


def test_8_bit_weights_lose_no_more_than_qwixs():
    qwix = pytest.importorskip("qwix")
    w = draw(0, (512, 384), jnp.float32, 0.05)
    ours, theirs = packed.quantise(w), qwix.quantize(w, jnp.int8, channelwise_axes=(0,))
    loss = [jnp.linalg.norm(a - w) for a in (ours.values * ours.scale[:, None], qwix.dequantize(theirs))]
    print("relative loss: ours, Qwix", *(float(a / jnp.linalg.norm(w)) for a in loss))
    assert loss[0] <= 1.001 * loss[1]


def test_other_bit_widths_are_refused():
    cfg = qwen25_vl.tiny()
    with pytest.raises(ValueError, match="bits = 4"):
        qwen25_vl.pack(cfg, parameters(cfg), bits=4)


SHAPES = [(2048, 2048), (2560, 2048), (22016, 2048), (2048, 11008), (151936, 2048), (8192, 29568)]


@pytest.mark.parametrize("n, k", SHAPES)
def test_a_plan_covers_the_contraction_and_holds_its_share_of_x(n, k):
    pieces, width, steps = stream.plan(8, n, k)
    assert pieces * steps * width >= k > (pieces - 1) * steps * width
    assert steps * width * 8 * 2 <= stream.STAGED


def test_what_the_kernel_cannot_do_has_no_plan():
    assert stream.plan(7, 64, 128) is None
    assert stream.plan(8, 65, 128) is None
    assert stream.plan(8, 64, 100) is None


@pytest.fixture
def interpreter():
    if hopper.pallas() is None:
        pytest.skip("the kernels need the Mosaic GPU back end of jax >= 0.11")
    return hopper.pallas()[1].force_gpu_interpret_mode()


@pytest.mark.parametrize("m, n, k", [(8, 128, 640), (16, 192, 512)])
def test_streamed_product_equals_numpy(interpreter, monkeypatch, m, n, k):
    monkeypatch.setattr(hopper, "PROCESSORS", 4)  # more tiles than blocks: several per block
    x, w = draw(0, (m, k)), draw(1, (n, k))
    with interpreter:
        out = f32(stream.matmul(x, w))
    np.testing.assert_allclose(out.sum(0), f32(x) @ f32(w).T, atol=1e-3)


def test_streamed_glu_equals_numpy(interpreter, monkeypatch):
    monkeypatch.setattr(hopper, "PROCESSORS", 2)
    x, w = draw(0, (8, 512)), draw(1, (384, 512), scale=0.05)
    with interpreter:
        out = f32(stream.glu(x, w))
    gate, up = np.split(f32(x) @ f32(w).T, 2, axis=1)
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=2e-2, atol=1e-2)


# b, g, p, r, index, spread, query heads per key head
STEPS = [(1, 3, 200, 152, 70, 2, 8), (2, 1, 128, 128, 0, 1, 7), (1, 9, 600, 136, 130, 2, 8)]


@pytest.mark.parametrize("b, g, p, r, index, spread, heads", STEPS)
def test_streamed_attention_equals_numpy(interpreter, b, g, p, r, index, spread, heads):
    kv, layer = 2, 1
    q, k_new, v_new = draw(0, (b, kv, g, heads, 128), scale=0.2), draw(1, (b, kv, g, 128)), draw(2, (b, kv, g, 128))
    prefix = KV(draw(3, (2, b, p, kv, 128)), draw(4, (2, b, p, kv, 128)))
    own = KV(draw(5, (2, b, kv, g, r, 128)), draw(6, (2, b, kv, g, r, 128)))
    mask = np.random.default_rng(7).random((b, p)) < 0.7

    def keys(a, c, new):
        shared = np.repeat(f32(a[layer]).transpose(0, 2, 1, 3)[:, :, None], g, 2)
        return np.concatenate([shared, f32(c[layer])[:, :, :, :index], f32(new)[:, :, :, None]], 3)

    scores = np.einsum("bkgmh,bkgsh->bkgms", f32(q), keys(prefix.k, own.k, k_new))
    ok = np.concatenate([mask, np.ones((b, index + 1), bool)], 1)
    scores = np.where(ok[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bkgms,bkgsh->bkgmh", weights / weights.sum(-1, keepdims=True), keys(prefix.v, own.v, v_new))

    step = attention.step_rows(*(a.swapaxes(1, 2).reshape(b, g, -1, 128) for a in (q, k_new, v_new)))
    bias = attention.key_bias(jnp.asarray(mask), jnp.int32(index), r)
    at = (jnp.array([layer]), jnp.array([index]))
    with interpreter:
        parts = attention.partial_attention(step, prefix, own, *at, bias, heads=heads, spread=spread)
        out = f32(attention.join(parts, g, heads)).swapaxes(1, 2)
    np.testing.assert_allclose(out, want, atol=5e-3)


def test_decoding_with_the_kernels_equals_decoding_without(interpreter, monkeypatch):
    cfg = qwen25_vl.tiny(hidden_size=512, num_layers=1, num_heads=4, num_kv_heads=2, intermediate_size=512)
    params = parameters(cfg, jnp.bfloat16)
    want = decoded(cfg, params, 1, 3, 1, jnp.bfloat16, attention="xla")
    monkeypatch.setattr(hopper, "available", lambda: True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreter)
        got = decoded(cfg, qwen25_vl.pack(cfg, params), 1, 3, 1, jnp.bfloat16, attention="xla")
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2
