"""Low-rank adapters: what they compute, merged and not; what trains; where the leaves live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from marc_jax import checkpoint, loop, optim, pretrained, sharding, state
from marc_jax.models import lora, packed, qwen25_vl, weights
from marc_jax.models.layers import Linear
from marc_jax.paths import flatten, unflatten
from marc_jax.rl import rollout, step
from marc_jax.rl.rollout import Sampling
from tests.rl import tiny_model as tiny
from tests.rl.test_step import encode
from tools import export_weights

EVERY = ("text/layers/.*/kernel", "vision/merger/.*/kernel")
HOW = Sampling(max_new=5, stop_ids=tiny.STOPS, pad_id=tiny.PAD, banned_ids=tiny.BANNED)
DESCRIBED = qwen25_vl.describe(tiny.CONFIG)


def adapted(seed=0, rank=4, alpha=8.0, trained=True):
    """(nested parameters with adapters, flat leaves that train, flat rest)."""
    flat = flatten(tiny.params())
    adapters, scales = lora.init(DESCRIBED, rank, alpha, EVERY, jax.random.key(seed))
    if trained:
        rng = np.random.default_rng(seed)
        adapters = {path: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32) for path, x in adapters.items()}
    return unflatten(flat | adapters | scales), adapters, flat | scales


def batch():
    prompt, _ = tiny.prompts(b=2)
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(size=(2, 16, tiny.CONFIG.vision.hidden_size)), jnp.float32)
    mask = np.arange(5) < np.array([[5, 2], [3, 4]])[..., None]
    tokens = jnp.asarray(rng.integers(7, 40, (2, 2, 5)), jnp.int32)
    return step.SFTBatch(prompt, features, tokens, jnp.asarray(mask), jnp.asarray(mask))


def logits(params):
    one = batch()

    @jax.jit
    def run(params):
        model = qwen25_vl.bind(tiny.CONFIG, params)
        vis, prompt = encode(model, one.visual, one.prompt)
        return model.logits(rollout.hidden_states(model, vis, prompt, one.tokens_bgr, one.mask_bgr))

    return np.asarray(run(params))


def test_every_linear_layer_adds_its_product_and_nothing_else_moves():
    params, adapters, _ = adapted()
    assert sum(path.endswith("lora_a") for path in adapters) == 7 + 2
    plain, merged = flatten(tiny.params()), flatten(lora.merge(params))
    assert set(plain) == set(merged)
    for path, w in plain.items():
        place = path.removesuffix("kernel")
        if place + "lora_a" not in adapters:
            np.testing.assert_array_equal(merged[path], w)
            continue
        a, b = (np.asarray(adapters[place + leaf], np.float64) for leaf in lora.TRAINED)
        np.testing.assert_allclose(merged[path], np.asarray(w, np.float64) + 2.0 * a @ b, atol=1e-5)


def test_merged_equals_unmerged_bit_for_bit_where_every_sum_is_exact():
    rng = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(rng.integers(-4, 5, s), jnp.float32) for s in ((3, 8), (8, 6), (8, 2), (2, 6)))
    leaves = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": jnp.float32(0.5)}
    linear = Linear((8, 6), (None, None))
    linear.kernel.set_value(w)
    got = lora.Adapted(linear, leaves)(x)
    np.testing.assert_array_equal(got, x @ lora.kernel(leaves))
    # with zeros after the kernel's own rows and columns
    wide = lora.Adapted(linear, leaves)(jnp.pad(x, ((0, 0), (0, 2))), 3, 2)
    np.testing.assert_array_equal(wide, jnp.pad(got, ((0, 0), (0, 3))))


def test_the_model_computes_the_same_merged_and_unmerged():
    params, _, _ = adapted()
    with jax.default_matmul_precision("highest"):
        got, want = logits(params), logits(lora.merge(params))
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(want - logits(tiny.params())).max() > 0.1


def test_fresh_adapters_change_nothing():
    np.testing.assert_array_equal(logits(adapted(trained=False)[0]), logits(tiny.params()))


@pytest.mark.parametrize("bits", [16, 8])
def test_packing_merges(bits):
    params, _, _ = adapted()
    pack = lambda tree: packed.pack(tree["text"], True, dtype=jnp.float32, bits=bits)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, pack(params), pack(lora.merge(params)))


def test_a_rollout_is_that_of_the_merged_weights():
    params, _, _ = adapted()
    one, keys = batch(), rollout.rollout_keys(0, 0, jnp.arange(2), 2)
    sample = jax.jit(step.make_sampler(tiny.CONFIG, encode, HOW))
    got, want = (sample(tree, one.prompt, one.visual, keys) for tree in (params, lora.merge(params)))
    np.testing.assert_array_equal(got.tokens_bgr, want.tokens_bgr)
    np.testing.assert_allclose(got.logp_bgr, want.logp_bgr, atol=1e-4)


def test_a_step_trains_adapters_alone_like_the_chain_rule_says():
    params, adapters, rest = adapted()
    tx = optax.sgd(1.0)
    first = state.create(tx, adapters, rest, key=jax.random.key(0))
    after, _ = jax.jit(step.make_sft_step(tiny.CONFIG, encode, tx))(first, batch())
    jax.tree.map(np.testing.assert_array_equal, after.frozen, first.frozen)
    # dL/dA = scale dW B', dL/dB = scale A' dW, dW of the merged kernel
    plain = flatten(lora.merge(params))
    whole = state.create(tx, plain, key=jax.random.key(0))
    moved, _ = jax.jit(step.make_sft_step(tiny.CONFIG, encode, tx))(whole, batch())
    for path in ("text/layers/mlp/down/", "text/layers/attn/k/", "vision/merger/fc1/"):
        dw = np.asarray(plain[path + "kernel"] - moved.params[path + "kernel"], np.float64)
        a, b = (np.asarray(adapters[path + leaf], np.float64) for leaf in lora.TRAINED)
        for leaf, want in (("lora_a", 2 * dw @ b.swapaxes(-1, -2)), ("lora_b", 2 * a.swapaxes(-1, -2) @ dw)):
            got = np.asarray(adapters[path + leaf] - after.params[path + leaf])
            np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()))


def test_the_optimizer_keeps_moments_of_adapters_only():
    _, adapters, rest = adapted()
    now = state.create(optim.make({"learning_rate": 1e-3}, 5), adapters, rest, key=jax.random.key(0))
    sizes = [x.size for x in jax.tree.leaves(now.opt_state) if x.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in adapters.values())


def test_base_shares_the_arrays():
    params, _, rest = adapted()
    shared = flatten(lora.base(params))
    assert all(shared[path] is x for path, x in rest.items() if "lora" not in path)
    assert set(shared) == set(flatten(tiny.params()))


def test_adapters_lie_on_the_mesh_like_their_kernel_and_change_nothing():
    mesh = sharding.make_mesh(2, 2, 2)
    adapters, scales = lora.init(DESCRIBED, 4, 8.0, EVERY, jax.random.key(0), mesh)
    here, _ = lora.init(DESCRIBED, 4, 8.0, EVERY, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), adapters, here)
    spec = {path: x.sharding.spec for path, x in adapters.items()}
    assert spec["text/layers/mlp/down/lora_a"] == P(None, "tensor", None)
    assert spec["text/layers/mlp/down/lora_b"] == P(None, None, "fsdp")
    trained, rest = lora.abstract(DESCRIBED, 4, EVERY, mesh)
    assert {k: (x.shape, x.sharding) for k, x in trained.items()} == {
        k: (x.shape, x.sharding) for k, x in adapters.items()
    }
    assert {k: x.shape for k, x in rest.items()} == {k: x.shape for k, x in scales.items()}


def test_a_stage_hands_on_merged_weights_onto_any_mesh(tmp_path):
    params, adapters, rest = adapted()
    now = state.create(optim.make({}, 5), adapters, rest, key=jax.random.key(0))
    checkpoint.save(tmp_path, 3, now, {"trainable": list(adapters)})
    want = lora.merge(params)
    for mesh in (None, sharding.make_mesh(2, 2, 2)):
        target = qwen25_vl.abstract(tiny.CONFIG, mesh=mesh)
        got = pretrained.load_parameters(target, tmp_path)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
        if mesh is not None:
            jax.tree.map(lambda x, to: np.testing.assert_equal(x.sharding.is_equivalent_to(to.sharding, x.ndim), True),
                         got, target)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patterns": ("text/head/kernel",)}, "matches no kernel"),
        ({"rank": 99}, "lora rank 99: "),
        ({"rank": 0}, "lora rank 0"),
    ],
)
def test_impossible_adapters_are_one_line(change, words):
    how = {"rank": 4, "patterns": EVERY} | change
    with pytest.raises(ValueError, match=words):
        lora.describe(DESCRIBED, **how)


def test_a_stopped_run_goes_on_with_the_same_numbers_and_the_frozen_weights_untouched(tmp_path):
    _, adapters, rest = adapted(trained=False)
    tx = optim.make({"learning_rate": 1e-2, "ema": 0.5}, 4)
    advance = jax.jit(step.make_sft_step(tiny.CONFIG, encode, tx), donate_argnums=0)
    fresh = lambda: jax.tree.map(jnp.copy, state.create(tx, adapters, rest, key=jax.random.key(0)))  # noqa: E731

    def run(folder, steps):
        pace, meta = loop.Pace(steps, 1, 1), {"trainable": list(adapters)}
        return loop.fit("s", folder, fresh(), lambda number: batch(), advance, pace, meta=meta)[0]

    whole = run(tmp_path / "through", 4)
    run(tmp_path / "stopped", 2)
    again = run(tmp_path / "stopped", 4)
    for got, want in ((again.params, whole.params), (again.opt_state, whole.opt_state), (whole.frozen, rest)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    # what the stage hands on is the average, merged
    average = next(x.average for x in whole.opt_state if isinstance(x, optim.Averaged))
    want = flatten(lora.merge(unflatten(average | rest)))
    folder = tmp_path / "stopped" / "s" / "checkpoints"
    got = flatten(pretrained.load_parameters(qwen25_vl.abstract(tiny.CONFIG), folder))
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, atol=1e-6, err_msg=path)
    assert any(np.abs(average[path] - whole.params[path]).max() > 1e-4 for path in average)


def test_the_exported_folder_holds_the_merged_weights(tmp_path):
    params, adapters, rest = adapted()
    now = state.create(optim.make({}, 5), adapters, rest, key=jax.random.key(0))
    checkpoint.save(tmp_path / "steps", 3, now, {"trainable": list(adapters), "model": weights.hf_config(tiny.CONFIG)})
    asked = [f"--checkpoint={tmp_path / 'steps'}", f"--out={tmp_path / 'out'}", "--dtype=float32"]
    assert export_weights.main(asked) == 0
    got = weights.load(tmp_path / "out", tiny.CONFIG, qwen25_vl.abstract(tiny.CONFIG))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, lora.merge(params))
