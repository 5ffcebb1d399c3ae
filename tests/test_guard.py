"""Updates held back: bit for bit nothing happens, and what is let through is the optimizer's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marc_jax import guard

PARAMS = {"w": jnp.array([1.0, -0.0, 3.0]), "b": jnp.array(2.0, jnp.bfloat16)}
GOOD = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array(0.5, jnp.bfloat16)}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def run(tx, losses, gradients=None):
    """(parameters, optimizer state, what was held) after each loss."""
    state, params, out = tx.init(PARAMS), PARAMS, []
    update = jax.jit(lambda g, s, p, loss: tx.update(g, s, p, loss=loss))
    for i, loss in enumerate(losses):
        updates, state = update(GOOD if gradients is None else gradients[i], state, params, loss)
        params = optax.apply_updates(params, updates)
        out.append((params, state, int(guard.told(state)["held"])))
    return out


def test_what_is_let_through_is_the_optimizers_own():
    plain, tx = optax.adam(0.1), guard.guard(optax.adam(0.1), spike=6.0)
    state, params = plain.init(PARAMS), PARAMS
    for got, inner, held in run(tx, [1.0, 2.0, 1.5]):
        updates, state = plain.update(GOOD, state, params)
        params = optax.apply_updates(params, updates)
        assert held == guard.APPLIED
        for x, y in zip(jax.tree.leaves((got, inner.inner)), jax.tree.leaves((params, state)), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "w", "b"])
def test_what_is_not_finite_changes_nothing_and_is_counted(bad, where):
    spoilt = GOOD | ({where: GOOD[where] * jnp.asarray(bad, GOOD[where].dtype)} if where != "loss" else {})
    losses = [1.0, bad if where == "loss" else 1.0, bad if where == "loss" else 1.0, 1.0]
    steps = run(guard.guard(optax.adam(0.1)), losses, [GOOD, spoilt, spoilt, GOOD])
    assert [held for *_, held in steps] == [0, guard.NOT_FINITE, guard.NOT_FINITE, 0]
    for params, state, _ in steps[1:3]:
        assert bits(params) == bits(steps[0][0]) and bits(state.inner) == bits(steps[0][1].inner)
    assert [int(state.in_a_row) for _, state, _ in steps] == [0, 1, 2, 0]
    assert bits(steps[3][0]) != bits(steps[0][0])


def test_a_spike_is_measured_against_the_losses_let_through():
    rng = np.random.default_rng(0)
    losses = (2 + 0.1 * rng.normal(size=60)).tolist()
    losses[10] = 9.0  # before enough is known
    assert not run(guard.guard(optax.sgd(0.0), spike=8.0), losses[:11])[10][2]
    losses[10], losses[40], losses[41] = 2.0, 9.0, 9.0
    steps = run(guard.guard(optax.sgd(0.0), spike=8.0), losses)
    assert [i for i, (*_, h) in enumerate(steps) if h == guard.SPIKE] == [40, 41]
    applied = np.delete(losses, [40, 41])
    assert abs(float(steps[-1][1].mean) - applied.mean()) < 0.05 and abs(float(steps[-1][1].var) ** 0.5 - 0.1) < 0.04


def test_a_constant_loss_and_no_guard():
    assert not any(held for *_, held in run(guard.guard(optax.sgd(0.1), spike=6.0), [2.0] * 30 + [2.001] * 5))
    assert guard.told(optax.adam(0.1).init(PARAMS)) == {}
