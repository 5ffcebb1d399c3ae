"""Stages of kind "distill": the teacher reads every frame, the student a compressed view; no label is needed.

On policy the student samples and the teacher judges along its tokens (reverse KL and the like); off policy the teacher
samples and the student learns its text, or its distribution along it.
"""

from collections.abc import Callable

import jax

from marc_jax import grades
from marc_jax import stage_parts as parts
from marc_jax.memory import view as views
from marc_jax.rl import rollout, step
from marc_jax.run import Run, embedded


def distill(run: Run, name: str, begun: parts.Begun, view: views.View) -> tuple[Callable, Callable]:
    """(draw, learn) through one view: sample, judge along the tokens, update."""
    stage, watch = run.config[name], run.watch
    full, most, how = run.view(stage.teacher_view), run.sizes.event, run.decoding(stage.temperature)
    encode, encode_full = parts.encoder(run, view), parts.encoder(run, full)
    sample = step.make_sampler(run.cfg, encode if stage.on_policy else encode_full, how, **run.binding)
    update = step.make_distill_step(
        run.cfg, encode, encode_full, begun.tx, how, step.DistillConfig(stage.divergence, stage.mix, stage.top_k),
        micro_batches=stage.micro_batches, **run.binding,
    )  # fmt: skip

    @jax.jit
    def look(key, banks, index, retriever, queries):
        query, pairs = embedded(view, retriever, queries), zip((view, full), banks, strict=True)
        return tuple(views.select(v, index, query, bank, most, key) for v, bank in pairs)

    @jax.jit
    def answer(now, teacher, seen, prompts, ids_b):
        keys = rollout.rollout_keys(now.key, now.step, ids_b, stage.group)
        params = now.model if stage.on_policy else parts.teaching(now, teacher)
        which = 0 if stage.on_policy else 1
        return sample(params, prompts[which], seen[which], keys)

    def improve(now, teacher, seen, prompts, done):
        batch = step.DistillBatch(prompts[0], seen[0], prompts[1], seen[1], done)
        now, values = update(now, batch, parts.teaching(now, teacher))
        own, whole = (parts.tokens(prompt, done.mask_bgr) for prompt in prompts)
        judged = whole if stage.divergence != "text" else 0.0
        return now, values | parts.lengths(done, how) | parts.work(own, judged + (own if stage.on_policy else whole))

    improve = parts.jit(improve, begun.first)

    def learn(now, batch):
        asked, (own, index, queries, prompt, full_prompt, ids_b) = batch
        banks = (begun.bank, begun.teacher_bank) if own is None else (own, own)
        seen = watch.timed("retrieve", look, now.step_key, banks, index, run.retriever, queries)
        prompts = prompt, full_prompt
        done = watch.timed("rollout", answer, now, begun.teacher, seen, prompts, ids_b)
        if watch.due:
            watch.completions(grades.rows(asked, grades.completion_texts(run, done)))
        return watch.timed("update", improve, now, begun.teacher, seen, prompts, done)

    return lambda number: parts.prompt_pair(run, name, number, view, full), learn
