"""Building blocks shared by the vision tower and the decoder, each weight described once.

A module's parameters start life as `Weight` descriptions (shape, logical axes, init). That one description gives
the random init, the abstract shapes, the shardings and the restore target; `bind` swaps descriptions for arrays.
Stacked layers carry a leading "layers" axis in every description and are run by `jax.lax.scan`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter before it exists.

    Attributes:
      shape: its shape.
      axes: logical axis name (or None) per dimension; `marc_jax.sharding.RULES` maps them to mesh axes.
      init: "normal" (std 0.02), "ones" or "zeros".
      units: per dimension, the number of indivisible pieces (heads in a fused heads x head_dim axis), 0 = the size.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    units: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


BLOCK = 1024
LANES = 128  # a multiple of it keeps the rows of wide matrices aligned on GPUs and TPUs


def sample(weights: list[tuple[int, Weight]], key: jax.Array, dtype: Any) -> list[jax.Array]:
    """Random values of (salt, weight) pairs; a value depends on its own salt and shape only, not on its neighbours.

    Normals come in blocks of 1024, block j of a weight keyed by (salt, j): all of them are one call of the generator,
    whose compilation would otherwise dominate the start of a small model.
    """
    counts = [-(-w.size // BLOCK) if w.init == "normal" else 0 for _, w in weights]
    salts = np.repeat(np.asarray([s for s, _ in weights], np.uint32), counts)
    index = np.concatenate([np.arange(c, dtype=np.uint32) for c in counts])
    if len(index):
        keys = jax.vmap(lambda s, j: jax.random.fold_in(jax.random.fold_in(key, s), j))(salts, index)
        blocks = 0.02 * jax.vmap(lambda k: jax.random.normal(k, (BLOCK,), jnp.float32))(keys)
    out, at = [], 0
    for (_, w), count in zip(weights, counts, strict=True):
        if count:
            out.append(blocks[at : at + count].reshape(-1)[: w.size].reshape(w.shape).astype(dtype))
            at += count
        else:
            out.append(jnp.full(w.shape, {"ones": 1, "zeros": 0}[w.init], dtype))
    return out


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a bound model computes: activation dtype, attention backend, rematerialisation of layers."""

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: bool | str = False


def _param(stack: tuple[int, ...], shape, axes, init="normal", units=None) -> nnx.Param:
    units = tuple(units or (0,) * len(shape))
    return nnx.Param(Weight((*stack, *shape), (*("layers",) * len(stack), *axes), init, (*(0,) * len(stack), *units)))


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); kernel [in, out]."""

    def __init__(self, shape, axes, *, bias=False, stack=(), units=(0, 0)):
        self.kernel = _param(stack, shape, axes, units=units)
        self.bias = _param(stack, shape[1:], axes[1:], "zeros", units[1:]) if bias else None

    def __call__(self, x: jax.Array, columns: int = 0, rows: int = 0) -> jax.Array:
        """x @ kernel (+ bias), with so many columns or rows of zeros after the kernel's own."""
        # Rows flattened: the weight gradient is then one plain matmul, where XLA's CPU backend would first transpose
        # (and recompute) the incoming gradient of a 3-D input.
        kernel = jnp.pad(self.kernel[...].astype(x.dtype), ((0, rows), (0, columns)))
        y = x.reshape(-1, x.shape[-1]) @ kernel
        if self.bias is not None:
            y = y + jnp.pad(self.bias[...].astype(x.dtype), (0, columns))
        return y.reshape(*x.shape[:-1], -1)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale along the last axis, in x's dtype.

    Statistics in float32, cast back, then times the scale (the reference's order of rounding).
    """
    x32 = x.astype(jnp.float32)
    inv = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * inv).astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale."""

    def __init__(self, size: int, eps: float, stack=()):
        self.scale = _param(stack, (size,), (None,), "ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, width: int, *, bias: bool, stack=()):
        self.gate = Linear((size, width), ("embed", "mlp"), bias=bias, stack=stack)
        self.up = Linear((size, width), ("embed", "mlp"), bias=bias, stack=stack)
        self.down = Linear((width, size), ("mlp", "embed"), bias=bias, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """A width off the grid of the matrix units (the vision tower's 3,420) is padded with zeros on the way."""
        more = -self.gate.kernel.shape[-1] % LANES if self.gate.kernel.shape[-1] > 8 * LANES else 0
        return self.down(jax.nn.silu(self.gate(x, more)) * self.up(x, more), rows=more)


def stack_of(module: nnx.Module) -> tuple[Callable[[Any], nnx.Module], Any]:
    """Splits a module with stacked parameters into (state of one layer -> module, stacked state) for `lax.scan`."""
    graphdef, state = nnx.split(module)
    return functools.partial(nnx.merge, graphdef), nnx.to_pure_dict(state)


def kept(x: jax.Array) -> jax.Array:
    """Marks what remat "attention" saves: without these arrays, as wide as the model, attention would be done again."""
    return checkpoint_name(x, "attention")


def _kernels(primitive, *_, **__) -> bool:
    """Saves what a flash attention kernel gave: its output and the log-sum-exp that its backward pass starts from."""
    return primitive.name.startswith("dot_product_attention_fwd")


_both = jax.checkpoint_policies.save_from_both_policies
# What the backward pass finds instead of computing it again, by name; a layer's input is always kept.
REMAT = {
    "layer": None,
    "attention": _both(_kernels, jax.checkpoint_policies.save_only_these_names("attention")),
    "products": _both(_kernels, jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def maybe_remat(body: Callable, runtime: Runtime) -> Callable:
    """Wraps a scan body so that the backward pass recomputes it; `prevent_cse` is not needed under scan.

    Raises:
      ValueError: `runtime.remat` names no policy.
    """
    if not runtime.remat:
        return body
    name = "layer" if runtime.remat is True else runtime.remat
    if name not in REMAT:
        raise ValueError(f"remat={name!r}: choose True, False or one of {', '.join(REMAT)}")
    return jax.checkpoint(body, prevent_cse=False, policy=REMAT[name])
