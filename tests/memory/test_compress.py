"""Two-stage merging: equal to merging features directly, and blind to padding, width and batch order."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_jax.memory import compress

STATIC = dict(static_argnames=("keep", "per_event", "window", "weighted"))
run = jax.jit(compress.compress, **STATIC)
merge_weights = jax.jit(compress.merge_weights, **STATIC)
per_event_patches = jax.jit(compress.compress_per_event, **STATIC)


def reference(vis_tpd, mask_t, event_t, keep, per_event=None, window=None, weighted=False):
    """Plain float64 merging of the features themselves. Rows: (merged [P, D], weights [T])."""
    t = len(mask_t)
    rows = [
        dict(x=vis_tpd[i].astype(np.float64), w=np.eye(t)[i], size=1, first=event_t[i], last=event_t[i])
        for i in range(t)
        if mask_t[i]
    ]

    def similarity(a, b):
        norm = np.linalg.norm(a["x"], axis=-1) * np.linalg.norm(b["x"], axis=-1)
        cos = np.sum(a["x"] * b["x"], axis=-1) / np.maximum(norm, 1e-30)
        return np.round(cos.mean() * compress.SIMILARITY_GRID)

    def join(i):
        a, b = rows[i], rows[i + 1]
        f = a["size"] / (a["size"] + b["size"]) if weighted else 0.5
        rows[i : i + 2] = [
            dict(x=f * a["x"] + (1 - f) * b["x"], w=f * a["w"] + (1 - f) * b["w"], size=a["size"] + b["size"],
                 first=a["first"], last=b["last"])
        ]  # fmt: skip

    def best(pairs):
        return max(pairs, key=lambda i: (similarity(rows[i], rows[i + 1]), -i))

    for event in dict.fromkeys(event_t[mask_t]) if per_event is not None else []:
        while True:
            mine = [i for i, r in enumerate(rows) if r["first"] == event]
            pairs = [i for i in mine[:-1] if rows[i]["size"] + rows[i + 1]["size"] <= (window or t)]
            if len(mine) <= per_event or not pairs:
                break
            join(best(pairs))
    while len(rows) > keep:
        join(best(range(len(rows) - 1)))
    return rows


def scene(seed, b=2, t=9, p=3, d=5, holes=True):
    rng = np.random.default_rng(seed)
    event_bt = np.sort(rng.integers(0, 4, (b, t)), axis=1)
    vis = rng.normal(size=(b, t, p, d)) + 2 * rng.normal(size=(4, p, d))[event_bt]
    mask_bt = rng.random((b, t)) < 0.8 if holes else np.ones((b, t), bool)
    mask_bt[:, 0] = True
    return vis.astype(np.float32), mask_bt, event_bt.astype(np.int32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keep,per_event,window", [(1, None, None), (1, 2, None), (3, 1, None), (2, 1, 2), (12, 2, 3)])
def test_same_as_merging_features_directly(keep, per_event, window, weighted):
    for seed in range(8):
        vis, mask, event = scene(seed)
        options = dict(per_event=per_event, window=window, weighted=weighted)
        out = run(vis, mask, event, keep, **options)
        for b in range(len(vis)):
            rows = reference(vis[b], mask[b], event[b], keep, **options)
            assert int(out.mask_bk[b].sum()) == len(rows)
            assert list(out.size_bk[b][: len(rows)]) == [r["size"] for r in rows]
            for k, row in enumerate(rows):
                np.testing.assert_allclose(out.weights_bkt[b, k], row["w"], rtol=1e-6)
                np.testing.assert_allclose(out.tokens_bkpd[b, k], row["x"], atol=2e-6)
                np.testing.assert_allclose(out.t_bk[b, k], row["w"] @ np.arange(9), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, None, None), (3, 2, 3)]))
def test_rows_are_means_of_contiguous_runs(seed, budgets):
    keep, per_event, window = budgets
    vis, mask, event = scene(seed)
    out = run(vis, mask, event, keep, per_event=per_event, window=window)
    weights = np.asarray(out.weights_bkt)
    np.testing.assert_allclose(weights.sum(2), np.asarray(out.mask_bk, float), atol=1e-6)
    for b in range(len(vis)):
        owner = weights[b][:, mask[b]].argmax(0)  # over valid patches, in time
        assert (np.diff(owner) >= 0).all() and (np.diff(owner) <= 1).all() and owner[0] == 0
        assert ((weights[b] > 0).sum(0) == mask[b]).all()  # every valid patch counts once, masked ones never


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_padding_and_batch_order_change_nothing(seed, weighted):
    vis, mask, event = scene(seed, b=3)
    keep, options = 1, dict(per_event=2, weighted=weighted)
    out = run(vis, mask, event, keep, **options)
    dirty = np.where(mask[:, :, None, None], vis, np.nan).astype(np.float32)
    flipped = run(dirty[::-1], mask[::-1], np.where(mask, event, 77)[::-1], keep, **options)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), out, flipped)


def test_fewer_patches_than_the_budget_are_kept_as_they_are():
    vis, mask, event = scene(0)
    mask[:] = False
    mask[:, [2, 5]] = True
    out = run(vis, mask, event, 4)
    assert out.mask_bk.tolist() == [[True, True, False, False]] * 2
    np.testing.assert_array_equal(out.tokens_bkpd[:, :2], vis[:, [2, 5]])
    assert not out.tokens_bkpd[:, 2:].any() and not out.size_bk[:, 2:].any()


def test_no_valid_patch_gives_no_valid_row_and_no_nan():
    vis, mask, event = scene(0)
    out = run(vis, np.zeros_like(mask), event, 2, per_event=1)
    assert not out.mask_bk.any() and all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_a_still_camera_ties_exactly_and_the_earliest_pair_wins():
    vis = np.tile(np.random.default_rng(0).normal(size=(1, 1, 7, 33)).astype(np.float32), (1, 4, 1, 1))
    out = run(vis, np.ones((1, 4), bool), np.zeros((1, 4), np.int32), 1)
    np.testing.assert_allclose(out.weights_bkt[0, 0], [0.125, 0.125, 0.25, 0.5])


def test_weighted_keep_one_is_the_plain_mean():
    vis, mask, event = scene(3)
    out = run(vis, mask, event, 1, per_event=1, weighted=True)
    for b in range(2):
        np.testing.assert_allclose(out.tokens_bkpd[b, 0], vis[b][mask[b]].mean(0), atol=1e-5)


def test_one_patch_per_event_lands_in_the_event_s_own_row():
    vis, mask, event = scene(5)
    mask &= event != 1  # slot 1 is empty
    out = per_event_patches(vis, mask, event, 4)
    for b in range(2):
        for e in range(4):
            mine = mask[b] & (event[b] == e)
            assert bool(out.mask_bk[b, e]) == bool(mine.any())
            if mine.any():
                row = reference(vis[b], mine, event[b], 1)[0]
                np.testing.assert_allclose(out.tokens_bkpd[b, e], row["x"], atol=2e-6)


def test_a_budget_per_video():
    vis, mask, event = scene(1, holes=False)
    out = run(vis, mask, event, 4, target_b=jnp.array([1, 3]))
    assert out.mask_bk.sum(1).tolist() == [1, 3]


def test_gradients_flow_through_tokens_by_the_weights_alone():
    vis, mask, event = scene(2)
    weights = merge_weights(vis, mask, event, 2, per_event=2)
    grad = jax.grad(lambda v: run(v, mask, event, 2, per_event=2).tokens_bkpd.sum())(jnp.asarray(vis))
    expected = np.broadcast_to(np.asarray(weights).sum(1)[:, :, None, None], vis.shape)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_bfloat16_in_bfloat16_out():
    vis, mask, event = scene(2)
    out = run(jnp.asarray(vis, jnp.bfloat16), mask, event, 1)
    assert out.tokens_bkpd.dtype == jnp.bfloat16


def test_fast_enough_on_a_cpu_for_the_quick_start():
    vis, mask, event = scene(0, b=64, t=8, p=4, d=64)
    once = lambda: run(vis, mask, event, 1).tokens_bkpd.block_until_ready()  # noqa: E731
    once()
    start = time.perf_counter()
    for _ in range(5):
        once()
    assert (time.perf_counter() - start) / 5 < 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_select_keeps_the_source_most_like_the_mean(weighted):
    for seed in range(4):
        vis, mask, event = scene(seed)
        event_t = np.arange(9, dtype=np.float32) * 10 + np.zeros((2, 1), np.float32)
        options = dict(per_event=2, weighted=weighted)
        out = compress.compress(vis, mask, event, 3, represent="select", t_bt=event_t, **options)
        for b in range(2):
            rows = reference(vis[b], mask[b], event[b], 3, **options)
            assert list(out.size_bk[b][: len(rows)]) == [r["size"] for r in rows]
            for k, row in enumerate(rows):
                dot = np.sum(vis[b] * row["x"], -1)
                cos = dot / (np.linalg.norm(vis[b], axis=-1) * np.linalg.norm(row["x"], axis=-1))
                best = int(np.argmax(np.where(row["w"] > 0, np.round(cos.mean(1) * compress.SIMILARITY_GRID), -np.inf)))
                np.testing.assert_array_equal(out.tokens_bkpd[b, k], vis[b, best])
                assert out.t_bk[b, k] == 10 * best
    nothing = compress.compress(vis, np.zeros_like(mask), event, 3, represent="select")
    assert not nothing.mask_bk.any() and not nothing.tokens_bkpd.any()
    with pytest.raises(ValueError, match="'mean' or 'select'"):
        compress.compress(vis, mask, event, 3, represent="median")


def test_select_of_one_patch_per_event():
    vis, mask, event = scene(5, holes=False)
    out = compress.compress_per_event(vis, mask, event, 4, represent="select")
    for b in range(2):
        for e in np.unique(event[b]):
            assert any((np.asarray(out.tokens_bkpd[b, e]) == vis[b, t]).all() for t in np.flatnonzero(event[b] == e))


def test_a_merge_costs_as_much_as_one_row_of_similarities():
    """FLOPs that XLA counts for the loop's body: they double with T, they do not quadruple."""

    def flops(t, p=1024):
        shapes = (
            jax.ShapeDtypeStruct((t, t, p), jnp.float32),
            jax.ShapeDtypeStruct((t,), bool),
            *(jax.ShapeDtypeStruct((t,), jnp.int32),) * 2,
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        one = lambda *args: compress._merge_one(  # noqa: E731
            *args, trips=t - 1, window=t, weighted=False, metric="cosine"
        )
        return jax.jit(one).lower(*shapes).cost_analysis()["flops"]  # a loop's body is counted once

    # Beside T x P there is one comparison of T x T events, so P is large here.
    assert flops(128) / flops(64) < 2.2
