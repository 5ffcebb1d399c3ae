"""TrainState: everything a training step reads and writes, as one frozen pytree."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from marc_jax import optim, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One point of a run.

    Attributes:
      step: int32 []; updates done so far.
      params: what the optimizer updates, flat: path -> array.
      frozen: the rest of the model, flat: path -> array; never updated, not part of the optimizer state.
      opt_state: of the optax chain, for `params`.
      key: typed PRNG key []; a step uses `step_key`, so that a resumed run draws the same numbers.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt_state: optax.OptState
    key: jax.Array

    @property
    def model(self) -> dict:
        """All parameters as one nested dict, for `models.*.bind`."""
        return optim.join(self.params, self.frozen)

    @property
    def step_key(self) -> jax.Array:
        """The key of this step; a function of (key, step) alone."""
        return jax.random.fold_in(self.key, self.step)

    def apply(self, tx: optax.GradientTransformation, grads: Mapping[str, jax.Array], loss=0.0) -> "TrainState":
        """The next state: one optimizer update of `params`. `loss`: the batch's mean, for `guard.guard`."""
        updates, opt_state = optax.with_extra_args_support(tx).update(grads, self.opt_state, self.params, loss=loss)
        params = optax.apply_updates(self.params, updates)
        return dataclasses.replace(self, step=self.step + 1, params=params, opt_state=opt_state)


def create(
    tx: optax.GradientTransformation,
    params: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array] | None = None,
    *,
    key: jax.Array,
) -> TrainState:
    """The state before the first step. `params`, `frozen`: as `optim.partition` returns them."""
    params, frozen = dict(params), dict(frozen or {})
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, tx.init(params), key)


def settled(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """A state with every leaf on the mesh: parameters and moments where they are, counters and keys everywhere."""
    everywhere = sharding.replicated(mesh)

    def place(x):
        there = isinstance(x.sharding, jax.sharding.NamedSharding) and x.sharding.mesh == mesh
        return x if there else sharding.place(x, everywhere)

    return jax.tree.map(place, state)


def abstract(
    tx: optax.GradientTransformation,
    params: Mapping[str, jax.ShapeDtypeStruct],
    frozen: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """Shapes and shardings of `create`'s result, to restore into or to compile for.

    Args:
      tx: the optax chain.
      params: shapes (or arrays) of the trainable parameters; their `.sharding` is kept, and the optimizer's moments
        of a parameter are sharded as it is.
      frozen: shapes (or arrays) of the others.
      mesh: where given, everything without a sharding of its own (step, key, counters) is replicated over it.
    """
    params = {path: _struct(x) for path, x in params.items()}
    frozen = {path: _struct(x) for path, x in (frozen or {}).items()}
    replicated = sharding.replicated(mesh) if mesh is not None else None

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or replicated)

    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda x, param: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.tree.map(place, TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, frozen, opt_state, key))


def _struct(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
