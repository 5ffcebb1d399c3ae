"""Budgets against plain numpy: what an event is worth, who gets the next patch, which tokens tell most."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_jax.memory import budget


def cosine(a, b):
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_what_happens_in_an_event():
    rng = np.random.default_rng(0)
    vis = rng.normal(size=(2, 7, 3, 8)).astype(np.float32)
    vis[0, 1] = vis[0, 0]  # a still event of two patches
    event = np.array([[0, 0, 1, 1, 1, 2, 9], [0, 1, 1, 1, 1, 1, 1]])
    mask = np.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 0]], bool)
    length, change = budget.event_statistics(np.where(mask[:, :, None, None], vis, np.nan), mask, event, 4)
    assert length.tolist() == [[2, 3, 1, 0], [1, 4, 0, 0]]
    for b in range(2):
        for e in range(4):
            mine = [t for t in range(6) if event[b, t] == event[b, t + 1] == e and mask[b, t] and mask[b, t + 1]]
            want = sum(max(1 - cosine(vis[b, t], vis[b, t + 1]).mean(), 0) for t in mine)
            assert change[b, e] == pytest.approx(want, abs=1e-5)
    assert change[0, 0] == pytest.approx(0, abs=1e-6)
    want = 3 + np.asarray(change[0]).sum()
    assert budget.wanted_patches(length, change)[0] == pytest.approx(want, rel=1e-6)


def test_the_ladder():
    assert budget.rung(jnp.array([0.0, 64, 65, 121, 500, 1024, 9000])).tolist() == [64, 64, 128, 128, 512, 1024, 1024]


def reference_share(total, weight, length, most, least):
    """One patch after the other, as the docstring says."""
    got = np.zeros(len(weight), int)
    room = np.minimum(length, most)
    for _ in range(total):
        open_e = got < room
        if not open_e.any():
            break
        first = open_e & (got < least)
        pool = first if first.any() else open_e
        quotient = np.where(pool, weight.astype(np.float32) / (got + 1).astype(np.float32), -np.inf)
        got[int(np.argmax(quotient))] += 1
    return got


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 2]))
def test_shares_are_those_of_one_patch_after_the_other(seed, least):
    rng = np.random.default_rng(seed)
    weight = np.round(rng.random((3, 5)), 1).astype(np.float32)  # ties
    length = rng.integers(0, 6, (3, 5))
    weight = np.where(length > 0, weight, 0)
    total = rng.integers(0, 20, 3)
    out = np.asarray(budget.share(jnp.asarray(total), jnp.asarray(weight), jnp.asarray(length), 4, least=least))
    for b in range(3):
        assert out[b].tolist() == reference_share(total[b], weight[b], length[b], 4, least).tolist()
        assert out[b].sum() == min(total[b], np.minimum(length[b], 4).sum())


def test_weights_follow_relevance_change_and_length():
    length, change = jnp.array([[4, 4, 8, 0]]), jnp.array([[0.3, 1.2, 0.7, 0.0]])
    weight = budget.event_weights(length, change)
    want = np.array([0.1, 0.4, 0.1, 0]) ** 0.5 * np.array([4, 4, 8, 1]) ** 0.25
    np.testing.assert_allclose(weight[0], want, rtol=1e-5)
    asked = budget.event_weights(length, change, jnp.array([[0.9, 0.05, 0.05, 0.0]]))
    np.testing.assert_allclose(asked, np.asarray(weight) * [[0.9, 0.05, 0.05, 0.0]], rtol=1e-6)
    assert budget.of_patches(jnp.array([[3, 0]]), jnp.array([[0, 0, 1, 7]])).tolist() == [[3, 3, 1, 1]]


def test_the_tokens_least_like_their_patch_are_kept():
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    valid = np.repeat(mask[:, :, None], 5, axis=2)
    keep = np.asarray(budget.telling_tokens(tokens, valid, 4))
    for b in range(2):
        unit = tokens[b] / np.linalg.norm(tokens[b], axis=-1, keepdims=True)
        score = 1 - cosine(unit, unit.mean(1, keepdims=True))
        score[~mask[b]] = -np.inf
        want = np.zeros(15, bool)
        want[np.argsort(-score.ravel(), kind="stable")[:4]] = True
        assert (keep[b].ravel() == want).all()
    assert (np.asarray(budget.telling_tokens(tokens, valid, 99)) == valid).all()
    valid[:, :, 3:] = False  # padding is never kept, nor looked at
    padded = np.asarray(budget.telling_tokens(tokens, valid, 4))
    alone = np.asarray(budget.telling_tokens(tokens[:, :, :3], valid[:, :, :3], 4))
    assert (padded[:, :, :3] == alone).all() and not padded[:, :, 3:].any()


def test_tokens_that_only_fill_a_patch_up_change_nothing():
    vis_btpd = np.random.default_rng(3).normal(size=(2, 5, 6, 4)).astype(np.float32)
    mask_bt, event_bt = np.ones((2, 5), bool), np.array([[0, 0, 1, 1, 1]] * 2)
    vis_btpd[1, :, 4:] = 0
    length, change = budget.event_statistics(vis_btpd, mask_bt, event_bt, 3, np.array([6, 4]))
    for b, own in enumerate((6, 4)):
        alone = budget.event_statistics(vis_btpd[b : b + 1, :, :own], mask_bt[:1], event_bt[:1], 3)
        np.testing.assert_array_equal(length[b], alone[0][0])
        np.testing.assert_allclose(change[b], alone[1][0], rtol=1e-5)
