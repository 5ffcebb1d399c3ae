"""Top-k: the same events on one device, in blocks and on a mesh; ties, masks and time order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marc_jax.memory import retrieve


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def best_of(score_n, k):
    """Plain reference: best first, the smaller id on a tie, -inf never."""
    order = sorted((i for i in range(len(score_n)) if score_n[i] > -np.inf), key=lambda i: (-score_n[i], i))
    return order[:k]


def test_events_come_back_in_time_order():
    rng = np.random.default_rng(0)
    emb, query, mask = unit(rng, 5, 8, 16), unit(rng, 5, 16), rng.random((5, 8)) < 0.6
    mask[0] = False
    mask[1] = np.arange(8) < 2
    ids, valid = retrieve.topk_events(query, emb, mask, 3)
    for b in range(5):
        score = np.where(mask[b], emb[b] @ query[b], -np.inf)
        assert np.asarray(ids)[b][np.asarray(valid)[b]].tolist() == sorted(best_of(score, 3))
    assert valid[0].tolist() == [False] * 3 and ids[0].tolist() == [0] * 3


def test_equal_events_tie_to_the_earliest():
    emb = np.tile(unit(np.random.default_rng(0), 1, 1, 4), (1, 6, 1))
    ids, _ = retrieve.topk_events(emb[:, 0], emb, np.array([[False, True, True, True, True, True]]), 3)
    assert ids.tolist() == [[1, 2, 3]]


def test_more_wanted_than_there_are():
    emb = unit(np.random.default_rng(0), 1, 2, 4)
    ids, valid = retrieve.topk_events(emb[:, 0], emb, np.ones((1, 2), bool), 5)
    assert ids.tolist() == [[0, 1, 0, 0, 0]] and valid.sum() == 2


def test_the_number_of_events_follows_the_scores():
    score = np.array([[0.9, 0.1, 0.1, 0.0], [0.5, 0.5, 0.5, 0.5], [0.8, 0.2, 0.8, -np.inf]], np.float32)
    mask = score > -np.inf
    ids, valid = retrieve.topk_scores(score, mask, 3, rule="mass", temperature=0.05, mass=0.7)
    assert valid.sum(1).tolist() == [1, 3, 2] and ids[2, :2].tolist() == [0, 2]
    _, valid = retrieve.topk_scores(score, mask, 3, rule="gap")
    assert valid.sum(1).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="'mass' or 'gap'"):
        retrieve.enough(score, 3, rule="luck")


def test_patches_of_chosen_events():
    start, length = np.array([[0, 2, 7]]), np.array([[2, 5, 1]])
    ids, valid = np.array([[1, 2, 0]]), np.array([[True, True, False]])
    patch, mask, slot = retrieve.gather_patches(ids, valid, start, length, 5)
    assert patch[0][mask[0]].tolist() == [2, 3, 4, 5, 6, 7] and slot[0][mask[0]].tolist() == [0] * 5 + [1]
    assert patch.shape == (1, 15) and not patch[0][~mask[0]].any()
    patch, mask, _ = retrieve.gather_patches(ids, valid, start, length, 3)  # too long: spread over the event
    assert patch[0][mask[0]].tolist() == [2, 4, 6, 7]


def test_gathered_tokens_are_those_of_the_patches():
    vis = np.random.default_rng(0).normal(size=(1, 8, 2, 3)).astype(np.float32)
    out, mask, _, patch = retrieve.gather_events(
        vis, np.array([[1]]), np.array([[True]]), np.array([[0, 3]]), np.array([[3, 4]]), 6
    )
    np.testing.assert_array_equal(out[0][mask[0]], vis[0, 3:7])


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_archive_in_blocks(block):
    rng = np.random.default_rng(1)
    emb, query, mask = unit(rng, 200, 16), unit(rng, 4, 16), rng.random(200) < 0.9
    emb[150:] = emb[:50]  # ties across blocks
    owner, owner_q = rng.integers(0, 40, 200).astype(np.int32), np.array([-1, 3, -1, 99], np.int32)
    run = jax.jit(functools.partial(retrieve.search, k=10, block=block))
    score, ids = run(query, emb, mask_n=mask, owner_n=owner, owner_q=owner_q)
    for q in range(4):
        full = np.where(mask & ((owner_q[q] < 0) | (owner == owner_q[q])), emb @ query[q], -np.inf)
        expected = best_of(np.asarray(full, np.float32).round(6), 10)
        got = [i for i in ids[q].tolist() if i >= 0]
        assert got == expected and (np.asarray(score[q]) > -np.inf).sum() == len(expected)


def test_sharded_archive_gives_the_same_winners_and_ties():
    rng = np.random.default_rng(2)
    devices = np.array(jax.devices()[:4])
    if len(devices) < 4:
        pytest.skip("needs 4 (simulated) devices")
    mesh = Mesh(devices, ("data",))
    emb, query, mask = unit(rng, 240, 16), unit(rng, 3, 16), rng.random(240) < 0.9
    emb[120:] = emb[:120]
    rows = jax.device_put(emb, NamedSharding(mesh, PartitionSpec("data")))
    one = retrieve.search(query, emb, 8, mask_n=jnp.asarray(mask), block=50)
    sharded = jax.jit(lambda q, e, m: retrieve.search_sharded(mesh, "data", q, e, 8, mask_n=m, block=50))
    many = sharded(query, rows, mask)
    np.testing.assert_array_equal(one[1], many[1])
    np.testing.assert_allclose(one[0], many[0], atol=1e-6)
    with pytest.raises(ValueError, match="do not divide"):
        retrieve.search_sharded(mesh, "data", query, emb[:239], 8)
