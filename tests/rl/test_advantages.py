"""Advantages: published numbers, dead groups, and what a bonus for every correct rollout changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_jax.rl import rewards
from marc_jax.rl.advantages import (
    AdvantageConfig,
    advantages,
    alpha_effect,
    dead_groups,
    reward_metrics,
    token_credit,
)

REWARDS = [[2.0, 1.0, 0.0, 1.5]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdvantageConfig(), [1.02457509, -0.14636787, -1.31731083, 0.43910361]),
        (AdvantageConfig(eps=1e-6), [1.02469388, -0.14638484, -1.31746356, 0.43915452]),
        (AdvantageConfig(ddof=0), [1.18305598, -0.16900800, -1.52107197, 0.50702399]),
        (AdvantageConfig(scale="none"), [0.875, -0.125, -1.125, 0.375]),
        (AdvantageConfig(scale="none", baseline="rloo"), [7 / 6, -1 / 6, -1.5, 0.5]),
    ],
)
def test_published_families(config, expected):
    with jax.enable_x64(True):
        got = advantages(jnp.asarray(REWARDS, jnp.float64), config)
        np.testing.assert_allclose(got, [expected], atol=6e-9)


def test_batch_scale_divides_by_the_std_of_all_rewards():
    with jax.enable_x64(True):
        rewards = np.array([[1.0, 0.0], [3.0, 1.0]])
        got = advantages(jnp.asarray(rewards), AdvantageConfig(scale="batch"))
        np.testing.assert_allclose(got, (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "rloo"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.3, 1e6])
def test_a_group_of_equal_rewards_gets_exactly_zero(scale, baseline, value):
    rewards = jnp.full((2, 7), value, jnp.float32).at[1].set(jnp.arange(7.0))
    got = advantages(rewards, AdvantageConfig(scale=scale, baseline=baseline, eps=1e-6))
    assert (np.asarray(got[0]) == 0.0).all() and np.asarray(got[1]).any()
    np.testing.assert_array_equal(dead_groups(rewards), [True, False])


def test_a_group_of_one_is_dead():
    assert not np.asarray(advantages(jnp.ones((3, 1)))).any()


def test_rollouts_nobody_scored_leave_the_baseline():
    valid = jnp.array([[True, True, False, True]])
    got = advantages(jnp.array([[1.0, 0.0, jnp.nan, 2.0]]), valid_bg=valid)
    want = advantages(jnp.array([[1.0, 0.0, 2.0]]))
    np.testing.assert_allclose(np.asarray(got)[0, [0, 1, 3]], want[0], rtol=1e-6)
    assert got[0, 2] == 0.0


group = st.lists(st.integers(0, 8), min_size=2, max_size=8)


@settings(deadline=None, max_examples=30)
@given(group, st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_advantages(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    rewards = np.array([values], np.float32) / 4
    got, moved = advantages(jnp.asarray(rewards)), advantages(jnp.asarray(rewards[:, order]))
    np.testing.assert_allclose(np.asarray(got)[:, order], moved, atol=1e-5)
    assert abs(float(got.sum())) < 1e-4


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=2, max_size=8), st.floats(0, 1), st.floats(0.01, 2))
def test_any_alpha_gives_the_same_advantages_once_format_is_saturated(correct, other, r):
    """The identity of C-GRPO: two reward values per group leave nothing of r_c after division by the group's std."""
    with jax.enable_x64(True):
        correct = np.array([correct], np.float64)
        rewards, bonus = jnp.asarray(correct + 1.0), jnp.asarray(correct * r)
        total, _ = alpha_effect(rewards, bonus, AdvantageConfig(eps=0.0))
        assert float(total) < 1e-9
        unscaled, _ = alpha_effect(rewards, bonus, AdvantageConfig(scale="none"))
        assert float(unscaled) > 1e-3 or correct.all() or not correct.any()


def test_alpha_acts_where_format_varies():
    rewards, bonus = jnp.array([[2.0, 1.0, 0.0, 1.0]]), jnp.array([[0.12, 0.12, 0.0, 0.0]])
    total, count = alpha_effect(rewards, bonus)
    assert float(total) > 0.01 and int(count) == 4


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=5), st.integers(1, 4))
def test_the_forms_in_which_retention_acts(correct, teacher):
    """Plain numpy: r_c per question survives a common scale and no scale, a weight survives any."""
    correct = np.array(correct, np.float64)
    a_full = np.full(len(correct), teacher / 4)
    kept = rewards.retention(correct, a_full, np.zeros(len(correct), bool), rewards.RetentionConfig(alpha=0.5, tau=0.5))
    eta = np.minimum(correct.mean(1) / a_full, 2.0)
    r = 0.5 * np.maximum(0, eta - 0.5)
    centred = (correct - correct.mean(1, keepdims=True)) * (1 + r[:, None])
    total = correct * (1 + r[:, None])
    with jax.enable_x64(True):
        both = jnp.asarray(correct + kept.bonus_bg)
        np.testing.assert_allclose(advantages(both, AdvantageConfig(scale="none")), centred, atol=1e-9)
        got = advantages(both, AdvantageConfig(scale="batch", eps=1e-4))
        np.testing.assert_allclose(got, centred / (total.std(ddof=1) + 1e-4), atol=1e-9)
        grouped = advantages(both, AdvantageConfig(eps=0.0))
    plain = np.nan_to_num(
        (correct - correct.mean(1, keepdims=True)) / np.maximum(correct.std(1, ddof=1, keepdims=True), 1e-12)
    )
    weighted = rewards.retention_weight(kept.eta_b)[:, None] * np.asarray(grouped)
    np.testing.assert_allclose(weighted, np.clip(1 - eta, 0, 1)[:, None] * plain, atol=1e-6)


def test_a_question_without_a_ratio_keeps_its_weight():
    np.testing.assert_array_equal(rewards.retention_weight([np.nan, 0.0, 0.25, 1.0, 2.0]), [1, 1, 0.75, 0, 0])


def test_credit_per_token_is_the_clamped_gap_to_the_teacher():
    teacher, own = jnp.array([[[-0.5, -30.0, -1.0]]]), jnp.array([[[-1.5, -0.1, -9.0]]])
    got = token_credit(teacher, own, jnp.array([[[True, True, False]]]))
    np.testing.assert_allclose(got, [[[1.0, -10.0, 0.0]]])


def test_reward_metrics_count_dead_groups():
    got = reward_metrics(jnp.array([[1.0, 1.0], [0.0, 1.0]]))
    assert [float(s) / float(c) for s, c in got.values()] == pytest.approx([0.75, 0.5**0.5 / 2, 0.5])


@pytest.mark.parametrize("bad", [{"scale": "std"}, {"baseline": "max"}, {"ddof": 2}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdvantageConfig(**bad)
