"""G completions per prompt, and their log-probabilities, over one shared prefix.

A prompt is prefilled once; its G completions read the same keys and values, when they are sampled and again when
they are scored for the update. Sampling, scoring and training are one graph over the same arrays, so the sampler's
log-probabilities equal the teacher-forced ones up to rounding, and no importance correction is needed on policy.
"""

import dataclasses

import jax
import jax.numpy as jnp

from marc_jax.rl import logprob
from marc_jax.rl.types import Completions, PromptBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """B prefilled prompts.

    Attributes:
      last_bd: hidden state of the last real prompt token; it predicts the first token of every completion.
      cache: keys and values of the prompt, [layers, B, P, kv_heads, head_dim].
      mask_bp: bool [B, P]; [layers, B, P] where layers keep different tokens (`baselines.fastv`).
      next_pos_b: position id of the first generated token.
    """

    last_bd: jax.Array
    cache: object
    mask_bp: jax.Array
    next_pos_b: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Everything is static: one compiled sampler per setting.

    Attributes:
      max_new: tokens per completion, the stop token included.
      temperature: 0 is greedy (log-probabilities are then those at temperature 1).
      top_p: keep the smallest set of tokens with this probability mass; 1 keeps all.
      top_k: keep this many tokens; 0 keeps all.
      stop_ids: any of them ends a completion and stays in it.
      banned_ids: never sampled, and outside the distribution that log-probabilities refer to (vision specials).
      pad_id: fills what follows the stop token.
    """

    max_new: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new < 1:
            raise ValueError(f"sampling.max_new = {self.max_new}: at least one token")
        if self.temperature < 0.0:
            raise ValueError(f"sampling.temperature = {self.temperature}: must not be negative")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p = {self.top_p}: must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k = {self.top_k}: must not be negative")
        if both := sorted(set(self.stop_ids) & set(self.banned_ids)):
            raise ValueError(f"tokens {both} both stop a completion and are banned: it could never stop")

    @property
    def score_temperature(self) -> float:
        """The temperature of the distribution that log-probabilities refer to."""
        return self.temperature or 1.0


def rollout_keys(seed, step, sample_id_b: jax.Array, g: int) -> jax.Array:
    """Typed keys [B, G], a function of (seed, step, sample id, rollout) alone.

    So a rollout is the same whatever else is in the batch, on any mesh, and after a restart.

    Args:
      seed: an int or a typed key.
      step: int32 [] (may be traced).
      sample_id_b: int or uint32 [B]; a stable id of the question, e.g. a CRC of its name.
      g: rollouts per question.
    """
    typed = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    key = jax.random.fold_in(seed if typed else jax.random.key(seed), step)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys_b = fold(key, jnp.asarray(sample_id_b).astype(jnp.uint32))
    return jax.vmap(fold, in_axes=(0, None))(keys_b, jnp.arange(g, dtype=jnp.uint32))


def prefill(model, vis_bnd: jax.Array | None, prompt: PromptBatch) -> Prefix:
    """Runs B prompts through the decoder once; gradients flow through it into the visual tokens."""
    prompt = closed_up(prompt)
    last_bd, cache = model.prefill(*_rows(model, vis_bnd, prompt))
    return Prefix(last_bd, cache, prompt.mask_bp, prompt.next_pos_b)


def _rows(model, vis_bnd: jax.Array | None, prompt: PromptBatch):
    """What the decoder reads of closed-up prompts: input rows, positions, mask, index of the last real token."""
    x_bpd = model.embed(prompt.tokens_bp, vis_bnd, None if vis_bnd is None else prompt.vis_index_bp)
    return x_bpd, prompt.pos_3bp, prompt.mask_bp, jnp.maximum(prompt.mask_bp.sum(axis=1) - 1, 0)


def closed_up(prompt: PromptBatch) -> PromptBatch:
    """The prompts with masked holes moved to the end, order kept: a compressed view may leave visual slots empty.

    Positions travel with their tokens, so nothing else changes; and causal attention needs no key mask any more.
    """
    order_bp = jnp.argsort(~prompt.mask_bp, axis=1, stable=True)

    def move(a):
        return jnp.take_along_axis(a, order_bp, axis=1)

    return PromptBatch(
        move(prompt.tokens_bp), move(prompt.mask_bp), jax.vmap(move)(prompt.pos_3bp), move(prompt.vis_index_bp),
        prompt.next_pos_b,
    )


def filter_logits(logits_v: jax.Array, top_p: float = 1.0, top_k: int = 0) -> jax.Array:
    """-inf outside the top_k tokens, then outside the smallest set whose renormalised mass reaches top_p."""
    if top_k and top_k < logits_v.shape[-1]:
        kth = jax.lax.top_k(logits_v, top_k)[0][..., -1:]
        logits_v = jnp.where(logits_v >= kth, logits_v, -jnp.inf)
    if top_p < 1.0:
        falling = -jnp.sort(-logits_v, axis=-1)
        mass = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(mass, axis=-1) - mass < top_p  # the mass before a token decides; the first always stays
        floor = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
        logits_v = jnp.where(logits_v >= floor, logits_v, -jnp.inf)
    return logits_v


def _draw(logits_bgv: jax.Array, keys_bg: jax.Array, t, how: Sampling) -> tuple[jax.Array, jax.Array]:
    """The t-th token [B, G] and its log-probability, from logits at temperature 1."""
    z = logits_bgv / how.score_temperature
    if how.banned_ids:
        z = z.at[..., jnp.asarray(how.banned_ids)].set(-jnp.inf)
    highest_bg, mode_bg = _mode(z)
    if how.temperature == 0.0:
        token_bg, chosen_bg = mode_bg, highest_bg
    else:
        keys_bg = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, t)))(keys_bg)
        token_bg = jax.vmap(jax.vmap(jax.random.categorical))(keys_bg, filter_logits(z, how.top_p, how.top_k))
        chosen_bg = jnp.take_along_axis(z, token_bg[..., None], axis=-1)[..., 0]
    total_bg = _blocks(jnp.exp(z - highest_bg[..., None])).sum(-1).sum(-1)
    return token_bg.astype(jnp.int32), chosen_bg - highest_bg - jnp.log(total_bg)


def _blocks(z_v: jax.Array) -> jax.Array:
    """[..., V] -> [..., V / 128, 128] where it divides: reduced in two steps, a vocabulary fills a GPU."""
    return z_v.reshape(*z_v.shape[:-1], -1, 128 if z_v.shape[-1] % 128 == 0 else z_v.shape[-1])


def _mode(z_v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest, its index; the first of equals) over the last axis."""
    blocks = _blocks(z_v)
    tops = blocks.max(-1)
    block = tops.argmax(-1)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :].argmax(-1)
    return tops.max(-1), block * blocks.shape[-1] + inside


def decode(model, prefix: Prefix, keys_bg: jax.Array, how: Sampling) -> Completions:
    """Samples G completions for each prefilled prompt; ends when all have stopped.

    Args:
      model: a bound model; its `for_decoding()` form runs the loop.
      prefix: of `prefill`.
      keys_bg: typed keys [B, G], of `rollout_keys`.
      how: the settings.

    Returns:
      Completions with R = how.max_new.
    """
    b, g = keys_bg.shape
    model = model.for_decoding()
    stop_ids = jnp.asarray(how.stop_ids, jnp.int32)

    def place(out, t, token_bg, logp_bg, live_bg):
        rows = (jnp.where(live_bg, token_bg, how.pad_id), live_bg, jnp.where(live_bg, logp_bg, 0.0))
        return tuple(
            jax.lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), t, axis=0)
            for x, row in zip(out, rows, strict=True)
        )

    def body(carry):
        t, token_bg, live_bg, out, cache = carry
        pos_3bg = jnp.broadcast_to((prefix.next_pos_b[:, None] + t - 1)[None], (3, b, g))
        x_bgd = model.embed(token_bg)
        hidden_bgd, cache = model.decode_step(x_bgd, pos_3bg, t - 1, prefix.cache, prefix.mask_bp, cache)
        token_bg, logp_bg = _draw(model.logits(hidden_bgd), keys_bg, t, how)
        out = place(out, t, token_bg, logp_bg, live_bg)
        return t + 1, token_bg, live_bg & ~jnp.isin(token_bg, stop_ids), out, cache

    shape = (how.max_new, b, g)
    out = (jnp.full(shape, how.pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    first_bv = model.logits(prefix.last_bd)
    first_bgv = jnp.broadcast_to(first_bv[:, None], (b, g, first_bv.shape[-1]))
    token_bg, logp_bg = _draw(first_bgv, keys_bg, 0, how)
    out = place(out, 0, token_bg, logp_bg, jnp.ones((b, g), bool))
    if how.max_new > 1:
        cache = model.empty_cache(b, g, how.max_new - 1, prefix.last_bd.dtype)
        carry = (jnp.int32(1), token_bg, ~jnp.isin(token_bg, stop_ids), out, cache)
        out = jax.lax.while_loop(lambda c: (c[0] < how.max_new) & c[2].any(), body, carry)[3]
    tokens, mask, logp = (jnp.moveaxis(x, 0, -1) for x in out)
    return Completions(tokens, mask, logp)


def sample(model, vis_bnd: jax.Array | None, prompt: PromptBatch, keys_bg: jax.Array, *, max_new: int,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, stop_ids: tuple[int, ...],
           banned_ids: tuple[int, ...] = (), pad_id: int) -> Completions:
    """Prefills B prompts and samples G = keys_bg.shape[1] completions of each. See Sampling for the settings."""
    how = Sampling(max_new, tuple(stop_ids), pad_id, temperature, top_p, top_k, tuple(banned_ids))
    return decode(model, prefill(model, vis_bnd, prompt), keys_bg, how)


def hidden_states(model, vis_bnd: jax.Array | None, prompt: PromptBatch, tokens_bgr, mask_bgr) -> jax.Array:
    """Hidden states [B, G, R, D]; the one at r predicts token r. Differentiable, also into the visual tokens.

    A prompt and its G completions are one row of the forward and of the backward pass. The prompt's last hidden state
    predicts token 0, and that of a completion's last token predicts nothing.
    """
    prompt = closed_up(prompt)
    b, g, r = tokens_bgr.shape
    pos_bgr = jnp.broadcast_to(prompt.next_pos_b[:, None, None] + jnp.arange(r), (b, g, r))
    last_bd, hidden = model.prefill_group(
        *_rows(model, vis_bnd, prompt), model.embed(tokens_bgr), jnp.broadcast_to(pos_bgr[None], (3, b, g, r)), mask_bgr
    )
    first = jnp.broadcast_to(last_bd[:, None, None], (b, g, 1, last_bd.shape[-1]))
    return jnp.concatenate([first, hidden[:, :, :-1]], axis=2)


def token_stats(model, vis_bnd: jax.Array | None, prompt: PromptBatch, completions: Completions, *,
                temperature: float = 1.0, banned_ids: tuple[int, ...] = (), chunk: int | None = None,
                ) -> logprob.TokenStats:
    """TokenStats [B, G, R] (log-probability, entropy, hit) of completions; 0 where masked. Differentiable.

    Args:
      model, vis_bnd, prompt: as for `sample`.
      completions: what was sampled.
      temperature, banned_ids: of the distribution; pass the sampler's, so that the numbers are the sampler's.
      chunk: positions per chunk of logits; None chooses by size.
    """
    hidden = hidden_states(model, vis_bnd, prompt, completions.tokens_bgr, completions.mask_bgr)
    # Padding may be a banned token: give it any other target, so that no -inf enters the backward pass.
    allowed = next(i for i in range(len(banned_ids) + 1) if i not in banned_ids)
    targets = jnp.where(completions.mask_bgr, completions.tokens_bgr, allowed)
    stats = logprob.chunked_logprob(
        hidden, model.head(), targets, chunk, temperature=temperature or 1.0, banned_ids=tuple(banned_ids)
    )
    return logprob.TokenStats(*(jnp.where(completions.mask_bgr, x, 0.0) for x in stats))


def score(model, vis_bnd: jax.Array | None, prompt: PromptBatch, completions: Completions, **how) -> jax.Array:
    """Teacher-forced log-probabilities float32 [B, G, R] of `token_stats`."""
    return token_stats(model, vis_bnd, prompt, completions, **how).logp
