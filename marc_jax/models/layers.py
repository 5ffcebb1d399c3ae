"""Building blocks shared by the vision tower and the decoder, each weight described once.

A module's parameters start life as `Weight` descriptions (shape, logical axes, init). That one description gives
the random init, the abstract shapes, the shardings and the restore target; `bind` swaps descriptions for arrays.
Stacked layers carry a leading "layers" axis in every description and are run by `jax.lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


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

    def sample(self, key: jax.Array, dtype: Any) -> jax.Array:
        """A random value; `key` is used by "normal" only."""
        if self.init == "normal":
            return (0.02 * jax.random.normal(key, self.shape, jnp.float32)).astype(dtype)
        return jnp.full(self.shape, {"ones": 1, "zeros": 0}[self.init], dtype)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a bound model computes: activation dtype, attention backend, rematerialisation of layers."""

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: bool = False


def _param(stack: tuple[int, ...], shape, axes, init="normal", units=None) -> nnx.Param:
    units = tuple(units or (0,) * len(shape))
    return nnx.Param(Weight((*stack, *shape), (*("layers",) * len(stack), *axes), init, (*(0,) * len(stack), *units)))


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); kernel [in, out]."""

    def __init__(self, shape, axes, *, bias=False, stack=(), units=(0, 0)):
        self.kernel = _param(stack, shape, axes, units=units)
        self.bias = _param(stack, shape[1:], axes[1:], "zeros", units[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Statistics in float32, cast back, then times the scale (the reference's order of rounding)."""

    def __init__(self, size: int, eps: float, stack=()):
        self.scale = _param(stack, (size,), (None,), "ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inv = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * inv).astype(x.dtype) * self.scale[...].astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, width: int, *, bias: bool, stack=()):
        self.gate = Linear((size, width), ("embed", "mlp"), bias=bias, stack=stack)
        self.up = Linear((size, width), ("embed", "mlp"), bias=bias, stack=stack)
        self.down = Linear((width, size), ("mlp", "embed"), bias=bias, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def stack_of(module: nnx.Module) -> tuple[Callable[[Any], nnx.Module], Any]:
    """Splits a module with stacked parameters into (state of one layer -> module, stacked state) for `lax.scan`."""
    graphdef, state = nnx.split(module)
    return functools.partial(nnx.merge, graphdef), nnx.to_pure_dict(state)


def maybe_remat(body: Callable, runtime: Runtime) -> Callable:
    """Wraps a scan body so that the backward pass recomputes it; `prevent_cse` is not needed under scan."""
    return jax.checkpoint(body, prevent_cse=False) if runtime.remat else body
