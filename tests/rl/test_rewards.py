"""Retention, bonuses and users' reward functions."""

import sys
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.rl import rewards
from marc_jax.rl.rewards import BonusConfig, RetentionConfig, RewardTerm

VIDEO = np.zeros(1, bool)


def test_retention_pays_correct_rollouts_only():
    out = rewards.retention([[1, 1, 1, 0]], [0.75], VIDEO)
    assert out.eta_b == pytest.approx([1.0])
    np.testing.assert_allclose(out.bonus_bg, [[0.12, 0.12, 0.12, 0.0]])


def test_retention_below_tau_pays_nothing():
    out = rewards.retention([[1, 0, 0, 0]], [0.75], VIDEO)
    assert out.eta_b == pytest.approx([1 / 3])
    assert not out.bonus_bg.any()


def test_images_earn_no_retention_unless_asked():
    out = rewards.retention([[1, 1]], [1.0], np.ones(1, bool))
    assert not out.bonus_bg.any() and np.isnan(out.eta_b).all()
    assert rewards.retention([[1, 1]], [1.0], np.ones(1, bool), RetentionConfig(images=True)).bonus_bg.all()


def test_eta_is_capped():
    np.testing.assert_allclose(rewards.retention([[1, 1]], [0.1], VIDEO).bonus_bg, 0.3 * (2.0 - 0.6))


@pytest.mark.parametrize(("policy", "expected"), [("none", 0.0), ("cap", 0.3 * 1.4), ("floor", 0.3 * 1.4)])
def test_a_teacher_that_never_answers(policy, expected):
    out = rewards.retention([[1, 0]], [0.0], VIDEO, RetentionConfig(teacher_zero=policy))
    np.testing.assert_allclose(out.bonus_bg, [[expected, 0.0]])
    dead = rewards.retention([[0, 0]], [0.0], VIDEO, RetentionConfig(teacher_zero=policy))
    assert not dead.bonus_bg.any()


def test_an_unknown_teacher_accuracy_earns_nothing():
    out = rewards.retention([[1, 1]], [np.nan], VIDEO)
    assert not out.bonus_bg.any() and np.isnan(out.eta_b).all()


def test_the_gate_is_a_threshold_on_soft_accuracy():
    soft = [[0.4, 0.6]]
    np.testing.assert_array_equal(rewards.retention(soft, [0.5], VIDEO).correct_bg, [[False, True]])
    both = rewards.retention(soft, [0.5], VIDEO, RetentionConfig(correct_above=0.1))
    np.testing.assert_array_equal(both.correct_bg, [[True, True]])


@pytest.mark.parametrize("bad", [{"tau": 1.1}, {"tau": -0.1}, {"alpha": -1}, {"eta_max": 0.5}, {"teacher_zero": "x"}])
def test_impossible_retention_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RetentionConfig(**bad)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1), st.sampled_from(["none", "cap", "floor"]))
def test_retention_is_finite_bounded_and_gated(group, a_full, policy):
    config = RetentionConfig(teacher_zero=policy)
    out = rewards.retention([group], [a_full], VIDEO, config)
    assert np.isfinite(out.bonus_bg).all()
    assert (out.bonus_bg >= 0).all() and (out.bonus_bg <= config.alpha * (config.eta_max - config.tau) + 1e-12).all()
    assert not out.bonus_bg[~out.correct_bg].any()


def test_length_bonus_needs_two_correct_rollouts():
    config = BonusConfig(length_bonus=0.2)
    np.testing.assert_allclose(
        rewards.length_bonus([[1, 1, 0, 1], [1, 0, 0, 0]], [[320, 513, 400, 512], [400] * 4], config),
        [[0.2, 0, 0, 0.2], [0, 0, 0, 0]],
    )


def test_temporal_bonus_compares_with_shuffled_frames():
    config = BonusConfig(temporal_bonus=0.3)
    accuracy = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    shuffled = [[1, 0], [1, 1], [0, 0], [0, 0]]
    got = rewards.temporal_bonus(accuracy, shuffled, [False, False, False, True], config)
    np.testing.assert_allclose(got, [[0.3, 0.3, 0, 0], [0] * 4, [0] * 4, [0] * 4])


COLUMNS = {"solution": ["<answer>B</answer>", "<answer>2</answer>"], "problem_type": ["multiple choice", "numerical"]}
TEXTS = ["<think>x</think><answer>B</answer>", "<answer>2</answer>"]


def test_terms_are_weighted_and_summed():
    table = rewards.score(rewards.reward_terms({"accuracy": 1.0, "format": 0.5}), TEXTS, COLUMNS)
    np.testing.assert_allclose(table.values_nf, [[1, 1], [1, 0]])
    np.testing.assert_allclose(table.total_n, [1.5, 1.0])
    assert table.names == ("accuracy", "format") and not table.failures


def test_a_user_function_comes_by_import_path(monkeypatch):
    module = types.ModuleType("users_rewards")
    module.length = lambda completions: [len(text) for text in completions]
    monkeypatch.setitem(sys.modules, "users_rewards", module)
    table = rewards.score(rewards.reward_terms(["users_rewards:length"]), ["ab", "c"], {"solution": ["", ""]})
    np.testing.assert_allclose(table.total_n, [2, 1])


@pytest.mark.parametrize("path", ["nowhere", "no.such.module:fn", "math:nothing", "math:pi", ":x"])
def test_a_bad_import_path_is_named(path):
    with pytest.raises(ValueError, match=path.split(":")[0] or "reward"):
        rewards.load_reward(path)


def test_one_bad_sample_costs_only_itself():
    def fussy(completions):
        if "bad" in completions:
            raise RuntimeError("cannot judge this")
        return [1.0] * len(completions)

    table = rewards.score([RewardTerm("fussy", fussy)], ["ok", "bad", "ok"], {})
    np.testing.assert_allclose(table.total_n, [1, 0, 1])
    assert [f.row for f in table.failures] == [1]
    assert "cannot judge this" in str(table.failures[0]) and "'fussy'" in str(table.failures[0])


def test_nan_text_and_short_answers_are_reported():
    table = rewards.score([RewardTerm("odd", lambda completions: [float("nan"), "x", 1.0])], list("abc"), {})
    np.testing.assert_allclose(table.total_n, [0, 0, 1])
    assert [f.row for f in table.failures] == [0, 1]
    short = rewards.score([RewardTerm("short", lambda completions: [])], list("ab"), {})
    assert len(short.failures) == 2 and not short.total_n.any()


def test_none_means_the_term_does_not_apply():
    table = rewards.score([RewardTerm("maybe", lambda completions: [None, 0.5])], list("ab"), {})
    np.testing.assert_array_equal(table.applies_n, [False, True])
    np.testing.assert_allclose(table.total_n, [0, 0.5])


def test_a_hanging_sample_is_given_up():
    def slow(completions):
        if "slow" in completions:
            time.sleep(3)
        return [1.0] * len(completions)

    start = time.monotonic()
    table = rewards.score([RewardTerm("slow", slow)], ["ok", "slow"], {}, timeout=0.3)
    assert time.monotonic() - start < 2
    np.testing.assert_allclose(table.total_n, [1, 0])
    assert "in time" in table.failures[0].reason


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="solution"):
        rewards.score(rewards.reward_terms(["accuracy"]), ["a"], {"solution": ["b", "c"], "problem_type": ["OCR"]})


def test_what_the_retention_reward_does_is_counted():
    accuracy_bg = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    kept = rewards.retention(accuracy_bg, [0.5, 0.5, 0.75, 0.0], np.zeros(4), rewards.RetentionConfig(tau=0.6))
    told = rewards.retention_metrics(kept, accuracy_bg)
    assert told["retention/eta"] == (pytest.approx(1 + 0.5 + 4 / 3), 3.0)
    assert [told[f"retention/eta_{i / 5:.1f}"][0] for i in range(6)] == [0, 0, 1, 0, 0, 2]
    assert told["retention/gate_rate"] == (6.0, 16.0) and told["retention/alone"] == (0.0, 4.0)
    # All right: the bonus is the same for all. Equal rewards of right and wrong: it alone tells them apart.
    told = rewards.retention_metrics(kept, np.zeros((4, 4)))
    assert told["retention/alone"] == (1.0, 4.0)
