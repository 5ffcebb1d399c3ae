"""From hidden states to log-probabilities and divergences without ever holding [B, G, R, vocab] logits.

Positions are cut into chunks along the last (time) axis; a chunk's logits live only while it is scanned, and the
backward pass computes them again (jax.checkpoint). Leading axes stay whole, so their sharding does too.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from marc_jax.sharding import mesh_of

CHUNK_BYTES = 256 * 2**20  # float32 logits alive at once, per device, when the caller does not choose a chunk
DIVERGENCES = ("reverse", "forward", "jsd")


class TokenStats(NamedTuple):
    """About each target token, float32 [..., R]: log-probability; entropy of its distribution; 1 if it is the mode."""

    logp: jax.Array
    entropy: jax.Array
    hit: jax.Array


def logits(hidden: jax.Array, head_dv: jax.Array, temperature: float | jax.Array = 1.0,
           banned_ids: tuple[int, ...] = ()) -> jax.Array:
    """Float32 [..., V] logits over temperature; banned tokens get -inf, so they have no probability at all."""
    z = jnp.einsum("...d,dv->...v", hidden, head_dv.astype(hidden.dtype), preferred_element_type=jnp.float32)
    z = z / jnp.asarray(temperature, jnp.float32)
    if banned_ids:  # compared, not scattered: it stays part of whatever reads the logits
        banned_v = (jnp.arange(z.shape[-1])[:, None] == jnp.asarray(banned_ids)).any(axis=1)
        z = jnp.where(banned_v, -jnp.inf, z)
    return z


def entropy(logp_v: jax.Array) -> jax.Array:
    """-sum p log p over the last axis; tokens without probability add nothing (and have no NaN gradient)."""
    safe = jnp.where(jnp.isfinite(logp_v), logp_v, 0.0)
    return -jnp.where(jnp.isfinite(logp_v), jnp.exp(safe) * safe, 0.0).sum(axis=-1)


def chunked_logprob(hidden: jax.Array, head_dv: jax.Array, targets: jax.Array, chunk: int | None = None, *,
                    temperature: float | jax.Array = 1.0, banned_ids: tuple[int, ...] = (),
                    ) -> TokenStats:
    """Log-probability of each target, entropy of each distribution, and whether the target was the likeliest token.

    Args:
      hidden: [..., R, D]; the hidden state that predicts the target of the same index.
      head_dv: [D, V] output matrix.
      targets: int32 [..., R].
      chunk: positions of R per chunk; None chooses by CHUNK_BYTES.
      temperature: logits are divided by it.
      banned_ids: tokens masked out of the distribution, as the sampler does.

    Returns:
      TokenStats; only the log-probability carries a gradient.
    """

    shape, vocab = targets.shape, head_dv.shape[-1]
    head_dv, ways = _gathered(head_dv, hidden)
    stats, _ = _stats(hidden, head_dv, targets, temperature, tuple(banned_ids), _chunk(chunk, shape, vocab, ways))
    return TokenStats(*stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _stats(hidden, head_dv, targets, temperature, banned_ids, chunk):
    """((logp, entropy, hit), log-sum-exp), float32 like `targets`; only logp has a gradient.

    The backward pass computes a chunk's logits again and turns them into d logits in one sweep, rounded to the dtype of
    `hidden`: autodiff would multiply float32 by a float32 copy of the head, and scatter into zeros of their size.
    """
    half = head_dv.astype(hidden.dtype)  # once, not once per chunk

    def one(hidden, targets):
        z = logits(hidden, half, temperature, banned_ids)
        top = z.max(axis=-1)
        p = jnp.exp(z - top[..., None])
        total = p.sum(axis=-1)
        mean = (p * jnp.where(jnp.isfinite(z), z, 0.0)).sum(axis=-1) / total
        lse = top + jnp.log(total)
        chosen = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return (chosen - lse, lse - mean, (chosen >= top).astype(jnp.float32)), lse

    return _over_chunks(one, (hidden, targets), targets.ndim - 1, chunk)


def _stats_forward(hidden, head_dv, targets, temperature, banned_ids, chunk):
    stats, lse = _stats(hidden, head_dv, targets, temperature, banned_ids, chunk)
    return (stats, lse), (hidden, head_dv, targets, temperature, lse)


def _stats_backward(banned_ids, chunk, saved, d_out):
    hidden, head_dv, targets, temperature, lse = saved
    half, vocab = head_dv.astype(hidden.dtype), head_dv.shape[-1]

    def one(d_head, block):
        hidden, targets, lse, d_logp = block
        p = jnp.exp(logits(hidden, half, temperature, banned_ids) - lse[..., None])
        is_target = jnp.arange(vocab) == targets[..., None]
        d_z = ((is_target - p) * (d_logp / temperature)[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("...v,dv->...d", d_z, half)
        rows = [x.reshape(-1, x.shape[-1]) for x in (hidden, d_z)]
        return d_head + jnp.einsum("nd,nv->dv", *rows, preferred_element_type=jnp.float32), d_hidden

    axis, length = targets.ndim - 1, targets.shape[-1]
    zeros = jnp.zeros(head_dv.shape, jnp.float32)
    blocks = _split((hidden, targets, lse, d_out[0][0]), axis, chunk)
    d_head, d_hidden = jax.lax.scan(one, zeros, blocks)
    return _joined(d_hidden, axis, length), d_head.astype(head_dv.dtype), None, None


_stats.defvjp(_stats_forward, _stats_backward)


def divergence(student_v: jax.Array, teacher_v: jax.Array, kind: str = "reverse", mix: float = 0.5) -> jax.Array:
    """A divergence between log-probabilities over the last axis.

    Args:
      student_v, teacher_v: log-probabilities [..., V] (-inf allowed at the same places).
      kind: "reverse" = KL(student || teacher), "forward" = KL(teacher || student), "jsd" = generalised
        Jensen-Shannon: mix * KL(teacher || m) + (1 - mix) * KL(student || m), m = mix * teacher + (1 - mix) * student.
      mix: the weight of "jsd".
    """
    if kind == "reverse":
        return _kl(student_v, teacher_v)
    if kind == "forward":
        return _kl(teacher_v, student_v)
    if kind != "jsd":
        raise ValueError(f"divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}")
    both = jnp.logaddexp(_finite(teacher_v) + jnp.log(mix), _finite(student_v) + jnp.log1p(-mix))
    return mix * _kl(teacher_v, both) + (1.0 - mix) * _kl(student_v, both)


def _finite(logp_v):
    return jnp.maximum(logp_v, -1e4)  # exp(-1e4) is 0, and no gradient meets inf - inf


def _kl(p_v, q_v):
    return (jnp.exp(_finite(p_v)) * (_finite(p_v) - _finite(q_v))).sum(axis=-1)


def top_k_and_tail(logp_v: jax.Array, ids_k: jax.Array) -> jax.Array:
    """[..., K + 1]: log-probabilities of the tokens `ids_k` and of all other tokens together.

    Collapsing both distributions the same way gives a lower bound on their divergence that needs K + 1 numbers.
    """
    top_k = jnp.take_along_axis(logp_v, ids_k, axis=-1)
    rest = jnp.log(jnp.maximum(1.0 - jnp.exp(_finite(top_k)).sum(axis=-1, keepdims=True), 1e-7))
    return jnp.concatenate([top_k, rest], axis=-1)


def chunked_divergence(student: jax.Array, student_head_dv: jax.Array, teacher: jax.Array, teacher_head_dv: jax.Array,
                       chunk: int | None = None, *, kind: str = "reverse", mix: float = 0.5, top_k: int = 0,
                       temperature: float | jax.Array = 1.0, banned_ids: tuple[int, ...] = (),
                       ) -> tuple[jax.Array, jax.Array]:
    """Per-token divergence of the student's next-token distribution from the teacher's, over the full vocabulary.

    Args:
      student, teacher: hidden states [..., R, D] of the same completions (D may differ).
      student_head_dv, teacher_head_dv: their output matrices [D, V]. No gradient flows into the teacher.
      chunk: positions of R per chunk; None chooses by CHUNK_BYTES.
      kind, mix: see `divergence`.
      top_k: compare only the K likeliest tokens (of the student for "reverse", else of the teacher) and the rest as
        one; 0 is the full vocabulary.
      temperature, banned_ids: applied to both.

    Returns:
      float32 (divergence [..., R], student's entropy [..., R], without gradient).
    """

    def one(heads, student, teacher):
        student_v = jax.nn.log_softmax(logits(student, heads[0], temperature, banned_ids))
        teacher_v = jax.lax.stop_gradient(jax.nn.log_softmax(logits(teacher, heads[1], temperature, banned_ids)))
        spread = entropy(jax.lax.stop_gradient(student_v))
        if top_k:
            chooser = jax.lax.stop_gradient(student_v if kind == "reverse" else teacher_v)
            ids_k = jax.lax.top_k(chooser, top_k)[1]
            student_v, teacher_v = top_k_and_tail(student_v, ids_k), top_k_and_tail(teacher_v, ids_k)
        return divergence(student_v, teacher_v, kind, mix), spread

    shape, vocab = student.shape[:-1], student_head_dv.shape[-1]
    heads, ways = _gathered((student_head_dv, jax.lax.stop_gradient(teacher_head_dv)), student)
    body = functools.partial(jax.checkpoint(one), heads)
    chunk = _chunk(chunk, shape, vocab, ways)
    return _over_chunks(body, (student, jax.lax.stop_gradient(teacher)), len(shape) - 1, chunk)


def _chunk(chunk: int | None, shape: tuple[int, ...], vocab: int, ways: int) -> int:
    """Positions of the last axis of `shape` whose logits exist at once, in blocks of equal length."""
    rows = math.prod(shape[:-1])
    rows = rows // ways if len(shape) > 1 and shape[0] % ways == 0 else rows
    most = chunk or max(1, CHUNK_BYTES // (4 * vocab * max(1, rows)))
    return -(-shape[-1] // -(-shape[-1] // most))


def _split(arrays: tuple, axis: int, chunk: int) -> tuple:
    """Each [..., R, *] -> [blocks, ..., chunk, *], R on `axis`, padded with zeros."""

    def one(x):
        blocks = -(-x.shape[axis] // chunk)
        x = jnp.pad(x, [(0, blocks * chunk - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, chunk, *x.shape[axis + 1 :]), axis, 0)

    return tuple(one(x) for x in arrays)


def _joined(y: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_split`."""
    y = jnp.moveaxis(y, 0, axis)
    y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return jax.lax.slice_in_dim(y, 0, length, axis=axis)


def _over_chunks(one: Callable, arrays: tuple, axis: int, chunk: int):
    """`one(*arrays)` over chunks of `axis`; a single chunk needs no loop."""
    length = arrays[0].shape[axis]
    if chunk >= length:
        return one(*arrays)
    out = jax.lax.map(lambda block: one(*block), _split(arrays, axis, chunk))
    return jax.tree.map(lambda y: _joined(y, axis, length), out)


def _gathered(heads, rows):
    """(heads whole on every row's device, devices over which rows are split): gathered once, not once per chunk.

    Left split over "fsdp", a head is gathered in each chunk and its gradient reduced in each chunk; vocabulary rows
    stay over "tensor" where they divide. Nothing changes outside a mesh.
    """
    mesh = mesh_of(rows)
    if mesh is None or not {"data", "fsdp", "tensor"} <= set(mesh.axis_names):
        return heads, 1

    def one(head_dv):
        over = "tensor" if head_dv.shape[-1] % mesh.shape["tensor"] == 0 else None
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, over))
        return jax.lax.with_sharding_constraint(head_dv, place)

    return jax.tree.map(one, heads), mesh.shape["data"] * mesh.shape["fsdp"]
