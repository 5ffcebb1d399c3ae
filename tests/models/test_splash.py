"""Splash attention (in Pallas' interpreter) against the plain XLA backend: values and gradients, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marc_jax import sharding
from marc_jax.models import attention, qwen25_vl, splash
from marc_jax.rl import rollout
from marc_jax.rl.types import Completions, PromptBatch

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def draw(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def same(f, arrays, weight_shape, dtype):
    """f(impl, *arrays): values and gradients of both backends, compared where `weight` is not zero."""
    weight = draw("float32", weight_shape)[0]

    def loss(arrays, impl):
        out = f(impl, *arrays)
        return (out.astype(jnp.float32) * weight).sum(), out

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    for mine, plain in zip(*(jax.tree.leaves(run(arrays, impl)) for impl in ("splash", "xla")), strict=True):
        mine, plain = (np.asarray(a.astype(jnp.float32)) for a in (mine, plain))
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, plain, atol=TOLERANCE[dtype] * max(1.0, np.abs(plain).max()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length,heads,kv,h", [(130, 8, 1, 128), (256, 4, 2, 64)])
def test_causal(dtype, length, heads, kv, h):
    mask = np.ones((2, length), bool)
    mask[0, length - 37 :] = False
    mask[1, 5:9] = False  # holes: visual slots a compressed view left empty
    arrays = draw(dtype, (2, length, heads, h), (2, length, kv, h), (2, length, kv, h))

    def run(impl, q, k, v):
        return jnp.where(mask[..., None, None], attention.causal(q, k, v, jnp.asarray(mask), impl), 0)

    same(run, arrays, (2, length, heads, h), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [None, (300, 17)])
def test_bidirectional_with_the_vision_towers_head_dim(dtype, lengths):
    arrays = draw(dtype, *[(2, 300, 2, 80)] * 3)
    same(lambda impl, *a: attention.bidirectional(*a, impl, lengths), arrays, (2, 300, 2, 80), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("g,r,p", [(3, 11, 70), (2, 140, 200)])
def test_suffixes_over_a_shared_prefix(dtype, g, r, p):
    b, n, kv, h = 2, 4, 2, 64
    ok, ok_prefix = np.ones((b, g, r), bool), np.ones((b, p), bool)
    ok[1, :, r // 2 :], ok_prefix[0, p - 9 :], ok_prefix[1, 3:8] = False, False, False
    arrays = draw(dtype, (b, g, r, n, h), *[(b, g, r, kv, h)] * 2, *[(b, p, kv, h)] * 2)

    def run(impl, q, k, v, k_prefix, v_prefix):
        out = attention.prefix_causal(q, k, v, jnp.asarray(ok), k_prefix, v_prefix, jnp.asarray(ok_prefix), impl)
        return jnp.where(ok[..., None, None], out, 0)

    same(run, arrays, (b, g, r, n, h), dtype)


def test_a_suffix_sees_neither_its_siblings_nor_its_future():
    mask = splash.Suffixes(prefix=3, length=2, queries=6)[:, :]
    own = np.kron(np.eye(3, dtype=bool), np.tri(2, dtype=bool))
    np.testing.assert_array_equal(mask, np.concatenate([np.ones((6, 3), bool), own], axis=1))


def test_windows_stay_batched_matmuls():
    q, k, v = draw("float32", *[(3, 64, 2, 80)] * 3)
    text = jax.jit(lambda *a: attention.bidirectional(*a, "splash")).lower(q, k, v).as_text()
    assert "dot_general" in text and "while" not in text


@pytest.mark.parametrize("mesh,b,n,kv", [
    ((2, 2, 2), 4, 4, 2),  # rows over data and fsdp, heads over tensor
    ((1, 2, 4), 2, 8, 2),  # fewer key heads than devices on tensor
    ((2, 2, 2), 1, 3, 1),  # one row and an odd number of heads: whole everywhere
])  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_meshes(mesh, b, n, kv, dtype):
    g, r, p, h = 2, 9, 40, 64
    mesh = sharding.make_mesh(*mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")) if b > 1 else P())
    ok = jax.device_put(jnp.asarray(np.arange(p) < np.full((b, 1), p - 5)), rows)
    arrays = draw(dtype, (b, g, r, n, h), *[(b, g, r, kv, h)] * 2, *[(b, p, kv, h)] * 2)
    arrays = [jax.device_put(a, rows) for a in arrays]

    def run(impl, q, k, v, k_prefix, v_prefix):
        own = attention.prefix_causal(q, k, v, jnp.ones((b, g, r), bool), k_prefix, v_prefix, ok, impl)
        whole = attention.causal(q[:, 0], k[:, 0], v[:, 0], jnp.ones((b, r), bool), impl)
        return own + whole[:, None]

    assert jax.jit(run, static_argnums=0).lower("splash", *arrays).as_text().count("manual_computation") == 2
    same(run, arrays, (b, g, r, n, h), dtype)


def test_a_models_scores_and_gradients_do_not_depend_on_the_backend():
    """Vision tower with full rows of 256, prompt, two suffixes each, and gradients into everything, in float32."""
    cfg = qwen25_vl.tiny(num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    mesh = sharding.make_mesh(2, 2, 2)
    b, g, r, p, grid = 4, 2, 7, 80, (16, 16)
    rng = np.random.default_rng(0)
    index = np.where(np.arange(p) < 64, np.arange(p), -1)
    pos = np.broadcast_to(np.arange(p), (3, b, p))
    prompt = PromptBatch(
        rng.integers(7, 300, (b, p)), np.arange(p) < 77 - np.arange(b)[:, None], pos, np.tile(index, (b, 1)),
        np.full(b, p),
    )  # fmt: skip
    mask = np.arange(r) < np.array([[7, 3]] * b)[..., None]
    done = Completions(rng.integers(7, 300, (b, g, r)), mask, np.zeros((b, g, r), np.float32))
    patches = rng.standard_normal((b, 256, cfg.vision.patch_dim)).astype(np.float32)
    params = qwen25_vl.init(cfg, jax.random.key(0), mesh=mesh)
    patches = jax.device_put(patches, sharding.batch(mesh))

    def loss(params, impl):
        model = qwen25_vl.bind(cfg, params, attention=impl)
        logp = rollout.score(model, model.vision(patches, grid), prompt, done)
        return -logp.sum() / mask.sum(), logp

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(run(params, impl)) for impl in ("splash", "xla")), strict=True)
    for (path, mine), (_, plain) in pairs:
        np.testing.assert_allclose(mine, plain, atol=1e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
