"""What the stages share: where a state begins, how a step is compiled, which questions it draws, who judges."""

import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from marc_jax import optim, settings, stage_settings, state
from marc_jax.config import ConfigError
from marc_jax.memory import view as views
from marc_jax.models import lora
from marc_jax.rl import step
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.teacher import TeacherCache, weights_hash
from marc_jax.rl.types import Completions, PromptBatch
from marc_jax.run import Run


@dataclasses.dataclass
class Begun:
    """What a stage begins with, shared by the views it trains through.

    Attributes:
      first: the fresh state.
      tx: the optax chain.
      teacher: nested, frozen parameters; None where they lie beneath the student's adapters, or nobody needs one.
      bank: what the student's views read; None where batches bring their own.
      teacher_bank: what the teacher's view reads.
      known: the teacher's accuracies on disk, or None.
    """

    first: state.TrainState
    tx: optax.GradientTransformation
    bank: jax.Array | None
    teacher: dict | None = None
    teacher_bank: jax.Array | None = None
    known: TeacherCache | None = None


def begin(run: Run, name: str) -> Begun:
    """The start of a stage that trains (part of) the model. Raises ConfigError where its keys do not go together."""
    stage = run.config[name]
    whole = stage_settings.trainable(stage)
    params = run.parameters(stage.init, whole)
    trainable, frozen = optim.partition(params, whole)
    if stage.lora.rank:
        adapters, scales = run.adapters(name, stage.lora)
        trainable, frozen = trainable | adapters, frozen | scales
    if stage.visual == "features" and any(k.startswith("vision/") and "merger" not in k for k in trainable):
        raise ConfigError(f"config.{name}: visual='features' caches a frozen tower, but trainable includes the tower")
    tx = optim.make(stage.optimizer, stage.steps * stage.get("iterations", 1))
    key = jax.random.key(zlib.crc32(f"{run.config.seed}/{name}".encode()))
    begun = Begun(run.settle(state.create(tx, trainable, frozen, key=key)), tx, run.bank(stage.visual, params))
    if not stage_settings.needs_teacher(stage):
        return begun
    within = stage_settings.teacher_within(stage)
    teacher = params if within else run.parameters(stage.teacher)
    begun.teacher, begun.teacher_bank = None if within else teacher, run.bank("features", teacher)
    if stage_settings.asks_teacher(stage) and stage.a_full == "frozen":
        begun.known = teacher_cache(run, stage, teacher)
    return begun


def teacher_cache(run: Run, stage, teacher: dict) -> TeacherCache | None:
    """a_full of questions on file, which come again each epoch; the synthetic set's are never asked twice."""
    if not settings.on_files(run.config):
        return None
    told = dataclasses.asdict(run.decoding(stage.temperature)) | {"group": stage.teacher_group, "seed": run.config.seed}
    told |= {"view": dataclasses.asdict(run.view(stage.teacher_view)), "file": stage.file or run.config.data.train}
    if stage.rewards[0] != "accuracy":
        told |= {"accuracy": stage.rewards[0]}
    return TeacherCache(run.workdir / "teacher.jsonl", weights_hash(teacher), told)


def teaching(now: state.TrainState, teacher: dict | None) -> dict:
    """The teacher's parameters; None: those beneath the student's adapters."""
    return lora.base(now.model) if teacher is None else teacher


def jit(step_fn: Callable, first: state.TrainState) -> Callable:
    """jit whose new state takes the old one's place in memory and on the mesh.

    The old state is used up: nobody may read it after the step. Lying where it does, the new one finds the program of
    the first call at the second.
    """
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, first), None))


def encoder(run: Run, view: views.View) -> step.Encode:
    """How this run's model turns what a view chose into visual tokens."""
    return views.make_encode(view, run.grid_hw, run.time_scale)


def drawn(run: Run, name: str, number: int):
    """The videos and questions of step `number`, from 0."""
    stage = run.config[name]
    source, per_video = run.sources[stage.file], stage.get("questions", 1)
    if stage.get("packing", False):
        return source.draw_packed(name, number, stage.videos, packs(run, name))
    if stage.get("records", 0):
        return source.again(name, number, stage.records, stage.videos, per_video, stage.events, stage.types)
    return source.draw(name, number, stage.videos, per_video, stage.events, stage.types)


def packs(run: Run, name: str):
    """The questions of a stage that packs them, row by row; ConfigError where one is too long for a row."""
    stage = run.config[name]
    views = {view: run.view(view) for view in stage_settings.ladder(stage)}
    return run.sources[stage.file].packs(name, views, stage.max_length, stage.max_segments)


def prompt_pair(run: Run, name: str, number: int, view: views.View, full: views.View):
    """(Asked, (bank or None, index, queries, both prompts, ids)): the same questions as student and teacher read them.

    One question per video.
    """
    asked = drawn(run, name, number)
    return asked, prompts_of(run, asked, view, full)


def prompts_of(run: Run, asked, *through: views.View):
    """(bank or None, index, queries, a PromptBatch for each view, ids) of one question per video, on the device."""
    index, sizes = asked.index(), asked.sizes
    lengths, prompts = index.mask_bt.sum(1), []
    for view in through:
        kept = view.kept(sizes.patches, run.sizes.event)
        texts = [text for row in asked.told_bg(view, kept, run.prompter.tokens_per_patch) for text in row]
        prompts.append(run.prompter.whole(texts, kept, lengths, sizes, asked.shapes))
    return run.split(asked.bank, index, run.queries(asked, asked.problems), *prompts, asked.ids_b)


def tokens(prompt: PromptBatch, mask_bgr: jax.Array) -> jax.Array:
    """Float32 []: real tokens of prompts and their completions, as a step computes them: a prompt once per group."""
    return (prompt.mask_bp.sum() + mask_bgr.sum()).astype(jnp.float32)


def work(updated: jax.Array, forward: jax.Array | float = 0.0) -> dict:
    """Tokens for `watch`: those that gradients come from, and those of forward passes alone."""
    return {"num_tokens": updated, "work/updated": updated, "work/forward": forward}


def lengths(done: Completions, how: Sampling) -> dict:
    """TRL's metrics of completion lengths that need the whole batch; `step` gives mean and clipped ratio."""
    length_bg = done.mask_bgr.sum(-1)
    stopped_bg = (jnp.isin(done.tokens_bgr, jnp.asarray(how.stop_ids)) & done.mask_bgr).any(-1)
    return {
        "completions/min_length": length_bg.min(), "completions/max_length": length_bg.max(),
        "completions/mean_terminated_length": (jnp.where(stopped_bg, length_bg, 0).sum(), stopped_bg.sum()),
    }  # fmt: skip

