"""Views: which patches are chosen, how many are kept, and where their tokens stand in the prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.memory import view as views
from marc_jax.rl.types import PromptBatch

N, D = 4, 8  # patches per frame, width; p = 1 visual token per temporal patch


def index():
    """Two videos: events of 2, 1, 2 patches, and of 1, 2."""
    event = np.array([[0, 0, 1, 2, 2], [0, 1, 1, 3, 3]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    emb = np.zeros((2, 3, 3), np.float32)
    emb[:, np.arange(3), np.arange(3)] = 1
    return views.VideoIndex(
        jnp.array([[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]]), jnp.array(mask), jnp.array(event),
        jnp.array([[0, 2, 3], [0, 1, 0]]), jnp.array([[2, 1, 2], [1, 2, 0]]),
        jnp.array([[True, True, True], [True, True, False]]), jnp.array(emb),
    )  # fmt: skip


BANK = jnp.arange(8 * N * D, dtype=jnp.float32).reshape(8, N, D)


class Model:
    """merge_features alone: the mean of a temporal patch's patches as its one visual token."""

    class cfg:
        class text:
            hidden_size = D

    def merge_features(self, features_snd):
        return features_snd.mean(1, keepdims=True)


def prompts(kept):
    length = kept + 2
    slots = jnp.where((jnp.arange(length) >= 1) & (jnp.arange(length) <= kept), jnp.arange(length) - 1, -1)
    pos = jnp.where(jnp.arange(length) <= kept, jnp.minimum(jnp.arange(length), 1), 9)
    rows = lambda x: jnp.broadcast_to(x, (2, length))  # noqa: E731
    return PromptBatch(
        jnp.zeros((2, length), jnp.int32), jnp.ones((2, length), bool), jnp.broadcast_to(pos, (3, 2, length)),
        rows(slots), jnp.full(2, 10),
    )  # fmt: skip


def test_retrieval_takes_whole_events_in_time_order():
    query = jnp.array([[0.5, 0.0, 1.0], [0.0, 1.0, 0.5]])
    got = views.select(views.View("retrieve", "merge", k=2), index(), query, BANK, 2, None)
    assert got.t_bs[0][got.mask_bs[0]].tolist() == [0, 1, 3, 4] and got.t_bs[1][got.mask_bs[1]].tolist() == [0, 1, 2]
    assert (got.patches_bsnc[0, 2] == BANK[3]).all()


def test_every_view_keeps_as_many_patches_as_it_says():
    query = jnp.ones((2, 3))
    for view in (
        views.View(), views.View("all", "merge", keep=2), views.View("retrieve", "merge", k=2),
        views.View("retrieve", "per_event", k=2), views.View("all", "mean"), views.View("random", "keep"),
        views.View("none", "keep"), views.View("retrieve", "keep", k=2),
    ):  # fmt: skip
        kept = view.kept(5, 2)
        visual = views.select(view, index(), query, BANK, 2, jax.random.key(0))
        encode = views.make_encode(view, (2, 2), 1.0)
        tokens, prompt = encode(Model(), visual, prompts(kept))
        assert tokens.shape == (2, kept, D), view
        read = np.asarray(prompt.mask_bp)[:, 1 : kept + 1].sum(1)
        assert (read == 0).all() if view.select == "none" else (read >= 1).all(), view
        assert (read <= [view.most(patches, 1, 2) for patches in (5, 3)]).all(), view


def test_kept_tokens_stand_at_the_mean_time_of_what_they_stand_for():
    view = views.View("all", "mean")
    visual = views.select(view, index(), None, BANK, 2, None)
    tokens, prompt = views.make_encode(view, (2, 2), 1.0)(Model(), visual, prompts(1))
    assert prompt.pos_3bp[0, :, 1].tolist() == [1 + 2, 1 + 1]  # means of 0..4 and of 0..2 behind one text token
    assert prompt.pos_3bp[1, :, 1].tolist() == [1, 1] and prompt.pos_3bp[0, :, 2].tolist() == [9, 9]
    np.testing.assert_allclose(tokens[1, 0], BANK[5:8].mean((0, 1)), rtol=1e-6)


def test_padding_of_a_short_video_is_masked_in_its_prompt():
    view = views.View()
    visual = views.select(view, index(), None, BANK, 2, None)
    _, prompt = views.make_encode(view, (2, 2), 1.0)(Model(), visual, prompts(5))
    assert prompt.mask_bp[0, 1:6].tolist() == [True] * 5 and prompt.mask_bp[1, 1:6].tolist() == [True] * 3 + [False] * 2


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="select must be one of"):
        views.View("some", "merge")


def test_an_adaptive_view_keeps_more_where_more_happens():
    rng = np.random.default_rng(0)
    still = np.tile(rng.normal(size=(1, 1, 64, D)), (1, 6, 1, 1))
    vis = jnp.asarray(np.concatenate([still, rng.normal(size=(1, 6, 64, D))]), jnp.float32)
    mask, event = jnp.ones((2, 6), bool), jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
    view = views.View("all", "merge", keep=8, adaptive=True)
    visual = views.Visual(vis, mask, event, jnp.zeros((2, 6)), jnp.full(2, 6))
    total, per_patch = views.deserved(view, vis, visual)
    assert total.tolist() == [2, 8]  # 2 patches of 64 tokens fill 128; 6 want 384 and get the rung of 512
    assert per_patch[0].tolist() == [1] * 6 and per_patch[1].tolist() == [3] * 6
    assert views.reduce(view, vis, visual).mask_bk.sum(1).tolist() == [2, 6]
    small = dataclasses.replace(view, budgets=(64, 192, 320))
    assert views.deserved(small, vis, visual)[0].tolist() == [3, 5]


def test_a_budget_below_a_patch_masks_the_least_telling_tokens():
    vis = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2 * 2, D)), jnp.float32)

    class Whole:
        cfg = Model.cfg

        def merge_features(self, features):
            return features

    visual = views.Visual(vis, jnp.ones((2, 4), bool), jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4)), jnp.full(2, 4))
    tokens, prompt = views.make_encode(views.View("all", "mean", tokens=3), (4, 4), 1.0)(Whole(), visual, prompts(4))
    assert tokens.shape == (2, 4, D) and prompt.mask_bp[:, 1:5].sum(1).tolist() == [3, 3] and prompt.mask_bp[:, 0].all()


def test_retrieval_by_rule_may_take_fewer_events():
    query = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.6, 0.0]])  # about one event; about two alike
    for rule, patches in ((None, [3, 3]), ("gap", [2, 1]), ("mass", [2, 3])):
        got = views.select(views.View("retrieve", "merge", k=2, rule=rule), index(), query, BANK, 2, None)
        assert got.mask_bs.sum(1).tolist() == patches, rule


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="adaptive shares the budget of a merge"):
        views.View("all", "mean", adaptive=True)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        views.View(tokens=0)
