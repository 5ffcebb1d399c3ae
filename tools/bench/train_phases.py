"""A whole C-GRPO step on one GPU, phase by phase: the last row of `tools.bench.train`.

Four questions, each about its own video of 64 frames (32 temporal patches of 22 x 22, in 8 events): vision tower,
compression to one temporal patch (121 tokens of a prompt of 243), G = 8 rollouts of 256 tokens, rewards on the host,
reference log-probabilities, and the update. The teacher's accuracies come from the cache. The policy is on the rollouts
when it is updated, so old log-probabilities need no pass of their own.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax import hardware
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.rl import advantages, answers, loss, parity, rewards, rollout, step
from tools.bench import model as shapes
from tools.bench import profile, train

QUESTIONS, GOAL = 4, 1500.0
PROMPTS = dataclasses.replace(train.SHORT, batch=QUESTIONS)
CASE = train.Case("whole", "whole C-GRPO step, 4 questions", GOAL, PROMPTS, chunk=64)
PATCHES, EVENT = 32, 4  # temporal patches of a video, of an event
VIEW = views.View("all", "merge", keep=1)
PHASES = ("vision", "compress", "rollout", "reward", "score", "update")


def pixels_of(cfg):
    """uint8 [B * S, n, C]: every video's temporal patches."""
    n = CASE.view.grid[0] * CASE.view.grid[1]
    shape = (QUESTIONS * PATCHES, n, cfg.vision.patch_dim)
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, shape, np.uint8))


def visual_of(features_snc) -> views.Visual:
    """Every video whole, cut into events of equal length."""
    shape = (QUESTIONS, PATCHES)
    slots = jnp.broadcast_to(jnp.arange(PATCHES), shape)
    patches = features_snc.reshape(*shape, *features_snc.shape[1:])
    length = jnp.full(QUESTIONS, PATCHES)
    return views.Visual(patches, jnp.ones(shape, bool), slots // EVENT, slots.astype(jnp.float32), length)


class Phases:
    """The compiled phases, and what lives from step to step: the policy's state and the reference."""

    def __init__(self, cfg, args):
        how, bind = train.sampling(cfg, CASE.new), dict(dtype=jnp.bfloat16, attention=args.attention)
        self.scale, config = parity.parity("videor1", kl_coef=0.02)
        encode = views.make_encode(VIEW, CASE.view.grid, 1.0)
        model = lambda params: qwen25_vl.bind(cfg, params, **bind)  # noqa: E731
        tower = lambda p, x: model(p).vision_features(views.normalise(x), CASE.view.grid)  # noqa: E731
        self.vision = jax.jit(tower)
        self.compress = jax.jit(lambda p, x, prompt: encode(model(p), visual_of(x), prompt))
        self.sample = jax.jit(step.make_sampler(cfg, train.given, how, **bind))
        self.score = jax.jit(step.make_scorer(cfg, train.given, how, chunk=CASE.chunk, **bind))
        self.gains = jax.jit(lambda r, bonus: advantages.group_advantages(r, bonus, self.scale)[0])
        tx = train.optimizer()
        self.update = train.build(cfg, CASE, tx, args.attention, config)
        self.now = train.state_of(cfg, tx, "bfloat16")
        self.reference = jax.tree.map(jnp.copy, self.now.model)
        self.words = np.array([chr(97 + i % 26) for i in range(cfg.text.vocab_size)])  # in place of a tokenizer's
        self.prompt, self.pixels = shapes.prompt_of(cfg, CASE.view), pixels_of(cfg)

    def judge(self, done):
        """Rewards and retention bonus [B, G], on the host, as the stage does: text in, floats out."""
        texts = [["".join(self.words[row]) for row in group] for group in np.asarray(done.tokens_bgr)]
        right_bg = np.array([[answers.accuracy(text, "A", "multiple choice") for text in g] for g in texts], np.float32)
        format_bg = np.array([[float(answers.has_format(text)) for text in g] for g in texts], np.float32)
        kept = rewards.retention(right_bg, np.full(QUESTIONS, 0.75), np.zeros(QUESTIONS, bool))
        spread_bg = np.random.default_rng(0).random(right_bg.shape)  # letters are never right: a group with no spread
        return (right_bg + format_bg + spread_bg).astype(np.float32), kept.bonus_bg.astype(np.float32)

    def step(self, number: int) -> dict[str, float]:
        """One step; milliseconds of each phase, waited for one by one."""
        spent, at = {}, time.perf_counter()

        def lap(name, value):
            nonlocal at
            value = jax.block_until_ready(value)
            spent[name], at = (time.perf_counter() - at) * 1e3, time.perf_counter()
            return value

        params = self.now.model
        features = lap("vision", self.vision(params, self.pixels))
        visual, prompt = lap("compress", self.compress(params, features, self.prompt))
        keys = rollout.rollout_keys(0, number, jnp.arange(QUESTIONS), train.GROUP)
        done = lap("rollout", self.sample(params, prompt, visual, keys))
        gain_bg = lap("reward", self.gains(*self.judge(done)))
        reference = lap("score", self.score(self.reference, prompt, visual, done))
        del params
        batch = step.GRPOBatch(prompt, visual, done, gain_bg, reference)
        self.now, self.metrics = lap("update", self.update(self.now, batch))
        return spent


def run(cfg, args) -> dict:
    """Measures and prints the row."""
    begin = time.perf_counter()
    phases = Phases(cfg, args)
    first = phases.step(0)
    compile_s = time.perf_counter() - begin
    laps = [phases.step(i + 1) for i in range(min(args.repeats, 4))]
    row = {name: statistics.median(lap[name] for lap in laps) for name in PHASES}
    total = statistics.median(sum(lap.values()) for lap in laps)
    met = "yes" if total <= GOAL else "NO"
    gap, peak = float(loss.mean(phases.metrics["sampling/logp_diff"])), hardware.device_peak() or 0
    print(f"{CASE.title:36} {total:8.1f} ms, goal {GOAL:.0f}: {met}; peak {peak / 2**30:.2f} GiB, first step with"
          f" compilation {compile_s:.1f} s, |logp sampled - scored| {gap:.4f}", flush=True)  # fmt: skip
    for name in PHASES:
        print(f"    {name:10} {row[name]:8.1f} ms {row[name] / total:6.1%}   (first call {first[name] / 1e3:5.1f} s)")
    if args.profile:
        print(profile.table(profile.kernels(lambda: phases.step(99) and phases.now.step), 3 * args.profile), flush=True)
    return {"ms": total, "phases": row, "peak_bytes": peak, "logp_gap": gap, "compile_s": compile_s}
