"""The trivial baselines against plain numpy, at the same number of tokens as the compressor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.baselines import mean, moviechat, no_video, pooled, random, uniform

KEY = jax.random.key(0)
ALL = {
    name: jax.jit(compress, static_argnums=3)
    for name, compress in {
        "mean": mean.compress,
        "uniform": uniform.compress,
        "random": lambda *a: random.compress(*a, key=KEY),
        "pooled": pooled.compress,
        "no_video": no_video.compress,
        "moviechat": moviechat.compress,
    }.items()
}


@pytest.fixture
def video():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 10)) < 0.7
    mask[:, [1, 8]] = True
    return rng.normal(size=(3, 10, 4, 5)).astype(np.float32), mask, np.zeros((3, 10), np.int32)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", [1, 2, 12])
def test_shapes_padding_and_weights(video, name, keep):
    vis, mask, event = video
    out = ALL[name](vis, mask, event, keep)
    assert out.tokens_bkpd.shape == (3, keep, 4, 5) and out.weights_bkt.shape == (3, keep, 10)
    np.testing.assert_allclose(out.weights_bkt.sum(2), np.asarray(out.mask_bk, float), atol=1e-6)
    assert not np.asarray(out.tokens_bkpd)[~np.asarray(out.mask_bk)].any()
    dirty = np.where(mask[:, :, None, None], vis, np.nan).astype(np.float32)
    jax.tree.map(np.testing.assert_array_equal, out, ALL[name](dirty, mask, event, keep))
    if name not in ("no_video", "pooled"):
        assert out.mask_bk.sum(1).tolist() == np.minimum(mask.sum(1), keep).tolist()
    nothing = ALL[name](vis, np.zeros_like(mask), event, keep)
    assert not nothing.mask_bk.any() and not nothing.tokens_bkpd.any()


def test_mean(video):
    vis, mask, event = video
    out = mean.compress(vis, mask, event, 1)
    two = mean.compress(vis, mask, event, 2)
    for b in range(3):
        valid = vis[b][mask[b]]
        np.testing.assert_allclose(out.tokens_bkpd[b, 0], valid.mean(0), atol=1e-6)
        n = (len(valid) + 1) // 2
        np.testing.assert_allclose(two.tokens_bkpd[b, 0], valid[:n].mean(0), atol=1e-6)
        np.testing.assert_allclose(two.tokens_bkpd[b, 1], valid[n:].mean(0), atol=1e-6)


@pytest.mark.parametrize("keep", [1, 3])
def test_uniform(video, keep):
    vis, mask, event = video
    out = uniform.compress(vis, mask, event, keep)
    for b in range(3):
        valid = vis[b][mask[b]]
        middle = np.floor((np.arange(keep) + 0.5) * len(valid) / keep).astype(int)
        np.testing.assert_array_equal(out.tokens_bkpd[b], valid[middle])


def test_random_takes_every_patch_equally_often_and_keeps_time(video):
    vis, mask, event = video
    draw = jax.jit(lambda key: random.compress(vis, mask, event, 2, key=key).weights_bkt)
    weights = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 400)))
    share = weights.sum(2).mean(0)
    np.testing.assert_allclose(share, 2 * mask / mask.sum(1, keepdims=True), atol=0.12)
    at = weights.argmax(-1)
    assert (at[..., 0] < at[..., 1]).all()


@pytest.mark.parametrize("keep,m", [(1, 1), (2, 2)])
def test_pooled(video, keep, m):
    vis, mask, event = video
    out = pooled.compress(vis, mask, event, keep, tokens_per_patch=m)
    frames = keep * 4 // m
    for b in range(3):
        valid = vis[b][mask[b]]
        middle = np.floor((np.arange(frames) + 0.5) * len(valid) / frames).astype(int)
        small = valid[middle].reshape(frames, m, 4 // m, 5).mean(2)
        np.testing.assert_allclose(out.tokens_bkpd[b], small.reshape(keep, 4, 5), atol=1e-6)
    with pytest.raises(ValueError, match="do not divide"):
        pooled.compress(vis, mask, event, 1, tokens_per_patch=3)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_moviechat(video, metric):
    vis, mask, event = video
    out = jax.jit(moviechat.compress, static_argnums=3, static_argnames="metric")(vis, mask, event, 2, metric=metric)
    for b in range(3):
        frames = list(vis[b][mask[b]].astype(np.float64))
        while len(frames) > 2:
            unit = [f / np.linalg.norm(f, axis=-1, keepdims=True) if metric == "cosine" else f for f in frames]
            s = [np.mean(np.sum(x * y, -1)) for x, y in zip(unit[:-1], unit[1:], strict=True)]
            i = int(np.argmax(s))
            frames[i : i + 2] = [(frames[i] + frames[i + 1]) / 2]
        np.testing.assert_allclose(out.tokens_bkpd[b], np.stack(frames), atol=1e-5)
    assert jnp.all(out.mask_bk)
