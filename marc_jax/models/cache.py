"""The key-value cache: a pytree of two arrays with a leading layer axis."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys (already rotated) and values of every layer.

    A prefix has shape [layers, B, P, kv_heads, head_dim] and is shared by the G completions of a prompt; a suffix
    has shape [layers, B, G, R, kv_heads, head_dim].
    """

    k: jax.Array
    v: jax.Array


def empty(layers: int, b: int, g: int, r: int, kv_heads: int, head_dim: int, dtype) -> KV:
    """A suffix cache of R zeroed slots for B prompts with G completions each."""
    shape = (layers, b, g, r, kv_heads, head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: KV, k_new: jax.Array, v_new: jax.Array, index: jax.Array) -> KV:
    """Writes one step of all layers, [layers, B, G, kv_heads, head_dim], into slot `index` (a scalar for all rows)."""
    update = jax.lax.dynamic_update_index_in_dim
    return KV(
        update(cache.k, k_new.astype(cache.k.dtype), index, axis=3),
        update(cache.v, v_new.astype(cache.v.dtype), index, axis=3),
    )
