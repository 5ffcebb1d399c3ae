"""A prompt and its group in one forward pass: loss and gradients equal G copies of the prompt, on every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marc_jax import optim, sharding, state
from marc_jax.models import qwen25_vl
from marc_jax.rl import loss, rollout, step
from marc_jax.rl.types import Completions, PromptBatch
from tests.rl import tiny_model as tiny

G, R = 3, 5


@pytest.fixture(scope="module")
def case():
    prompt, vis = tiny.prompts()
    rng = np.random.default_rng(2)
    b = len(vis)
    mask = np.arange(R) < rng.integers(1, R + 1, (b, G, 1))
    tokens = np.where(mask, rng.integers(7, tiny.VOCAB, (b, G, R)), tiny.PAD)
    weight = jnp.asarray(rng.normal(size=(b, G, R)) * mask, jnp.float32)
    done = Completions(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros((b, G, R)))
    return prompt, vis, done, weight


def shared(params, vis, case, **bind):
    prompt, _, done, weight = case
    return (rollout.score(qwen25_vl.bind(tiny.CONFIG, params, **bind), vis, prompt, done) * weight).sum()


def replicated(params, vis, case):
    """Every completion beside its own copy of the prompt, the prompt's padding between them masked."""
    prompt, _, done, weight = case
    b, p = prompt.tokens_bp.shape
    join = lambda a, own: jnp.concatenate([jnp.repeat(a, G, axis=-2), own.reshape(*a.shape[:-2], b * G, R)], -1)  # noqa: E731
    pos = jnp.broadcast_to(prompt.next_pos_b[:, None, None] + jnp.arange(R), (3, b, G, R))
    index = join(prompt.vis_index_bp, jnp.full((b, G, R), -1))
    model = qwen25_vl.bind(tiny.CONFIG, params, attention="xla")
    x = model.embed(join(prompt.tokens_bp, done.tokens_bgr), jnp.repeat(vis, G, axis=0), index)
    hidden, _ = model.prefill(x, join(prompt.pos_3bp, pos), join(prompt.mask_bp, done.mask_bgr))
    last = jnp.repeat(prompt.mask_bp.sum(1) - 1, G)
    at = jnp.concatenate([last[:, None], jnp.broadcast_to(p + jnp.arange(R - 1), (b * G, R - 1))], axis=1)
    logp = jax.nn.log_softmax(model.logits(jnp.take_along_axis(hidden, at[..., None], axis=1)))
    targets = done.tokens_bgr.reshape(b * G, R, 1)
    return (jnp.take_along_axis(logp, targets, axis=-1)[..., 0] * weight.reshape(b * G, R)).sum()


@pytest.fixture(scope="module")
def wanted(case):
    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(lambda p, v: replicated(p, v, case), (0, 1)))(tiny.params(), case[1])


def close(got, wanted):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=2e-5 * (1 + np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
        ), got, wanted,
    )  # fmt: skip


@pytest.mark.parametrize("remat", [False, True, "attention", "products"])
def test_loss_and_gradients_equal_the_replicated_prompt(case, wanted, remat):
    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.value_and_grad(lambda p, v: shared(p, v, case, remat=remat), (0, 1)))
        close(run(tiny.params(), case[1]), wanted)


def test_the_cudnn_layout_gives_the_same(case, wanted, plain_cudnn):
    """What is handed to the kernel, computed by jax's plain implementation of the same call."""
    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.value_and_grad(lambda p, v: shared(p, v, case, attention="cudnn"), (0, 1)))
        close(run(tiny.params(), case[1]), wanted)
    assert plain_cudnn and all(q[1] % 64 == k[1] % 64 == 0 for q, k in plain_cudnn)


def test_an_unknown_remat_policy_is_an_error(case):
    with pytest.raises(ValueError, match="remat='all': choose True, False or one of layer, attention, products"):
        shared(tiny.params(), case[1], case, remat="all")


def test_the_update_lowers_for_a_gpu_without_scores(lowered_cudnn):
    """Flash kernels for prompt and suffixes, forward once, and no [.., queries, keys] array of floats anywhere."""
    b, p, g, r = 2, 192, 4, 128
    cfg = qwen25_vl.tiny(vocab_size=352, hidden_size=128, num_heads=2, num_kv_heads=1)
    tx = optim.make(optim.Config(), 10)
    trainable, frozen = optim.partition(qwen25_vl.abstract(cfg, jnp.bfloat16), ("text/.*",))
    how = rollout.Sampling(r, (2,), 0)
    run = step.make_grpo_step(
        cfg, lambda model, visual, prompt: (visual, prompt), tx, how, loss.LossConfig(kl_coef=0.0),
        dtype=jnp.bfloat16, attention="cudnn", remat="attention",
    )
    shape = lambda *size, d=jnp.int32: jax.ShapeDtypeStruct(size, d)  # noqa: E731
    prompt = PromptBatch(shape(b, p), shape(b, p, d=bool), shape(3, b, p), shape(b, p), shape(b))
    done = Completions(shape(b, g, r), shape(b, g, r, d=bool), shape(b, g, r, d=jnp.float32))
    batch = step.GRPOBatch(prompt, shape(b, 96, 128, d=jnp.bfloat16), done, shape(b, g, d=jnp.float32))
    traced = jax.jit(run).trace(state.abstract(tx, trainable, frozen), batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {kind: text.count(f"@__cudnn$fmha{kind}(") for kind in ("Softmax", "ScaleBiasSoftmax")} == {
        "Softmax": 1, "ScaleBiasSoftmax": 1,
    }
    assert text.count("SoftmaxBackward(") == 2
    assert f"{r}x{p + r}xf32" not in text and f"{p}x{p}xf32" not in text


def test_an_update_over_two_devices_equals_that_of_one(plain_cudnn):
    """A whole update in bfloat16 and the rollout before it, weights and questions over fsdp, with the cudnn backend."""
    b = 4
    prompt, vis = tiny.prompts(b=b)
    tx, how = optax.sgd(0.1), rollout.Sampling(R, tiny.STOPS, tiny.PAD, banned_ids=tiny.BANNED)
    keys = rollout.rollout_keys(0, 0, jnp.arange(b), G)
    bind = dict(dtype=jnp.bfloat16, attention="cudnn")
    given = lambda model, visual, prompt: (visual, prompt)  # noqa: E731
    draw = jax.jit(step.make_sampler(tiny.CONFIG, given, how, **bind | {"dtype": jnp.float32}))
    config = loss.LossConfig(kl_coef=0.0)
    update = jax.jit(step.make_grpo_step(tiny.CONFIG, given, tx, how, config, remat="attention", **bind))
    gain = jnp.asarray(np.random.default_rng(0).normal(size=(b, G)), jnp.float32)

    def run(devices):
        mesh = sharding.make_mesh(1, devices, 1, jax.devices()[:devices])
        held = sharding.shardings(qwen25_vl.describe(tiny.CONFIG), mesh)
        params = jax.device_put(tiny.params(), held)
        rows = functools.partial(jax.tree.map_with_path, lambda path, x: jax.device_put(
            x, sharding.batch(mesh, int(jax.tree_util.keystr(path).endswith("pos_3bp")))
        ))  # fmt: skip
        with jax.set_mesh(mesh):
            done = draw(params, *rows((prompt, vis, keys)))
            trainable, frozen = optim.partition(params, ("text/.*",))
            first = state.settled(state.create(tx, trainable, frozen, key=jax.random.key(0)), mesh)
            plain_cudnn.clear()
            after, metrics = update(first, rows(step.GRPOBatch(prompt, vis, done, gain)))
        assert {q[0] for q, _ in plain_cudnn} == {b // devices, b * G // devices}
        moved = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.params, dict(trainable))
        return done, moved, metrics

    (done, moved, metrics), (done1, moved1, metrics1) = run(2), run(1)
    np.testing.assert_array_equal(done.tokens_bgr, done1.tokens_bgr)
    for path, mine, plain in ((path, moved[path], moved1[path]) for path in moved1):
        np.testing.assert_allclose(mine, plain, atol=2e-2 * (np.abs(plain).max() + 1e-6), err_msg=str(path))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(*(np.asarray(jax.tree.leaves(m[name])) for m in (metrics, metrics1)), rtol=1e-2)
