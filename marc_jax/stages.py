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

from marc_jax import optim, settings, sharding, stage_settings, state
from marc_jax.config import ConfigError
from marc_jax.memory import embed, retrieve
from marc_jax.memory import view as views
from marc_jax.models import lora
from marc_jax.rl import advantages, answers, groups, parity, rewards, rollout, step
from marc_jax.rl.teacher import TeacherCache, weights_hash
from marc_jax.rl.types import Completions
from marc_jax.run import Run, embedded


def build(run: Run, name: str):
    """(state, draw, step, trainable names) of the stage `config[name]`."""
    stage = run.config[name]
    if stage.kind not in KINDS:
        raise ConfigError(f"config.{name}.kind is {stage.kind!r}; known: {', '.join(KINDS)}")
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if stage.videos % ways:
        raise ConfigError(f"config.{name}.videos = {stage.videos} does not divide over {ways} devices (data x fsdp)")
    needed = stage.kind != "retriever" and run.view(stage.view).select == "retrieve" and bool(run.retriever_stage)
    if needed and run.retriever is None:
        run.load_retriever()
        run.use_retriever(run.retriever, run.config[run.retriever_stage].init)
    return KINDS[stage.kind](run, name, stage)


def _start(run: Run, name: str, stage):
    """(nested parameters, fresh state, optax chain) of a stage that trains (part of) the model."""
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
    return params, run.settle(state.create(tx, trainable, frozen, key=key)), tx


def _jit(step_fn: Callable, first: state.TrainState) -> Callable:
    """jit whose new state takes the old one's place in memory and on the mesh.

    The old state is used up: nobody may read it after the step. Lying where it does, the new one finds the program of
    the first call at the second.
    """
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, first), None))


def _drawn(run: Run, name: str, number: int):
    """The videos and questions of step `number`, from 0."""
    stage = run.config[name]
    source, per_video = run.sources[stage.file], stage.get("questions", 1)
    if stage.get("records", 0):
        return source.again(name, number, stage.records, stage.videos, per_video, stage.events, stage.types)
    return source.draw(name, number, stage.videos, per_video, stage.events, stage.types)


def samples(run: Run, name: str, number: int) -> dict[str, dict]:
    """{sample id: the files it is made of, its questions} of step `number`, from 0, for a person to look at."""
    asked = _drawn(run, name, number)
    files = run.sources[run.config[name].file].files(asked)
    rows = zip(asked.ids_b.tolist(), files, asked.problems_bg, strict=True)
    return {str(i): {"videos": files, "questions": problems} for i, files, problems in rows}


def _encode(run: Run, view: views.View):
    return views.make_encode(view, run.grid_hw, run.time_scale)


def sft(run: Run, name: str, stage):
    """Questions about one video share the prompt up to its last visual token."""
    params, first, tx = _start(run, name, stage)
    view, most, bank = run.view(stage.view), run.sizes.event, run.bank(stage.visual, params)
    update = step.make_sft_step(run.cfg, _encode(run, view), tx, micro_batches=stage.micro_batches, **run.binding)

    def advance(now, bank, index, retriever, queries, prompt, tokens, mask, train):
        query = embedded(view, retriever, queries)
        visual = views.select(view, index, query, bank, most, now.step_key)
        return update(now, step.SFTBatch(prompt, visual, tokens, mask, train))

    advance = _jit(advance, first)

    def draw(number: int):
        asked = _drawn(run, name, number)
        index, sizes = asked.index(), asked.sizes
        kept, lengths = view.kept(sizes.patches, most), index.mask_bt.sum(1)
        split = run.prompter.split(asked.texts_bg, asked.answers_bg, kept, lengths, sizes, asked.shapes)
        blind = np.arange(stage.videos) < stage.blind * stage.videos
        index = dataclasses.replace(index, mask_bt=index.mask_bt & ~blind[:, None])
        queries = run.queries(asked, asked.problems[:: stage.questions])
        return run.split(asked.bank, index, queries, *split)

    def learn(now, batch):
        own, index, *others = batch
        return advance(now, bank if own is None else own, index, run.retriever, *others)

    return first, draw, learn, tuple(first.params)


def retriever(run: Run, name: str, stage):
    """Softmax over the events of the question's own video, plus in-batch InfoNCE; every needed event is a positive."""
    model = run.parameters(stage.init)
    bank = run.bank("features", model)
    params = run.whole(optim.flatten(embed.init(jax.random.key(run.config.seed + 1), run.embed_sizes())))
    tx = optim.make(stage.optimizer, stage.steps)
    first = run.settle(state.create(tx, params, key=jax.random.key(run.config.seed)))

    def advance(now, bank, index, queries, needed_be):
        def objective(flat):
            params = optim.unflatten(flat)
            emb_bed, mask_be = embed.embed_events(
                params, bank[index.patch_bt], index.mask_bt, index.event_bt, needed_be.shape[1]
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
        queries = run.prompter.queries(asked.problems, asked.sizes.question)
        return run.split(asked.index(), queries, asked.needed(asked.sizes.events))

    return first, draw, lambda now, batch: advance(now, bank, *batch), tuple(first.params)


def _two_views(run: Run, stage, params: dict):
    """(the teacher's parameters, whether the state holds them too, student's view, teacher's view, teacher's bank).

    Where they are within the state, jitted functions get None in their place, see `_teaching`.
    """
    within = stage_settings.teacher_within(stage)
    teacher = params if within else run.parameters(stage.teacher)
    return teacher, within, run.view(stage.view), run.view(stage.teacher_view), run.bank("features", teacher)


def _teaching(now: state.TrainState, teacher: dict | None) -> dict:
    """The teacher's parameters; None: those beneath the student's adapters."""
    return lora.base(now.model) if teacher is None else teacher


def _prompt_pair(run, name, number, view, full):
    """The same questions as the student and as the teacher reads them; one question per video."""
    asked = _drawn(run, name, number)
    index, sizes = asked.index(), asked.sizes
    texts, lengths = [text for row in asked.texts_bg for text in row], index.mask_bt.sum(1)
    kept = [v.kept(sizes.patches, run.sizes.event) for v in (view, full)]
    prompts = [run.prompter.whole(texts, k, lengths, sizes, asked.shapes) for k in kept]
    return asked, run.split(asked.bank, index, run.queries(asked, asked.problems), *prompts, asked.ids_b)


def distill(run: Run, name: str, stage):
    """Sample from the student, judge along its tokens by the teacher, update; one compiled step."""
    params, first, tx = _start(run, name, stage)
    teacher, within, view, full, teacher_bank = _two_views(run, stage, params)
    most, bank, how = run.sizes.event, run.bank(stage.visual, params), run.decoding(stage.temperature)
    encode, encode_full = _encode(run, view), _encode(run, full)
    sample = step.make_sampler(run.cfg, encode, how, **run.binding)
    update = step.make_distill_step(
        run.cfg, encode, encode_full, tx, how, step.DistillConfig(stage.divergence),
        micro_batches=stage.micro_batches, **run.binding,
    )  # fmt: skip

    def advance(now, teacher, banks, index, retriever, queries, prompt, full_prompt, ids_b):
        query = embedded(view, retriever, queries)
        pairs = zip((view, full), banks, strict=True)
        visual, full_visual = (views.select(v, index, query, bank, most, now.step_key) for v, bank in pairs)
        keys = rollout.rollout_keys(now.key, now.step, ids_b, stage.group)
        done = sample(jax.lax.stop_gradient(now.model), prompt, visual, keys)
        batch = step.DistillBatch(prompt, visual, full_prompt, full_visual, jax.lax.stop_gradient(done))
        return update(now, batch, _teaching(now, teacher))

    advance, teacher = _jit(advance, first), None if within else teacher

    def learn(now, batch):
        _, (own, index, *others) = batch
        banks = (bank, teacher_bank) if own is None else (own, own)
        return advance(now, teacher, banks, index, run.retriever, *others)

    return first, lambda n: _prompt_pair(run, name, n, view, full), learn, tuple(first.params)


def cgrpo(run: Run, name: str, stage):
    """Rollouts on the device, rewards on the host (text in, floats out), advantages and update on the device."""
    params, first, tx = _start(run, name, stage)
    teacher, within, view, full, teacher_bank = _two_views(run, stage, params)
    how, encode = run.decoding(stage.temperature), _encode(run, view)
    scale, losses = parity.parity(stage.parity, kl_coef=stage.beta)
    scale = dataclasses.replace(scale, scale=stage.scale or scale.scale)
    losses = dataclasses.replace(losses, count_empty=losses.count_empty and not stage.skip_dead)
    update = step.make_grpo_step(
        run.cfg, encode, tx, how, losses, iterations=stage.iterations, skip=stage.skip_dead,
        micro_batches=stage.micro_batches, **run.binding,
    )  # fmt: skip
    known = _teacher_cache(run, stage, teacher, how)
    attempt = _attempt(run, stage, (view, full), (run.bank(stage.visual, params), teacher_bank), how, known)

    def improve(now, teacher, drawn: groups.Groups):
        gain, values = advantages.group_advantages(drawn.rewards_bg, drawn.bonus_bg, scale)
        gain = gain * drawn.weight_b[:, None]
        if stage.credit:
            gain = gain[..., None] + stage.credit * drawn.credit_bgr
        batch = step.GRPOBatch(drawn.prompt, drawn.visual, drawn.completions, gain)
        if stage.skip_dead:
            batch = groups.without_dead(batch, (gain != 0).reshape(stage.videos, -1).any(1))
        now, more = update(now, batch, _teaching(now, teacher))
        return now, values | more

    improve, teacher = _jit(improve, first), None if within else teacher

    def learn(now, batch):
        drawn, host = attempt(now, teacher, batch)
        if stage.refill:
            begin = stage.steps + int(now.step) * stage.refill  # no step draws these numbers, and no other refill
            further = (_prompt_pair(run, name, n, view, full) for n in range(begin, begin + stage.refill))
            drawn, more = _refilled(drawn, (attempt(now, teacher, batch)[0] for batch in further))
            host |= more
        now, values = improve(now, teacher, drawn)
        return now, values | host

    return first, lambda n: _prompt_pair(run, name, n, view, full), learn, tuple(first.params)


def _attempt(run: Run, stage, both_views, both_banks, how, known: TeacherCache | None) -> Callable:
    """(state, teacher or None, batch of `_prompt_pair`) -> (Groups, metrics): rollouts, teacher's accuracy, rewards."""
    (view, full), most = both_views, run.sizes.event
    encode, encode_full = _encode(run, view), _encode(run, full)
    sample, sample_full = (step.make_sampler(run.cfg, e, how, **run.binding) for e in (encode, encode_full))
    score_full = step.make_scorer(run.cfg, encode_full, how, **run.binding)
    keeping = rewards.RetentionConfig(alpha=stage.alpha, tau=stage.tau)

    @jax.jit
    def answer(now, bank, index, retriever, queries, prompt, ids_b):
        visual = views.select(view, index, embedded(view, retriever, queries), bank, most, now.step_key)
        return visual, sample(now.model, prompt, visual, rollout.rollout_keys(now.key, now.step, ids_b, stage.group))

    @jax.jit
    def answer_full(now, teacher, bank, index, retriever, queries, prompt, ids_b):
        visual = views.select(full, index, embedded(full, retriever, queries), bank, most, now.step_key)
        # Where the answers are kept on disk they may depend on nothing but the question.
        key, number = (jax.random.fold_in(now.key, 1), now.step) if known is None else (run.config.seed, 0)
        keys = rollout.rollout_keys(key, number, ids_b, stage.teacher_group)
        return sample_full(_teaching(now, teacher), prompt, visual, keys)

    @jax.jit
    def credit(now, teacher, bank, index, retriever, queries, prompt, done):
        visual = views.select(full, index, embedded(full, retriever, queries), bank, most, now.step_key)
        judged_bgr = score_full(_teaching(now, teacher), prompt, visual, done)
        return advantages.token_credit(judged_bgr, done.logp_bgr, done.mask_bgr)

    def attempt(now, teacher, batch):
        asked, (own, index, queries, prompt, full_prompt, ids_b) = batch
        own_bank, full_bank = both_banks if own is None else (own, own)
        visual, done = answer(now, own_bank, index, run.retriever, queries, prompt, ids_b)
        seen_full = full_bank, index, run.retriever, queries, full_prompt
        ask_teacher = lambda: judge(run, answer_full(now, teacher, *seen_full, ids_b), asked)[0]  # noqa: E731
        a_full_b = ask_teacher().mean(1) if known is None else _known(known, asked.ids_b.tolist(), ask_teacher)
        right_bg, format_bg = judge(run, done, asked)
        kept = rewards.retention(right_bg, a_full_b, asked.image_b, keeping)
        weight_b = rewards.retention_weight(kept.eta_b if stage.weight else np.zeros(stage.videos))
        scored = run.split(right_bg + format_bg, kept.bonus_bg, weight_b)
        credit_bgr = credit(now, teacher, *seen_full, done) if stage.credit else None
        host = {"accuracy": right_bg.mean(), "format": format_bg.mean(), "teacher_accuracy": a_full_b.mean()}
        host["retention_bonus"] = kept.bonus_bg.mean()
        return groups.Groups(prompt, visual, done, *scored, credit_bgr), host

    return attempt


def _refilled(drawn: groups.Groups, more) -> tuple[groups.Groups, dict]:
    """The groups with dead ones replaced by live ones of `more` Groups, taken only while there are dead ones."""

    def live(these):
        return ~sharding.fetch(advantages.dead_groups(these.rewards_bg + these.bonus_bg))

    batches, live_b = 1, live(drawn)
    while not live_b.all() and (further := next(more, None)) is not None:
        exchange = jax.jit(groups.exchanged, out_shardings=jax.tree.map(lambda x: x.sharding, drawn))
        drawn = exchange(drawn, further, groups.refill_index(live_b, live(further)))
        batches += 1
        live_b = live(drawn)
    return drawn, {"refill/batches": batches, "refill/dead": 1 - live_b.mean()}


def _teacher_cache(run: Run, stage, teacher: dict, how) -> TeacherCache | None:
    """a_full of questions on file, which come again each epoch; the synthetic set's are never asked twice."""
    if not settings.on_files(run.config):
        return None
    told = dataclasses.asdict(how) | {"group": stage.teacher_group, "seed": run.config.seed}
    told |= {"view": dataclasses.asdict(run.view(stage.teacher_view)), "file": stage.file or run.config.data.train}
    return TeacherCache(run.workdir / "teacher.jsonl", weights_hash(teacher), told)


def _known(known: TeacherCache, ids: list[int], ask: Callable) -> np.ndarray:
    """a_full [B] from the cache; one batch of the teacher's rollouts where it lacks any."""
    if missing := known.missing(ids):
        answered = dict(zip(ids, ask(), strict=True))
        known.add(missing, np.stack([answered[i] for i in missing]))
    return known.a_full(ids)


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
