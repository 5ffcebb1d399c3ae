"""The loss against published numbers, its gradients, and what must not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.rl import loss
from marc_jax.rl.advantages import AdvantageConfig, advantages
from marc_jax.rl.loss import LossConfig, policy_loss
from marc_jax.rl.parity import parity

B, T = np.arange(4.0)[:, None], np.arange(6.0)[None]
MASK = (T < np.array([6, 4, 2, 3])[:, None])[None]
LOGP = -(0.50 + 0.10 * B + 0.07 * T)[None]
REF = -(0.40 + 0.12 * B + 0.09 * T)[None]
OLD = LOGP - (np.array([0.30, 0.30, -0.40, -0.75])[:, None] - 0.02 * T)[None]
REWARDS = np.array([[2.0, 1.0, 0.0, 1.5]])


def run(family, old=OLD, advantage=None, logp=LOGP, **overrides):
    advantage_config, config = parity(family, **overrides)
    adv = advantages(jnp.asarray(REWARDS), advantage or advantage_config)
    return loss.mean(policy_loss(jnp.asarray(logp), adv, jnp.asarray(MASK), config, old, REF)[0])


@pytest.mark.parametrize(
    ("expected", "family", "overrides"),
    [
        (5.07940497e-05, "videor1", {"old": None}),
        (-0.0467478607, "trl", {}),
        (-0.0467428243, "trl_bias_corrected", {"aggregation": "grpo"}),
        (-0.3407401277, "trl_bias_corrected", {}),
        (-0.3407401277, "trl_bias_corrected", {"aggregation": "bnpo"}),
        (-0.2129625798, "trl_bias_corrected", {"aggregation": "dr_grpo", "max_length": 6}),
        (-0.2129625798, "trl_bias_corrected", {"aggregation": "dr_grpo"}),
        (-0.0468038619, "trl", {"ratio": "sequence", "kl_coef": 0.0}),
        (-0.0485040804, "tunix", {}),
        (-0.3407911209, "tunix", {"kl": "k3", "aggregation": "dapo"}),
        (-0.3407911209, "verl", {}),
        (-0.3934676428, "verl", {"advantage": AdvantageConfig(ddof=0)}),
    ],
)
def test_golden_numbers(expected, family, overrides):
    with jax.enable_x64(True):
        np.testing.assert_allclose(float(run(family, **overrides)), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("kl", "expected"), [("k1", -0.044), ("k2", 0.00137333333), ("k3", 0.00140678733)])
def test_golden_kl_estimators(kl, expected):
    with jax.enable_x64(True):
        value = loss.kl_divergence(jnp.asarray(LOGP), jnp.asarray(REF), LossConfig(kl=kl))
        np.testing.assert_allclose(np.asarray(value)[MASK].mean(), expected, atol=5e-12)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kl": "k1"}, lambda x: np.ones_like(x)),
        ({"kl": "k2"}, lambda x: -x),
        ({"kl": "k3"}, lambda x: 1 - np.exp(x)),
        ({"kl": "k3", "kl_bias_corrected": True}, lambda x: -x),
    ],
)
def test_gradients_of_the_kl_term(overrides, expected):
    """k1: beta; k2: beta (lp - ref); k3: beta (1 - e^(ref - lp)); bias-corrected on policy: beta (lp - ref)."""
    with jax.enable_x64(True):
        config = LossConfig(aggregation="dapo", **overrides)

        def total(logp):
            return policy_loss(logp, jnp.zeros((1, 4)), jnp.asarray(MASK), config, None, jnp.asarray(REF))[0][0]

        grad = jax.grad(total)(jnp.asarray(LOGP))
        np.testing.assert_allclose(grad, np.where(MASK, 0.04 * expected(REF - LOGP), 0.0), atol=1e-12)


def test_on_policy_gradient_is_minus_the_advantage():
    with jax.enable_x64(True):
        adv = advantages(jnp.asarray(REWARDS))
        config = LossConfig(kl_coef=0.0, aggregation="dapo")
        grad = jax.grad(lambda lp: policy_loss(lp, adv, jnp.asarray(MASK), config)[0][0])(jnp.asarray(LOGP))
        np.testing.assert_allclose(grad, np.where(MASK, -np.asarray(adv)[..., None], 0.0), atol=1e-12)


def test_a_dead_group_leaves_the_kl_only():
    with jax.enable_x64(True):
        adv = advantages(jnp.full((1, 4), 1.7))
        assert (np.asarray(adv) == 0).all()
        config = LossConfig(kl="k3")
        (total, count), _ = policy_loss(jnp.asarray(LOGP), adv, jnp.asarray(MASK), config, OLD, REF)
        np.testing.assert_allclose(total / count, 0.04 * 0.00140678733, atol=1e-12)


def test_clip_low_high_and_dual():
    """One token each: ratio 2 with A > 0 and A < 0, ratio 1/2 likewise, ratio 8 with A < 0 under a dual clip of 3."""
    logp = jnp.log(jnp.array([[[2.0], [2.0], [0.5], [0.5], [8.0]]]))
    adv, mask = jnp.array([[1.0, -1.0, 1.0, -1.0, -1.0]]), jnp.ones((1, 5, 1), bool)
    config = LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.0, aggregation="dapo")

    def token(i):
        row = slice(i, i + 1)
        return float(policy_loss(logp[:, row], adv[:, row], mask[:, row], config, jnp.zeros((1, 1, 1)))[0][0])

    assert [token(i) for i in range(5)] == pytest.approx([-1.3, 2.0, -0.5, 0.8, 3.0])
    metrics = policy_loss(logp, adv, mask, config, jnp.zeros((1, 5, 1)))[1]
    assert {k: float(s) / float(c) for k, (s, c) in metrics.items()} == pytest.approx(
        {"clip_ratio/low_mean": 0.2, "clip_ratio/high_mean": 0.2, "clip_ratio/region_mean": 0.4}
    )


FAMILIES = [
    parity("videor1")[1], parity("trl")[1], parity("trl_bias_corrected")[1], parity("tunix")[1], parity("verl")[1],
    LossConfig(aggregation="dr_grpo", max_length=9), LossConfig(ratio="sequence", aggregation="grpo"),
]


def _value_and_grad(config, logp, adv, mask, old, ref):
    def fn(logp):
        pair, _ = policy_loss(logp, adv, mask, config, old, ref)
        return loss.mean(pair)

    return jax.value_and_grad(fn)(jnp.asarray(logp))


@pytest.mark.parametrize("config", FAMILIES)
def test_padding_and_what_it_holds_do_not_matter(config):
    with jax.enable_x64(True):
        adv = advantages(jnp.asarray(REWARDS))

        def pad(x, value):
            return np.concatenate([np.where(MASK, x, value), np.full((1, 4, 3), value)], axis=-1)

        mask = pad(MASK, False).astype(bool)
        value, grad = _value_and_grad(config, LOGP, adv, MASK, OLD, REF)
        padded, padded_grad = _value_and_grad(config, pad(LOGP, np.nan), adv, mask, pad(OLD, np.inf), pad(REF, np.nan))
        np.testing.assert_allclose(padded, value, rtol=1e-12)
        np.testing.assert_allclose(padded_grad[..., :6], grad, atol=1e-12)
        assert not np.asarray(padded_grad[..., 6:]).any()


@pytest.mark.parametrize("config", FAMILIES)
def test_permuting_rollouts_changes_nothing(config):
    with jax.enable_x64(True):
        order = np.array([2, 0, 3, 1])
        adv = advantages(jnp.asarray(REWARDS))
        value, grad = _value_and_grad(config, LOGP, adv, MASK, OLD, REF)
        moved = _value_and_grad(config, LOGP[:, order], adv[:, order], MASK[:, order], OLD[:, order], REF[:, order])
        np.testing.assert_allclose(moved[0], value, rtol=1e-12)
        np.testing.assert_allclose(moved[1], grad[:, order], atol=1e-13)


@pytest.mark.parametrize("config", FAMILIES)
def test_micro_batches_add_up(config):
    with jax.enable_x64(True):
        adv = advantages(jnp.asarray(REWARDS))
        whole, _ = policy_loss(jnp.asarray(LOGP), adv, MASK, config, OLD, REF)
        parts = [policy_loss(LOGP[:, s], adv[:, s], MASK[:, s], config, OLD[:, s], REF[:, s])[0]
                 for s in (slice(0, 1), slice(1, 4))]
        np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-12)
        assert sum(int(p[1]) for p in parts) == int(whole[1])


def test_sequence_ratio_is_one_number_per_completion():
    config = LossConfig(ratio="sequence")
    got = loss.log_ratio(jnp.asarray(LOGP), jnp.asarray(OLD), jnp.asarray(MASK), config)
    want = [(LOGP - OLD)[0, i][MASK[0, i]].mean() for i in range(4)]
    np.testing.assert_allclose(got[0, :, 0], want, atol=1e-6)


def test_per_token_advantages_are_accepted():
    adv = jnp.ones((1, 4, 6)).at[0, 0, 0].set(5.0)
    config = LossConfig(kl_coef=0.0, aggregation="dapo")
    total = policy_loss(jnp.asarray(LOGP), adv, jnp.asarray(MASK), config)[0][0]
    assert float(total) == pytest.approx(-(MASK.sum() + 4))


@pytest.mark.parametrize("bad", [{"kl": "k4"}, {"ratio": "x"}, {"aggregation": "sum"}, {"dual_clip": 0.5}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(LossConfig(), **bad)


def test_a_kl_term_needs_a_reference_and_a_family_a_name():
    with pytest.raises(ValueError, match="reference"):
        policy_loss(jnp.asarray(LOGP), jnp.zeros((1, 4)), jnp.asarray(MASK), LossConfig())
    with pytest.raises(ValueError, match="ppo"):
        parity("ppo")
