"""Views: which patches are chosen, how many are kept, and where their tokens stand in the prompt."""

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
