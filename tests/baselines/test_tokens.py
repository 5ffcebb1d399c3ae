"""Compressors that keep single tokens, against plain numpy in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.baselines import density, dtd, evs, fastvid, holitom, kept, pooled, random, vidcom2, visionzip

B, T, P, D = 3, 9, 8, 12
RNG = np.random.default_rng(7)
WATCHED = {
    "received_btp": RNG.random((B, T, P), np.float32),
    "key_btph": RNG.normal(size=(B, T, P, 5)).astype(np.float32),
}
PRUNE = {"vidcom2": vidcom2.compress, "evs": evs.compress, "dtd": dtd.compress}
PRUNE["random"] = functools.partial(random.compress_tokens, key=jax.random.key(0))
MERGE = {
    name: functools.partial(m.compress, **WATCHED)
    for name, m in {"visionzip": visionzip, "holitom": holitom, "fastvid": fastvid}.items()
}
ALL = PRUNE | MERGE
FEWER = ("holitom", "fastvid")


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
        # What HoliTom's windows make one of first is not there to be kept; FastVID's carrying patches may be full.
        assert (out.mask_bn.sum(1) == want).all() or name in FEWER and (out.mask_bn.sum(1) <= want).all()
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


@pytest.mark.parametrize("target", [1, 4, 5, 1000])
def test_pooled_blocks_of_uniform_patches(target):
    vis, mask, event = video(5)
    compress = jax.jit(functools.partial(pooled.compress_tokens, grid_hw=(2, 4)), static_argnums=3)
    out = compress(vis, mask, event, T * P, target_b=np.full(B, target, np.int32))
    for b in range(B):
        slots = np.flatnonzero(mask[b])
        frames = min(-(-target // 2), len(slots))
        at = slots[np.floor((np.arange(frames) + 0.5) * len(slots) / frames).astype(int)]
        want = vis[b][at].reshape(frames, 2, 2, 2, D).mean((1, 3)).reshape(-1, D)[:target]
        assert places(out, b).tolist() == [t * P + c for t in at for c in (0, 2)][:target]
        np.testing.assert_allclose(out.tokens_bnd[b][: len(want)], want, atol=1e-6)
    with pytest.raises(ValueError, match="do not divide"):
        pooled.compress_tokens(vis, mask, event, 4, grid_hw=(1, 8))


def holitom_windows(x_tpd, tau):
    """Best division by trying them all: (start, end) of each window."""
    like = (unit(x_tpd)[:-1] * unit(x_tpd)[1:]).sum(-1) > tau
    gain = lambda a, b: (b - a) * like[a:b].all(0).sum() if b > a else 0  # noqa: E731
    best = (-1, None)
    for cuts in itertools.product([0, 1], repeat=len(x_tpd) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(x_tpd)]
        spans = [(a, b - 1) for a, b in itertools.pairwise(edges)]
        best = max(best, (sum(gain(*s) for s in spans), spans), key=lambda x: x[0])
    return *best, like


def density_centres(x_pd, count, neighbours):
    d = np.linalg.norm(x_pd[:, None] - x_pd[None], axis=-1) / np.sqrt(x_pd.shape[1])
    rho = np.exp(-(np.sort(d, axis=1)[:, :neighbours] ** 2).mean(1))
    delta = [min([d[i, j] for j in range(len(d)) if rho[j] > rho[i]], default=d.max()) for i in range(len(d))]
    return np.sort(np.argsort(-rho * np.array(delta), kind="stable")[:count]), d


def test_holitom():
    rng = np.random.default_rng(6)
    still = np.repeat(rng.normal(size=(B, 3, P, D)), 3, axis=1)  # three scenes of three patches, some places moving
    vis = (still + rng.normal(size=(B, T, P, D)) * (rng.random((B, 1, P, 1)) < 0.5)).astype(np.float32)
    mask, event = np.ones((B, T), bool), np.zeros((B, T), np.int32)
    target = np.array([20, 30, 40], np.int32)
    out = run("holitom", vis, mask, event, T * P, target_b=target)
    for b in range(B):
        x = vis[b].astype(np.float64)
        gain, spans, like = holitom_windows(x, 0.8)
        rows = []  # (places, tokens, is static)
        for a, e in spans:
            static = like[a:e].all(0) if e > a else np.zeros(P, bool)
            rows.append((a * P + np.flatnonzero(static), x[a : e + 1].mean(0)[static], True))
            rows += [(t * P + np.flatnonzero(~static), x[t][~static], False) for t in range(a, e + 1)]
        assert sum(len(r[0]) for r in rows) == T * P - gain
        got, tokens = places(out, b), np.asarray(out.tokens_bnd)[b]
        assert len(got) == min(target[b], T * P - gain)
        for at, features, static in rows:
            k = int(np.isin(got, at).sum())
            # D'Hondt's division is within one seat of proportion for rows of like size
            assert abs(k - min(target[b], T * P - gain) * len(at) / (T * P - gain)) < 1.5
            if k and static:
                centre, d = density_centres(features, k, min(k, 7))
                nearest = centre[d[:, centre].argmin(1)]
                for c in centre:
                    others = [i for i in range(len(at)) if nearest[i] == c and i not in centre]
                    want = 0.6 * features[c] + 0.4 * features[others].mean(0) if others else features[c]
                    np.testing.assert_allclose(tokens[got.tolist().index(at[c])], want, atol=1e-4)
            elif k:
                top = np.sort(np.argsort(-WATCHED["received_btp"][b].ravel()[at], kind="stable")[:k])
                assert got[np.isin(got, at)].tolist() == at[top].tolist()


def test_density_centres_take_one_of_each_cluster():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(3, 1, 6)), 4, axis=1).reshape(1, 12, 6) + 0.01 * rng.normal(size=(1, 12, 6))
    valid = np.ones((1, 12), bool)
    distance = density.distances(jnp.asarray(x, jnp.float32))
    got = np.flatnonzero(density.centres(distance, valid, jnp.array([3]), jnp.array([4]))[0])
    want, d = density_centres(x[0], 3, 4)
    assert got.tolist() == want.tolist() and sorted(got // 4) == [0, 1, 2]
    np.testing.assert_allclose(distance[0], d, atol=1e-3)


def even(total, parts):
    return [total // parts + (i < total % parts) for i in range(parts)]


def fastvid_counts(frame_td, count):
    """(first patch, length) of the segments, and salient and context tokens of every patch, as published."""
    f = unit(frame_td)
    s = (f[1:] * f[:-1]).sum(-1)
    cuts = sorted({*np.argsort(s, kind="stable")[:7].tolist(), *np.flatnonzero(s < 0.84).tolist()})
    edges = [0, *(i + 1 for i in cuts), len(f)]
    salient, context = np.zeros(len(f), int), np.zeros(len(f), int)
    spans = [(a, b - a) for a, b in itertools.pairwise(edges)]
    for a, length in spans:
        total = count // len(f) * length
        c = max(int(total * 0.4), 1)
        if length == 1:
            salient[a], context[a] = total - c, c
            continue
        carriers = [i for i in range(a, a + length) if i == a + length - 1 or s[i] < 0.95]
        anchors = carriers[::-1][::4]
        for i, n in zip(anchors, even(c, len(anchors)), strict=True):
            context[i] = min(n, P // 2)
        for i, n in zip(carriers, even(total - c, len(carriers)), strict=True):
            salient[i] = min(n, P - context[i])
    return spans, salient, context


def test_fastvid():
    rng = np.random.default_rng(8)
    scene = np.repeat(3 * rng.normal(size=(B, 3, 1, D)), 3, axis=1)
    vis = (scene + rng.normal(size=(B, T, P, D)) + rng.normal(size=(B, T, 1, D)) * 0.5).astype(np.float32)
    mask, event = np.ones((B, T), bool), np.zeros((B, T), np.int32)
    out = run("fastvid", vis, mask, event, T * P, target_b=np.full(B, 4 * T, np.int32))
    for b in range(B):
        x = vis[b].astype(np.float64)
        spans, salient, context = fastvid_counts(x.mean(1), 4 * T)
        top = {t: np.argsort(-WATCHED["received_btp"][b, t], kind="stable")[:n] for t, n in enumerate(salient)}
        centre = {}
        for t, n in enumerate(context):
            rest = np.setdiff1d(np.arange(P), top[t])
            centre[t] = rest[density_centres(x[t][rest], n, 4)[0]] if n else rest[:0]
        want = {t * P + p: x[t, p] for t in range(T) for p in top[t]}
        for a, length in spans:
            for t in (i for i in range(a, a + length) if context[i]):
                free = [(u, p) for u in range(a, a + length) for p in range(P)
                        if p not in top[u] and not (u == t and p in centre[t])]  # fmt: skip
                joins = [centre[t][np.argmax(unit(x[t, centre[t]]) @ unit(x[u, p]))] for u, p in free]
                for p in centre[t]:
                    mine = [x[i] for i, c in zip(free, joins, strict=True) if c == p]
                    own = max(0.6, 1 / (len(mine) + 1))
                    want[t * P + p] = own * x[t, p] + (1 - own) * np.mean(mine, axis=0) if mine else x[t, p]
        at = places(out, b)
        assert at.tolist() == sorted(want)
        np.testing.assert_allclose(out.tokens_bnd[b][: len(at)], [want[i] for i in at], atol=1e-4)
