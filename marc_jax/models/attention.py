"""Attention kernels: grouped queries without repeated keys, and the joint softmax over a shared prefix.

Backends: "cudnn" (flash attention through `jax.nn.dot_product_attention`), "xla" (plain einsums, any platform);
"auto" takes cudnn for half precision on a GPU and xla elsewhere. Scores and softmax are float32 in all of them.
"""

import jax
import jax.numpy as jnp

NEG = -1e30  # finite: a row whose keys are all masked gives finite garbage, never NaN


def backend(name: str, dtype) -> str:
    """Resolves "auto" for this platform and dtype; an unknown name is a ValueError."""
    if name not in ("auto", "xla", "cudnn"):
        raise ValueError(f"attention={name!r}: expected 'auto', 'xla' or 'cudnn'")
    if name != "auto":
        return name
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def _pad_axis1(x: jax.Array, length: int) -> jax.Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _cudnn(q, k, v, *, causal=False, lengths=None):
    """cuDNN refuses some lengths: sequences are padded to a multiple of 64 and the padding masked by length."""
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


def _scores(q_blkgh, k_bskh):
    scale = q_blkgh.shape[-1] ** -0.5
    return jnp.einsum("blkgh,bskh->bklgs", q_blkgh * scale, k_bskh, preferred_element_type=jnp.float32)


def bidirectional(q_blnh: jax.Array, k_blnh: jax.Array, v_blnh: jax.Array, impl: str, lengths=None) -> jax.Array:
    """Attention among the tokens of each row (a window or a temporal patch); -> [b, l, n, h].

    Args:
      lengths: None, or int [b] (numpy or jax): only the first `lengths[b]` keys of a row are real.
    """
    if backend(impl, q_blnh.dtype) == "cudnn":
        return _cudnn(q_blnh, k_blnh, v_blnh, lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32))
    q_blnh = q_blnh * q_blnh.shape[-1] ** -0.5
    scores = jnp.einsum("blnh,bsnh->bnls", q_blnh, k_blnh, preferred_element_type=jnp.float32)
    if lengths is not None:
        key_ok_bs = jnp.arange(k_blnh.shape[1]) < jnp.asarray(lengths)[:, None]
        scores = jnp.where(key_ok_bs[:, None, None, :], scores, NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_blnh.dtype)
    return jnp.einsum("bnls,bsnh->blnh", probs, v_blnh)


def causal(q_blnh: jax.Array, k_blkh: jax.Array, v_blkh: jax.Array, mask_bl: jax.Array, impl: str) -> jax.Array:
    """Causal attention with a key mask; query head j reads key head j // (n / k). -> [b, l, n, h].

    The cudnn backend needs right-padded rows (True, .., True, False, .., False); xla takes any mask.
    """
    if backend(impl, q_blnh.dtype) == "cudnn":
        return _cudnn(q_blnh, k_blkh, v_blkh, causal=True, lengths=jnp.sum(mask_bl, -1, dtype=jnp.int32))
    b, length, n, h = q_blnh.shape
    q = q_blnh.reshape(b, length, k_blkh.shape[2], -1, h)
    order = jnp.arange(length)
    ok_bls = (order[:, None] >= order[None, :]) & mask_bl[:, None, :]
    scores = jnp.where(ok_bls[:, None, :, None, :], _scores(q, k_blkh), NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_blkh.dtype)
    return jnp.einsum("bklgs,bskh->blkgh", probs, v_blkh).reshape(b, length, n, h)


def prefix_causal(q_bgrnh, k_bgrkh, v_bgrkh, mask_bgr, k_bpkh, v_bpkh, prefix_mask_bp) -> jax.Array:
    """Suffixes of a group over one shared prefix: a joint softmax of two blocks of keys. -> [b, g, r, n, h].

        keys:      prefix p (masked)          own suffix r (causal, masked)
        query r:   1 1 1 1 0 0                1 1 1 0 0

    The prefix block is one matmul per (prompt, key head) whose rows are all G x R queries: the prefix is read once,
    never repeated G times. The blocks share one maximum and one sum.
    """
    b, g, r, n, h = q_bgrnh.shape
    kv = k_bpkh.shape[2]
    q = (q_bgrnh * h**-0.5).reshape(b, g, r, kv, n // kv, h)
    prefix = jnp.einsum("bgrkmh,bpkh->bkgrmp", q, k_bpkh, preferred_element_type=jnp.float32)
    prefix = jnp.where(prefix_mask_bp[:, None, None, None, None, :], prefix, NEG)
    own = jnp.einsum("bgrkmh,bgskh->bgkrms", q, k_bgrkh, preferred_element_type=jnp.float32)
    order = jnp.arange(r)
    ok_bgrs = (order[:, None] >= order[None, :]) & mask_bgr[:, :, None, :]
    own = jnp.where(ok_bgrs[:, :, None, :, None, :], own, NEG)
    top = jnp.maximum(prefix.max(-1), own.max(-1).swapaxes(1, 2))
    top = jax.lax.stop_gradient(top)  # [b, k, g, r, m]
    prefix = jnp.exp(prefix - top[..., None])
    own = jnp.exp(own - top.swapaxes(1, 2)[..., None])
    total = prefix.sum(-1).swapaxes(1, 2) + own.sum(-1)  # [b, g, k, r, m]
    out = jnp.einsum("bkgrmp,bpkh->bgrkmh", prefix.astype(v_bpkh.dtype), v_bpkh, preferred_element_type=jnp.float32)
    out += jnp.einsum("bgkrms,bgskh->bgrkmh", own.astype(v_bgrkh.dtype), v_bgrkh, preferred_element_type=jnp.float32)
    out = out / total.transpose(0, 1, 3, 2, 4)[..., None]
    return out.astype(q_bgrnh.dtype).reshape(b, g, r, n, h)


def prefix_step(q_bgnh, k_bgkh, v_bgkh, k_bgrkh, v_bgrkh, index, k_bpkh, v_bpkh, prefix_mask_bp) -> jax.Array:
    """One decoding step: prefix keys, cache slots before `index`, and the token itself. -> [b, g, n, h].

    The new key takes part directly, so the cache can be written once for all layers after the step.
    """
    b, g, n, h = q_bgnh.shape
    kv = k_bpkh.shape[2]
    q = (q_bgnh * h**-0.5).reshape(b, g, kv, n // kv, h)
    prefix = jnp.einsum("bgkmh,bpkh->bkgmp", q, k_bpkh, preferred_element_type=jnp.float32)
    prefix = jnp.where(prefix_mask_bp[:, None, None, None, :], prefix, NEG)
    past = jnp.einsum("bgkmh,bgrkh->bgkmr", q, k_bgrkh, preferred_element_type=jnp.float32)
    past = jnp.where(jnp.arange(past.shape[-1]) < index, past, NEG)
    own = jnp.sum((q * k_bgkh[:, :, :, None]).astype(jnp.float32), -1)  # [b, g, k, m]
    top = jnp.maximum(jnp.maximum(prefix.max(-1).swapaxes(1, 2), past.max(-1)), own)
    prefix = jnp.exp(prefix - top.swapaxes(1, 2)[..., None])
    past = jnp.exp(past - top[..., None])
    own = jnp.exp(own - top)
    total = prefix.sum(-1).swapaxes(1, 2) + past.sum(-1) + own
    out = jnp.einsum("bkgmp,bpkh->bgkmh", prefix.astype(v_bpkh.dtype), v_bpkh, preferred_element_type=jnp.float32)
    out += jnp.einsum("bgkmr,bgrkh->bgkmh", past.astype(v_bgrkh.dtype), v_bgrkh, preferred_element_type=jnp.float32)
    out += own[..., None] * v_bgkh[:, :, :, None].astype(jnp.float32)
    return (out / total[..., None]).astype(q_bgnh.dtype).reshape(b, g, n, h)
