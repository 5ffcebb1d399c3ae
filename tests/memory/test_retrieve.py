"""Top-k: the same events on one device, in blocks and on a mesh; ties, masks and time order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marc_jax import hopper
from marc_jax.hopper import maxima
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


@pytest.mark.parametrize("n", [64, 65, 300, 512])
def test_tiles_of_a_block_change_nothing(monkeypatch, n):
    """On a CPU a block is multiplied tile by tile; here of 64 rows, the last one overlapping."""
    rng = np.random.default_rng(8)
    emb, query, mask = unit(rng, n, 16), unit(rng, 3, 16), rng.random(n) < 0.8
    emb[n // 2 :] = emb[: n - n // 2]
    want = retrieve.search(query, emb, 9, mask_n=mask)
    monkeypatch.setattr(retrieve, "TILE_BYTES", 64 * 64)
    for block in (None, 200, 64):
        got = retrieve.search(query, emb, 9, mask_n=mask, block=block)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[0], want[0])


def test_equal_rows_tie_to_the_smallest_ids_however_many_there_are():
    """More equal rows than are nominated, in blocks whose products round differently: the plain sum decides."""
    rng = np.random.default_rng(3)
    query, row = unit(rng, 4, 100), unit(rng, 1, 100)
    query = (row + 0.3 * query) / np.linalg.norm(row + 0.3 * query, axis=1, keepdims=True)  # about the repeated row
    for n, block in ((2000, 64), (1003, 97), (500, None)):
        emb = np.concatenate([unit(rng, n // 3, 100), np.tile(row, (n - n // 3, 1))])
        _, ids = retrieve.search(query, emb, 10, block=block)
        assert (np.asarray(ids) == n // 3 + np.arange(10)).all()


def test_near_equal_rows_do_not_depend_on_blocks():
    """A still camera: rows apart by less than a product's rounding; some questions are about them and some not."""
    rng = np.random.default_rng(4)
    emb, query = unit(rng, 3000, 64), unit(rng, 6, 64)
    emb[500:2500] = query[0] + 1e-7 * rng.normal(size=(2000, 64)).astype(np.float32)
    want = None
    for block in (None, 64, 333, 1024):
        score, ids = retrieve.search(query, emb, 5, block=block)
        want = want or (np.asarray(score), np.asarray(ids))
        np.testing.assert_array_equal(ids, want[1])
        np.testing.assert_array_equal(score, want[0])
    exact = query.astype(np.float64) @ emb.T.astype(np.float64)
    np.testing.assert_allclose(want[0], -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    assert ids[1:].tolist() == [best_of(row, 5) for row in exact[1:]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1024, 3), (1000, 2), (4097, 16), (50, 5)]))
def test_top_k_by_maxima_of_groups_is_top_k(seed, sizes):
    size, k = sizes
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 6, (3, size)).astype(np.float32)  # ties everywhere
    score[rng.random((3, size)) < 0.3] = -np.inf
    score[2, : size - 2] = -np.inf  # fewer than k
    best, ids = retrieve._top_k(jnp.asarray(score).T, k)
    for q in range(3):
        assert np.asarray(ids[q])[np.asarray(best[q]) > -np.inf].tolist() == best_of(score[q], k)


def test_small_and_empty_archives():
    emb, query = unit(np.random.default_rng(0), 3, 8), unit(np.random.default_rng(1), 2, 8)
    score, ids = retrieve.search(query, emb, 5)
    assert score.shape == ids.shape == (2, 5) and (ids[:, 3:] == -1).all() and (score[:, 3:] == -np.inf).all()
    score, ids = retrieve.search(query, emb[:0], 5)
    assert score.shape == (2, 5) and (ids == -1).all()
    score, ids = retrieve.search(query, emb, 2, mask_n=np.zeros(3, bool))
    assert (ids == -1).all()


def test_bfloat16_rows_are_ranked_by_their_exact_products():
    rng = np.random.default_rng(5)
    emb, query = jnp.asarray(unit(rng, 2000, 64), jnp.bfloat16), jnp.asarray(unit(rng, 4, 64), jnp.bfloat16)
    exact = np.asarray(query, np.float64) @ np.asarray(emb, np.float64).T
    for asked in (query, query.astype(jnp.float32)):
        score, ids = retrieve.search(asked, emb, 4)
        assert score.dtype == jnp.float32 and ids.tolist() == [best_of(row, 4) for row in exact]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "default"])
@pytest.mark.parametrize("dtype, width, num", [("float32", 50, 1), ("bfloat16", 40, 1), ("bfloat16", 64, 3)])
def test_every_platform_s_way_is_exact(monkeypatch, platform, dtype, width, num):
    """The ways of a GPU and of a TPU, compiled for this CPU; an odd number of rows and widths that no lane divides."""
    monkeypatch.setattr(lax, "platform_dependent", lambda **ways: ways[platform]())
    rng = np.random.default_rng(9)
    emb, query = (jnp.asarray(unit(rng, n, width), dtype) for n in (1003, num))
    emb = emb.at[990:].set(emb[3])
    exact = np.asarray(query, np.float64) @ np.asarray(emb, np.float64).T
    score, ids = jax.jit(functools.partial(retrieve.search, k=6, block=200))(query, emb)
    np.testing.assert_allclose(score, -np.sort(-exact, axis=1)[:, :6], atol=1e-6)
    assert ids.tolist() == [best_of(row, 6) for row in exact]


def test_the_approximate_search_has_the_same_contract():
    rng = np.random.default_rng(6)
    emb, query = unit(rng, 5000, 32), unit(rng, 4, 32)
    exact, near = retrieve.search(query, emb, 5), retrieve.search(query, emb, 5, block=640, approx=True)
    found = [len(set(a) & set(b)) for a, b in zip(exact[1].tolist(), near[1].tolist(), strict=True)]
    assert sum(found) >= 0.9 * 20 and (np.diff(near[0]) <= 0).all()  # all 20 off TPU, where XLA computes it exactly


def test_as_faiss_finds_them():
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu: the [bench] extra")
    rng = np.random.default_rng(7)
    emb, query = unit(rng, 20_000, 96), unit(rng, 9, 96)
    index = faiss.IndexFlatIP(96)
    index.add(emb)
    their_score, their_ids = index.search(query, 10)
    score, ids = retrieve.search(query, emb, 10)
    np.testing.assert_array_equal(ids, their_ids)
    np.testing.assert_allclose(score, their_score, atol=1e-6)


@pytest.mark.parametrize("shards", [4, 8])
def test_sharded_archive_gives_the_same_winners_and_ties(shards):
    rng = np.random.default_rng(2)
    devices = np.array(jax.devices()[:shards])
    if len(devices) < shards:
        pytest.skip(f"needs {shards} (simulated) devices")
    mesh = Mesh(devices, ("data",))
    emb, query, mask = unit(rng, 240, 16), unit(rng, 3, 16), rng.random(240) < 0.9
    emb[120:] = emb[:120]
    query[2] = emb[7]
    emb[60:] = np.where(rng.random((180, 1)) < 0.5, emb[7], emb[60:])  # more equal rows than a shard nominates
    owner, owner_q = rng.integers(0, 3, 240).astype(np.int32), np.array([-1, 1, -1], np.int32)
    rows = jax.device_put(emb, NamedSharding(mesh, PartitionSpec("data")))
    only = dict(mask_n=jnp.asarray(mask), owner_n=jnp.asarray(owner), owner_q=jnp.asarray(owner_q))
    for block in (None, 50, 7):
        one = retrieve.search(query, emb, 8, block=block, **only)
        many = jax.jit(functools.partial(retrieve.search_sharded, mesh, "data", k=8, block=block))
        many = many(query, rows, **only)
        np.testing.assert_array_equal(one[1], many[1])
        np.testing.assert_array_equal(one[0], many[0])
    with pytest.raises(ValueError, match="do not divide"):
        retrieve.search_sharded(mesh, "data", query, emb[:239], 8)


def test_the_hopper_kernel_keeps_the_best_of_every_few_scores(monkeypatch):
    """In Pallas' interpreter: a last tile that reaches past the rows, and questions that fill no tile."""
    if hopper.pallas() is None:
        pytest.skip("the kernel needs the Mosaic GPU back end of jax >= 0.11")
    monkeypatch.setattr(hopper, "PROCESSORS", 3)  # more tiles than blocks
    monkeypatch.setattr(hopper, "available", lambda: True)
    monkeypatch.setattr(lax, "platform_dependent", lambda **ways: ways["cuda"]())
    rng = np.random.default_rng(12)
    emb, query = (jnp.asarray(unit(rng, n, 128), jnp.bfloat16) for n in (1100, 5))
    exact = np.asarray(query, np.float64) @ np.asarray(emb, np.float64).T
    with hopper.pallas()[1].force_gpu_interpret_mode():
        best_gq = np.asarray(maxima.maxima(query, emb, 8))
        score, ids = retrieve.search(query, emb, 4)
    padded = np.pad(exact, ((0, 0), (0, 5 * 256 - 1100)))
    np.testing.assert_allclose(best_gq.T, padded.reshape(5, 5, 8, 32).max(axis=2).reshape(5, -1), atol=1e-6)
    assert ids.tolist() == [best_of(row, 4) for row in exact]
    np.testing.assert_allclose(score, -np.sort(-exact, axis=1)[:, :4], atol=1e-6)
