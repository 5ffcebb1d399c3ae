"""Attention kernels: grouped queries without repeated keys, and the joint softmax over a shared prefix.

Backends: "cudnn" (flash attention through `jax.nn.dot_product_attention`), "splash" (TPU, see `splash`), "xla" (plain
einsums, any platform); "auto" takes cudnn on a GPU and splash on a TPU for half precision, and xla elsewhere. Scores
and softmax are float32 in all of them. On a mesh cudnn and splash run on each device's own rows and heads
(`sharding.split_attention`); XLA partitions the rest.
"""

import functools

import jax
import jax.numpy as jnp

from marc_jax.models import splash
from marc_jax.sharding import split_attention

NEG = -1e30  # finite: a row whose keys are all masked gives finite garbage, never NaN


def backend(name: str, dtype) -> str:
    """Resolves "auto" for this platform and dtype; an unknown name is a ValueError."""
    if name not in ("auto", "xla", "cudnn", "splash"):
        raise ValueError(f"attention={name!r}: expected 'auto', 'xla', 'cudnn' or 'splash'")
    if name != "auto":
        return name
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla") if half else "xla"


def _pad_axis1(x: jax.Array, length: int) -> jax.Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _cudnn(q, k, v, lengths=None, *, causal=False):
    """cuDNN refuses some lengths: sequences are padded to a multiple of 64.

    The padding is masked by length; a causal query never sees what comes after it.
    """
    b, length = q.shape[:2]
    padded = -(-length // 64) * 64
    if padded != length and lengths is None and not causal:
        lengths = jnp.full((b,), length, jnp.int32)
    queries = None if lengths is None else jnp.full((b,), padded, jnp.int32)
    q, k, v = (_pad_axis1(x, padded) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, query_seq_lengths=queries, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def _cudnn_segments(q, k, v, segment_bl):
    """Causal within segments: the kernel takes the segments as a mask [b, 1, l, l] and skips what lies ahead itself."""
    length = q.shape[1]
    q, k, v, segment_bl = (_pad_axis1(x, -(-length // 64) * 64) for x in (q, k, v, segment_bl))
    mask = _same_segment(segment_bl)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")[:, :length]


def _same_segment(segment_bl):
    """bool [b, l, l]."""
    return segment_bl[:, :, None] == segment_bl[:, None, :]


def _cudnn_prefix(q_bgrnh, k_bgrkh, v_bgrkh, k_bpkh, v_bpkh, prefix_mask_bp):
    """Flash attention of right-padded suffixes, each beside its own copy of the prefix's keys (few heads: megabytes).

        keys:      prefix (masked)   own suffix       all suffixes have one mask, so it is [b, 1, r, p + r]; nothing is
        query r:   1 1 1 1 0 0       1 1 1 0 0        computed twice, and only half of the last block in vain
    """
    b, g, r = q_bgrnh.shape[:3]
    more = -prefix_mask_bp.shape[1] % 64

    def rows(a_bgr):  # [b, g, r, ..] -> [b g, r', ..]
        return _pad_axis1(a_bgr.reshape(b * g, *a_bgr.shape[2:]), -(-r // 64) * 64)

    def keys(prefix, own):
        prefix = jnp.pad(prefix, ((0, 0), (0, more), (0, 0), (0, 0)))
        return jnp.concatenate([jnp.repeat(prefix, g, axis=0), rows(own)], axis=1)

    q = rows(q_bgrnh)
    ok_bp = jnp.pad(prefix_mask_bp, ((0, 0), (0, more)))
    ok_bp = jnp.broadcast_to(ok_bp[:, None, None], (b, 1, q.shape[1], ok_bp.shape[1]))
    causal_rr = jnp.broadcast_to(jnp.tri(q.shape[1], dtype=bool), (b, 1, q.shape[1], q.shape[1]))
    mask = jnp.concatenate([ok_bp, causal_rr], axis=-1)
    mask = mask if b == 1 else jnp.repeat(mask, g, axis=0)
    out = jax.nn.dot_product_attention(
        q, keys(k_bpkh, k_bgrkh), keys(v_bpkh, v_bgrkh), mask=mask, implementation="cudnn"
    )
    return out[:, :r].reshape(q_bgrnh.shape)


def _products(q_bkgxh, own_bkgrh, prefix_bkph, ok_bgxr, ok_bp):
    """Masked scores of queries (scaled) with their own block of keys and, if any, the prefix's; float32."""
    own = jnp.einsum("bkgxh,bkgrh->bkgxr", q_bkgxh, own_bkgrh, preferred_element_type=jnp.float32)
    own = jnp.where(ok_bgxr[:, None], own, NEG)
    if prefix_bkph is None:
        return own, None
    prefix = jnp.einsum("bkgxh,bkph->bkgxp", q_bkgxh, prefix_bkph, preferred_element_type=jnp.float32)
    return own, jnp.where(ok_bp[:, None, None, None, :], prefix, NEG)


@jax.custom_vjp
def _joint(q_bkgxh, k_own, v_own, k_prefix, v_prefix, ok_bgxr, ok_bp):
    """softmax over [prefix | own] keys, times their values; all arrays batch-major so that every product is a matmul.

    Axis x holds every query of (b, k, g): positions times the query heads of one key head. k_own, v_own [b, k, g, r,
    h]; k_prefix, v_prefix [b, k, p, h] or None. The backward pass recomputes probabilities from the saved
    log-sum-exp (as flash attention does) and holds each intermediate once: left to itself, XLA fuses the exponential
    into every matmul operand that reads it and computes it again, transposed.
    """
    return _joint_forward(q_bkgxh, k_own, v_own, k_prefix, v_prefix, ok_bgxr, ok_bp)[0]


def _joint_forward(q, k_own, v_own, k_prefix, v_prefix, ok_bgxr, ok_bp):
    own, prefix = _products(q, k_own, k_prefix, ok_bgxr, ok_bp)
    top = own.max(-1) if prefix is None else jnp.maximum(own.max(-1), prefix.max(-1))
    own = jax.lax.optimization_barrier(jnp.exp(own - top[..., None]))
    total = own.sum(-1)
    out = jnp.einsum("bkgxr,bkgrh->bkgxh", own.astype(q.dtype), v_own, preferred_element_type=jnp.float32)
    if prefix is not None:
        prefix = jax.lax.optimization_barrier(jnp.exp(prefix - top[..., None]))
        total += prefix.sum(-1)
        out += jnp.einsum("bkgxp,bkph->bkgxh", prefix.astype(q.dtype), v_prefix, preferred_element_type=jnp.float32)
    out = (out / total[..., None]).astype(q.dtype)
    return out, (q, k_own, v_own, k_prefix, v_prefix, ok_bgxr, ok_bp, out, top + jnp.log(total))


def _joint_backward(saved, d_out):
    q, k_own, v_own, k_prefix, v_prefix, ok_bgxr, ok_bp, out, lse = saved
    own, prefix = _products(q, k_own, k_prefix, ok_bgxr, ok_bp)
    delta = jnp.sum((d_out * out).astype(jnp.float32), -1)[..., None]

    def block(scores, k, v, keys):  # keys: the axes of k and v in einsum letters
        s = keys[-2]
        p = jax.lax.optimization_barrier(jnp.exp(scores - lse[..., None]).astype(q.dtype))
        d_p = jnp.einsum(f"bkgxh,{keys}->bkgx{s}", d_out, v, preferred_element_type=jnp.float32)
        d_s = jax.lax.optimization_barrier((p * (d_p - delta)).astype(q.dtype))
        d_v = jnp.einsum(f"bkgx{s},bkgxh->{keys}", p, d_out)
        d_k = jnp.einsum(f"bkgx{s},bkgxh->{keys}", d_s, q)
        return jnp.einsum(f"bkgx{s},{keys}->bkgxh", d_s, k), d_k, d_v

    d_q, dk_own, dv_own = block(own, k_own, v_own, "bkgrh")
    if prefix is None:
        return d_q, dk_own, dv_own, None, None, None, None
    more, dk_prefix, dv_prefix = block(prefix, k_prefix, v_prefix, "bkph")
    return d_q + more, dk_own, dv_own, dk_prefix, dv_prefix, None, None


_joint.defvjp(_joint_forward, _joint_backward)


def _rows(q_bgrnh: jax.Array, kv: int) -> jax.Array:
    """Scaled queries [b, g, r, n, h] -> [b, k, g, x = r * m, h]: the m = n / k heads of a key head side by side."""
    b, g, r, n, h = q_bgrnh.shape
    q = (q_bgrnh * h**-0.5).reshape(b, g, r, kv, n // kv, h)
    return q.transpose(0, 3, 1, 2, 4, 5).reshape(b, kv, g, r * (n // kv), h)


def _unrows(out_bkgxh: jax.Array, r: int) -> jax.Array:
    """[b, k, g, r * m, h] -> [b, g, r, n, h]."""
    b, kv, g, x, h = out_bkgxh.shape
    return out_bkgxh.reshape(b, kv, g, r, x // r, h).transpose(0, 2, 3, 1, 4, 5).reshape(b, g, r, kv * (x // r), h)


def bidirectional(q_blnh: jax.Array, k_blnh: jax.Array, v_blnh: jax.Array, impl: str, lengths=None) -> jax.Array:
    """Attention among the tokens of each row (a window or a temporal patch); -> [b, l, n, h].

    Args:
      lengths: None, or int [b] (numpy or jax): only the first `lengths[b]` keys of a row are real.
    """
    if backend(impl, q_blnh.dtype) == "cudnn":
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        return split_attention(_cudnn, q_blnh, (k_blnh, v_blnh), lengths)
    if backend(impl, q_blnh.dtype) == "splash" and splash.fits(q_blnh.shape[1]):
        return splash.bidirectional(q_blnh, k_blnh, v_blnh, lengths)
    q_blnh = q_blnh * q_blnh.shape[-1] ** -0.5
    scores = jnp.einsum("blnh,bsnh->bnls", q_blnh, k_blnh, preferred_element_type=jnp.float32)
    if lengths is not None:
        key_ok_bs = jnp.arange(k_blnh.shape[1]) < jnp.asarray(lengths)[:, None]
        scores = jnp.where(key_ok_bs[:, None, None, :], scores, NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_blnh.dtype)
    return jnp.einsum("bnls,bsnh->blnh", probs, v_blnh)


def causal(
    q_blnh: jax.Array, k_blkh: jax.Array, v_blkh: jax.Array, mask_bl: jax.Array, impl: str, segment_bl=None
) -> jax.Array:
    """Causal attention with a key mask; query head j reads key head j // (n / k). -> [b, l, n, h].

    The cudnn backend needs right-padded rows (True, .., True, False, .., False), where the mask changes no real token's
    result; xla takes any mask.

    Args:
      segment_bl: None, or int32 [b, l] of packed rows: a query sees keys of its own segment alone.
    """
    if backend(impl, q_blnh.dtype) == "cudnn":
        if segment_bl is not None:
            return split_attention(_cudnn_segments, q_blnh, (k_blkh, v_blkh), segment_bl)
        return split_attention(functools.partial(_cudnn, causal=True), q_blnh, (k_blkh, v_blkh))
    if backend(impl, q_blnh.dtype) == "splash":
        return splash.causal(q_blnh, k_blkh, v_blkh, mask_bl, segment_bl)
    kv, length = k_blkh.shape[2], q_blnh.shape[1]
    keys, values = (a[:, None].transpose(0, 3, 1, 2, 4) for a in (k_blkh, v_blkh))
    ok = _causal_mask(mask_bl[:, None], q_blnh.shape[2] // kv)
    if segment_bl is not None:
        ok &= jnp.repeat(_same_segment(segment_bl), q_blnh.shape[2] // kv, axis=1)[:, None]
    return _unrows(_joint(_rows(q_blnh[:, None], kv), keys, values, None, None, ok, None), length)[:, 0]


def row_probabilities(q_bnh: jax.Array, k_blkh: jax.Array, mask_bl: jax.Array) -> jax.Array:
    """Attention of one query per row to the real keys, mean over heads, float32 [B, L]: one row of the softmax."""
    kv, h = k_blkh.shape[2:]
    q_bkmh = (q_bnh * h**-0.5).reshape(len(q_bnh), kv, -1, h)
    scores = jnp.einsum("bkmh,blkh->bkml", q_bkmh, k_blkh, preferred_element_type=jnp.float32)
    return jnp.mean(jax.nn.softmax(jnp.where(mask_bl[:, None, None], scores, NEG), axis=-1), axis=(1, 2))


def _causal_mask(mask_bgr: jax.Array, heads: int) -> jax.Array:
    """[b, g, x = r * heads, r]: key not masked and not after the query."""
    order = jnp.arange(mask_bgr.shape[-1])
    return (jnp.repeat(order, heads)[:, None] >= order) & mask_bgr[:, :, None, :]


def prefix_causal(q_bgrnh, k_bgrkh, v_bgrkh, mask_bgr, k_bpkh, v_bpkh, prefix_mask_bp, impl="xla") -> jax.Array:
    """Suffixes of a group over one shared prefix: a joint softmax of two blocks of keys. -> [b, g, r, n, h].

        keys:      prefix p (masked)          own suffix r (causal, masked)
        query r:   1 1 1 1 0 0                1 1 1 0 0

    The prefix block is one matmul per (prompt, key head) whose rows are all G x R queries: the prefix is read once,
    never repeated G times. The blocks share one maximum and one sum. The cudnn backend needs right-padded
    suffixes, where their mask changes no real token's result; xla and splash take any mask.
    """
    if backend(impl, q_bgrnh.dtype) == "cudnn":
        return split_attention(_cudnn_prefix, q_bgrnh, (k_bgrkh, v_bgrkh, k_bpkh, v_bpkh), prefix_mask_bp)
    if backend(impl, q_bgrnh.dtype) == "splash":
        return splash.prefix_causal(q_bgrnh, k_bgrkh, v_bgrkh, mask_bgr, k_bpkh, v_bpkh, prefix_mask_bp)
    kv, r = k_bpkh.shape[2], q_bgrnh.shape[2]
    own = (a.transpose(0, 3, 1, 2, 4) for a in (k_bgrkh, v_bgrkh))
    prefix = (a.transpose(0, 2, 1, 3) for a in (k_bpkh, v_bpkh))
    ok = _causal_mask(mask_bgr, q_bgrnh.shape[3] // kv)
    return _unrows(_joint(_rows(q_bgrnh, kv), *own, *prefix, ok, prefix_mask_bp), r)


def prefix_step(q_bgnh, k_bgkh, v_bgkh, k_bkgrh, v_bkgrh, index, k_bkph, v_bkph, prefix_mask_bp) -> jax.Array:
    """One decoding step: prefix keys, cache slots before `index`, and the token itself. -> [b, g, n, h].

    The new key takes part directly, so the cache can be written once for all layers after the step. Cache and prefix
    come with the key head before the position: every product is then a plain batched matmul.
    """
    b, g, n, h = q_bgnh.shape
    kv = k_bkph.shape[1]
    q = _rows(q_bgnh[:, :, None], kv)  # [b, k, g, m, h]
    new_k, new_v = (a.swapaxes(1, 2)[:, :, :, None] for a in (k_bgkh, v_bgkh))  # [b, k, g, 1, h]
    past = jnp.einsum("bkgmh,bkgrh->bkgmr", q, k_bkgrh, preferred_element_type=jnp.float32)
    past = jnp.where(jnp.arange(past.shape[-1]) < index, past, NEG)
    prefix = jnp.einsum("bkgmh,bkph->bkgmp", q, k_bkph, preferred_element_type=jnp.float32)
    prefix = jnp.where(prefix_mask_bp[:, None, None, None, :], prefix, NEG)
    own = jnp.sum((q * new_k).astype(jnp.float32), -1)
    top = jnp.maximum(jnp.maximum(prefix.max(-1), past.max(-1)), own)
    prefix, past, own = jnp.exp(prefix - top[..., None]), jnp.exp(past - top[..., None]), jnp.exp(own - top)
    total = prefix.sum(-1) + past.sum(-1) + own
    out = jnp.einsum("bkgmp,bkph->bkgmh", prefix.astype(q.dtype), v_bkph, preferred_element_type=jnp.float32)
    out += jnp.einsum("bkgmr,bkgrh->bkgmh", past.astype(q.dtype), v_bkgrh, preferred_element_type=jnp.float32)
    out += own[..., None] * new_v.astype(jnp.float32)
    return _unrows((out / total[..., None]).astype(q_bgnh.dtype), 1).reshape(b, g, n, h)
