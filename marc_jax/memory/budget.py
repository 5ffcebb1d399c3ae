"""How many patches a video and a question deserve, and how its events share them (compression.md 5).

A patch that looks like the one before it tells nothing new, so an event is worth 1 + sum_t (1 - sim(t, t + 1)) patches:
1 for a still camera, as many as it has where everything changes. A video's budget is the sum over the events that are
read, on a ladder of a few sizes, because each size is a compiled program. Events share a budget by
w = relevance^a complexity^b length^c, one patch after the other to the event with the largest w / (patches + 1)
(D'Hondt): greedy, and so optimal for gains that shrink harmonically with every further patch of an event.

Axes: b video, t temporal patch, p token of a patch, d width, e event, u number of a patch within an event's budget.
"""

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax.memory.compress import adjacent_similarity

LADDER = (64, 128, 256, 512, 1024)  # visual tokens


def event_statistics(vis_btpd, mask_bt, event_bt, num_events: int, tokens_b=None):
    """How long events are and how much happens in them.

    Args:
      vis_btpd: [B, T, P, D] visual tokens; mask_bt bool [B, T]; event_bt int32 [B, T], as for `compress`.
      num_events: E, static; patches of events >= E are left out.
      tokens_b: int [B], real tokens of a patch where videos differ in it; those it is padded with are zeros.

    Returns:
      len_be int32 [B, E], valid patches of each event; change_be float32 [B, E], sum of 1 - sim over neighbouring
      valid patches of the event (0 for a single one), at least 0.
    """
    here_bte = (event_bt[:, :, None] == jnp.arange(num_events)) & mask_bt[:, :, None]
    both_bte = here_bte[:, 1:] & here_bte[:, :-1]
    alike_bt = adjacent_similarity(vis_btpd, mask_bt)  # a mean over all P, and a token of zeros is like nothing
    if tokens_b is not None:
        alike_bt *= (vis_btpd.shape[2] / tokens_b)[:, None]
    change_bt = jnp.maximum(1 - alike_bt, 0)
    return jnp.sum(here_bte, axis=1, dtype=jnp.int32), jnp.sum(jnp.where(both_bte, change_bt[:, :, None], 0), axis=1)


def wanted_patches(len_be, change_be) -> jax.Array:
    """float32 [B]: 1 + change, summed over the events that are there."""
    return jnp.sum(jnp.where(len_be > 0, 1 + change_be, 0), axis=1)


def rung(tokens_b, ladder=LADDER) -> jax.Array:
    """int32 [B]: the smallest size of the ladder that holds tokens_b, the largest if none does."""
    return jnp.asarray(ladder, jnp.int32)[jnp.clip(jnp.searchsorted(jnp.asarray(ladder), tokens_b), 0, len(ladder) - 1)]


def event_weights(len_be, change_be, relevance_be=None, *, a=1.0, b=0.5, c=0.25) -> jax.Array:
    """w_e = relevance^a complexity^b length^c, float32 [B, E], 0 for an event without patches.

    Complexity is the mean change from patch to patch, at least 0.01. `relevance_be` (default 1 for all): the
    probability that the question is about the event, e.g. a softmax of its scores.
    """
    complexity_be = jnp.maximum(change_be / jnp.maximum(len_be - 1, 1), 0.01)
    weight_be = complexity_be**b * jnp.maximum(len_be, 1).astype(jnp.float32) ** c
    if relevance_be is not None:
        weight_be *= relevance_be**a
    return jnp.where(len_be > 0, weight_be, 0.0)


def share(total_b, weight_be, len_be, most: int, *, least: int = 1) -> jax.Array:
    """Divides total_b patches among events; an event gets no more patches than it has, nor more than `most` (static).

    First `least` to every event, the weightier first if there are not enough for all; then each to the event with the
    largest weight / (patches it has + 1), the earlier one on a tie. Returns int32 [B, E], sums to total_b where the
    events have as many.
    """
    b, e = weight_be.shape
    u = jnp.arange(most)
    quotient_beu = weight_be[:, :, None] / (u + 1)
    open_beu = u < len_be[:, :, None]
    turn_beu = jnp.where(open_beu, (u >= least).astype(jnp.int32), 2)
    flat = lambda x: jnp.broadcast_to(x, (b, e, most)).reshape(b, e * most)  # noqa: E731
    event_bn = flat(jnp.arange(e)[None, :, None])
    turn_bn, _, event_bn = lax.sort((flat(turn_beu), -flat(quotient_beu), event_bn), dimension=1, num_keys=2)
    given_bn = (jnp.arange(e * most) < total_b[:, None]) & (turn_bn < 2)
    hit_bne = given_bn[:, :, None] & (event_bn[:, :, None] == jnp.arange(e))
    return jnp.sum(hit_bne, axis=1, dtype=jnp.int32)


def of_patches(budget_be, event_bt) -> jax.Array:
    """int32 [B, T], the budget of the event each patch belongs to, at least 1: `per_event` of `compress`."""
    at_bt = jnp.clip(event_bt, 0, budget_be.shape[1] - 1)
    return jnp.maximum(jnp.take_along_axis(budget_be, at_bt, axis=1), 1)


def telling_tokens(tokens_bkpd, mask_bkp, count) -> jax.Array:
    """Which `count` (an int, or int [B]) tokens to keep where less than whole patches fit: those least like the mean of
    their patch.

    bool [B, K, P], some of mask_bkp; score 1 - cos(token, mean of the patch's unit tokens), the earlier token on a tie;
    all valid tokens if they are not more than `count`.
    """
    b, k, p, _ = tokens_bkpd.shape
    x = lax.stop_gradient(tokens_bkpd).astype(jnp.float32)
    unit = x * lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-30)
    mean = jnp.mean(jnp.where(mask_bkp[..., None], unit, 0), axis=2, keepdims=True)
    mean *= lax.rsqrt(jnp.sum(mean**2, axis=-1, keepdims=True) + 1e-30)
    score_bkp = jnp.where(mask_bkp, 1 - jnp.sum(unit * mean, axis=-1), -jnp.inf)
    order_bn = jnp.argsort(-score_bkp.reshape(b, k * p), axis=1, stable=True)
    rank_bn = jnp.argsort(order_bn, axis=1)
    chosen_bn = rank_bn < jnp.broadcast_to(count, b)[:, None]
    return chosen_bn.reshape(b, k, p) & mask_bkp
