"""Stages: dynamic sampling draws further batches while there are dead groups, a ladder's views take turns."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax import cgrpo, stage_settings, stages
from marc_jax.config import ConfigError
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


def test_a_batch_that_does_not_divide_is_one_line():
    stage = stage_settings.stage("sft")
    stage.videos = 6
    run = types.SimpleNamespace(config={"a": stage}, mesh=types.SimpleNamespace(shape={"data": 2, "fsdp": 2}))
    with pytest.raises(ConfigError, match=r"config.a.videos = 6 does not divide over 4 devices \(data x fsdp\)"):
        stages.build(run, "a")


def test_steps_go_through_the_views_of_a_ladder_in_turn(monkeypatch):
    seen = []

    def kind(run, name, begun, view):
        return lambda number: (view, number), lambda now, batch: (now, {"loss": seen.append(batch) or 1.0})

    stage = stage_settings.stage("sft")
    stage.update(view="one", ladder=("two", "three"))
    views = {name: types.SimpleNamespace(select="all", name=name) for name in ("one", "two", "three")}
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1})
    run = types.SimpleNamespace(config={"a": stage}, mesh=mesh, view=views.get, retriever_stage="")
    begun = types.SimpleNamespace(first=types.SimpleNamespace(params=()))
    monkeypatch.setattr(stages.parts, "begin", lambda run, name: begun)
    monkeypatch.setitem(stages.KINDS, "sft", kind)
    _, draw, learn, _ = stages.build(run, "a")
    told = [learn(None, draw(number))[1] for number in range(5)]
    assert [(view.name, number) for view, number in seen] == list(
        zip(("one", "two", "three", "one", "two"), range(5), strict=True)
    )
    assert [list(values) for values in told][:2] == [["loss", "ladder/one/loss"], ["loss", "ladder/two/loss"]]
