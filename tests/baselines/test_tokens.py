"""Compressors that keep single tokens, against plain numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.baselines import dtd, evs, kept, vidcom2, visionzip

B, T, P, D = 3, 9, 8, 12
RNG = np.random.default_rng(7)
WATCHED = {
    "received_btp": RNG.random((B, T, P), np.float32),
    "key_btph": RNG.normal(size=(B, T, P, 5)).astype(np.float32),
}
PRUNE = {"vidcom2": vidcom2.compress, "evs": evs.compress, "dtd": dtd.compress}
MERGE = {"visionzip": functools.partial(visionzip.compress, **WATCHED)}
ALL = PRUNE | MERGE


def video(seed=0, full=False):
    rng = np.random.default_rng(seed)
    mask = np.ones((B, T), bool) if full else rng.random((B, T)) < 0.7
    mask[:, [1, 7]] = True
    walk = np.cumsum(rng.normal(size=(B, T, P, D)) * rng.uniform(0.05, 1, (B, T, P, 1)), axis=1)
    return (walk + rng.normal(size=(B, 1, 1, D))).astype(np.float32), mask, np.zeros((B, T), np.int32)


def run(name, vis, mask, event, keep, target_b=None, **static):
    return compiled(name, keep, tuple(static.items()))(vis, mask, event, target_b=target_b)


@functools.cache
def compiled(name, keep, static):
    return jax.jit(lambda *args, **target: ALL[name](*args, keep, **target, **dict(static)))


def places(out, b):
    return np.asarray(out.at_bn)[b][np.asarray(out.mask_bn)[b]]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", [5, T * P + 3])
def test_budgets_places_and_padding(name, keep):
    vis, mask, event = video()
    target = np.array([3, 200, 11], np.int32)
    for given in (np.full(B, keep, np.int32), target):
        out = run(name, vis, mask, event, keep, target_b=given)
        assert out.tokens_bnd.shape == (B, keep, D)
        want = np.minimum(np.minimum(keep, mask.sum(1) * P), given)
        assert out.mask_bn.sum(1).tolist() == want.tolist()
        for b in range(B):
            at = places(out, b)
            assert (np.diff(at) > 0).all() and mask[b][at // P].all()
        assert not np.asarray(out.tokens_bnd)[~np.asarray(out.mask_bn)].any()
        dirty = np.where(mask[:, :, None, None], vis, np.nan).astype(np.float32)
        jax.tree.map(np.testing.assert_array_equal, out, run(name, dirty, mask, event, keep, target_b=given))
    nothing = run(name, vis, np.zeros_like(mask), event, keep, target_b=target)
    assert not nothing.mask_bn.any() and not nothing.tokens_bnd.any()


@pytest.mark.parametrize("name", PRUNE)
def test_pruned_tokens_are_the_source_tokens_and_carry_gradients(name):
    vis, mask, event = video()
    out = run(name, vis, mask, event, 10)
    for b in range(B):
        np.testing.assert_array_equal(np.asarray(out.tokens_bnd)[b][: len(places(out, b))],
                                      vis[b].reshape(-1, D)[places(out, b)])  # fmt: skip
    grad = jax.grad(lambda v: ALL[name](v, mask, event, 10).tokens_bnd.sum())(jnp.asarray(vis))
    assert np.isfinite(grad).all() and int((grad != 0).sum()) == B * 10 * D


def test_evenly_spreads_the_rest_over_time():
    mask = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], bool)
    assert kept.evenly(jnp.array([6, 1]), mask).tolist() == [[2, 1, 0, 2, 1], [0, 0, 1, 0, 0]]


def vidcom2_reference(x_tpd, rate):
    """Kept places per patch and r_t, as the formulas stand."""
    flat = x_tpd.reshape(-1, D)
    steady = np.sort(np.argsort(flat.var(0), kind="stable")[: D // 2])
    x = unit(x_tpd[..., steady])
    kernel = lambda c: sum(np.exp(-((x - c) ** 2).sum(-1) / (2 * 2.0**k)) for k in range(-3, 2))  # noqa: E731
    to_video, to_frame = kernel(x.mean((0, 1))), kernel(x.mean(1, keepdims=True))
    u = -to_video.mean(1)
    w = np.exp((u - u.max()) / 0.01)
    w /= w.sum()
    r = np.minimum(rate * (1 + w - w.mean()), 1)
    k = np.maximum(np.round(r * P), 1).astype(int)
    picks = [np.sort(np.argsort(s, kind="stable")[:n]) for s, n in zip(to_video + to_frame, k, strict=True)]
    return picks, r


@pytest.mark.parametrize("seed", range(3))
def test_vidcom2_published_rounding(seed):
    vis, mask, event = video(seed)
    out = run("vidcom2", vis, mask, event, T * P, target_b=np.full(B, 17, np.int32), exact=False)
    for b in range(B):
        slots = np.flatnonzero(mask[b])
        picks, _ = vidcom2_reference(vis[b][slots].astype(np.float64), 17 / (len(slots) * P))
        want = np.concatenate([slots[i] * P + picks[i] for i in range(len(slots))])
        assert places(out, b).tolist() == want.tolist()


def test_vidcom2_gives_its_exact_budget_in_proportion():
    _, mask, event = video(1, full=True)
    vis = 2 + np.random.default_rng(1).normal(size=(B, T, P, D)).astype(np.float32)
    vis[:, 4] *= -1  # one patch unlike the others
    out = run("vidcom2", vis, mask, event, 20)
    for b in range(B):
        count = np.bincount(places(out, b) // P, minlength=T)
        assert count.sum() == 20 and count.min() >= 1 and count.argmax() == 4


@pytest.mark.parametrize("keep", [5, 20])
def test_evs(keep):
    vis, mask, event = video(2)
    out = run("evs", vis, mask, event, keep)
    for b in range(B):
        slots = np.flatnonzero(mask[b])
        x = unit(vis[b][slots].astype(np.float64))
        score = np.concatenate([np.full((1, P), 255.0), 1 - (x[1:] * x[:-1]).sum(-1)]).ravel()
        at = np.sort(np.argsort(-score, kind="stable")[:keep])
        assert places(out, b).tolist() == (slots[at // P] * P + at % P).tolist()


def test_dtd():
    vis, mask, event = video(3)
    relative = run("dtd", vis, mask, event, P + 20, target_b=np.full(B, P + 3 * 4, np.int32))
    absolute = run("dtd", vis, mask, event, T * P, tau=0.8)
    for b in range(B):
        slots = np.flatnonzero(mask[b])
        x = unit(vis[b][slots].astype(np.float64))
        sim = (x[1:] * x[:-1]).sum(-1)
        still = np.concatenate([np.zeros((1, P), bool), sim > 0.8])
        assert places(absolute, b).tolist() == (slots[:, None] * P + np.arange(P))[~still].tolist()
        count = np.bincount(places(relative, b) // P, minlength=T)[slots]
        assert count[0] == P and count.sum() == P + 12 and count[1:].max() - count[1:].min() <= 1
        for i in range(1, len(slots)):
            at = np.sort(np.argsort(sim[i - 1], kind="stable")[: count[i]])
            assert [a - slots[i] * P for a in places(relative, b) if a // P == slots[i]] == at.tolist()


def test_pixel_change_compares_the_outer_frames_of_neighbouring_pairs():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (1, 2, 8, 1176), np.uint8)
    got = dtd.pixel_change(pixels)
    x = pixels.astype(float).reshape(2, 2, 4, 3, 2, 14, 14)
    want = np.abs(x[0, :, :, :, 0] - x[1, :, :, :, 1]).mean((1, 2, 3, 4))
    np.testing.assert_allclose(got[0, 1], want, rtol=1e-6)
    assert got.shape == (1, 2, 2) and not got[0, 0].any()


@pytest.mark.parametrize("combine", ["add", "mean"])
def test_visionzip(combine):
    vis, mask, event = video(4)
    keep = T * P
    out = run("visionzip", vis, mask, event, keep, target_b=6 * mask.sum(1).astype(np.int32) + 1, combine=combine)
    for b in range(B):
        at, patches = places(out, b), np.flatnonzero(mask[b])
        count = np.bincount(at // P, minlength=T)[patches]
        assert count.sum() == 6 * len(patches) + 1 and set(count) <= {6, 7}
        for t, k in zip(patches, count, strict=True):
            want_at, want = visionzip_reference(
                vis[b, t].astype(np.float64), WATCHED["received_btp"][b, t], WATCHED["key_btph"][b, t], k, combine
            )
            assert at[at // P == t].tolist() == (t * P + want_at).tolist()
            np.testing.assert_allclose(out.tokens_bnd[b][: len(at)][at // P == t], want, atol=1e-5)


def visionzip_reference(x_pd, received_p, key_ph, k, combine):
    contextual = int(k * 10 / 64 + 0.5)
    dominant = np.argsort(-received_p, kind="stable")[: k - contextual]
    rest = np.setdiff1d(np.arange(P), dominant)
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else rest[:0]
    out, joined = {i: x_pd[i] for i in dominant}, {i: [] for i in targets}
    for i in np.setdiff1d(rest, targets) if contextual else []:
        joined[targets[np.argmax(unit(key_ph[targets]) @ unit(key_ph[i]))]].append(x_pd[i])
    for i in targets:
        if combine == "mean":
            out[i] = np.mean([x_pd[i], *joined[i]], axis=0)
        else:
            out[i] = x_pd[i] + (np.mean(joined[i], axis=0) if joined[i] else 0)
    return np.array(sorted(out)), np.array([out[i] for i in sorted(out)])
