"""The training stages: each builds a TrainState, a `draw(step) -> batch` and a `step(state, batch)` for `loop.fit`.

    sft         maximum likelihood of templated answers, for the teacher (every patch) or a student (compressed)
    retriever   contrastive question/event embeddings
    distill     on-policy distillation: the student's own tokens, the full-token teacher's distribution; no labels
    cgrpo       C-GRPO: G rollouts from compressed tokens, rewards with the gated retention term, no text labels

Batches are drawn on the host while the device computes; everything random is a function of (seed, stage, step).
"""

import dataclasses
import zlib
from collections.abc import Callable

import jax
import numpy as np
import optax

from marc_jax import optim, sharding, state
from marc_jax.batches import Sizes
from marc_jax.config import ConfigError
from marc_jax.memory import embed, retrieve
from marc_jax.memory import view as views
from marc_jax.rl import advantages, answers, parity, rewards, rollout, step
from marc_jax.rl.types import Completions
from marc_jax.run import Run


def build(run: Run, name: str):
    """(state, draw, step, trainable names) of the stage `config[name]`."""
    stage = run.config[name]
    if stage.kind not in KINDS:
        raise ConfigError(f"config.{name}.kind is {stage.kind!r}; known: {', '.join(KINDS)}")
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if stage.videos % ways:
        raise ConfigError(f"config.{name}.videos = {stage.videos} does not divide over {ways} devices (data x fsdp)")
    if stage.kind != "retriever" and run.view(stage.view).select == "retrieve" and run.retriever is None:
        run.load_retriever()
        run.use_retriever(run.retriever, run.config[run.retriever_stage].init)
    return KINDS[stage.kind](run, name, stage)


def _start(run: Run, name: str, stage):
    """(nested parameters, fresh state, optax chain) of a stage that trains (part of) the model."""
    params = run.parameters(stage.init)
    trainable, frozen = optim.partition(params, tuple(stage.trainable))
    if stage.visual == "features" and any(k.startswith("vision/") and "merger" not in k for k in trainable):
        raise ConfigError(f"config.{name}: visual='features' caches a frozen tower, but trainable includes the tower")
    tx = optim.make(stage.optimizer, stage.steps)
    key = jax.random.key(zlib.crc32(f"{run.config.seed}/{name}".encode()))
    return params, run.settle(state.create(tx, trainable, frozen, key=key)), tx


def _jit(step_fn: Callable, first: state.TrainState) -> Callable:
    """jit whose new state takes the old one's place in memory and on the mesh.

    The old state is used up: nobody may read it after the step. Lying where it does, the new one finds the program of
    the first call at the second.
    """
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, first), None))


def _sizes(run: Run, stage) -> Sizes:
    """Static lengths of the stage's videos: shorter where it draws fewer events."""
    most = min(int(stage.events[1]), run.sizes.events)
    return dataclasses.replace(run.sizes, patches=most * run.sizes.event, events=most)


def _drawn(run: Run, name: str, number: int):
    """The videos and questions of step `number`, from 0."""
    stage = run.config[name]
    per_video = stage.get("questions", 1)
    return run.recomposer.draw(name, number, stage.videos, per_video, stage.events, stage.types)


def samples(run: Run, name: str, number: int) -> dict[str, dict]:
    """{sample id: the files its events come from, its questions} of step `number`, from 0, for a person to look at."""
    asked = _drawn(run, name, number)
    videos = zip(asked.videos.row_be, asked.videos.mask_be, asked.problems_bg, strict=True)
    return {
        str(number): {"videos": [run.file_of(row) for row in rows[mask]], "questions": problems}
        for number, (rows, mask, problems) in zip(asked.ids_b.tolist(), videos, strict=True)
    }


def _encode(run: Run, view: views.View):
    return views.make_encode(view, run.grid_hw, run.time_scale)


def _query(view: views.View, retriever, queries):
    return embed.embed_questions(retriever, *queries) if view.select == "retrieve" else None


def sft(run: Run, name: str, stage):
    """Questions about one video share the prompt up to its last visual token."""
    params, first, tx = _start(run, name, stage)
    view, sizes, bank = run.view(stage.view), _sizes(run, stage), run.bank(stage.visual, params)
    update = step.make_sft_step(run.cfg, _encode(run, view), tx)

    def advance(now, bank, index, retriever, queries, prompt, tokens, mask, train):
        query = _query(view, retriever, queries)
        visual = views.select(view, index, query, bank, sizes.event, now.step_key)
        return update(now, step.SFTBatch(prompt, visual, tokens, mask, train))

    advance = _jit(advance, first)

    def draw(number: int):
        asked = _drawn(run, name, number)
        index = asked.videos.index(sizes)
        kept = view.kept(sizes.patches, sizes.event)
        lengths = index.mask_bt.sum(1)
        split = run.prompter.split(asked.texts_bg, asked.answers_bg, kept, lengths, sizes)
        blind = np.arange(stage.videos) < stage.blind * stage.videos
        index = dataclasses.replace(index, mask_bt=index.mask_bt & ~blind[:, None])
        queries = run.prompter.queries(asked.problems[:: stage.questions], sizes.question)
        return run.split(index, queries, *split)

    def learn(now, batch):
        index, *others = batch
        return advance(now, bank, index, run.retriever, *others)

    return first, draw, learn, tuple(first.params)


def retriever(run: Run, name: str, stage):
    """Softmax over the events of the question's own video, plus in-batch InfoNCE; every needed event is a positive."""
    model = run.parameters(stage.init)
    bank, sizes = run.bank("features", model), _sizes(run, stage)
    params = run.whole(optim.flatten(embed.init(jax.random.key(run.config.seed + 1), run.embed_sizes())))
    tx = optim.make(stage.optimizer, stage.steps)
    first = run.settle(state.create(tx, params, key=jax.random.key(run.config.seed)))

    def advance(now, bank, index, queries, needed_be):
        def objective(flat):
            params = optim.unflatten(flat)
            emb_bed, mask_be = embed.embed_events(
                params, bank[index.patch_bt], index.mask_bt, index.event_bt, sizes.events
            )
            query_bd = embed.embed_questions(params, *queries)
            total, count, _ = embed.loss(params, query_bd, emb_bed, mask_be, needed_be, in_batch=stage.in_batch)
            values = {"loss": (total, count)}
            for k in (1, 3):
                found_b, share_b = embed.recall(*retrieve.topk_events(query_bd, emb_bed, mask_be, k), needed_be)
                values |= {f"recall@{k}": (found_b.sum(), count), f"found@{k}": (share_b.sum(), count)}
            return total / count, values

        grads, values = jax.grad(objective, has_aux=True)(now.params)
        values["grad_norm"] = optax.tree.norm(grads)
        return now.apply(tx, grads, values["loss"][0] / values["loss"][1]), values

    advance = _jit(advance, first)

    def draw(number: int):
        asked = _drawn(run, name, number)
        queries = run.prompter.queries(asked.problems, sizes.question)
        return run.split(asked.videos.index(sizes), queries, asked.needed(sizes.events))

    return first, draw, lambda now, batch: advance(now, bank, *batch), tuple(first.params)


def _two_views(run: Run, stage):
    """Student and teacher: parameters, view, bank and encode of each."""
    teacher = run.parameters(stage.teacher)
    return teacher, run.view(stage.view), run.view(stage.teacher_view), run.bank("features", teacher)


def _prompt_pair(run, stage, name, number, sizes, view, full):
    """The same questions as the student and as the teacher reads them; one question per video."""
    asked = _drawn(run, name, number)
    index = asked.videos.index(sizes)
    queries = run.prompter.queries(asked.problems, sizes.question)
    texts, lengths = [text for row in asked.texts_bg for text in row], index.mask_bt.sum(1)
    prompts = [run.prompter.whole(texts, v.kept(sizes.patches, sizes.event), lengths, sizes) for v in (view, full)]
    return asked, run.split(index, queries, *prompts, asked.ids_b)


def _visuals(view, full, now, banks, index, retriever, queries, max_event: int):
    """What the student and what the teacher looks at, of the same videos."""
    query = _query(view, retriever, queries)
    pairs = zip((view, full), banks, strict=True)
    return [views.select(v, index, query, bank, max_event, now.step_key) for v, bank in pairs]


def distill(run: Run, name: str, stage):
    """Sample from the student, judge along its tokens by the teacher, update; one compiled step."""
    params, first, tx = _start(run, name, stage)
    teacher, view, full, teacher_bank = _two_views(run, stage)
    sizes, bank, how = _sizes(run, stage), run.bank(stage.visual, params), run.decoding(stage.temperature)
    encode, encode_full = _encode(run, view), _encode(run, full)
    sample = step.make_sampler(run.cfg, encode, how)
    update = step.make_distill_step(run.cfg, encode, encode_full, tx, how)

    def advance(now, teacher, banks, index, retriever, queries, prompt, full_prompt, ids_b):
        visual, full_visual = _visuals(view, full, now, banks, index, retriever, queries, sizes.event)
        keys = rollout.rollout_keys(now.key, now.step, ids_b, stage.group)
        done = sample(jax.lax.stop_gradient(now.model), prompt, visual, keys)
        batch = step.DistillBatch(prompt, visual, full_prompt, full_visual, jax.lax.stop_gradient(done))
        return update(now, batch, teacher)

    advance = _jit(advance, first)

    def learn(now, batch):
        _, (index, *others) = batch
        return advance(now, teacher, (bank, teacher_bank), index, run.retriever, *others)

    return first, lambda n: _prompt_pair(run, stage, name, n, sizes, view, full), learn, tuple(first.params)


def cgrpo(run: Run, name: str, stage):
    """Rollouts on the device, rewards on the host (text in, floats out), advantages and update on the device."""
    params, first, tx = _start(run, name, stage)
    teacher, view, full, teacher_bank = _two_views(run, stage)
    sizes, bank, how = _sizes(run, stage), run.bank(stage.visual, params), run.decoding(stage.temperature)
    encode, encode_full = _encode(run, view), _encode(run, full)
    sample, sample_full = (step.make_sampler(run.cfg, e, how) for e in (encode, encode_full))
    scale, losses = parity.parity(stage.parity, kl_coef=stage.beta)
    keeping = rewards.RetentionConfig(alpha=stage.alpha, tau=stage.tau)
    update = step.make_grpo_step(run.cfg, encode, tx, how, losses)

    @jax.jit
    def sample_both(now, teacher, banks, index, retriever, queries, prompt, full_prompt, ids_b):
        visual, full_visual = _visuals(view, full, now, banks, index, retriever, queries, sizes.event)
        keys = rollout.rollout_keys(now.key, now.step, ids_b, stage.group)
        full_keys = rollout.rollout_keys(jax.random.fold_in(now.key, 1), now.step, ids_b, stage.teacher_group)
        done = sample(now.model, prompt, visual, keys)
        return visual, done, sample_full(teacher, full_prompt, full_visual, full_keys)

    def improve(now, teacher, prompt, visual, done, rewards_bg, bonus_bg):
        gain_bg, values = advantages.group_advantages(rewards_bg, bonus_bg, scale)
        now, more = update(now, step.GRPOBatch(prompt, visual, done, gain_bg), teacher)
        return now, values | more

    improve = _jit(improve, first)

    def learn(now, batch):
        asked, (index, queries, prompt, *others) = batch
        banks = (bank, teacher_bank)
        visual, done, full_done = sample_both(now, teacher, banks, index, run.retriever, queries, prompt, *others)
        right_bg, format_bg = judge(run, done, asked)
        a_full_b = judge(run, full_done, asked)[0].mean(1)
        kept = rewards.retention(right_bg, a_full_b, np.zeros(len(a_full_b), bool), keeping)
        now, values = improve(now, teacher, prompt, visual, done, *run.split(right_bg + format_bg, kept.bonus_bg))
        host = {"accuracy": right_bg.mean(), "format": format_bg.mean(), "teacher_accuracy": a_full_b.mean()}
        return now, values | host | {"retention_bonus": kept.bonus_bg.mean()}

    return first, lambda n: _prompt_pair(run, stage, name, n, sizes, view, full), learn, tuple(first.params)


KINDS = {"sft": sft, "retriever": retriever, "distill": distill, "cgrpo": cgrpo}


def judge(run: Run, done: Completions, asked) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy, format) float32 [B, G] of completions about `asked`, one question per video."""
    texts = completion_texts(run, done)
    right = [
        [answers.accuracy(text, row[0].solution, row[0].problem_type) for text in group]
        for group, row in zip(texts, asked.questions_bg, strict=True)
    ]
    fits = [[float(answers.has_format(text)) for text in group] for group in texts]
    return np.array(right, np.float32), np.array(fits, np.float32)


def completion_texts(run: Run, done: Completions) -> list[list[str]]:
    """Decoded text of every completion, special tokens skipped."""
    tokens_bgr, mask_bgr = sharding.fetch((done.tokens_bgr, done.mask_bgr))
    return [
        [run.tokenizer.decode(tokens[mask].tolist()) for tokens, mask in zip(*group, strict=True)]
        for group in zip(tokens_bgr, mask_bgr, strict=True)
    ]
