"""Dynamic sampling of a C-GRPO stage: further batches are drawn while there are dead groups, and no longer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from marc_jax import cgrpo
from tests.rl.test_groups import made


def attempts(*alive):
    """Groups of 4 questions per tuple of flags, live ones with two different rewards; told which were drawn."""
    for number, flags in enumerate(alive):
        drawn = made(len(flags), start=10 * number)
        rewards = np.stack([np.ones(len(flags)), 1 - np.array(flags, np.float32)], 1)
        yield dataclasses.replace(drawn, rewards_bg=jnp.asarray(rewards), bonus_bg=jnp.zeros(rewards.shape))


def test_live_groups_of_further_batches_take_the_places_of_dead_ones():
    first, *more = attempts((1, 0, 0, 1), (0, 0, 1, 0), (1, 1, 1, 1), (1, 1, 1, 1))
    further = iter(more)
    got, told = cgrpo.refilled(first, further)
    np.testing.assert_array_equal(got.weight_b, [1, 13, 21, 4])
    assert told == {"refill/batches": 3, "refill/dead": 0.0}
    assert len(list(further)) == 1  # never drawn


def test_where_the_limit_is_reached_dead_groups_stay():
    first, *more = attempts((0, 0), (0, 1))
    got, told = cgrpo.refilled(first, iter(more))
    np.testing.assert_array_equal(got.weight_b, [12, 2])
    assert told == {"refill/batches": 2, "refill/dead": 0.5}
