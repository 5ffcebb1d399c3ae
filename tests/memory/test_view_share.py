"""Views with a share: every selector and compressor reads the same number of tokens, each where its source stood."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.memory import choose
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.rl.types import PromptBatch

GRID, P, T = (4, 8), 8, 6  # patches, tokens of a patch, patches of a video
CFG = qwen25_vl.tiny(num_layers=1)
PIXELS = jnp.asarray(np.random.default_rng(0).integers(0, 255, (10, 32, 1176), np.uint8))
LENGTH = (6, 4)


@functools.cache
def model():
    return qwen25_vl.bind(CFG, qwen25_vl.init(CFG, jax.random.key(0)))


def index():
    mask = np.arange(T) < np.array(LENGTH)[:, None]
    rows = np.where(mask, np.arange(T) + np.array([[0], [6]]), 0)
    event = np.where(mask, np.arange(T) // 2, 3)
    emb = np.eye(3, dtype=np.float32)[None].repeat(2, 0)
    start, length = np.array([[0, 2, 4], [0, 2, 0]]), np.array([[2, 2, 2], [2, 2, 0]])
    return views.VideoIndex(*map(jnp.asarray, (rows, mask, event, start, length, length > 0, emb)))


def prompts(kept):
    """One token of text, the visual slots in raster order, one token of text."""
    slots = kept * P
    vis = np.concatenate([[-1], np.arange(slots), [-1]])
    place = np.stack([np.zeros(slots), np.arange(slots) % P // 4, np.arange(slots) % 4]).astype(int)
    pos = np.concatenate([np.zeros((3, 1), int), 1 + place, np.full((3, 1), 9)], axis=1)
    rows = lambda x: jnp.asarray(np.repeat(x[None], 2, 0), jnp.int32)  # noqa: E731
    return PromptBatch(
        rows(vis * 0), rows(vis * 0) == 0, jnp.asarray(np.repeat(pos[:, None], 2, 1), jnp.int32), rows(vis),
        jnp.full(2, 10),
    )  # fmt: skip


def read(view):
    """Per video: the tokens read and their places (t, h, w)."""
    query, emb = jnp.array([[1.0, 0, 0], [0, 1.0, 0]]), jax.random.normal(jax.random.key(1), (10, 3))
    bound = model()

    @jax.jit
    def run():
        visual = views.select(view, index(), query, PIXELS, 2, jax.random.key(0), emb)
        return views.make_encode(view, GRID, 1.0)(bound, visual, prompts(view.kept(T, 2)))

    tokens, prompt = run()
    seen = np.asarray(prompt.mask_bp & (prompt.vis_index_bp >= 0))
    assert np.asarray(prompt.mask_bp)[:, [0, -1]].all()
    for b in range(2):
        slots = np.asarray(prompt.vis_index_bp)[b][seen[b]]
        yield np.asarray(tokens)[b][slots], (np.asarray(prompt.pos_3bp)[:, b][:, seen[b]] - 1).T


LOOKS = [("all", method) for method in (*choose.TOKENS, "merge", "moviechat")]
LOOKS += [(select, "keep") for select in choose.SELECTORS] + [("retrieve", "merge")]


@pytest.mark.parametrize("select,method", LOOKS)
def test_a_share_is_that_many_tokens(select, method):
    if method in choose.SCENIC:
        pytest.importorskip("scenic", reason="google-research/scenic is the [scenic] extra")
        pytest.importorskip("tensorflow", reason="scenic's models import TensorFlow")
    view = views.View(select, method, k=2, share=0.25, in_event=99)
    for (tokens, places), length in zip(read(view), LENGTH, strict=True):
        count = 0.25 * length * P
        fewer = method in ("holitom", "fastvid", "pooled_tokens", "token_learner") or select == "aks"
        assert len(tokens) == count or fewer and 0 < len(tokens) <= count
        assert np.isfinite(tokens).all() and (places >= 0).all()
        assert (places[:, 0] < length).all() and places[:, 1].max() < 2 and places[:, 2].max() < 4


@pytest.mark.parametrize(
    "select,method", [("all", "vidcom2"), ("all", "evs"), ("uniform", "keep"), ("all", "visionzip")]
)
def test_survivors_are_the_models_tokens_at_their_own_places(select, method):
    whole = np.asarray(jax.jit(functools.partial(views.to_tokens, model(), grid_hw=GRID))(PIXELS[None]))[0]
    for b, (tokens, places) in enumerate(read(views.View(select, method, share=0.1))):
        rows = places[:, 0] + 6 * b
        np.testing.assert_allclose(tokens, whole[rows, places[:, 1] * 4 + places[:, 2]], atol=1e-5)


class Sums:
    """A merger that adds up each token's patches, and something where there is nothing."""

    def merge_features(self, features_snc):
        s, n, c = features_snc.shape
        return features_snc.reshape(s, n // 4, 4, c).sum(2) + 1


SHAPES = ((2, 4), (3, 2))  # of the two videos' patches, padded to P tokens
PADDED = [("all", "keep", {}), ("all", "keep", {"tokens": 5}), ("retrieve", "merge", {})]
PADDED += [("all", method, {"share": 0.4}) for method in ("merge", "vidcom2", "evs", "dtd")]
PADDED += [("uniform", "keep", {"share": 0.4}), ("all", "merge", {"adaptive": True, "keep": 3})]


@pytest.mark.parametrize("select,method,more", PADDED)
def test_padding_patches_of_several_shapes_changes_nothing(select, method, more):
    view = views.View(select, method, k=2, **more)
    bank, query = jax.random.normal(jax.random.key(1), (2, T, 4 * P, 5)), jnp.array([[1.0, 0, 0], [0, 1.0, 0]])
    own = np.prod(SHAPES, axis=1)
    bank *= (np.arange(4 * P) < 4 * own[:, None])[:, None, :, None]
    shapes = views.Shapes(*(jnp.asarray(x) for x in (own, [w for _, w in SHAPES], [1.0, 2.0])))
    every = dataclasses.replace(index(), patch_bt=jnp.arange(T)[None].repeat(2, 0), shapes=shapes)
    padded = look(view, every, bank, query, (2, 2 * P), 1.0, SHAPES)
    alone, (h, w) = jax.tree.map(lambda a: a[1:], dataclasses.replace(every, shapes=None)), SHAPES[1]
    exact = look(view, alone, bank[1:, :, : 4 * h * w], query[1:], (2 * h, 2 * w), 2.0, SHAPES[1:])
    assert all(len(seen) <= view.most(int(n), int(p), 2) for (seen, _), n, p in zip(padded, LENGTH, own, strict=True))
    assert (padded[1][1] == exact[0][1]).all()
    np.testing.assert_allclose(padded[1][0], exact[0][0], atol=1e-5)


def look(view, index, bank, query, grid_hw, rate, shapes):
    """Per video: the tokens read and their places, through prompts whose patches are padded to the bank's tokens."""
    kept, p = view.kept(T, 2), bank.shape[2] // 4
    vis = np.full((len(shapes), kept * p), -1)
    for row, (h, w) in zip(vis, shapes, strict=True):
        row[: kept * h * w] = (np.arange(kept)[:, None] * p + np.arange(h * w)).ravel()
    pos = jnp.ones((3, *vis.shape), jnp.int32)
    asked = PromptBatch(jnp.zeros(vis.shape, jnp.int32), jnp.asarray(vis >= 0), pos, jnp.asarray(vis), pos[0, :, 0])

    @jax.jit
    def run(index, bank, query, asked):
        visual = views.select(view, index, query, bank, 2, jax.random.key(0))
        return views.make_encode(view, grid_hw, rate)(Sums(), visual, asked)

    (tokens, prompt), found = run(index, bank, query, asked), []
    for b in range(len(shapes)):
        seen = np.asarray(prompt.mask_bp[b])
        found.append((tokens[b][prompt.vis_index_bp[b][seen]], np.asarray(prompt.pos_3bp[:, b][:, seen] - 1).T))
    return found


def test_shrunk_frames_have_fewer_tokens_and_more_frames():
    for (tokens, places), length in zip(read(views.View("uniform", share=0.25, shrink=2)), LENGTH, strict=True):
        assert len(tokens) == 2 * length and len(set(places[:, 0])) == length  # a quarter of each patch
        assert places[:, 1].max() == 0 and places[:, 2].max() == 1


def test_counts_round_to_the_nearest_token_and_are_at_least_one():
    view = views.View("all", "evs", share=0.05)
    assert view.count(np.array([1, 6, 14]), 4).tolist() == [1, 1, 3]
    assert [views.View("all", "evs", share=s).kept(14, 2) for s in (0.001, 0.1, 1.0)] == [1, 2, 14]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs a share"):
        views.View("all", "vidcom2")
    with pytest.raises(ValueError, match="share goes with neither"):
        views.View("all", "mean", share=0.1)
    with pytest.raises(ValueError, match="share must lie between"):
        views.View("all", "merge", share=1.5)
    with pytest.raises(ValueError, match="needs an embedding of every patch"):
        views.select(views.View("bolt"), index(), jnp.zeros((2, 3)), PIXELS, 2, None)
    visual = views.select(views.View(), index(), None, jnp.zeros((10, 32, 5)), 2, None)
    with pytest.raises(ValueError, match="reads pixels; here are features alone"):
        views.see(views.View("all", "visionzip", share=0.1), None, visual, GRID)
