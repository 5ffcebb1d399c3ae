"""The key-value cache: a pytree of two arrays with a leading layer axis."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys (already rotated) and values of every layer.

    A prefix has shape [layers, B, P, kv_heads, head_dim] and is shared by the G completions of a prompt; a suffix
    (made by `empty`, written by `write`) has shape [layers, B, kv_heads, G, R, head_dim].
    """

    k: jax.Array
    v: jax.Array


def empty(layers: int, b: int, g: int, r: int, kv_heads: int, head_dim: int, dtype) -> KV:
    """A suffix cache of R zeroed slots for B prompts with G completions each."""
    shape = (layers, b, kv_heads, g, r, head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: KV, k_new: jax.Array, v_new: jax.Array, index: jax.Array) -> KV:
    """Writes one step of all layers, [layers, B, G, kv_heads, head_dim], into slot `index` (a scalar for all rows)."""

    def update(old, new):
        return jax.lax.dynamic_update_index_in_dim(old, new.swapaxes(2, 3).astype(old.dtype), index, axis=4)

    return KV(update(cache.k, k_new), update(cache.v, v_new))
