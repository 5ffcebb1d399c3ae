"""Stages of kind "cgrpo" and "grpo": rollouts on the device, rewards on the host, advantages and update on the device.

C-GRPO compares the group's accuracy at the student's budget with the teacher's at all tokens, and pays correct answers
for what was kept (`rl.rewards.retention`). "grpo" is the same without a teacher's accuracy: alpha = 0.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax import grades, sharding, stage_settings
from marc_jax import stage_parts as parts
from marc_jax.memory import view as views
from marc_jax.rl import advantages, groups, parity, rewards, rollout, step
from marc_jax.rl.teacher import TeacherCache
from marc_jax.run import Run, embedded


def cgrpo(run: Run, name: str, begun: parts.Begun, view: views.View) -> tuple[Callable, Callable]:
    """(draw, learn) through one view."""
    stage, watch, full = run.config[name], run.watch, run.view(run.config[name].teacher_view)
    how, encode = run.decoding(stage.temperature), parts.encoder(run, view)
    scale, losses = numerics(stage)
    update = step.make_grpo_step(
        run.cfg, encode, begun.tx, how, losses, iterations=stage.iterations, skip=stage.skip_dead,
        micro_batches=stage.micro_batches, **run.binding,
    )  # fmt: skip
    attempt = Attempt(run, name, begun, view, full, how)

    def improve(now, teacher, drawn: groups.Groups):
        gain, values = advantages.group_advantages(drawn.rewards_bg, drawn.bonus_bg, scale)
        gain = gain * drawn.weight_b[:, None]
        if stage.credit:
            gain = gain[..., None] + stage.credit * drawn.credit_bgr
        batch = step.GRPOBatch(drawn.prompt, drawn.visual, drawn.completions, gain)
        if stage.skip_dead:
            batch = groups.without_dead(batch, (gain != 0).reshape(stage.videos, -1).any(1))
        now, more = update(now, batch, parts.teaching(now, teacher) if stage.beta else None)
        count = parts.tokens(drawn.prompt, drawn.completions.mask_bgr)
        told = parts.lengths(drawn.completions, how) | parts.work(count, (1 + bool(stage.beta)) * count)
        return now, values | more | told | {"work/updated": stage.iterations * count}

    improve = parts.jit(improve, begun.first)

    def draw(number: int):
        return parts.prompt_pair(run, name, number, view, full)

    def learn(now, batch):
        drawn, host = attempt(now, batch)
        if stage.refill:
            start = stage.steps + int(now.step) * stage.refill  # no step draws these numbers, and no other refill
            further = (draw(number) for number in range(start, start + stage.refill))
            drawn, more = refilled(drawn, (attempt(now, batch)[0] for batch in further))
            host |= more
        now, values = watch.timed("update", improve, now, begun.teacher, drawn)
        return now, values | host

    return draw, learn


def numerics(stage):
    """(AdvantageConfig, LossConfig) of a stage: its `parity`, with what `loss` and `advantage` say otherwise."""
    given = {key: value for key, value in stage.loss.items() if value is not None}
    scale, losses = parity.parity(stage.parity, kl_coef=stage.beta, **given)
    given = {key: value for key, value in stage.advantage.items() if value is not None}
    scale = dataclasses.replace(scale, scale=stage.scale or scale.scale, **given)
    return scale, dataclasses.replace(losses, count_empty=losses.count_empty and not stage.skip_dead)


class Attempt:
    """(state, batch of `prompt_pair`) -> (Groups, metrics): rollouts, the teacher's accuracy, rewards."""

    def __init__(self, run: Run, name: str, begun: parts.Begun, view: views.View, full: views.View, how):
        self.run, self.stage, self.begun = run, run.config[name], begun
        stage, most = self.stage, run.sizes.event
        encode, encode_full = parts.encoder(run, view), parts.encoder(run, full)
        sample, sample_full = (step.make_sampler(run.cfg, e, how, **run.binding) for e in (encode, encode_full))
        score_full = step.make_scorer(run.cfg, encode_full, how, **run.binding)
        self.grade = grades.Grader(run, name)
        self.keeping = rewards.RetentionConfig(stage.alpha, stage.tau, **stage.retention.to_dict())
        self.bonus = rewards.BonusConfig(
            stage.bonus.length, tuple(stage.bonus.length_range), stage.bonus.temporal, stage.bonus.temporal_factor,
            stage.bonus.correct_above,
        )  # fmt: skip
        self.asks = stage_settings.asks_teacher(stage)

        def look(view, key, bank, index, retriever, queries):
            return views.select(view, index, embedded(view, retriever, queries), bank, most, key)

        def answer(now, prompt, visual, ids_b):
            return sample(now.model, prompt, visual, rollout.rollout_keys(now.key, now.step, ids_b, stage.group))

        def answer_shuffled(now, prompt, visual, ids_b):
            key = jax.random.fold_in(now.key, 2)
            keys = rollout.rollout_keys(key, now.step, ids_b, max(stage.group // 2, 1))
            return sample(now.model, prompt, visual, keys)

        def answer_full(now, teacher, visual, prompt, ids_b):
            # Where the answers are kept on disk they may depend on nothing but the question.
            kept = begun.known is not None
            key, number = (run.config.seed, 0) if kept else (jax.random.fold_in(now.key, 1), now.step)
            keys = rollout.rollout_keys(key, number, ids_b, stage.teacher_group)
            params = now.model if stage.a_full == "current" else parts.teaching(now, teacher)
            return sample_full(params, prompt, visual, keys)

        def credit(now, teacher, visual, prompt, done):
            judged_bgr = score_full(parts.teaching(now, teacher), prompt, visual, done)
            return advantages.token_credit(judged_bgr, done.logp_bgr, done.mask_bgr)

        self._look = jax.jit(lambda *args: look(view, *args))
        self._look_full = jax.jit(lambda *args: look(full, *args))
        self._shuffled = jax.jit(shuffled)
        self._answer, self._answer_full, self._credit = jax.jit(answer), jax.jit(answer_full), jax.jit(credit)
        self._answer_shuffled = jax.jit(answer_shuffled)

    def __call__(self, now, batch) -> tuple[groups.Groups, dict]:
        asked, (own, index, queries, prompt, full_prompt, ids_b) = batch
        run, stage, begun, timed = self.run, self.stage, self.begun, self.run.watch.timed
        bank, teacher_bank = (begun.bank, begun.teacher_bank) if own is None else (own, own)
        chosen = index, run.retriever, queries
        visual = timed("retrieve", self._look, now.step_key, bank, *chosen)
        done = timed("rollout", self._answer, now, prompt, visual, ids_b)

        @functools.cache
        def see_all(current: bool):
            return timed("retrieve", self._look_full, now.step_key, bank if current else teacher_bank, *chosen)

        def ask_teacher():
            return self.ask(now, see_all(stage.a_full == "current"), full_prompt, ids_b, asked)

        graded = timed("reward", self.grade, done, asked)
        host, a_full_b = {"accuracy": graded.accuracy_bg.mean(), **graded.told}, np.full(stage.videos, np.nan)
        if self.asks:
            ids = asked.ids_b.tolist()
            a_full_b = ask_teacher().mean(1) if begun.known is None else known(begun.known, ids, ask_teacher)
        reward_bg, more = self._bonuses(now, bank, chosen, prompt, ids_b, asked, done, graded)
        kept = rewards.retention(graded.accuracy_bg, a_full_b, asked.image_b, self.keeping)
        if self.asks:
            host |= {"teacher_accuracy": a_full_b.mean(), "retention_bonus": kept.bonus_bg.mean()}
            host |= rewards.retention_metrics(kept, reward_bg)
        if run.watch.due:
            numbers = {name: graded.values_bgf[..., f] for f, name in enumerate(graded.names)}
            numbers |= {"retention": kept.bonus_bg, "a_full": a_full_b} if self.asks else {}
            run.watch.completions(grades.rows(asked, graded.texts_bg, **numbers))
        weight_b = rewards.retention_weight(kept.eta_b if stage.weight else np.zeros(stage.videos))
        scored = run.split(reward_bg.astype(np.float32), kept.bonus_bg, weight_b)
        credit_bgr = None
        if stage.credit:
            credit_bgr = timed("teacher", self._credit, now, begun.teacher, see_all(False), full_prompt, done)
        return groups.Groups(prompt, visual, done, *scored, credit_bgr), host | more

    def ask(self, now, seen_full, full_prompt, ids_b, asked) -> np.ndarray:
        """Accuracies [B, G] of the teacher's answers from every token."""
        timed, teacher = self.run.watch.timed, self.begun.teacher
        said = timed("teacher", self._answer_full, now, teacher, seen_full, full_prompt, ids_b)
        return timed("reward", self.grade, said, asked).accuracy_bg

    def precompute(self, batch) -> None:
        """Brings the teacher's accuracy on a batch's questions into the cache."""
        asked, (own, index, queries, _, full_prompt, ids_b) = batch

        def ask_teacher():
            bank, key = self.begun.teacher_bank if own is None else own, jax.random.key(self.run.config.seed)
            seen = self._look_full(key, bank, index, self.run.retriever, queries)
            return self.ask(None, seen, full_prompt, ids_b, asked)

        known(self.begun.known, asked.ids_b.tolist(), ask_teacher)

    def _bonuses(self, now, bank, chosen, prompt, ids_b, asked, done, graded) -> tuple[np.ndarray, dict]:
        """([B, G] rewards with Video-R1's optional bonuses, what is told of them)."""
        reward_bg, told, bonus, timed = graded.reward_bg, {}, self.bonus, self.run.watch.timed
        if bonus.length_bonus:
            paid_bg = rewards.length_bonus(graded.accuracy_bg, sharding.fetch(done.mask_bgr).sum(-1), bonus)
            reward_bg, told["rewards/length_bonus"] = reward_bg + paid_bg, paid_bg.mean()
        if bonus.temporal_bonus:
            index, *others = chosen
            visual = timed("retrieve", self._look, now.step_key, bank, self._shuffled(index, now.step_key), *others)
            said = timed("rollout", self._answer_shuffled, now, prompt, visual, ids_b)
            shuffled_bh = timed("reward", self.grade, said, asked).accuracy_bg
            paid_bg = rewards.temporal_bonus(graded.accuracy_bg, shuffled_bh, asked.image_b, bonus)
            reward_bg = reward_bg + paid_bg
            told |= {"rewards/temporal_bonus": paid_bg.mean(), "shuffled_accuracy": shuffled_bh.mean()}
        return reward_bg, told


def shuffled(index: views.VideoIndex, key: jax.Array) -> views.VideoIndex:
    """The same videos with their temporal patches in another order: what T-GRPO compares with."""
    place_bt = jnp.where(index.mask_bt, jax.random.uniform(key, index.mask_bt.shape), 2.0)
    order_bt = jnp.argsort(place_bt, axis=1)  # real patches are a row's first
    return dataclasses.replace(index, patch_bt=jnp.take_along_axis(index.patch_bt, order_bt, axis=1))


def refilled(drawn: groups.Groups, more) -> tuple[groups.Groups, dict]:
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


def known(cache: TeacherCache, ids: list[int], ask: Callable) -> np.ndarray:
    """a_full [B] from the cache; one batch of the teacher's rollouts where it lacks any."""
    if missing := cache.missing(ids):
        answered = dict(zip(ids, ask(), strict=True))
        cache.add(missing, np.stack([answered[i] for i in missing]))
    return cache.a_full(ids)
