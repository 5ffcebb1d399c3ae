"""Groups between rollout and update: rows, refilling, leaving dead ones out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.rl import groups, step
from marc_jax.rl.types import Completions, PromptBatch


def made(b, p=4, r=3, start=0):
    """Groups whose every number tells its row."""
    row = np.arange(start, start + b, dtype=np.int32) + 1
    wide = lambda *shape: np.broadcast_to(row.reshape(b, *[1] * len(shape)), (b, *shape))  # noqa: E731
    prompt = PromptBatch(wide(p), wide(p) > 0, np.broadcast_to(row[None, :, None], (3, b, p)), wide(p), row)
    done = Completions(wide(2, r), wide(2, r) > 0, wide(2, r).astype(np.float32))
    more = [wide(2).astype(np.float32), wide(2).astype(np.float32), row.astype(np.float32)]
    return jax.tree.map(jnp.asarray, groups.Groups(prompt, wide(5), done, *more))


def test_rows_moves_every_leaf_alike():
    got = groups.rows(made(4), [2, 0, 3])
    assert got.prompt.pos_3bp.shape == (3, 3, 4)
    np.testing.assert_array_equal(got.prompt.pos_3bp[1, :, 0], [3, 1, 4])
    for x in (got.prompt.next_pos_b, got.visual[:, 0], got.completions.tokens_bgr[:, 1, 2], got.weight_b):
        np.testing.assert_array_equal(x, [3, 1, 4])


def test_stacking_pads_what_is_smaller_with_masked_zeros():
    got = groups.stacked(made(2, p=4), made(2, p=6, start=2))
    np.testing.assert_array_equal(got.prompt.mask_bp.sum(1), [4, 4, 6, 6])
    assert got.prompt.pos_3bp.shape == (3, 4, 6) and got.completions.tokens_bgr.shape == (4, 2, 3)
    np.testing.assert_array_equal(got.weight_b, [1, 2, 3, 4])


flags = st.lists(st.booleans(), min_size=1, max_size=8)


@given(flags, flags)
def test_refilling_keeps_live_groups_and_takes_each_fresh_one_once(live, fresh):
    live, fresh = np.array(live), np.array(fresh)
    index = groups.refill_index(live, fresh)
    both = np.concatenate([live, fresh])
    assert len(index) == len(live) == len(set(index.tolist()))
    np.testing.assert_array_equal(index[live], np.flatnonzero(live))
    assert both[index].sum() == min(len(live), both.sum())


def test_dead_groups_go_last_and_lose_their_masks():
    drawn = made(4)
    batch = step.GRPOBatch(drawn.prompt, drawn.visual, drawn.completions, drawn.rewards_bg)
    got = groups.without_dead(batch, jnp.array([False, True, False, True]))
    np.testing.assert_array_equal(got.visual[:, 0], [2, 4, 1, 3])
    np.testing.assert_array_equal(got.completions.mask_bgr.any((1, 2)), [True, True, False, False])
    assert dataclasses.replace(got, completions=None).prompt.mask_bp.all()
