"""Training steps as pure functions (state, batch, ...) -> (state, metrics): SFT, C-GRPO, on-policy distillation.

Each `make_*_step` closes over what is static (model configuration, how visual tokens are made, optimizer, numerics);
jit the result. What a model looks at is opaque here: `encode(model, visual, prompt) -> (vis_bnd, prompt)` turns it into
visual tokens, all patches for a teacher, compressed ones for a student, and puts them at their place in the prompt.
Every prompt is prefilled once and shared by its completions; gradients flow through that prefix into the visual tokens.

Losses are (sum, count) over the whole batch: with `micro_batches` = n the batch is cut into n parts along B, sums of
gradients are accumulated by a scan, and one division at the end makes the result independent of n.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marc_jax import optim
from marc_jax.models import qwen25_vl
from marc_jax.rl import logprob, loss, packing, rollout
from marc_jax.rl.loss import LossConfig, Metric
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.types import Completions, PromptBatch
from marc_jax.state import TrainState

Encode = Callable[[Any, Any, PromptBatch], tuple[jax.Array | None, PromptBatch]]
KINDS = (*logprob.DIVERGENCES, "sampled", "text")  # of DistillConfig
Metrics = dict[str, Metric | jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SFTBatch:
    """Prompts with G continuations each; `visual` is what `encode` takes, every leaf with B as its leading axis.

    Several questions about one video share its prompt, cut behind the last visual token: the rest of each question
    then belongs to its continuation and stands in `mask_bgr` but not in `train_bgr`.

    Attributes:
      tokens_bgr: int32 [B, G, R]; the target ends with its stop token.
      mask_bgr: bool [B, G, R]; real tokens.
      train_bgr: bool [B, G, R]; only these tokens are trained on. A row without any is ignored.
    """

    prompt: PromptBatch
    visual: Any
    tokens_bgr: jax.Array
    mask_bgr: jax.Array
    train_bgr: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GRPOBatch:
    """Sampled groups with their advantages (of `advantages.group_advantages`).

    Attributes:
      completions: what the policy sampled; its log-probabilities are the old ones when mu > 1.
      advantages_bg: [B, G], or [B, G, R] for per-token credit.
      ref_logp_bgr: of the reference model; None when the loss has no KL term or the step gets `reference` parameters.
    """

    prompt: PromptBatch
    visual: Any
    completions: Completions
    advantages_bg: jax.Array
    ref_logp_bgr: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillBatch:
    """Completions the student sampled from its own view, and the teacher's view of the same video."""

    prompt: PromptBatch
    visual: Any
    teacher_prompt: PromptBatch
    teacher_visual: Any
    completions: Completions


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What the student minimises along the tokens: its own (on policy), or the teacher's.

    Attributes:
      kind: "reverse" KL(student || teacher), "forward", "jsd" (all over the vocabulary); "sampled": the score function
        of the reverse KL from the log-probabilities of the student's own tokens alone; "text": -log p of the tokens
        themselves, for those of the teacher.
      mix: the weight of "jsd".
      top_k: full vocabulary (0), or the K likeliest tokens and the rest as one.
    """

    kind: str = "reverse"
    mix: float = 0.5
    top_k: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"distill.kind = {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0.0 < self.mix < 1.0:
            raise ValueError(f"distill.mix = {self.mix}: must lie between 0 and 1")


def make_sampler(cfg, encode: Encode, how: Sampling, **bind) -> Callable:
    """(params, prompt, visual, keys_bg) -> Completions. `params` nested; `bind`: dtype, attention, as models.bind."""

    def run(params: dict, prompt: PromptBatch, visual: Any, keys_bg: jax.Array) -> Completions:
        model = qwen25_vl.bind(cfg, params, **bind)
        return rollout.decode(model, rollout.prefill(model, *encode(model, visual, prompt)), keys_bg, how)

    return run


def make_scorer(cfg, encode: Encode, how: Sampling, *, chunk: int | None = None, **bind) -> Callable:
    """(params, prompt, visual, completions) -> float32 [B, G, R]: the log-probabilities under these parameters."""

    def run(params: dict, prompt: PromptBatch, visual: Any, completions: Completions) -> jax.Array:
        return _token_stats(qwen25_vl.bind(cfg, params, **bind), encode, prompt, visual, completions, how, chunk).logp

    return run


def make_sft_step(cfg, encode: Encode, tx: optax.GradientTransformation, *, micro_batches: int = 1,
                  chunk: int | None = None, **bind) -> Callable[[TrainState, SFTBatch], tuple[TrainState, Metrics]]:
    """Maximum likelihood of the targets: mean over all target tokens of -log p(token).

    Args:
      cfg: the model's configuration.
      encode: (model, visual, prompt) -> (visual tokens, prompt).
      tx: the optax chain.
      micro_batches: parts the batch is cut into; must divide B.
      chunk: positions of R whose logits exist at once; None chooses by size.
      **bind: dtype, attention, remat of `models.bind`.

    Returns:
      step(state, batch) -> (state, metrics): loss, mean_token_accuracy, entropy, grad_norm.
    """

    def objective(params, batch: SFTBatch):
        model = qwen25_vl.bind(cfg, params, **bind)
        target = Completions(batch.tokens_bgr, batch.mask_bgr, jnp.zeros(()))
        stats = rollout.token_stats(model, *encode(model, batch.visual, batch.prompt), target, chunk=chunk)
        return _likelihood(stats, batch.train_bgr)

    def step(state: TrainState, batch: SFTBatch) -> tuple[TrainState, Metrics]:
        return _update(state, tx, objective, batch, micro_batches)

    return step


def make_packed_sft_step(cfg, encode: Encode, tx: optax.GradientTransformation, *, segments: int, max_length: int,
                         targets: int, micro_batches: int = 1, chunk: int | None = None, **bind) -> Callable:
    """`make_sft_step` over packed rows: the same batch, with G = 1, gives the same loss and gradients.

    Args:
      cfg, encode, tx, micro_batches, chunk, **bind: as for `make_sft_step`; micro_batches must divide the rows.
      segments: that many prompts of the batch, one after the other, lie in one row; those without a real token are
        left out.
      max_length: tokens of a row, enough for what lies in it.
      targets: most tokens of a row that are trained on.

    Returns:
      step(state, batch) -> (state, metrics): those of `make_sft_step`; packed_fill, real tokens of all of the rows.
    """

    def objective(params, batch: SFTBatch):
        model = qwen25_vl.bind(cfg, params, **bind)
        vis_bnd, prompt = encode(model, batch.visual, batch.prompt)
        following = batch.tokens_bgr, batch.mask_bgr, batch.train_bgr
        rows = packing.lay(prompt, 0 if vis_bnd is None else vis_bnd.shape[1], *following, segments, max_length)
        if vis_bnd is not None:
            vis_bnd = vis_bnd.reshape(len(rows.tokens_bl), -1, vis_bnd.shape[-1])
        pair, metrics = _likelihood(*packing.token_stats(model, vis_bnd, rows, targets, chunk))
        real = (rows.segment_bl > 0).sum()
        return pair, metrics | {"packed_fill": (real, jnp.full_like(real, rows.segment_bl.size))}

    def step(state: TrainState, batch: SFTBatch) -> tuple[TrainState, Metrics]:
        return _update(state, tx, objective, batch, micro_batches)

    return step


def _likelihood(stats: logprob.TokenStats, train) -> tuple[Metric, Metrics]:
    """((-log p of the tokens that are trained on, how many), metrics)."""
    tokens = train.sum()
    logp, hit, entropy = (jnp.where(train, x, 0.0).sum() for x in (stats.logp, stats.hit, stats.entropy))
    return (-logp, tokens), {"mean_token_accuracy": (hit, tokens), "entropy": (entropy, tokens)}


def make_grpo_step(cfg, encode: Encode, tx: optax.GradientTransformation, how: Sampling,
                   config: LossConfig, *, on_policy: bool = True, iterations: int = 1, skip: bool = False,
                   micro_batches: int = 1, chunk: int | None = None, **bind) -> Callable:
    """One step, of one or more policy updates, on sampled groups.

    Args:
      cfg, encode, tx, micro_batches, chunk, **bind: as for `make_sft_step`.
      how: the sampler's settings: log-probabilities are those of the distribution it drew from.
      config: the loss.
      on_policy: True for the first update after sampling (ratio exactly 1); False takes the sampler's
        log-probabilities as the old ones (samples of an older policy).
      iterations: mu, updates on the same samples; those after the first are off policy. They count as one step, and
        their metrics as one.
      skip: micro-batches without a token in their masks cost neither a forward nor a backward pass; needs a `config`
        that does not count empty completions.

    Returns:
      step(state, batch, reference=None) -> (state, metrics); `reference`: nested parameters of the reference model,
      scored inside the step when the batch brings no ref_logp_bgr.
    """

    if skip and config.count_empty:
        raise ValueError("skip=True needs loss.count_empty=False: the loss would count what was skipped")

    def objective(on_policy, params, batch: GRPOBatch, reference=None):
        stats = _token_stats(
            qwen25_vl.bind(cfg, params, **bind), encode, batch.prompt, batch.visual, batch.completions, how, chunk
        )
        ref_bgr = batch.ref_logp_bgr
        if ref_bgr is None and reference is not None:
            ref_bgr = jax.lax.stop_gradient(_token_stats(
                qwen25_vl.bind(cfg, reference, **bind), encode, batch.prompt, batch.visual, batch.completions, how,
                chunk,
            ).logp)
        old_bgr = None if on_policy else batch.completions.logp_bgr
        pair, metrics = loss.policy_loss(
            stats.logp, batch.advantages_bg, batch.completions.mask_bgr, config, old_bgr, ref_bgr
        )
        return pair, metrics | _completion_metrics(batch.completions, stats, how)

    def step(state: TrainState, batch: GRPOBatch, reference: dict | None = None) -> tuple[TrainState, Metrics]:
        def update(state, on_policy):
            used = (lambda part: part.completions.mask_bgr.any()) if skip else None
            chosen = functools.partial(objective, on_policy)
            return _update(state, tx, chosen, batch, micro_batches, reference, used=used)

        after, metrics = update(state, on_policy)
        if iterations > 1:
            after, more = jax.lax.scan(lambda now, _: update(now, False), after, length=iterations - 1)
            metrics = _summed(jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), metrics, more))
        return dataclasses.replace(after, step=state.step + 1), metrics

    return step


def make_distill_step(cfg, encode: Encode, encode_teacher: Encode, tx: optax.GradientTransformation, how: Sampling,
                      config: DistillConfig = DistillConfig(), *, micro_batches: int = 1, chunk: int | None = None,
                      **bind) -> Callable:
    """One distillation update: the teacher, with its full view, judges the completions' tokens.

    Args:
      cfg, encode, tx, how, micro_batches, chunk, **bind: as for `make_grpo_step`.
      encode_teacher: the same for the teacher's view.
      config: the divergence.

    Returns:
      step(state, batch, teacher) -> (state, metrics); `teacher`: nested parameters, frozen. Loss = mean over the
      completions' tokens of the divergence; no reward and no label is needed.
    """

    def objective(params, batch: DistillBatch, teacher):
        done, mask_bgr = batch.completions, batch.completions.mask_bgr
        model, judge = (qwen25_vl.bind(cfg, p, **bind) for p in (params, teacher))
        seen = model, *encode(model, batch.visual, batch.prompt)
        tokens, stats = mask_bgr.sum(), None
        shape = {"temperature": how.score_temperature, "banned_ids": how.banned_ids, "chunk": chunk}
        if config.kind == "text":
            told = rollout.token_stats(*seen, done, **shape)
            metrics = {"entropy": (told.entropy.sum(), tokens), "mean_token_accuracy": (told.hit.sum(), tokens)}
            metrics = jax.lax.stop_gradient(metrics) | _completion_metrics(done, None, how)
            return (-told.logp.sum(), tokens), metrics
        full = judge, *encode_teacher(judge, batch.teacher_visual, batch.teacher_prompt)
        if config.kind == "sampled":
            stats = rollout.token_stats(*seen, done, **shape)
            judged = rollout.token_stats(*full, done, **shape).logp
            gap_bgr = jax.lax.stop_gradient(stats.logp - judged)
            value, spread, kl = (gap_bgr * stats.logp).sum(), stats.entropy, gap_bgr.sum()
        else:
            student_h, teacher_h = (rollout.hidden_states(*who, done.tokens_bgr, mask_bgr) for who in (seen, full))
            kl_bgr, spread = logprob.chunked_divergence(
                student_h, model.head(), teacher_h, judge.head(), kind=config.kind, mix=config.mix,
                top_k=config.top_k, **shape,
            )
            value = kl = jnp.where(mask_bgr, kl_bgr, 0.0).sum()
            spread = jnp.where(mask_bgr, spread, 0.0)
        metrics = {"kl": (kl, tokens), "entropy": (spread.sum(), tokens)}
        return (value, tokens), jax.lax.stop_gradient(metrics) | _completion_metrics(done, stats, how)

    def step(state: TrainState, batch: DistillBatch, teacher: dict) -> tuple[TrainState, Metrics]:
        return _update(state, tx, objective, batch, micro_batches, jax.lax.stop_gradient(teacher))

    return step


def _token_stats(model, encode, prompt, visual, completions, how: Sampling, chunk) -> logprob.TokenStats:
    return rollout.token_stats(
        model, *encode(model, visual, prompt), completions, temperature=how.score_temperature,
        banned_ids=how.banned_ids, chunk=chunk,
    )


def _completion_metrics(completions: Completions, stats: logprob.TokenStats | None, how: Sampling) -> Metrics:
    """Lengths, truncation, and (with stats) entropy and the gap between sampled and scored log-probabilities."""
    mask_bgr = completions.mask_bgr
    rows, tokens = mask_bgr.any(axis=-1).sum(), mask_bgr.sum()
    stopped_bg = (jnp.isin(completions.tokens_bgr, jnp.asarray(how.stop_ids, jnp.int32)) & mask_bgr).any(axis=-1)
    metrics = {
        "completions/mean_length": (tokens, rows),
        "completions/clipped_ratio": ((mask_bgr.any(axis=-1) & ~stopped_bg).sum(), rows),
    }
    if stats is not None:
        gap_bgr = jnp.where(mask_bgr, jnp.abs(stats.logp - completions.logp_bgr), 0.0)
        metrics |= {
            "entropy": (stats.entropy.sum(), tokens),
            "sampling/logp_diff": (gap_bgr.sum(), tokens),
            "sampling/logp_diff_max": gap_bgr.max(),
        }
    return jax.lax.stop_gradient(metrics)


def _summed(stacked: Metrics) -> Metrics:
    """Metrics of several parts, stacked, as one: pairs added, the largest of single numbers."""
    return {k: (v[0].sum(), v[1].sum()) if isinstance(v, tuple) else v.max() for k, v in stacked.items()}


def _update(state: TrainState, tx, objective, batch, micro_batches: int, *others, used: Callable | None = None):
    """Gradient of the objective's sum over the batch, divided by its count, through the optimizer.

    `used`: part of the batch -> whether it adds anything to sums and counts; one that does not is passed over.
    """

    def total(params, part):
        (value, count), metrics = objective(optim.join(params, state.frozen), part, *others)
        return value, {"loss": (value, count), **metrics}

    grad_fn = jax.grad(total, has_aux=True)
    if micro_batches == 1:
        grads, metrics = grad_fn(state.params, batch)
    else:
        parts = split_batch(batch, micro_batches)

        def add(carry, part):
            grads, metrics = grad_fn(state.params, part)
            return jax.tree.map(lambda sum_, g: sum_ + g.astype(jnp.float32), carry, grads), metrics

        def pass_over(carry, part):
            shapes = jax.eval_shape(add, carry, part)[1]
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def visit(carry, part):
            return add(carry, part) if used is None else jax.lax.cond(used(part), add, pass_over, carry, part)

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), state.params)
        grads, stacked = jax.lax.scan(visit, zeros, parts)
        metrics = _summed(stacked)
    count = jnp.maximum(metrics["loss"][1], 1)
    scale = 1 / count.astype(jnp.float32)  # a product fuses into each of the gradient's readers, a quotient does not
    grads = jax.tree.map(lambda g, x: (g * scale).astype(x.dtype), grads, state.params)
    metrics["grad_norm"] = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    return state.apply(tx, grads, metrics["loss"][0] * scale), metrics


def split_batch(batch, n: int):
    """The batch with a new leading axis of n parts: B -> [n, B / n] on every leaf.

    Raises:
      ValueError: n does not divide B.
    """

    def cut(x, axis=0):
        if x.shape[axis] % n:
            raise ValueError(f"micro_batches = {n} does not divide the batch of {x.shape[axis]} prompts")
        x = x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def node(x):
        if isinstance(x, PromptBatch):  # its positions have B on axis 1
            parts = {f.name: cut(getattr(x, f.name), axis=int(f.name == "pos_3bp")) for f in dataclasses.fields(x)}
            return PromptBatch(**parts)
        return cut(x)

    return jax.tree.map(node, batch, is_leaf=lambda x: isinstance(x, PromptBatch))
