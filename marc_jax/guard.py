"""Updates that must not happen: a loss or gradient that is not finite, a loss far above the recent ones.

Inside the compiled step, since afterwards it is too late: the state before the update has been given away.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

APPLIED, NOT_FINITE, SPIKE = range(3)
DECAY = 0.98  # of the running mean and variance of the loss: about the last 50 steps
WARM_UP = 20  # losses in the mean before one can be a spike


class GuardState(NamedTuple):
    """Attributes: the optimizer's own state; mean and variance of the losses let through and how many those were; what
    became of the last step (APPLIED, NOT_FINITE or SPIKE); how many were held back in a row up to it."""

    inner: Any
    mean: jax.Array
    var: jax.Array
    seen: jax.Array
    held: jax.Array
    in_a_row: jax.Array


def guard(tx: optax.GradientTransformation, spike: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """`tx`, leaving parameters and its own state as they are, bit for bit, where an update must not happen.

    Held back is an update whose gradients, updates or `loss` hold a NaN or an infinity, and with spike > 0 one whose
    loss is more than `spike` standard deviations above the mean of the last (about 50) losses.

    `update` takes the mean loss of the batch as `loss`.
    """

    def init(params):
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return GuardState(tx.init(params), zero, zero, none, none, none)

    def update(grads, state, params=None, *, loss=0.0, **_):
        loss = jnp.asarray(loss, jnp.float32)
        updates, inner = tx.update(grads, state.inner, params)
        finite = jnp.isfinite(loss)
        for x in jax.tree.leaves((grads, updates)):
            finite &= jnp.isfinite(x).all()
        spread = jnp.sqrt(state.var) + 1e-3 * jnp.abs(state.mean) + 1e-6  # a constant loss may still tremble
        high = (spike > 0) & (state.seen >= WARM_UP) & (loss > state.mean + spike * spread)
        held = jnp.where(finite, jnp.where(high, SPIKE, APPLIED), NOT_FINITE).astype(jnp.int32)
        good = held == APPLIED
        # Adding -0.0 changes no number, adding 0.0 would turn -0.0 around.
        updates = jax.tree.map(lambda x: jnp.where(good, x, -jnp.zeros_like(x)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner, state.inner)
        # The weight of a mean over the losses so far, until there are enough of them for a running one.
        weight = jnp.where(good, jnp.maximum(1 - DECAY, 1 / (1 + state.seen)), 0.0)
        off = jnp.where(good, loss - state.mean, 0.0)
        mean, var = state.mean + weight * off, (1 - weight) * (state.var + weight * off**2)
        in_a_row = jnp.where(good, 0, state.in_a_row + 1)
        return updates, GuardState(inner, mean, var, state.seen + good, held, in_a_row)

    return optax.GradientTransformationExtraArgs(init, update)


def told(opt_state) -> dict[str, jax.Array]:
    """{"held": APPLIED, NOT_FINITE or SPIKE, "in_a_row"} of the last step, as copies; {} where nothing guards."""
    if not isinstance(opt_state, GuardState):
        return {}
    return {"held": opt_state.held + 0, "in_a_row": opt_state.in_a_row + 0}
