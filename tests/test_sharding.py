"""The mesh and the axis table: equal logits on every mesh, collisions raise, what does not divide is said."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from marc_jax import sharding
from marc_jax.models import qwen25_vl
from tools import tpu_program


def _mesh(data, fsdp, tensor):
    count = data * fsdp * tensor
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices, have {len(jax.devices())}")
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[:count])


CONFIG = qwen25_vl.tiny(num_heads=8, num_kv_heads=2, tie_word_embeddings=False)


@jax.jit
def _logits(params, tokens, patches):
    index = np.where((np.arange(9) >= 2) & (np.arange(9) < 6), np.arange(9) - 2, -1) * np.ones((8, 1), int)
    model = qwen25_vl.bind(CONFIG, params)
    x = model.embed(tokens, model.vision(patches, (4, 4)), index)
    pos = np.broadcast_to(np.arange(9), (3, 8, 9))
    return model.logits(model.prefill(x, pos, np.ones((8, 9), bool))[0])


@pytest.fixture(scope="module")
def alone():
    """Inputs, parameters and logits on one device."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 320, (8, 9)), rng.standard_normal((8, 16, 1176)).astype(np.float32)
    params = qwen25_vl.init(CONFIG, jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        return inputs, params, _logits(params, *inputs)


@pytest.mark.parametrize("shape", [
    (2, 1, 1), (1, 1, 2), (2, 2, 2), (1, 1, 8), (1, 8, 1),
    pytest.param((1, 1, 1), marks=pytest.mark.slow), pytest.param((1, 2, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_logits_are_equal_on_every_mesh(shape, alone):
    mesh = _mesh(*shape)
    inputs, params, want = alone
    sharded = qwen25_vl.init(CONFIG, jax.random.key(0), mesh=mesh)
    # The same random bits; how a shard is vectorised may decide the last bit of what is made of them.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8, rtol=3e-7), params, sharded)
    with jax.default_matmul_precision("highest"):
        got = _logits(sharded, *(jax.device_put(a, sharding.batch(mesh)) for a in inputs))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_parameters_are_split_as_the_table_says():
    mesh = _mesh(2, 2, 2)
    tree = qwen25_vl.abstract(qwen25_vl.tiny(), mesh=mesh)
    assert tree["text"]["layers"]["attn"]["q"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert tree["text"]["layers"]["attn"]["o"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert tree["text"]["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)])
def test_the_vision_tower_gathers_weights_and_never_sums_activations(shape):
    mesh = _mesh(*shape)
    cfg = qwen25_vl.tiny(vision_hidden_size=64, vision_num_heads=4)
    patches = jax.ShapeDtypeStruct((16, 64, cfg.vision.patch_dim), np.float32, sharding=sharding.batch(mesh))
    tower = jax.jit(lambda params, patches: qwen25_vl.bind(cfg, params).vision(patches, (8, 8)))
    compiled = tower.lower(qwen25_vl.abstract(cfg, mesh=mesh), patches).compile()
    assert set(tpu_program.collectives(compiled.as_text())) == {"all-gather"}


def test_a_batch_is_held_only_where_it_divides_over_a_mesh():
    mesh = _mesh(2, 4, 1)

    def held(x):
        return "sharding_constraint" in str(jax.make_jaxpr(sharding.constrain_batch)(x))

    assert held(jax.device_put(np.ones((16, 3)), sharding.batch(mesh)))
    assert not held(jax.device_put(np.ones((12, 3)), sharding.replicated(mesh)))
    assert not held(np.ones((16, 3)))
    assert not held(jax.device_put(np.ones((16, 3)), sharding.batch(_mesh(1, 1, 8))))
    local = jax.shard_map(sharding.constrain_batch, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert "sharding_constraint" not in str(jax.make_jaxpr(local)(np.ones((16, 3))))


def test_two_dimensions_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match="'heads' and 'mlp' both map to mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"), _mesh(1, 1, 1))


def test_an_unknown_logical_axis_raises():
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        sharding.spec(("head",), _mesh(1, 1, 1))


def test_what_does_not_divide_stays_whole_and_is_said(caplog):
    mesh = _mesh(1, 1, 4)
    cfg = qwen25_vl.tiny(vocab_size=321)
    with caplog.at_level(logging.WARNING):
        tree = qwen25_vl.abstract(cfg, mesh=mesh)
    assert tree["text"]["embed"]["embedding"].sharding.spec == P(None, "fsdp")
    # Two key heads of 16 make 32 columns, which would divide; heads may not be cut.
    assert tree["text"]["layers"]["attn"]["k"]["kernel"].sharding.spec == P(None, "fsdp", None)
    assert "text/embed/embedding: vocab (321) does not divide over tensor=4; kept whole" in caplog.text
    paths = {f.path for f in sharding.fallbacks(qwen25_vl.describe(cfg), mesh)}
    assert "text/layers/attn/k/kernel" in paths and "text/layers/mlp/up/kernel" not in paths


def test_a_mesh_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        sharding.make_mesh(3, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="only one axis may be -1"):
        sharding.make_mesh(-1, -1, 1)
