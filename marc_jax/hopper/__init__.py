"""Kernels for a Hopper GPU (H100, H200), where XLA's own stay behind the hardware (docs/performance.md, retrieval.md).

    stream     a few rows against large weights: decoding reads every weight once per token
    attention  one decoding step over a shared prompt and each completion's own keys
    maxima     the product of a search, of which only the best of every few scores is kept

Written in Pallas for its Mosaic GPU back end (jax >= 0.11). `available` says whether they can run;
`marc_jax.models.packed` and `marc_jax.memory.retrieve` fall back to XLA where they cannot.
"""

import functools

import jax
import jax.numpy as jnp

PROCESSORS = 132  # multiprocessors of an H100 or H200


@functools.cache
def pallas():
    """(pallas, its Mosaic GPU module), or None where this jax has no such back end."""
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError:
        return None
    return (pl, plgpu) if jax.__version_info__ >= (0, 11) else None


@functools.cache
def available() -> bool:
    """Whether the one device is a Hopper GPU and this jax can compile for it."""
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"
    return hopper and jax.device_count() == 1 and bool(pallas())


def tiled(dtype):
    """How the tensor core wants an operand in shared memory: boxes of 8 x 128 bytes, swizzled."""
    _, plgpu = pallas()
    return (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))


def rounded(a: jax.Array) -> jax.Array:
    """float32 values as bfloat16 would hold them: where the plain layers round, the kernels do too."""
    return a.astype(jnp.bfloat16).astype(jnp.float32)
