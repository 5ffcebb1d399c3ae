"""The decoder laid out for decoding: one array per layer and matrix, fused projections, optionally 8-bit weights.

Training keeps layers stacked (one `lax.scan`) and every projection apart. A decoding loop on a GPU wants the opposite:
no copy out of a stack on every token, few large products, each output's weights contiguous. `pack` makes that layout
once (about two passes over the weights), `Packed` decodes from it with the interface of the plain model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax import hopper
from marc_jax.hopper import attention as step
from marc_jax.hopper import stream
from marc_jax.models import attention, cache, lora, rope
from marc_jax.models.cache import KV
from marc_jax.models.layers import rms_norm

SPREAD = 8  # pieces of a prompt's keys that a decoding step reads side by side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """Weights of a projection, [N, K]: N outputs over K inputs, each output's weights contiguous.

    Attributes:
      values: the activation dtype, or int8.
      scale: float32 [N]; an int8 weight stands for values * scale. None when not quantised.
    """

    values: jax.Array
    scale: jax.Array | None = None


def quantise(w_nk: jax.Array) -> Matrix:
    """Symmetric int8 with one scale per output: the largest weight of a row becomes 127."""
    w_nk = w_nk.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w_nk).max(-1), 1e-12) / 127.0
    return Matrix(jnp.round(w_nk / scale[..., None]).astype(jnp.int8), scale)


def pack(text: dict, tied: bool, *, dtype=jnp.bfloat16, bits: int = 16) -> dict:
    """The packed layout of a decoder's parameters (`params["text"]`); a pure function, usable inside jit.

    Args:
      text: nested dict as `qwen25_vl.init` returns it; adapters (`lora`) are merged, layer by layer.
      tied: whether the head is the embedding.
      dtype: of the result.
      bits: 16 keeps the weights, 8 quantises every matrix of the layers and the head (norms, biases and the embedding
        stay).
    """
    if bits not in (8, 16):
        raise ValueError(f"bits = {bits}: weights are packed in 16 or 8 bits")

    def matrix(*kernels_kn):
        w = jnp.concatenate([k.T for k in kernels_kn]).astype(dtype)
        return quantise(w) if bits == 8 else Matrix(w)

    def layer(i: int) -> dict:
        one = jax.tree.map(lambda w: w[i], text["layers"])
        attn, mlp = one["attn"], one["mlp"]
        return {
            "norm1": one["norm1"]["scale"].astype(dtype),
            "qkv": matrix(*(lora.kernel(attn[n]) for n in "qkv")),
            "bias": jnp.concatenate([attn[n]["bias"] for n in "qkv"]).astype(dtype),
            "o": matrix(lora.kernel(attn["o"])),
            "norm2": one["norm2"]["scale"].astype(dtype),
            "gate_up": matrix(lora.kernel(mlp["gate"]), lora.kernel(mlp["up"])),
            "down": matrix(lora.kernel(mlp["down"])),
        }

    depth = jax.tree.leaves(text["layers"])[0].shape[0]
    embedding = text["embed"]["embedding"].astype(dtype)
    if tied:
        head = quantise(embedding) if bits == 8 else Matrix(embedding)
    else:
        head = matrix(text["head"]["kernel"])
    norm = text["norm"]["scale"].astype(dtype)
    return {"embedding": embedding, "layers": [layer(i) for i in range(depth)], "norm": norm, "head": head}


def project(x_mk: jax.Array, w: Matrix) -> jax.Array:
    """x @ w.T [M, N]: float32 for a few rows (sums not yet rounded), x's dtype for many (half the bytes to write)."""
    (m, k), n = x_mk.shape, w.values.shape[0]
    if _streams(x_mk.dtype) and stream.plan(m, n, k, w.values.dtype.itemsize):
        y = stream.matmul(x_mk, w.values).sum(0)
    else:
        out = jnp.float32 if m <= stream.MAX_ROWS else x_mk.dtype
        contract = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x_mk, w.values.astype(x_mk.dtype), contract, preferred_element_type=out)
    return y if w.scale is None else y * w.scale


def add_norm(x_md: jax.Array, y_mk: jax.Array, w: Matrix, scale_d: jax.Array, eps: float):
    """(x + y @ w.T, its RMSNorm), both in x's dtype [M, D]."""
    n, k = w.values.shape
    if _streams(x_md.dtype) and w.scale is None and n % 512 == 0 and stream.plan(len(y_mk), n, k):
        return stream.add_norm(x_md, stream.matmul(y_mk, w.values), scale_d, eps)
    x_md = x_md + project(y_mk, w).astype(x_md.dtype)
    return x_md, rms_norm(x_md, scale_d, eps)


def glu(x_mk: jax.Array, w: Matrix) -> jax.Array:
    """silu(x @ gate.T) * (x @ up.T) in x's dtype, [M, N / 2], of w = [gate; up]."""
    (m, k), n = x_mk.shape, w.values.shape[0]
    plan = stream.plan(m, n, k) if _streams(x_mk.dtype) and w.scale is None and n % (2 * stream.TILE) == 0 else None
    if plan and plan.pieces == 1:
        return stream.glu(x_mk, w.values)
    gate, up = jnp.split(project(x_mk, w).astype(x_mk.dtype), 2, axis=1)
    return jax.nn.silu(gate) * up


def _streams(dtype) -> bool:
    return jnp.dtype(dtype) == jnp.bfloat16 and hopper.available()


class Packed(nnx.Module):
    """Decodes from `pack`'s tree; with the decoder's own methods, training apart."""

    def __init__(self, cfg, runtime, tree: dict):
        """cfg: a decoder's TextConfig; runtime: activation dtype and attention backend; tree: of `pack`."""
        self.cfg, self.runtime, self.tree = cfg, runtime, nnx.data(tree)

    def for_decoding(self) -> "Packed":
        return self

    def rows(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.tree["embedding"], tokens, axis=0).astype(self.runtime.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = _pad_rows(flat)
        return project(rows, self.tree["head"])[: len(flat)].astype(jnp.float32).reshape(*hidden.shape[:-1], -1)

    def empty_cache(self, b: int, g: int, r: int, dtype=None) -> KV:
        c = self.cfg
        r = -(-r // step.KEYS) * step.KEYS if self._fused(0) else r
        return cache.empty(c.num_layers, b, g, r, c.num_kv_heads, c.head_dim, dtype or self.runtime.dtype)

    def _fused(self, p: int) -> bool:
        """Whether attention runs in the streaming kernel: Hopper, bfloat16, heads of 128, whole groups of 8 keys."""
        heads = step.padded_heads(self.cfg.num_heads // self.cfg.num_kv_heads)
        return _streams(self.runtime.dtype) and self.cfg.head_dim == 128 and heads <= step.QUERIES and p % 8 == 0

    def prefill(self, x_bld, pos_3bl, mask_bl, at_b=None) -> tuple[jax.Array, KV]:
        """Normed hidden states [B, L, D] (or [B, D], of positions `at_b`) and the cache [layers, B, L, kv, hd]."""
        b, length, d = x_bld.shape

        def attend(_, heads_mjh):
            q, k, v = self._split(heads_mjh.reshape(b, length, -1, self.cfg.head_dim))
            return attention.causal(q, k, v, mask_bl, self.runtime.attention).reshape(b * length, -1)

        def keep(rows):  # the last layer's keys and values are everybody's, the rest of it only the wanted rows
            return rows if at_b is None else _pad_rows(rows_at(rows.reshape(b, length, -1), at_b))

        x, k, v = self._run(x_bld.reshape(b * length, d), pos_3bl.reshape(3, -1), attend, 1.0, keep)
        x = x.reshape(b, length, d) if at_b is None else x[:b]
        return x, KV(*(a.reshape(-1, b, length, *a.shape[2:]) for a in (k, v)))

    def decode_step(self, x_bgd, pos_3bg, index, prefix: KV, prefix_mask_bp, past: KV) -> tuple[jax.Array, KV]:
        """One token per (b, g): -> ([B, G, D], the cache with slot `index` written).

        `prefix_mask_bp` may have a leading axis of layers (`Decoder.prefill_pruned`); the kernel knows one mask alone.
        """
        b, g, d = x_bgd.shape
        index = jnp.asarray(index, jnp.int32)
        fused = self._fused(prefix.k.shape[2]) and prefix_mask_bp.ndim == 2
        if fused:
            bias = step.key_bias(prefix_mask_bp, index, past.k.shape[4])
        else:
            prefix = jax.tree.map(lambda a: a.swapaxes(2, 3), prefix)

        def attend(i, heads_mjh):
            heads = heads_mjh[: b * g].reshape(b, g, -1, self.cfg.head_dim)
            if fused:
                at, group = (jnp.full(1, i, jnp.int32), index.reshape(1)), self.cfg.num_heads // self.cfg.num_kv_heads
                rows = step.step_rows(*self._split(heads))
                parts = step.partial_attention(rows, prefix, past, *at, bias, heads=group, spread=SPREAD)
                out = step.join(parts, g, group).astype(heads.dtype)
            else:
                mask_bp = prefix_mask_bp if prefix_mask_bp.ndim == 2 else prefix_mask_bp[i]
                keys = (past.k[i], past.v[i], index, prefix.k[i], prefix.v[i], mask_bp)
                out = attention.prefix_step(*self._split(heads), *keys)
            return _pad_rows(out.reshape(b * g, -1))

        x = _pad_rows(x_bgd.reshape(b * g, d))
        pos_3m = jnp.pad(pos_3bg.reshape(3, -1), ((0, 0), (0, len(x) - b * g)))
        x, k, v = self._run(x, pos_3m, attend, self.cfg.head_dim**-0.5 if fused else 1.0)
        k, v = (a[:, : b * g].reshape(-1, b, g, *a.shape[2:]) for a in (k, v))
        return x[: b * g].reshape(b, g, d), cache.write(past, k, v, index)

    def _split(self, heads):
        """[..., n + 2 kv, h] -> queries, keys, values."""
        n, kv = self.cfg.num_heads, self.cfg.num_kv_heads
        return heads[..., :n, :], heads[..., n : n + kv, :], heads[..., n + kv :, :]

    def _run(self, x_md, pos_3m, attend, query_scale: float, keep=lambda rows: rows):
        """All layers over M rows; attend(layer, queries, keys and values [M, n + 2 kv, h]) -> [M, n * h].

        `keep` chooses the rows that go on after the last attention. Returns normed rows [M, D], and keys and values
        [layers, M, kv, h].
        """
        c, dtype = self.cfg, self.runtime.dtype
        x, turn = x_md.astype(dtype), self._rotation(pos_3m, query_scale)
        layers, keys, values = self.tree["layers"], [], []
        y = rms_norm(x, layers[0]["norm1"], c.rms_norm_eps)
        for i, w in enumerate(layers):
            last = i + 1 == len(layers)
            norm = self.tree["norm"] if last else layers[i + 1]["norm1"]
            y = project(y, w["qkv"])
            heads_mjh = turn((y + w["bias"].astype(y.dtype)).astype(dtype).reshape(len(x), -1, c.head_dim))
            _, k, v = self._split(heads_mjh)
            keys.append(k), values.append(v)
            mixed = attend(i, heads_mjh)
            if last:
                x, mixed = keep(x), keep(mixed)
            x, y = add_norm(x, mixed, w["o"], w["norm2"], c.rms_norm_eps)
            y = glu(y, w["gate_up"])
            x, y = add_norm(x, y, w["down"], norm, c.rms_norm_eps)
        return y, jnp.stack(keys), jnp.stack(values)

    def _rotation(self, pos_3m, query_scale: float):
        """A function that rotates queries and keys of [M, n + 2 kv, h] and scales queries: one elementwise kernel."""
        c, dtype = self.cfg, self.runtime.dtype
        half, n, kv = c.head_dim // 2, c.num_heads, c.num_kv_heads
        tables = rope.mrope_cos_sin(pos_3m, c.head_dim, c.rope_theta, c.mrope_section, dtype)
        cos, sin = (t.astype(jnp.float32)[:, None, None] for t in tables)
        head = jnp.arange(n + 2 * kv)[:, None, None]
        scale = jnp.where(head < n, query_scale, 1.0)
        cos, sin = (jnp.where(head < n + kv, t, still) * scale for t, still in ((cos, 1.0), (sin, 0.0)))
        sin = sin * jnp.array([-1.0, 1.0])[:, None]  # (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

        def turn(heads_mjh):
            x = heads_mjh.reshape(*heads_mjh.shape[:2], 2, half).astype(jnp.float32)
            return (x * cos + x[:, :, ::-1] * sin).reshape(heads_mjh.shape).astype(dtype)

        return turn


def rows_at(x_bld: jax.Array, at_b: jax.Array) -> jax.Array:
    """x[b, at[b]]: [B, D]."""
    return jnp.take_along_axis(x_bld, at_b[:, None, None], axis=1)[:, 0]


def _pad_rows(x_md: jax.Array) -> jax.Array:
    """Rows up to a multiple of 8 (zeros): the tensor core's smallest side, and XLA is faster with 8 than with 1."""
    return jnp.pad(x_md, ((0, -len(x_md) % stream.ROWS), (0, 0)))
