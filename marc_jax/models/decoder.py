"""The text decoder of Qwen2.5-VL: pre-norm blocks with grouped-query attention, M-RoPE and SwiGLU.

This file owns the stacked-layers pattern for the decoder: `jax.lax.scan` over stacked parameters, the body returning
activations and keys/values only. `for_decoding()` gives the same decoder with separate layers, for decoding loops,
where a scan would copy each layer's weights out of the stack on every token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax.models import attention, cache, packed, rope
from marc_jax.models.cache import KV
from marc_jax.models.layers import Linear, RMSNorm, Runtime, SwiGLU, Weight, kept, maybe_remat, stack_of
from marc_jax.models.packed import Packed, rows_at
from marc_jax.sharding import constrain_batch


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder; `mrope_section` sums to head_dim / 2, a prompt and its answer stay within
    `max_position_embeddings` tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128000

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}")


class Attention(nnx.Module):
    """Projections only: who attends to what is the caller's business."""

    def __init__(self, cfg: TextConfig, stack=()):
        d, h, n, kv = cfg.hidden_size, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
        self.q = Linear((d, n * h), ("embed", "heads"), bias=True, stack=stack, units=(0, n))
        self.k = Linear((d, kv * h), ("embed", "kv_heads"), bias=True, stack=stack, units=(0, kv))
        self.v = Linear((d, kv * h), ("embed", "kv_heads"), bias=True, stack=stack, units=(0, kv))
        self.o = Linear((n * h, d), ("heads", "embed"), stack=stack, units=(n, 0))
        self.head_dim = h

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array):
        """Rotated queries [..., n, h] and keys [..., k, h], and values."""
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    def out(self, y: jax.Array) -> jax.Array:
        return self.o(y.reshape(*y.shape[:-2], -1))


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: TextConfig, stack=()):
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, stack)
        self.attn = Attention(cfg, stack)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, stack)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size, bias=False, stack=stack)

    def __call__(self, x, cos, sin, attend):
        """attend(q, k, v) -> [..., n, h]; returns the new activations and this layer's (k, v)."""
        q, k, v = (kept(a) for a in self.attn.qkv(self.norm1(x), cos, sin))
        x = kept(x + self.attn.out(attend(q, k, v)))
        return x + self.mlp(self.norm2(x)), (k, v)


class Embedding(nnx.Module):
    def __init__(self, vocab: int, size: int):
        self.embedding = nnx.Param(Weight((vocab, size), ("vocab", "embed"), "normal", (0, 0)))


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and (when untied) the head."""

    def __init__(self, cfg: TextConfig, runtime: Runtime):
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = DecoderLayer(cfg, (cfg.num_layers,))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head = None if cfg.tie_word_embeddings else Linear((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"))
        self.cfg, self.runtime = cfg, runtime

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Embedding rows [..., D] of tokens."""
        return jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self.runtime.dtype)

    def output(self) -> jax.Array:
        """The output matrix [D, vocab]; the embedding transposed when tied."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocab] of normed hidden states [..., D]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = jnp.matmul(flat, self.output().astype(hidden.dtype), preferred_element_type=jnp.float32)
        return out.reshape(*hidden.shape[:-1], -1)

    def empty_cache(self, b: int, g: int, r: int, dtype=None) -> KV:
        c = self.cfg
        return cache.empty(c.num_layers, b, g, r, c.num_kv_heads, c.head_dim, dtype or self.runtime.dtype)

    def for_decoding(self) -> "Decoder | Packed":
        """The same decoder for a decoding loop, made outside of it: packed on a GPU, elsewhere a list of its layers."""
        graphdef, state = nnx.split(self)
        if jax.default_backend() == "gpu":
            tree = packed.pack(nnx.to_pure_dict(state), self.cfg.tie_word_embeddings, dtype=self.runtime.dtype)
            return Packed(self.cfg, self.runtime, tree)
        twin = nnx.merge(graphdef, state)
        make, stacked = stack_of(self.layers)
        slices = [make(jax.tree.map(lambda w, i=i: w[i], stacked)) for i in range(self.cfg.num_layers)]
        del twin.layers
        twin.layers = nnx.List(slices)
        return twin

    def _tables(self, pos_3):
        c = self.cfg
        return rope.mrope_cos_sin(pos_3, c.head_dim, c.rope_theta, c.mrope_section, self.runtime.dtype)

    def prefill_pruned(self, x_bld, pos_3bl, mask_bl, at_b, layer: int, keep: Callable, length: int):
        """Prefill in which only some tokens go on after the first `layer` layers (FastV).

        Args:
          x_bld, pos_3bl, mask_bl: as for `prefill`, right-padded; at_b: int [B], the last real token.
          layer: 1 .. number of layers - 1.
          keep: of the attention float32 [B, L] that the token at_b pays in layer `layer` - 1, mean over heads, which
            tokens go on, bool [B, L]; at_b is one of them.
          length: the most tokens that go on, static.

        Returns:
          The normed hidden states [B, D] of at_b; the cache [layers, B, L, kv, hd], of the later layers only the first
          `length` places in use; the mask of every layer bool [layers, B, L].
        """
        make, stacked = stack_of(self.layers)
        tables, x = self._tables(pos_3bl), x_bld.astype(self.runtime.dtype)
        impl, kvs, seen = self.runtime.attention, [], {}

        def attend(q, k, v):
            seen.update(q=rows_at(q.reshape(*q.shape[:2], -1), at_b).reshape(len(q), *q.shape[2:]), k=k)
            return attention.causal(q, k, v, mask_bl, impl)

        for i in range(layer):
            x, kv = make(jax.tree.map(lambda w, i=i: w[i], stacked))(x, *tables, attend)
            kvs.append(kv)
        keep_bl = mask_bl & keep(attention.row_probabilities(seen["q"], seen["k"], mask_bl))
        order_bm = jnp.argsort(~keep_bl, axis=1, stable=True)[:, :length]
        move = lambda a: jnp.take_along_axis(a, order_bm.reshape(*order_bm.shape, *[1] * (a.ndim - 2)), axis=1)  # noqa: E731
        mask_bm, tables = move(keep_bl), tuple(map(move, tables))

        def body(x, weights):
            return make(weights)(x, *tables, lambda q, k, v: attention.causal(q, k, v, mask_bm, impl))

        x, later = jax.lax.scan(body, move(x), jax.tree.map(lambda w: w[layer:], stacked))
        fill = [(0, 0), (0, 0), (0, mask_bl.shape[1] - length), (0, 0), (0, 0)]
        early = jax.tree.map(lambda *layers: jnp.stack(layers), *kvs)
        k, v = jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.pad(b, fill)]), early, later)
        masks = jnp.concatenate([
            jnp.broadcast_to(mask_bl, (layer, *mask_bl.shape)),
            jnp.broadcast_to(jnp.pad(mask_bm, fill[1:3]), (len(k) - layer, *mask_bl.shape)),
        ])  # fmt: skip
        return rows_at(self.norm(x), jnp.sum(mask_bm, axis=1) - 1), KV(k, v), masks

    def _run(self, x, pos_3, attend, per_layer):
        """Runs all layers; attend(q, k, v, per_layer[l]); -> normed activations, keys, values (stacked over layers)."""
        cos, sin = self._tables(pos_3)
        if isinstance(self.layers, nnx.List):
            kvs = []
            for i, layer in enumerate(self.layers):
                mine = jax.tree.map(lambda a, i=i: a[i], per_layer)
                x, kv = layer(x, cos, sin, lambda q, k, v, mine=mine: attend(q, k, v, mine))
                kvs.append(kv)
            k, v = (jnp.stack(part) for part in zip(*kvs, strict=True))
            return self.norm(x), k, v
        make, stacked = stack_of(self.layers)

        def body(x, inputs):
            weights, mine = inputs
            return make(weights)(x, cos, sin, lambda q, k, v: attend(q, k, v, mine))

        x, (k, v) = jax.lax.scan(maybe_remat(body, self.runtime), x, (stacked, per_layer))
        return self.norm(x), k, v

    def _run_rows(self, x_bld, pos_3bl, attend):
        """`_run` of many tokens per row, which are held to their rows' devices: there weights come to activations.

        A decoding step has one token per row and is left to XLA: activations may go to weights.
        """
        x, k, v = self._run(constrain_batch(x_bld.astype(self.runtime.dtype)), pos_3bl, attend, ())
        return constrain_batch(x), k, v

    def prefill(self, x_bld, pos_3bl, mask_bl, at_b=None) -> tuple[jax.Array, KV]:
        def attend(q, k, v, _):
            return attention.causal(q, k, v, mask_bl, self.runtime.attention)

        x, k, v = self._run_rows(x_bld, pos_3bl, attend)
        return x if at_b is None else rows_at(x, at_b), KV(k, v)

    def prefill_group(self, x_bpd, pos_3bp, mask_bp, at_b, x_bgrd, pos_3bgr, mask_bgr) -> tuple[jax.Array, jax.Array]:
        """Prompts and their suffixes as one pass over the layers: ([B, D] of the prompts at `at_b`, [B, G, R, D]).

        Every matrix sees the tokens of prompts and suffixes in one product and is read, and its gradient written, once.
        """
        b, g, r, d = x_bgrd.shape
        p, impl = x_bpd.shape[1], self.runtime.attention

        def attend(q, k, v, _):
            prompts = [a[:, :p] for a in (q, k, v)]
            suffixes = [a[:, p:].reshape(b, g, r, *a.shape[2:]) for a in (q, k, v)]
            first = attention.causal(*prompts, mask_bp, impl)
            rest = attention.prefix_causal(*suffixes, mask_bgr, *prompts[1:], mask_bp, impl)
            return jnp.concatenate([first, rest.reshape(b, g * r, *rest.shape[3:])], axis=1)

        x = jnp.concatenate([x_bpd, x_bgrd.reshape(b, g * r, d)], axis=1)
        x = self._run_rows(x, jnp.concatenate([pos_3bp, pos_3bgr.reshape(3, b, g * r)], axis=2), attend)[0]
        return rows_at(x, at_b), x[:, p:].reshape(b, g, r, d)

    def prefill_packed(self, x_bld, pos_3bl, segment_bl) -> jax.Array:
        """Normed hidden states [B, L, D] of packed rows: each token sees the earlier ones of its own segment (> 0)."""

        def attend(q, k, v, _):
            return attention.causal(q, k, v, segment_bl > 0, self.runtime.attention, segment_bl)

        return self._run_rows(x_bld, pos_3bl, attend)[0]

    def decode_step(self, x_bgd, pos_3bg, index, prefix: KV, prefix_mask_bp, past: KV) -> tuple[jax.Array, KV]:
        """`prefix_mask_bp` may have a leading axis of layers (`prefill_pruned`)."""

        def attend(q, k, v, mine):
            pre, old, mask_bp = mine
            return attention.prefix_step(q, k, v, old.k, old.v, index, pre.k, pre.v, mask_bp)

        # Of the same arrays at every step, so XLA moves the transposition out of the decoding loop.
        prefix = jax.tree.map(lambda a: a.swapaxes(2, 3), prefix)
        masks = jnp.broadcast_to(prefix_mask_bp, (len(prefix.k), *prefix_mask_bp.shape[-2:]))
        x, k, v = self._run(x_bgd.astype(self.runtime.dtype), pos_3bg, attend, (prefix, past, masks))
        return x, cache.write(past, k, v, index)
