"""The dual encoder: unit vectors, no NaN from padding, learns to find what is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marc_jax.memory import embed, retrieve

SIZES = embed.Sizes(features=16, vocab=20, length=8, width=32, embedding=16)


@pytest.fixture(scope="module")
def params():
    return jax.jit(embed.init, static_argnums=1)(jax.random.key(0), SIZES)


def batch(rng, b=32, t=8, e=5):
    """Each event shows one of 10 things, at a random place of its patches; the question names one or two of them."""
    thing_be = np.argsort(rng.random((b, 10)), axis=1)[:, :e]
    event_bt = np.sort(rng.integers(0, e, (b, t)), axis=1).astype(np.int32)
    mask_bt = np.arange(t) < rng.integers(t - 2, t + 1, (b, 1))
    feat = 0.3 * rng.normal(size=(b, t, 4, 16)).astype(np.float32)
    codes = np.random.default_rng(7).normal(size=(10, 16)).astype(np.float32)
    place_bt, shown_bt = rng.integers(0, 4, (b, t)), np.take_along_axis(thing_be, event_bt, 1)
    feat[np.arange(b)[:, None], np.arange(t), place_bt] += codes[shown_bt]
    present_be = ((event_bt[:, :, None] == np.arange(e)) & mask_bt[:, :, None]).any(1)
    order = np.argsort(np.where(present_be, rng.random((b, e)), 2), axis=1)[:, :2]
    two_b = (rng.random(b) < 0.3) & (present_be.sum(1) > 1)
    needed_be = (np.arange(e) == order[:, :1]) | ((np.arange(e) == order[:, 1:]) & two_b[:, None])
    tokens = np.zeros((b, 6), np.int32)
    tokens[:, 0] = 11
    tokens[:, 1] = np.take_along_axis(thing_be, order, 1)[:, 0]
    tokens[:, 2] = np.where(two_b, np.take_along_axis(thing_be, order, 1)[:, 1], 12)
    mask_bl = np.arange(6) < 3
    return feat, mask_bt, event_bt, needed_be, tokens, np.broadcast_to(mask_bl, tokens.shape)


@jax.jit
def forward(params, data):
    feat, mask_bt, event_bt, needed_be, tokens, mask_bl = data
    emb, mask_be = embed.embed_events(params, feat, mask_bt, event_bt, 5)
    query = embed.embed_questions(params, tokens, mask_bl)
    return emb, mask_be, query, needed_be


@functools.partial(jax.jit, static_argnames="in_batch")
def mean_loss(params, data, in_batch=0.0):
    emb, mask_be, query, needed = forward(params, data)
    total, count, _ = embed.loss(params, query, emb, mask_be, needed, in_batch=in_batch)
    return total / count


def test_unit_vectors_and_empty_events(params):
    emb, mask_be, query, _ = forward(params, batch(np.random.default_rng(0)))
    np.testing.assert_allclose(np.linalg.norm(query, axis=-1), 1, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(emb, axis=-1), np.asarray(mask_be, float), atol=1e-3)


def test_event_is_the_renormalised_mean_of_its_patches(params):
    feat, mask_bt, event_bt, *_ = batch(np.random.default_rng(0))
    patches = np.asarray(jax.jit(embed.embed_patches)(params, feat))
    emb = forward(params, batch(np.random.default_rng(0)))[0]
    mine = mask_bt[0] & (event_bt[0] == event_bt[0, 0])
    mean = patches[0][mine].mean(0)
    np.testing.assert_allclose(emb[0, event_bt[0, 0]], mean / np.linalg.norm(mean), atol=1e-4)


@pytest.mark.parametrize("in_batch", [0.0, 0.5])
def test_gradients_are_finite_with_padded_events_and_zero_features(params, in_batch):
    feat, mask_bt, event_bt, needed, tokens, mask_bl = batch(np.random.default_rng(1))
    mask_bt[0] = False  # a video without any valid patch
    feat[1] = 0  # a black one
    feat[2, ~mask_bt[2]] = np.nan  # rubbish in the padding
    needed[3] = False
    data = (feat, mask_bt, event_bt, needed, tokens, mask_bl)
    grad = jax.jit(jax.grad(functools.partial(mean_loss, in_batch=in_batch)))(params, data)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_loss_against_a_plain_reference(params):
    data = batch(np.random.default_rng(2))
    emb, mask_be, query, needed = (np.asarray(x, np.float64) for x in forward(params, data))
    score = np.where(mask_be > 0, np.einsum("bd,bed->be", query, emb) / 0.07, -np.inf)
    log_p = score - np.log(np.exp(score).sum(1, keepdims=True))
    expected = np.mean([-log_p[b][needed[b] > 0].mean() for b in range(32)])
    np.testing.assert_allclose(mean_loss(params, data), expected, rtol=1e-4)


def test_in_batch_loss_against_a_plain_reference(params):
    """Own-video softmax plus half of both directions of InfoNCE over the batch, in float64."""
    data = batch(np.random.default_rng(2))
    emb, _, query, needed = (np.asarray(x, np.float64) for x in forward(params, data))
    target = needed / needed.sum(1, keepdims=True)
    answer = np.einsum("be,bed->bd", target, emb)
    cross = query @ (answer / np.linalg.norm(answer, axis=1, keepdims=True)).T / 0.07
    log_p = lambda x: np.diagonal(x - np.log(np.exp(x).sum(1, keepdims=True)))  # noqa: E731
    both = log_p(cross) + log_p(cross.T)
    expected = float(mean_loss(params, data)) - 0.3 * 0.5 * both.mean()
    np.testing.assert_allclose(mean_loss(params, data, in_batch=0.3), expected, rtol=1e-4)


def test_in_batch_negatives_come_from_the_whole_mesh(params):
    from marc_jax import sharding

    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    data = batch(np.random.default_rng(2))
    mesh = sharding.make_mesh(data=8, fsdp=1)
    spread = jax.device_put(data, sharding.batch(mesh))
    everywhere = jax.device_put(params, sharding.replicated(mesh))
    here = mean_loss(params, data, in_batch=0.3)
    np.testing.assert_allclose(mean_loss(everywhere, spread, in_batch=0.3), here, rtol=1e-5)


def test_learns_to_retrieve_one_and_several_events(params):
    tx = optax.adam(5e-3)

    @jax.jit
    def step(params, opt, data):
        value, grad = jax.value_and_grad(mean_loss)(params, data)
        updates, opt = tx.update(grad, opt)
        return optax.apply_updates(params, updates), opt, value

    rng, opt = np.random.default_rng(3), jax.jit(tx.init)(params)
    for _ in range(250):
        params, opt, value = step(params, opt, batch(rng))
    emb, mask_be, query, needed = forward(params, batch(np.random.default_rng(99), b=256))
    ids, valid = retrieve.topk_events(query, emb, mask_be, 2)
    found_all, share = embed.recall(ids, valid, jnp.asarray(needed))
    single = needed.sum(1) == 1
    assert found_all[single].mean() > 0.95 and found_all[~single].mean() > 0.8
    assert np.isfinite(float(value)) and (share >= found_all).all()


def test_recall_counts_every_needed_event():
    ids, valid = jnp.array([[0, 2], [1, 0], [0, 0]]), jnp.array([[True, True], [True, False], [False, False]])
    needed = jnp.array([[True, False, True], [False, True, True], [False, False, False]])
    found_all, share = embed.recall(ids, valid, needed)
    assert found_all.tolist() == [True, False, True] and share.tolist() == [1.0, 0.5, 1.0]


def test_too_long_a_question_is_an_error(params):
    with pytest.raises(ValueError, match="9 tokens.*made for 8"):
        embed.embed_questions(params, np.zeros((1, 9), np.int32), np.ones((1, 9), bool))
