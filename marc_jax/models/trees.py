"""From a module's `Weight` descriptions to parameters: abstract shapes, random values, shardings. One per model family.

A family is a function (cfg, Runtime) -> nnx.Module whose parameters are descriptions; cfg is hashable.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax import sharding
from marc_jax.models.layers import Runtime, sample

SMALL = 2**26  # parameters; up to here `init` is one program, above it one per leaf (bounded memory)


@functools.lru_cache(maxsize=64)
def skeleton(make: Callable, cfg: Any, runtime: Runtime) -> tuple[Any, Any]:
    """(graphdef, nested dict of Weight) of a model: no arrays, made once per configuration."""
    graphdef, state = nnx.split(make(cfg, runtime))
    return graphdef, nnx.to_pure_dict(state)


def init(weights: dict, key: jax.Array, dtype=jnp.float32, mesh=None) -> dict:
    """Random parameters of described `weights`; with a mesh each leaf is created on its own shards.

    A leaf's key depends on its path only, so its value does not depend on the other leaves.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(weights)
    pairs = [(zlib.crc32(jax.tree_util.keystr(path).encode()), w) for path, w in leaves]
    placed = [None] * len(pairs) if mesh is None else jax.tree.leaves(sharding.shardings(weights, mesh))
    whole = sum(w.size for _, w in pairs) <= SMALL
    groups = [list(range(len(pairs)))] if whole else [[i] for i in range(len(pairs))]
    out: list[Any] = [None] * len(pairs)
    for group in groups:
        make = functools.partial(sample, [pairs[i] for i in group], dtype=dtype)
        make = jax.jit(make, out_shardings=None if mesh is None else [placed[i] for i in group])
        for i, value in zip(group, make(key), strict=True):
            out[i] = value
    return jax.tree.unflatten(tree, out)


def abstract(weights: dict, dtype=jnp.float32, mesh=None) -> dict:
    """ShapeDtypeStructs of described `weights`, with shardings when a mesh is given: the target of restore and load."""
    if mesh is None:
        return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), weights)
    placed = sharding.shardings(weights, mesh)
    return jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype, sharding=s), weights, placed)
