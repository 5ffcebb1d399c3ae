"""The training stages: each builds a TrainState, a `draw(step) -> batch` and a `step(state, batch)` for `loop.fit`.

    sft         maximum likelihood of templated answers, for the teacher (every patch) or a student (compressed)
    retriever   contrastive question/event embeddings
    distill     on-policy distillation: the student's own tokens, the full-token teacher's distribution; no labels
    cgrpo       C-GRPO: G rollouts from compressed tokens, rewards with the gated retention term, no text labels
    grpo        the same from every token and without the retention term

Batches are drawn on the host while the device computes; everything random is a function of (seed, stage, step).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from marc_jax import optim, stage_settings, state
from marc_jax import stage_parts as parts
from marc_jax.cgrpo import cgrpo
from marc_jax.config import ConfigError
from marc_jax.distill import distill
from marc_jax.memory import embed, retrieve
from marc_jax.memory import view as views
from marc_jax.rl import step
from marc_jax.run import Run, check_batch, embedded


def build(run: Run, name: str):
    """(state, draw, step, trainable names) of the stage `config[name]`."""
    stage = run.config[name]
    if stage.kind not in KINDS:
        raise ConfigError(f"config.{name}.kind is {stage.kind!r}; known: {', '.join(KINDS)}")
    check_batch(run, name)
    if stage.kind == "retriever":
        return retriever(run, name)
    names = stage_settings.ladder(stage)
    through = [run.view(view) for view in names]
    if any(view.select == "retrieve" for view in through) and run.retriever_stage and run.retriever is None:
        run.load_retriever()
        run.use_retriever(run.retriever, run.config[run.retriever_stage].init)
    begun = parts.begin(run, name)
    rungs = [KINDS[stage.kind](run, name, begun, view) for view in through]

    def draw(number: int):
        """Step n goes through view n of the ladder, and round again."""
        rung = number % len(rungs)
        return rung, rungs[rung][0](number)

    def learn(now, batch):
        rung, batch = batch
        now, values = rungs[rung][1](now, batch)
        # Each budget's loss beside the mean of all, which one line of the log takes together.
        return now, values | ({f"ladder/{names[rung]}/loss": values["loss"]} if len(rungs) > 1 else {})

    return begun.first, draw, learn, tuple(begun.first.params)


def samples(run: Run, name: str, number: int) -> dict[str, dict]:
    """{sample id: the files it is made of, its questions} of step `number`, from 0, for a person to look at."""
    asked = parts.drawn(run, name, number)
    files = run.sources[run.config[name].file].files(asked)
    rows = zip(asked.ids_b.tolist(), files, asked.problems_bg, strict=True)
    return {str(i): {"videos": files, "questions": problems} for i, files, problems in rows}


def sft(run: Run, name: str, begun: parts.Begun, view: views.View) -> tuple[Callable, Callable]:
    """(draw, learn) through one view. Questions about one video share the prompt up to its last visual token.

    With `packing` those of several videos lie end to end in a row; what is drawn is the same, one question per video.
    """
    stage, most, g = run.config[name], run.sizes.event, run.config[name].questions
    make, many = step.make_sft_step, {"micro_batches": stage.micro_batches, **run.binding}
    if stage.packing:
        rows = parts.packs(run, name)
        make = functools.partial(
            step.make_packed_sft_step, segments=rows.segments, max_length=stage.max_length, targets=rows.targets
        )
    update = make(run.cfg, parts.encoder(run, view), begun.tx, **many)

    def advance(now, bank, index, retriever, queries, prompt, tokens, mask, train):
        query = embedded(view, retriever, queries)
        visual = views.select(view, index, query, bank, most, now.step_key)
        now, values = update(now, step.SFTBatch(prompt, visual, tokens, mask, train))
        read = values["packed_fill"][0].astype(jnp.float32) if stage.packing else parts.tokens(prompt, mask)
        return now, values | parts.work(read)

    advance = parts.jit(advance, begun.first)

    def draw(number: int):
        asked = parts.drawn(run, name, number)
        index, sizes = asked.index(), asked.sizes
        kept, lengths = view.kept(sizes.patches, most), index.mask_bt.sum(1)
        texts_bg = asked.told_bg(view, kept, run.prompter.tokens_per_patch)
        # A video with fewer questions repeats its first, which is then masked.
        texts_bg, answers_bg = ([row + row[:1] * (g - len(row)) for row in x] for x in (texts_bg, asked.answers_bg))
        real_bg1 = (np.arange(g) < np.array([[len(row)] for row in asked.questions_bg]))[..., None]
        prompt, tokens, mask, train = run.prompter.split(texts_bg, answers_bg, kept, lengths, sizes, asked.shapes)
        if asked.real_b is not None:
            real_bg1 &= asked.real_b[:, None, None]
            prompt = dataclasses.replace(prompt, mask_bp=prompt.mask_bp & asked.real_b[:, None])
        blind = np.arange(len(lengths)) < stage.blind * len(lengths)
        index = dataclasses.replace(index, mask_bt=index.mask_bt & ~blind[:, None])
        queries = run.queries(asked, [row[0] for row in asked.problems_bg])
        return run.split(asked.bank, index, queries, prompt, tokens, mask & real_bg1, train & real_bg1)

    def learn(now, batch):
        own, index, *others = batch
        bank = begun.bank if own is None else own
        return run.watch.timed("update", advance, now, bank, index, run.retriever, *others)

    return draw, learn


def retriever(run: Run, name: str):
    """Softmax over the events of the question's own video, plus in-batch InfoNCE; every needed event is a positive."""
    stage = run.config[name]
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

    advance = parts.jit(advance, first)

    def draw(number: int):
        asked = parts.drawn(run, name, number)
        queries = run.prompter.queries(asked.problems, asked.sizes.question)
        return run.split(asked.index(), queries, asked.needed(asked.sizes.events))

    return first, draw, lambda now, batch: advance(now, bank, *batch), tuple(first.params)


KINDS = {"sft": sft, "retriever": retriever, "distill": distill, "cgrpo": cgrpo, "grpo": cgrpo}
