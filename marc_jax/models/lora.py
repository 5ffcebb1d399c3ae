"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (x A) B * alpha / rank, beside weights that stay as they are.

Adapters are three more leaves beside the kernel of a linear layer, `lora_a` [in, r], `lora_b` [r, out] and the number
`lora_scale`, stacked like the kernel. So a tree of parameters says by itself whether, where and how strongly it is
adapted: `qwen25_vl.bind` and `pack` take it as it is, `merge` gives the plain parameters that compute the same, and
`base` those without adapters, which share the frozen arrays.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax import sharding
from marc_jax.models import trees
from marc_jax.models.layers import Linear, Weight
from marc_jax.paths import flatten, unflatten

TRAINED = ("lora_a", "lora_b")
LEAVES = (*TRAINED, "lora_scale")
STD = 0.02  # of `trees.init`
HEAD = "text/head/kernel"  # read as a matrix, not applied as a layer


class Adapted(Linear):
    """A linear layer with adapters beside its kernel."""

    def __init__(self, linear: Linear, leaves: Mapping[str, jax.Array]):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.lora_a, self.lora_b, self.lora_scale = (nnx.Param(leaves[name]) for name in LEAVES)

    def __call__(self, x: jax.Array, columns: int = 0, rows: int = 0) -> jax.Array:
        y = super().__call__(x, columns, rows)
        a = jnp.pad(self.lora_a[...].astype(x.dtype), ((0, rows), (0, 0)))
        b = jnp.pad(self.lora_b[...].astype(x.dtype), ((0, 0), (0, columns)))
        low = x.reshape(-1, x.shape[-1]) @ a * self.lora_scale[...].astype(x.dtype)
        return y + (low @ b).reshape(y.shape)


def describe(weights: Mapping, rank: int, patterns: Sequence[str]) -> dict[str, Weight]:
    """Flat descriptions of `lora_a` and `lora_b` for every kernel whose whole path matches a pattern.

    Args:
      weights: nested descriptions of a model, of `qwen25_vl.describe`.
      patterns: regular expressions, e.g. "text/layers/.*/kernel".

    Raises:
      ValueError: a pattern matches no kernel of a linear layer, or a rank is not below a kernel's sides.
    """
    kernels = {path: w for path, w in flatten(weights).items() if path.endswith("/kernel") and path != HEAD}
    out: dict[str, Weight] = {}
    for pattern in patterns:
        found = [path for path in kernels if re.fullmatch(pattern, path)]
        if not found:
            some = ", ".join(sorted(kernels)[:3])
            raise ValueError(f"lora pattern {pattern!r} matches no kernel; names look like {some}")
        for path in found:
            w = kernels[path]
            if not 0 < rank <= min(w.shape[-2:]):
                raise ValueError(f"lora rank {rank}: {path} is {w.shape[-2]} x {w.shape[-1]}")
            stack, units = w.shape[:-2], w.units or (0,) * len(w.shape)
            place = path.removesuffix("kernel")
            out[place + "lora_a"] = Weight(
                (*stack, w.shape[-2], rank), (*w.axes[:-1], None), "normal", (*units[:-1], 0)
            )
            out[place + "lora_b"] = Weight(
                (*stack, rank, w.shape[-1]), (*w.axes[:-2], None, w.axes[-1]), "zeros", (*units[:-2], 0, units[-1])
            )
    return out


def init(
    weights: Mapping, rank: int, alpha: float, patterns: Sequence[str], key: jax.Array, mesh=None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(what trains, scales), both flat, float32 and on the mesh: `a` random, `b` zero, so the model is what it was.

    `a` has the variance of PEFT's default, 1 / (3 in).
    """
    described = describe(weights, rank, patterns)
    flat = flatten(trees.init(unflatten(described), key, jnp.float32, mesh))
    wide = {path: (3 * x.shape[-2]) ** -0.5 / STD for path, x in flat.items() if path.endswith("lora_a")}
    flat |= {path: flat[path] * factor for path, factor in wide.items()}
    scales = {
        path.removesuffix("a") + "scale": jnp.full(flat[path].shape[:-2], alpha / rank, jnp.float32) for path in wide
    }
    return flat, scales


def abstract(weights: Mapping, rank: int, patterns: Sequence[str], mesh=None) -> tuple[dict, dict]:
    """ShapeDtypeStructs of `init`'s result, with shardings when a mesh is given."""
    flat = flatten(trees.abstract(unflatten(describe(weights, rank, patterns)), jnp.float32, mesh))
    where = None if mesh is None else sharding.replicated(mesh)
    scales = {
        path.removesuffix("a") + "scale": jax.ShapeDtypeStruct(x.shape[:-2], jnp.float32, sharding=where)
        for path, x in flat.items()
        if path.endswith("lora_a")
    }
    return flat, scales


def split(params: Mapping) -> tuple[dict, dict[str, dict[str, Any]]]:
    """(nested parameters without adapters, {path of a linear layer: its three leaves})."""
    base, adapters = {}, {}
    for path, x in flatten(params).items():
        place, _, leaf = path.rpartition("/")
        if leaf in LEAVES:
            adapters.setdefault(place, {})[leaf] = x
        else:
            base[path] = x
    return unflatten(base), adapters


def base(params: Mapping) -> dict:
    """The nested parameters without adapters; the arrays themselves, nothing is copied."""
    return split(params)[0]


def attach(model: nnx.Module, adapters: Mapping[str, Mapping[str, jax.Array]]) -> None:
    """Puts adapters, of `split`, on the linear layers of a bound model."""
    for place, leaves in adapters.items():
        *branches, name = place.split("/")
        parent = model
        for branch in branches:
            parent = getattr(parent, branch)
        setattr(parent, name, Adapted(getattr(parent, name), leaves))


def kernel(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel of a linear layer's leaves, its adapters (if any) added in float32, in the kernel's dtype."""
    w = leaves["kernel"]
    if "lora_a" not in leaves:
        return w
    a, b = (leaves[name].astype(jnp.float32) for name in TRAINED)
    more = jnp.matmul(a, b, precision="highest") * leaves["lora_scale"].astype(jnp.float32)[..., None, None]
    return (w.astype(jnp.float32) + more).astype(w.dtype)


def merge(params: Mapping) -> dict:
    """Nested plain parameters that compute what `params` with their adapters do."""
    return merged(*split(params))


def merged(plain: Mapping, adapters: Mapping[str, Mapping[str, jax.Array]]) -> dict:
    """`merge` of what `split` gives."""
    flat = flatten(plain)
    for place, leaves in adapters.items():
        flat[f"{place}/kernel"] = kernel({"kernel": flat[f"{place}/kernel"], **leaves})
    return unflatten(flat)
