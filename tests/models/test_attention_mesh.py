"""The cuDNN backend on meshes, its kernel computed by jax's plain implementation of the same call: equal to no mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marc_jax import sharding
from marc_jax.models import attention, layers

MESHES = [  # (data, fsdp, tensor), rows, heads, key heads; and the rows, heads and key heads of the first device
    ((1, 2, 1), 4, 4, 2, (2, 4, 2)),
    ((2, 2, 2), 4, 4, 2, (1, 2, 1)),
    ((2, 2, 2), 2, 4, 1, (1, 2, 1)),  # rows over data alone, as 2 do not divide over 4
    ((1, 1, 8), 2, 8, 2, (2, 1, 1)),  # fewer key heads than devices: repeated
    ((2, 2, 2), 1, 3, 1, (1, 3, 1)),  # one row and an odd number of heads: whole everywhere
]
G, R, L, H = 3, 7, 40, 16


def everything(arrays, lengths_b, mask_bl):
    """All three kinds of attention, where their results are defined."""
    q, k, v, q_bgrnh, k_own, v_own = arrays
    n = q.shape[2] // k.shape[2]
    k_all, v_all = (jnp.repeat(a, n, axis=2) for a in (k, v))
    real = mask_bl[..., None, None]
    return (
        attention.bidirectional(q, k_all, v_all, "cudnn", lengths_b),
        attention.bidirectional(q, k_all, v_all, "cudnn"),
        attention.causal(q, k, v, mask_bl, "cudnn") * real,
        attention.prefix_causal(q_bgrnh, k_own, v_own, jnp.ones((len(q), G, R), bool), k, v, mask_bl, "cudnn"),
    )


def loss(arrays, *given):
    out = everything(arrays, *given)
    return sum((y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() for y in out), out


def draw(b, n, kv):
    """Queries, keys and values of prompts and of suffixes; lengths and the mask of the prompts."""
    rng = np.random.default_rng(0)
    shapes = [(b, L, n, H), (b, L, kv, H), (b, L, kv, H), (b, G, R, n, H), (b, G, R, kv, H), (b, G, R, kv, H)]
    lengths = rng.integers(5, L + 1, b).astype(np.int32)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], lengths, np.arange(L) < lengths[:, None]


def placed(mesh, b, tree):
    """Rows over data and fsdp, where they divide."""
    over = P(("data", "fsdp")) if b % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else P()
    return jax.device_put(tree, NamedSharding(mesh, over))


@pytest.mark.parametrize("size,b,n,kv,local", MESHES)
def test_values_and_gradients_equal_those_without_a_mesh(size, b, n, kv, local, plain_cudnn):
    case = draw(b, n, kv)
    run = jax.jit(jax.grad(loss, has_aux=True))
    wanted = run(*case)
    plain_cudnn.clear()
    mesh = sharding.make_mesh(*size, devices=jax.devices()[: int(np.prod(size))])
    got = run(*placed(mesh, b, case))
    for mine, plain in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-5 * max(1, np.abs(plain).max()))
    rows, heads, key_heads = local
    own = [(rows, heads, heads)] * 2 + [(rows, heads, key_heads), (rows * G, heads, key_heads)]
    assert [(q[0], q[2], k[2]) for q, k in plain_cudnn[:4]] == own  # each device is handed its own part


@pytest.mark.parametrize("size,b,n,kv", [((1, 2, 1), 4, 4, 2), ((2, 2, 2), 4, 4, 2)])
def test_rows_are_not_gathered(size, b, n, kv, plain_cudnn):
    mesh = sharding.make_mesh(*size, devices=jax.devices()[: int(np.prod(size))])
    arrays, lengths, mask = placed(mesh, b, draw(b, n, kv))
    over = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    own = NamedSharding(mesh, P(("data", "fsdp"), None, None, "tensor"))
    arrays = [jax.device_put(a, over if a.ndim == 4 else own) for a in arrays]
    run = jax.jit(jax.grad(loss, has_aux=True), out_shardings=([a.sharding for a in arrays], None))
    text = run.lower(arrays, lengths, mask).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_one_device_is_the_plain_call(plain_cudnn):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert "shard_map" not in str(jax.make_jaxpr(everything)(*draw(2, 4, 2)))


def halves(*args):
    arrays, *given = draw(*args)
    return [jnp.asarray(a, jnp.bfloat16) for a in arrays], *given


def test_for_a_gpu_the_kernels_are_lowered_with_local_shapes(lowered_cudnn):
    """Nothing is left to the kernels' own partitioner, which refuses queries that are not split as their keys are."""
    mesh = sharding.make_mesh(2, 2, 2)
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(*placed(mesh, 4, halves(4, 4, 2)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" not in text
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert len(calls) == 8 and sum("Backward(" in line for line in calls) == 4
    assert all(f"(tensor<{rows}x64x2x{H}xbf16>" in line for line, rows in zip(calls, (1, 1, 1, G), strict=False))


@pytest.mark.parametrize("name", ["attention", "products"])
def test_rematerialisation_keeps_what_the_kernels_gave(lowered_cudnn, name):
    """Within the split too, the backward pass does not run the forward kernel again."""
    mesh = sharding.make_mesh(2, 2, 2)
    arrays, *given = placed(mesh, 4, halves(4, 4, 2))

    def count(remat):
        body = layers.maybe_remat(lambda arrays: loss(arrays, *given)[0], layers.Runtime(remat=remat))
        text = str(jax.make_jaxpr(jax.grad(body))(arrays))
        return text.count("dot_product_attention_fwd_wrapper["), text.count("dot_product_attention_bwd_wrapper[")

    assert count(name) == count(False) == (4, 4)
    assert count("layer") == (8, 4)
