"""The small dual encoder of the retriever: questions and events in one space, trained contrastively.

Event side: features of each temporal patch (the vision tower's last hidden state, before the merger) -> pooling by a
few learned queries -> MLP -> unit vector per patch; an event is the renormalised mean of its patches. The event side
never sees the question, so it runs once, at index time. Question side: token embeddings and positions -> one
transformer layer -> pooling by a learned query -> MLP -> unit vector.

Loss: softmax over the events of the question's own video; every needed event is a positive. Parameters are plain
nested dicts; all functions are pure.

Axes: b video (with one question), t temporal patch, n feature of a patch, v feature width, e event, l question token,
d embedding, q pooling query, w hidden width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

EPS = 1e-6  # inside the square root of every norm: a padded (zero) event must not have a NaN gradient
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`features`: width of the tower's features; `vocab`: token ids; `length`: longest question in tokens."""

    features: int
    vocab: int
    length: int = 64
    width: int = 64
    embedding: int = 64
    queries: int = 4
    heads: int = 4

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")


def init(key, sizes: Sizes, dtype=jnp.float32) -> dict:
    """Parameters: {"event": ..., "question": ..., "log_scale": []}; the temperature starts at 0.07."""
    keys = iter(jax.random.split(key, 16))
    w, d = sizes.width, sizes.embedding

    def dense(n_in, n_out):
        return jax.random.normal(next(keys), (n_in, n_out), dtype) * n_in**-0.5

    def mlp(n_in, n_out):
        return {
            "up": dense(n_in, 2 * w),
            "up_bias": jnp.zeros(2 * w, dtype),
            "down": dense(2 * w, n_out),
            "down_bias": jnp.zeros(n_out, dtype),
        }

    event = {
        "project": dense(sizes.features, w),
        "score": dense(sizes.features, sizes.queries),
        "mlp": mlp(sizes.queries * w, d),
    }
    question = {
        "token": jax.random.normal(next(keys), (sizes.vocab, w), dtype),
        "position": jax.random.normal(next(keys), (sizes.length, w), dtype) * 0.1,
        "qkv": dense(w, 3 * w).reshape(w, 3, sizes.heads, w // sizes.heads),
        "out": dense(w, w).reshape(sizes.heads, w // sizes.heads, w),
        "mlp": mlp(w, w),
        "score": dense(w, sizes.queries),
        "head": mlp(sizes.queries * w, d),
    }
    return {"event": event, "question": question, "log_scale": jnp.asarray(jnp.log(1 / 0.07), dtype)}


def unit(x):
    """x / |x| along the last axis, with a finite gradient at 0."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)


def embed_patches(params, feat_nv) -> jax.Array:
    """Unit vectors float32 [..., D] from tower features [..., n, V], each temporal patch on its own."""
    p = params["event"]
    feat_nv = _normalise(feat_nv)
    pooled_qw = _pool(feat_nv @ p["score"], feat_nv, None) @ p["project"]
    return unit(_mlp(p["mlp"], _flat(pooled_qw)))


def pool_events(emb_btd, mask_bt, event_bt, num_events: int):
    """Mean of the unit vectors of each event's patches, renormalised.

    Args:
      emb_btd: [B, T, D] from `embed_patches`; mask_bt: bool [B, T]; event_bt: int32 [B, T], ids 0..num_events-1.

    Returns:
      emb_bed [B, E, D] (zero where the event is empty), mask_be bool [B, E].
    """
    member_bet = (event_bt[:, None, :] == jnp.arange(num_events)[None, :, None]) & mask_bt[:, None, :]
    emb_btd = jnp.where(mask_bt[:, :, None], emb_btd, 0)
    count_be = jnp.sum(member_bet, axis=2)
    total_bed = jnp.einsum("bet,btd->bed", member_bet.astype(emb_btd.dtype), emb_btd)
    return unit(total_bed / jnp.maximum(count_be, 1)[:, :, None]), count_be > 0


def embed_events(params, feat_btnv, mask_bt, event_bt, num_events: int):
    """Event embeddings [B, E, D] and their mask [B, E] from tower features [B, T, n, V]; see `pool_events`."""
    feat_btnv = jnp.where(mask_bt[:, :, None, None], feat_btnv, 0)
    return pool_events(embed_patches(params, feat_btnv), mask_bt, event_bt, num_events)


def embed_questions(params, tokens_bl, mask_bl) -> jax.Array:
    """Unit vectors float32 [B, D] of questions: int32 token ids [B, L] with mask [B, L], L <= Sizes.length."""
    p = params["question"]
    length = tokens_bl.shape[1]
    if length > p["position"].shape[0]:
        raise ValueError(f"questions of {length} tokens, but the embedder was made for {p['position'].shape[0]}")
    x_blw = p["token"][tokens_bl].astype(jnp.float32) + p["position"][:length]
    q, k, v = jnp.einsum("blw,wchk->cblhk", _normalise(x_blw), p["qkv"])
    score_bhlm = jnp.einsum("blhk,bmhk->bhlm", q, k) * q.shape[-1] ** -0.5
    weight_bhlm = jax.nn.softmax(jnp.where(mask_bl[:, None, None, :], score_bhlm, -1e9), axis=-1)
    x_blw += jnp.einsum("bhlm,bmhk,hkw->blw", weight_bhlm, v, p["out"])
    x_blw += _mlp(p["mlp"], _normalise(x_blw))
    x_blw = _normalise(x_blw)
    return unit(_mlp(p["head"], _flat(_pool(x_blw @ p["score"], x_blw, mask_bl))))


def loss(params, query_bd, event_emb_bed, event_mask_be, needed_be, *, in_batch: float = 0.0, apart_bc=None):
    """Contrastive loss: (sum over questions, number of questions, logits [B, E]).

    Own-video term: cross-entropy between softmax_e(s <q, e>) and the uniform distribution on the needed events, so that
    a question over several events pulls all of them. In-batch term (weight `in_batch`): symmetric InfoNCE (CLIP,
    arXiv 2103.00020) of questions against the mean of their needed events; keep it small where different videos
    may hold the same content (false negatives), or say with `apart_bc`, bool [B, B], whose events are negatives of
    whose question. Questions without a needed event do not count.
    """
    scale = jnp.minimum(jnp.exp(params["log_scale"].astype(jnp.float32)), MAX_SCALE)
    needed_be = needed_be & event_mask_be
    count_b = jnp.sum(needed_be, axis=1)
    ok_b = count_b > 0
    logit_be = jnp.where(event_mask_be, scale * jnp.einsum("bd,bed->be", query_bd, event_emb_bed), -1e9)
    target_be = needed_be / jnp.maximum(count_b, 1)[:, None]
    loss_b = -jnp.sum(jnp.where(needed_be, jax.nn.log_softmax(logit_be, axis=1), 0) * target_be, axis=1)
    if in_batch:
        answer_bd = unit(jnp.einsum("be,bed->bd", target_be, event_emb_bed))
        told_bc = ok_b[None, :] & ok_b[:, None]
        if apart_bc is not None:
            told_bc &= apart_bc | jnp.eye(len(apart_bc), dtype=bool)
        cross_bc = jnp.where(told_bc, scale * query_bd @ answer_bd.T, -1e9)
        both_b = jnp.diagonal(jax.nn.log_softmax(cross_bc, axis=1) + jax.nn.log_softmax(cross_bc, axis=0))
        loss_b -= in_batch * 0.5 * both_b
    return jnp.sum(jnp.where(ok_b, loss_b, 0)), jnp.sum(ok_b), logit_be


def recall(ids_bk, valid_bk, needed_be):
    """Of the needed events, what was retrieved: (all_b bool: every needed event is there, share_b float32).

    For a question about one event all_b is recall@k; for several it is the strict form. Questions that need nothing
    give True and 1.
    """
    found_be = jnp.any((ids_bk[:, :, None] == jnp.arange(needed_be.shape[1])) & valid_bk[:, :, None], axis=1)
    count_b = jnp.sum(needed_be, axis=1)
    hits_b = jnp.sum(found_be & needed_be, axis=1)
    return hits_b == count_b, jnp.where(count_b > 0, hits_b / jnp.maximum(count_b, 1), 1.0)


def _normalise(x):
    """RMS norm without a scale, in float32: features of any size and padded rows are both safe."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)


def _mlp(p, x):
    return jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def _pool(score_nq, value_nw, mask_n):
    """Softmax over n under each query's scores: [..., q, w]."""
    if mask_n is not None:
        score_nq = jnp.where(mask_n[..., None], score_nq, -1e9)
    return jnp.einsum("...nq,...nw->...qw", jax.nn.softmax(score_nq, axis=-2), value_nw)


def _flat(x_qw):
    return x_qw.reshape(*x_qw.shape[:-2], -1)
