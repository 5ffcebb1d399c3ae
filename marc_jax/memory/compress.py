"""Memory-aware temporal compression: many temporal patches become one (or a few).

MARC (arXiv 2510.07915, section 3.2) merges greedily, in two stages: inside each retrieved event down to the event's
budget, then across the concatenation of events down to the total budget. A merge replaces the most similar adjacent
pair by its mean, (H_a + H_b) / 2.

Every merged patch is a linear combination of source patches with disjoint support, so all similarities follow from
the Gram matrices G_p[t, t'] = <h_t^p, h_t'^p> and two numbers per source patch: which slot owns it, and its weight.
The loop therefore never touches features: it costs O(T P) per merge whatever the width, has a fixed trip count and
carries no gradient. The weights are applied by one einsum, through which gradients flow into the tokens.

Axes: b video, t source temporal patch, p token of a patch, d width, k kept patch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

# Similarities are compared on this grid, so that equal pairs (a still camera) tie exactly, whatever the rounding of
# the hardware, and the tie goes to the earliest pair.
SIMILARITY_GRID = 2.0**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """K kept temporal patches of each of B videos, in time order, valid rows first.

    Attributes:
      tokens_bkpd: [B, K, P, D], dtype of the input; zero where masked.
      t_bk: float32 [B, K]; mean source index under the row's weights; 0 where masked.
      size_bk: int32 [B, K]; how many source patches the row stands for (also where it is one of them, "select").
      weights_bkt: float32 [B, K, T]; each valid row sums to 1.
      mask_bk: bool [B, K].
    """

    tokens_bkpd: jax.Array
    t_bk: jax.Array
    size_bk: jax.Array
    weights_bkt: jax.Array
    mask_bk: jax.Array


def merge_weights(
    vis_btpd, mask_bt, event_bt, keep, *, per_event=None, window=None, weighted=False, target_b=None, metric="cosine"
):
    """Which source patches each kept patch averages, and by how much.

    sim(H_a, H_b) = mean_p cos(h_a^p, h_b^p), computed anew for every merged patch. Stage 1 merges the most similar
    adjacent pair that lies in one event, while that event holds more than `per_event` patches; stage 2 merges any
    adjacent pair while more than `keep` patches are left. The earliest pair wins a tie.

    Args:
      vis_btpd: [B, T, P, D] visual tokens; decisions use stop_gradient of them, in float32.
      mask_bt: bool [B, T]; False patches are ignored wherever they stand and whatever they hold.
      event_bt: int32 [B, T]; neighbours with the same number belong to one event.
      keep: patches left in all.
      per_event: patches left in each event by stage 1: an int, an int array [B, T] (the budget of the event a patch
        belongs to), or None to skip stage 1.
      window: stage 1 builds no patch that stands for more than `window` source patches (the paper's short-term
        window m); an event that cannot reach its budget so is left to stage 2. None: no limit.
      weighted: False, the paper's unweighted mean of the two; True, weighted by their sizes, which makes each kept
        patch the plain mean of its sources.
      target_b: optional int32 [B], a budget per video, at most `keep` (a budget that follows the question).
      metric: "cosine", or "dot" for raw dot products (MovieChat's code).

    Returns:
      float32 [B, keep, T]; valid rows sum to 1, have contiguous support among valid patches and come first, in time
      order; the rest is zero.
    """
    owner_bt, share_bt, alive_bt = _merge(
        vis_btpd, mask_bt, event_bt, keep, per_event, window, weighted, target_b, metric
    )
    rank_bt = jnp.cumsum(alive_bt, axis=1) - 1
    row_bt = jnp.take_along_axis(rank_bt, owner_bt, axis=1)
    return _weights(row_bt, share_bt, keep)


def compress(
    vis_btpd, mask_bt, event_bt, keep, *, per_event=None, window=None, weighted=False, target_b=None, t_bt=None,
    represent="mean",
) -> Compressed:  # fmt: skip
    """Two-stage greedy merging of T temporal patches into at most `keep`. Arguments as in `merge_weights`.

    `t_bt` (optional, float [B, T]) is the time index of each source patch, which `t_bk` averages; default 0..T-1.
    `represent`: "mean" of the sources of a kept patch, or "select", the source most like that mean, as it is.
    """
    weights_bkt = merge_weights(
        vis_btpd, mask_bt, event_bt, keep, per_event=per_event, window=window, weighted=weighted, target_b=target_b
    )
    return _represent(vis_btpd, mask_bt, weights_bkt, t_bt, represent)


def compress_per_event(
    vis_btpd, mask_bt, event_bt, keep, *, per_event=None, window=None, weighted=False, t_bt=None, represent="mean"
) -> Compressed:
    """One patch per event: row e is event slot e merged to one patch. `event_bt` counts slots 0..keep-1.

    Slots without a valid patch are masked rows; slots >= keep are dropped. `per_event` and `window` are accepted for
    the common signature and not used: every event ends as one patch.
    """
    del per_event, window
    num_patches = vis_btpd.shape[1]
    _, share_bt, _ = _merge(vis_btpd, mask_bt, event_bt, num_patches, 1, None, weighted, None, "cosine")
    return _represent(vis_btpd, mask_bt, _weights(event_bt, share_bt, keep), t_bt, represent)


def _represent(vis_btpd, mask_bt, weights_bkt, t_bt, represent):
    if represent not in ("mean", "select"):
        raise ValueError(f"represent must be 'mean' or 'select', not {represent!r}")
    mean = apply_weights(vis_btpd, mask_bt, weights_bkt, t_bt)
    if represent == "mean":
        return mean
    chosen_bkt = nearest_sources(vis_btpd, mask_bt, weights_bkt)
    return dataclasses.replace(apply_weights(vis_btpd, mask_bt, chosen_bkt, t_bt), size_bk=mean.size_bk)


def nearest_sources(vis_btpd, mask_bt, weights_bkt) -> jax.Array:
    """One-hot weights [B, K, T]: of each row's sources the one with the largest mean_p cos to the row's mean.

    The earliest of equals (on SIMILARITY_GRID); rows of zeros stay so. Carries no gradient.
    """
    vis_btpd = jnp.where(mask_bt[:, :, None, None], lax.stop_gradient(vis_btpd), 0).astype(jnp.float32)
    unit = lambda x: x * lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-30)  # noqa: E731
    mean_bkpd = unit(jnp.einsum("bkt,btpd->bkpd", weights_bkt, vis_btpd, precision="highest"))
    sim_bkt = jnp.einsum("bkpd,btpd->bkt", mean_bkpd, unit(vis_btpd), precision="highest") / vis_btpd.shape[2]
    sim_bkt = jnp.where(weights_bkt > 0, jnp.round(sim_bkt * SIMILARITY_GRID), -jnp.inf)
    chosen_bkt = jnp.argmax(sim_bkt, axis=2)[:, :, None] == jnp.arange(mask_bt.shape[1])
    return (chosen_bkt & jnp.any(weights_bkt > 0, axis=2, keepdims=True)).astype(jnp.float32)


def apply_weights(vis_btpd, mask_bt, weights_bkt, t_bt=None) -> Compressed:
    """Averages tokens with the given weights [B, K, T]; rows of zeros become masked rows."""
    vis_btpd = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0)
    tokens_bkpd = jnp.einsum(
        "bkt,btpd->bkpd", weights_bkt, vis_btpd, precision="highest", preferred_element_type=jnp.float32
    ).astype(vis_btpd.dtype)
    if t_bt is None:
        t_bt = jnp.broadcast_to(jnp.arange(mask_bt.shape[1], dtype=jnp.float32), mask_bt.shape)
    t_bt = jnp.where(mask_bt, t_bt, 0).astype(jnp.float32)
    size_bk = jnp.sum(weights_bkt > 0, axis=2, dtype=jnp.int32)
    return Compressed(
        tokens_bkpd=tokens_bkpd,
        t_bk=jnp.einsum("bkt,bt->bk", weights_bkt, t_bt, precision="highest"),
        size_bk=size_bk,
        weights_bkt=weights_bkt,
        mask_bk=size_bk > 0,
    )


def adjacent_similarity(vis_btpd, mask_bt) -> jax.Array:
    """mean_p cos between neighbouring patches, float32 [B, T-1]; 0 where either is masked."""
    vis_btpd = jnp.where(mask_bt[:, :, None, None], lax.stop_gradient(vis_btpd), 0).astype(jnp.float32)
    unit = vis_btpd * lax.rsqrt(jnp.sum(vis_btpd**2, axis=-1, keepdims=True) + 1e-30)
    return jnp.mean(jnp.sum(unit[:, :-1] * unit[:, 1:], axis=-1), axis=-1)


def _weights(row_bt, share_bt, keep):
    hit_bkt = row_bt[:, None, :] == jnp.arange(keep)[None, :, None]
    return jnp.where(hit_bkt, share_bt[:, None, :], 0.0)


def _merge(vis_btpd, mask_bt, event_bt, keep, per_event, window, weighted, target_b, metric):
    """Runs the loop. Returns owner [B, T] (slot each source ended in), share [B, T] (its weight there, 0 where
    masked) and alive [B, T] (slots left)."""
    b, t = mask_bt.shape
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    if metric not in ("cosine", "dot"):
        raise ValueError(f"metric must be 'cosine' or 'dot', not {metric!r}")
    vis_btpd = jnp.where(mask_bt[:, :, None, None], lax.stop_gradient(vis_btpd), 0)
    gram_bttp = jnp.einsum("bupd,bvpd->buvp", vis_btpd, vis_btpd, precision="highest",
                           preferred_element_type=jnp.float32)  # fmt: skip
    budget_bt = jnp.broadcast_to(jnp.asarray(t if per_event is None else per_event, jnp.int32), (b, t))
    trips = max(t - (keep if per_event is None and target_b is None else 1), 0)
    target_b = jnp.full((b,), keep) if target_b is None else jnp.clip(target_b, 1, keep)
    one = functools.partial(_merge_one, trips=trips, window=window or t, weighted=weighted, metric=metric)
    return jax.vmap(one)(gram_bttp, mask_bt, event_bt.astype(jnp.int32), budget_bt, target_b.astype(jnp.int32))


def _merge_one(gram_ttp, mask_t, event_t, budget_t, target, *, trips, window, weighted, metric):
    t = mask_t.shape[0]
    slot_t = jnp.arange(t)
    # The next valid patch after each patch; t where there is none.
    after_t = lax.cummin(jnp.where(mask_t, slot_t, t), reverse=True)
    next_t = jnp.concatenate([after_t[1:], jnp.full((1,), t, after_t.dtype)])
    same_tt = (event_t[:, None] == event_t[None, :]) & mask_t[None, :]
    state = dict(
        gram=gram_ttp,
        alive=mask_t,
        next=next_t,
        owner=slot_t,
        share=mask_t.astype(jnp.float32),
        size=mask_t.astype(jnp.int32),
        last_event=event_t,  # event of a slot's last source patch; `event_t` is that of its first
        left=jnp.sum(same_tt, axis=1),  # slots left in the event of each patch
    )

    def step(_, s):
        partner_t = jnp.minimum(s["next"], t - 1)
        paired_t = s["alive"] & (s["next"] < t)
        sim_t = _similarity(s["gram"], partner_t, metric)
        one_event_t = (event_t == s["last_event"]) & (event_t == s["last_event"][partner_t])
        in_window_t = s["size"] + s["size"][partner_t] <= window
        first_t = paired_t & one_event_t & in_window_t & (s["left"] > budget_t)
        any_first = jnp.any(first_t)
        second_t = paired_t & (jnp.sum(s["alive"]) > target) & ~any_first
        open_t = first_t | second_t
        i = jnp.argmax(jnp.where(open_t, sim_t, -jnp.inf))  # the first of equals
        j = partner_t[i]
        return _join(s, i, j, jnp.any(open_t), event_t, weighted)

    state = lax.fori_loop(0, trips, step, state)
    return state["owner"], state["share"], state["alive"]


def _similarity(gram_ttp, partner_t, metric):
    dot_tp = gram_ttp[jnp.arange(len(partner_t)), partner_t]
    if metric == "dot":
        return jnp.mean(dot_tp, axis=1)
    norm_tp = jnp.diagonal(gram_ttp, axis1=0, axis2=1).T
    cos_tp = dot_tp * lax.rsqrt(norm_tp + 1e-30) * lax.rsqrt(norm_tp[partner_t] + 1e-30)
    return jnp.round(jnp.mean(cos_tp, axis=1) * SIMILARITY_GRID)


def _join(s, i, j, go, event_t, weighted):
    """Slot j joins slot i as the mean of the two, weighted by size or not; nothing changes unless `go`."""
    a = s["size"][i] / (s["size"][i] + s["size"][j]) if weighted else jnp.float32(0.5)
    a = jnp.where(go, a, 1.0)
    gram = s["gram"].at[i].set(a * s["gram"][i] + (1 - a) * s["gram"][j])
    gram = gram.at[:, i].set(a * gram[:, i] + (1 - a) * gram[:, j])
    joins_t = go & (s["owner"] == j)
    within = go & (s["last_event"][i] == s["last_event"][j])
    return dict(
        gram=gram,
        alive=s["alive"].at[j].set(s["alive"][j] & ~go),
        next=s["next"].at[i].set(jnp.where(go, s["next"][j], s["next"][i])),
        owner=jnp.where(joins_t, i, s["owner"]),
        share=s["share"] * jnp.where(joins_t, 1 - a, jnp.where(s["owner"] == i, a, 1.0)),
        size=s["size"].at[i].add(jnp.where(go, s["size"][j], 0)),
        last_event=s["last_event"].at[i].set(jnp.where(go, s["last_event"][j], s["last_event"][i])),
        left=s["left"] - (within & (event_t == event_t[i])),
    )
