"""The three training steps: their losses against plain computations, what they leave alone, and micro-batching."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marc_jax import optim, state
from marc_jax.rl import groups, loss, rollout, step
from marc_jax.rl.advantages import group_advantages
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.types import Completions
from tests.rl import tiny_model as tiny

B, G, R = 4, 3, 5
HOW = Sampling(max_new=R, stop_ids=tiny.STOPS, pad_id=tiny.PAD, banned_ids=tiny.BANNED)
TX = optax.sgd(0.1)


def encode(model, features_bnv, prompt):
    """Four features make a visual token: the merger trains, the vision blocks do not take part."""
    return model.merge_features(features_bnv), prompt


@pytest.fixture(scope="module")
def data():
    prompt, _ = tiny.prompts(b=B)
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(size=(B, 16, tiny.CONFIG.vision.hidden_size)), jnp.float32)
    params = tiny.params()
    keys = rollout.rollout_keys(0, 0, jnp.arange(B), G)
    drawn = jax.jit(step.make_sampler(tiny.CONFIG, encode, HOW))(params, prompt, features, keys)
    return {"prompt": prompt, "features": features, "params": params, "drawn": drawn}


@pytest.fixture(scope="module")
def first(data):
    trainable, frozen = optim.partition(data["params"], ("text/.*", "vision/merger/.*"))
    return state.create(TX, trainable, frozen, key=jax.random.key(0))


def sft_batch(data):
    """Two continuations per prompt; the first tokens of some belong to the question and are not trained on."""
    rng = np.random.default_rng(5)
    mask = np.arange(R) < np.array([[5, 2], [0, 5], [4, 3], [3, 1]])[..., None]
    train = mask & (np.arange(R) >= np.array([[2, 0], [0, 3], [1, 3], [0, 0]])[..., None])
    tokens = jnp.asarray(rng.integers(7, 40, (B, 2, R)), jnp.int32)
    return step.SFTBatch(data["prompt"], data["features"], tokens, jnp.asarray(mask), jnp.asarray(train))


def close(one, two, **how):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **how), one, two)


@pytest.fixture(scope="module")
def sft(data, first):
    run = jax.jit(step.make_sft_step(tiny.CONFIG, encode, TX))
    return run, run(first, sft_batch(data))


def test_sft_loss_is_the_mean_over_trained_tokens(data, sft):
    batch, (_, metrics) = sft_batch(data), sft[1]
    vis = step.qwen25_vl.bind(tiny.CONFIG, data["params"]).merge_features(data["features"])
    z = tiny.replicated_logits(data["params"], vis, data["prompt"], batch.tokens_bgr, batch.mask_bgr)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(z)), np.asarray(batch.tokens_bgr)[..., None], -1)
    keep = np.asarray(batch.train_bgr)
    value, count = metrics["loss"]
    assert count == keep.sum() == 14
    np.testing.assert_allclose(value / count, -logp[..., 0][keep].mean(), rtol=1e-5)
    hits = (z.argmax(-1) == np.asarray(batch.tokens_bgr))[keep]
    assert metrics["mean_token_accuracy"][0] == hits.sum()


def test_sft_moves_what_trains_and_leaves_the_rest(first, sft):
    after, _ = sft[1]
    assert after.step == 1 and not any(path.startswith("vision/blocks") for path in after.params)
    close(after.frozen, first.frozen, rtol=0)
    moved = {path for path in after.params if np.abs(after.params[path] - first.params[path]).max() > 0}
    assert any(path.startswith("vision/merger") for path in moved)  # through the prefix cache
    assert "text/embed/embedding" in moved


def test_sft_learns(data, first, sft):
    run, (now, metrics) = sft
    before = float(loss.mean(metrics["loss"]))
    for _ in range(10):
        now, metrics = run(now, sft_batch(data))
    assert float(loss.mean(metrics["loss"])) < 0.7 * before


@pytest.mark.parametrize("parts", [2])
def test_micro_batches_give_the_same_update(data, first, sft, parts):
    run = jax.jit(step.make_sft_step(tiny.CONFIG, encode, TX, micro_batches=parts, chunk=2))
    after, metrics = run(first, sft_batch(data))
    close(after.params, sft[1][0].params, atol=1e-5, rtol=1e-4)
    close(metrics, sft[1][1], atol=1e-4, rtol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(data, first):
    with pytest.raises(ValueError, match="micro_batches = 3 does not divide the batch of 4"):
        step.make_sft_step(tiny.CONFIG, encode, TX, micro_batches=3)(first, sft_batch(data))


def test_the_mesh_changes_nothing(data, first, sft):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec
    batch = sft_batch(data)
    place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(*axes)))  # noqa: E731
    prompt = dataclasses.replace(jax.tree.map(lambda x: x if x.ndim == 3 else place(x, "data"), batch.prompt),
                                 pos_3bp=place(batch.prompt.pos_3bp, None, "data"))
    rest = batch.visual, batch.tokens_bgr, batch.mask_bgr, batch.train_bgr
    spread = step.SFTBatch(prompt, *(place(x, "data") for x in rest))
    after, metrics = sft[0](jax.tree.map(place, first), spread)
    close(metrics, sft[1][1], rtol=1e-4, atol=1e-5)
    close(after.params, sft[1][0].params, atol=1e-5, rtol=1e-4)


def grpo_batch(data, rewards, bonus=0.0, **ref):
    rewards = jnp.asarray(rewards, jnp.float32)
    adv, _ = group_advantages(rewards, jnp.full_like(rewards, bonus))
    return step.GRPOBatch(data["prompt"], data["features"], data["drawn"], adv, **ref)


REWARDS = [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 2.0]]


@pytest.fixture(scope="module")
def grpo(data, first):
    config = loss.LossConfig(kl_coef=0.1)
    run = jax.jit(step.make_grpo_step(tiny.CONFIG, encode, TX, HOW, config))
    return config, run, run(first, grpo_batch(data, REWARDS), tiny.params(seed=1))


@pytest.fixture(scope="module")
def scorer():
    return jax.jit(step.make_scorer(tiny.CONFIG, encode, HOW))


def test_grpo_loss_and_metrics(data, grpo, scorer):
    config, _, (_, metrics) = grpo
    args = data["prompt"], data["features"], data["drawn"]
    logp, ref = scorer(data["params"], *args), scorer(tiny.params(seed=1), *args)
    batch = grpo_batch(data, REWARDS)
    pair, parts = loss.policy_loss(logp, batch.advantages_bg, data["drawn"].mask_bgr, config, None, ref)
    np.testing.assert_allclose(loss.mean(metrics["loss"]), loss.mean(pair), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss.mean(metrics["kl"]), loss.mean(parts["kl"]), rtol=1e-4)
    assert float(metrics["sampling/logp_diff_max"]) < 1e-5
    lengths = np.asarray(data["drawn"].mask_bgr).sum(-1)
    np.testing.assert_allclose(loss.mean(metrics["completions/mean_length"]), lengths.mean())
    assert metrics["clip_ratio/region_mean"][0] == 0


def test_dead_groups_on_the_reference_itself_move_nothing(data, first, grpo):
    after, metrics = grpo[1](first, grpo_batch(data, np.full((B, G), 1.5)), data["params"])
    assert float(metrics["grad_norm"]) < 1e-5 and abs(float(metrics["loss"][0])) < 1e-5
    close(after.params, first.params, atol=1e-6)


def test_grpo_raises_the_probability_of_rewarded_completions(data, first, scorer):
    """mu > 1: several updates on the same samples, with the sampler's log-probabilities as the old ones."""
    tx = optax.sgd(0.02)
    run = jax.jit(step.make_grpo_step(tiny.CONFIG, encode, tx, HOW, loss.LossConfig(kl_coef=0.0), on_policy=False))
    now, batch = dataclasses.replace(first, opt_state=tx.init(first.params)), grpo_batch(data, REWARDS)
    for _ in range(5):
        now, metrics = run(now, batch)
    gain = scorer(now.model, data["prompt"], data["features"], data["drawn"]) - data["drawn"].logp_bgr
    assert float((gain.sum(-1) * batch.advantages_bg).sum()) > 0.1
    assert float(metrics["sampling/logp_diff_max"]) > 1e-3


def test_grpo_micro_batches_with_stored_reference_logprobs(data, first, grpo, scorer):
    config, _, (after, metrics) = grpo
    ref = scorer(tiny.params(seed=1), data["prompt"], data["features"], data["drawn"])
    run = jax.jit(step.make_grpo_step(tiny.CONFIG, encode, TX, HOW, config, micro_batches=2))
    split, split_metrics = run(first, grpo_batch(data, REWARDS, ref_logp_bgr=ref))
    close(split.params, after.params, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(loss.mean(split_metrics["loss"]), loss.mean(metrics["loss"]), rtol=1e-4, atol=1e-6)


def distill_batch(data, teacher_features=None):
    full = data["features"] if teacher_features is None else teacher_features
    return step.DistillBatch(data["prompt"], data["features"], data["prompt"], full, data["drawn"])


@functools.cache
def distill(kind, **options):
    how = step.DistillConfig(kind=kind, **options)
    return jax.jit(step.make_distill_step(tiny.CONFIG, encode, encode, TX, HOW, how))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(data, first):
    after, metrics = distill("reverse")(first, distill_batch(data), data["params"])
    assert abs(float(loss.mean(metrics["loss"]))) < 1e-5
    assert float(metrics["grad_norm"]) < 1e-4


def test_distillation_loss_is_the_mean_kl_over_the_vocabulary_and_falls(data, first):
    run = distill("reverse")
    rng = np.random.default_rng(9)
    full = data["features"] + jnp.asarray(rng.normal(size=data["features"].shape), jnp.float32)
    now, metrics = run(first, distill_batch(data, full), data["params"])

    def logp(features):
        vis = step.qwen25_vl.bind(tiny.CONFIG, data["params"]).merge_features(features)
        drawn = data["drawn"]
        z = tiny.replicated_logits(data["params"], vis, data["prompt"], drawn.tokens_bgr, drawn.mask_bgr)
        z = np.delete(z, tiny.BANNED, axis=-1)
        return np.asarray(jax.nn.log_softmax(z))

    student, teacher = logp(data["features"]), logp(full)
    kl = (np.exp(student) * (student - teacher)).sum(-1)[np.asarray(data["drawn"].mask_bgr)].mean()
    np.testing.assert_allclose(loss.mean(metrics["loss"]), kl, rtol=1e-4)
    for _ in range(10):
        now, metrics = run(now, distill_batch(data, full), data["params"])
    assert float(loss.mean(metrics["loss"])) < 0.7 * kl


def test_sampled_distillation_has_the_gradient_of_the_reverse_kl_in_expectation(data, first):
    """Averaged over all one-token completions, weighted by their probability, the two gradients agree."""
    one = Sampling(max_new=1, stop_ids=(), pad_id=0)
    everything = jnp.broadcast_to(jnp.arange(tiny.VOCAB, dtype=jnp.int32)[None, :, None], (1, tiny.VOCAB, 1))
    prompt = dataclasses.replace(jax.tree.map(lambda x: x[:1], data["prompt"]), pos_3bp=data["prompt"].pos_3bp[:, :1])
    visual, full = data["features"][:1], data["features"][1:2]
    teacher = data["params"]
    logp = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=tiny.VOCAB)))
    reference = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(1).normal(size=tiny.VOCAB)))
    exact = jax.grad(lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - reference)).sum())(logp)
    p, gap = jnp.exp(logp), logp - reference
    sampled = jax.grad(lambda z: (p * gap * jax.nn.log_softmax(z)).sum())(logp)
    np.testing.assert_allclose(sampled, exact, atol=1e-6)
    done = Completions(everything, jnp.ones(everything.shape, bool), jnp.zeros(everything.shape))
    run = step.make_distill_step(tiny.CONFIG, encode, encode, TX, one, step.DistillConfig("sampled"))
    _, metrics = jax.jit(run)(first, step.DistillBatch(prompt, visual, prompt, full, done), teacher)
    assert np.isfinite(metrics["loss"][0]) and metrics["loss"][1] == tiny.VOCAB


@pytest.mark.parametrize(("kind", "options"), [("jsd", {"top_k": 8})])
def test_other_divergences_run(data, first, kind, options):
    after, metrics = distill(kind, **options)(first, distill_batch(data, data["features"][::-1]), data["params"])
    assert float(metrics["loss"][0]) > 0 and np.isfinite(float(metrics["grad_norm"]))


def test_off_policy_the_teachers_text_is_learned_by_maximum_likelihood(data, first):
    """What was sampled from these very parameters has the log-probabilities that its sampler gave."""
    run, drawn = distill("text"), data["drawn"]
    now, metrics = run(first, distill_batch(data), data["params"])
    np.testing.assert_allclose(loss.mean(metrics["loss"]), -drawn.logp_bgr[drawn.mask_bgr].mean(), rtol=1e-4)
    assert "kl" not in metrics and "sampling/logp_diff" not in metrics
    for _ in range(5):
        now, after = run(now, distill_batch(data), data["params"])
    assert loss.mean(after["loss"]) < loss.mean(metrics["loss"])


@pytest.mark.parametrize("bad", [{"kind": "x"}, {"mix": 1.0}])
def test_impossible_distillation_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        step.DistillConfig(**bad)


def test_iterations_are_updates_on_the_same_samples(data, first):
    """mu = 3: on policy, then twice with the sampler's log-probabilities as the old ones; one step in all."""
    config, batch = loss.LossConfig(kl_coef=0.0), grpo_batch(data, REWARDS)
    make = functools.partial(step.make_grpo_step, tiny.CONFIG, encode, TX, HOW, config)
    once, again = jax.jit(make()), jax.jit(make(on_policy=False))
    now, metrics = once(first, batch)
    pairs = [metrics]
    for _ in range(2):
        now, metrics = again(now, batch)
        pairs.append(metrics)
    got, told = jax.jit(make(iterations=3))(first, batch)
    assert got.step == 1 and now.step == 3
    close(got.params, now.params, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(told["loss"][0], sum(m["loss"][0] for m in pairs), rtol=1e-3, atol=1e-4)
    assert told["clip_ratio/region_mean"][1] == 3 * pairs[0]["clip_ratio/region_mean"][1]


def test_micro_batches_of_dead_groups_are_passed_over_and_change_nothing(data, first):
    config = loss.LossConfig(kl_coef=0.1, aggregation="grpo")
    scored = jnp.where(data["drawn"].mask_bgr, data["drawn"].logp_bgr - 0.1, 0.0)
    live = jnp.array([True, False, True, False])
    batch = groups.without_dead(grpo_batch(data, REWARDS, ref_logp_bgr=scored), live)
    run = {
        (n, skip): jax.jit(step.make_grpo_step(tiny.CONFIG, encode, TX, HOW, config, skip=skip, micro_batches=n))
        for n, skip in ((1, False), (4, True))
    }
    (whole, one), (parts, two) = (f(first, batch) for f in run.values())
    close(parts.params, whole.params, atol=1e-5, rtol=1e-4)
    close(two, one, atol=1e-4, rtol=1e-4)
    assert two["completions/mean_length"][1] == 2 * G
    # what a skipped part would compute is not looked at: NaN there does not reach anything
    poisoned = dataclasses.replace(batch, visual=batch.visual.at[2:].set(jnp.nan))
    after, _ = run[(4, True)](first, poisoned)
    close(after.params, parts.params, atol=1e-5, rtol=1e-3)


def test_skipping_needs_a_loss_that_counts_no_empty_completions():
    with pytest.raises(ValueError, match="count_empty"):
        step.make_grpo_step(tiny.CONFIG, encode, TX, HOW, loss.LossConfig(count_empty=True), skip=True)
