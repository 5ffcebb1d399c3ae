"""Chunked log-probabilities and divergences equal the plain ones, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.rl import logprob

LEAD, R, D, V = (2, 3), 7, 5, 11


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(*LEAD, R, D)),
        "other": rng.normal(size=(*LEAD, R, D + 1)),
        "head": rng.normal(size=(D, V)),
        "other_head": rng.normal(size=(D + 1, V)),
        "targets": rng.integers(0, V, (*LEAD, R)),
    }


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 20])
def test_logprob_and_entropy_for_any_chunk(arrays, chunk):
    p = softmax(arrays["hidden"] @ arrays["head"] / 0.7)
    want = np.log(np.take_along_axis(p, arrays["targets"][..., None], -1)[..., 0])
    got, spread, hit = logprob.chunked_logprob(jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"]),
                                          jnp.asarray(arrays["targets"]), chunk, temperature=0.7)
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(spread, -(p * np.log(p)).sum(-1), atol=2e-5)
    np.testing.assert_array_equal(hit, p.argmax(-1) == arrays["targets"])


@pytest.mark.parametrize("chunk", [2, 3])
def test_gradients_do_not_depend_on_the_chunk(arrays, chunk):
    hidden, head = jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"], jnp.float32)

    def total(hidden, head, chunk):
        return logprob.chunked_logprob(hidden, head, jnp.asarray(arrays["targets"]), chunk, banned_ids=(0,))[0].clip(
            -20).sum()

    whole, parts = (jax.jit(jax.grad(total, (0, 1)), static_argnums=2)(hidden, head, c) for c in (100, chunk))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_banned_tokens_have_no_probability(arrays):
    hidden, head = jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"], jnp.float32)
    banned = (0, 4)
    z = arrays["hidden"] @ arrays["head"]
    z[..., list(banned)] = -np.inf
    targets = np.where(np.isin(arrays["targets"], banned), 1, arrays["targets"])
    got, spread, _ = logprob.chunked_logprob(hidden, head, jnp.asarray(targets), banned_ids=banned)
    np.testing.assert_allclose(got, np.log(np.take_along_axis(softmax(z), targets[..., None], -1)[..., 0]), atol=2e-5)
    assert np.isfinite(spread).all()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_divergences_equal_their_definition(arrays, kind, chunk):
    s, t = softmax(arrays["hidden"] @ arrays["head"]), softmax(arrays["other"] @ arrays["other_head"])
    m = 0.3 * t + 0.7 * s
    want = {
        "reverse": (s * np.log(s / t)).sum(-1),
        "forward": (t * np.log(t / s)).sum(-1),
        "jsd": 0.3 * (t * np.log(t / m)).sum(-1) + 0.7 * (s * np.log(s / m)).sum(-1),
    }[kind]
    args = [jnp.asarray(arrays[n], jnp.float32) for n in ("hidden", "head", "other", "other_head")]
    got, _ = logprob.chunked_divergence(*args, chunk, kind=kind, mix=0.3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_equal_distributions_diverge_by_zero_and_banned_ones_stay_finite(arrays):
    hidden, head = jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"], jnp.float32)
    for kind in logprob.DIVERGENCES:
        def total(h, kind=kind):
            return logprob.chunked_divergence(h, head, hidden, head, kind=kind, banned_ids=(2,))[0].sum()

        value, grad = jax.jit(jax.value_and_grad(total))(hidden)
        assert abs(float(value)) < 1e-4
        np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_no_gradient_reaches_the_teacher(arrays):
    args = [jnp.asarray(arrays[n], jnp.float32) for n in ("hidden", "head", "other", "other_head")]
    grads = jax.jit(jax.grad(lambda *a: logprob.chunked_divergence(*a)[0].sum(), (0, 1, 2, 3)))(*args)
    assert [bool(np.asarray(g).any()) for g in grads] == [True, True, False, False]


def test_top_k_and_tail_bounds_the_full_divergence_and_meets_it_at_full_size(arrays):
    args = [jnp.asarray(arrays[n], jnp.float32) for n in ("hidden", "head", "other", "other_head")]
    divergence = jax.jit(logprob.chunked_divergence, static_argnames="top_k")
    full = np.asarray(divergence(*args)[0])
    sizes = [np.asarray(divergence(*args, top_k=k)[0]) for k in (1, 4, V - 1)]
    assert all((part <= full + 1e-5).all() for part in sizes)
    assert (np.diff([part.mean() for part in sizes]) >= -1e-6).all()
    np.testing.assert_allclose(sizes[-1], full, rtol=1e-3, atol=1e-4)
    assert np.isfinite(divergence(*args, top_k=V)[0]).all()


def test_an_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="chi2"):
        logprob.divergence(jnp.zeros(3), jnp.zeros(3), "chi2")


def test_logits_of_all_positions_never_exist_at_once(arrays):
    """The compiled forward and backward need less temporary memory than one full [B, G, R, V] array."""
    shape, vocab, width = (2, 4, 64), 4096, 8
    hidden, head = jnp.zeros((*shape, width)), jnp.zeros((width, vocab))
    targets = jnp.zeros(shape, jnp.int32)
    fn = jax.jit(jax.grad(lambda h, w: logprob.chunked_logprob(h, w, targets, 4)[0].sum(), (0, 1)))
    temporary = fn.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * np.prod(shape) * vocab / 2


def test_half_precision_gradients_stay_half_and_close(arrays):
    """bfloat16 in, bfloat16 products, float32 sums: near the float32 gradient, and no float32 copy of the head."""
    targets, weight = jnp.asarray(arrays["targets"]), jnp.asarray(np.random.default_rng(1).normal(size=(*LEAD, R)))

    def total(hidden, head):
        return (logprob.chunked_logprob(hidden, head, targets, 3, banned_ids=(0,)).logp.clip(-20) * weight).sum()

    args = [jnp.asarray(arrays[n], jnp.bfloat16) for n in ("hidden", "head")]
    grad = jax.jit(jax.grad(total, (0, 1)))
    half, whole = grad(*args), grad(*(x.astype(jnp.float32) for x in args))
    for a, b in zip(half, whole, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(a) - b) < 1e-2 * np.linalg.norm(b)
    products = [line for line in grad.lower(*args).as_text().splitlines() if "dot_general" in line]
    assert products and not any("xf32>, " in line.split(" : ")[-1].split("->")[0] for line in products)
