"""The vision tower of Qwen2.5-VL: window and full attention inside each temporal patch, then the 2x2 merger.

No attention crosses temporal patches, so the tower takes [S, n, C]: S temporal patches of any mix of videos with the
same grid. Tokens stay in window order between the blocks; a border window that is short is padded for its attention
only, never in the dense layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marc_jax.models import attention, rope
from marc_jax.models.layers import Linear, RMSNorm, Runtime, SwiGLU, maybe_remat, stack_of
from marc_jax.sharding import constrain_batch


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; `window_size` in pixels, the rest as in the published config."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    in_channels: int = 3

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"vision hidden_size {self.hidden_size} over {self.num_heads} heads: need a multiple of 4")

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class Windows:
    """How one frame's n patches fall into attention windows (numpy, from the grid alone).

    Attributes:
      order: int [n]; window order -> merge-block-major index. None when the two are the same.
      rows, cols: int [n]; absolute patch coordinates in window order.
      gather: int [windows * slots]; padded slot -> window-order index. None when no window is short.
      slots_of: int [n]; window-order index -> padded slot.
      lengths: int [windows]; real patches per window.
    """

    order: np.ndarray | None
    rows: np.ndarray
    cols: np.ndarray
    gather: np.ndarray | None
    slots_of: np.ndarray
    lengths: np.ndarray


@functools.lru_cache(maxsize=256)
def windows(grid_hw: tuple[int, int], merge: int, side: int) -> Windows:
    """Windows of `side` x `side` merge blocks over a grid of (h, w) patches, both multiples of `merge`."""
    h, w = grid_hw
    if h % merge or w % merge or h < merge or w < merge:
        raise ValueError(f"grid {grid_hw} (patches) must be a positive multiple of {merge} on both axes")
    row, col = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    block_major = (h // merge, merge, w // merge, merge)
    row, col = (a.reshape(block_major).transpose(0, 2, 1, 3).ravel() for a in (row, col))
    across = -(-(w // merge) // side)
    window = (row // merge // side) * across + col // merge // side
    order = np.argsort(window, kind="stable")
    lengths = np.bincount(window)
    slots = int(lengths.max())
    slot = np.concatenate([np.arange(c) for c in lengths])
    slots_of = np.repeat(np.arange(len(lengths)), lengths) * slots + slot
    gather = None
    if (lengths < slots).any():
        starts = np.cumsum(lengths) - lengths
        gather = (starts[:, None] + np.minimum(np.arange(slots), lengths[:, None] - 1)).ravel()
    same = bool((order == np.arange(h * w)).all())
    return Windows(None if same else order, row[order], col[order], gather, slots_of, lengths)


class VisionAttention(nnx.Module):
    def __init__(self, cfg: VisionConfig, runtime: Runtime, stack=()):
        d, n = cfg.hidden_size, cfg.num_heads
        self.qkv = Linear((d, 3 * d), ("embed", "heads"), bias=True, stack=stack, units=(0, 3 * n))
        self.proj = Linear((d, d), ("heads", "embed"), bias=True, stack=stack, units=(n, 0))
        self.num_heads, self.impl = n, runtime.attention

    def __call__(self, x_snd, cos, sin, plan: Windows | None):
        """plan None: every token of a temporal patch attends to every other; else within its window."""
        s, n, d = x_snd.shape
        qkv = self.qkv(x_snd).reshape(s, n, 3, self.num_heads, -1)
        q, k, v = rope.rotate(qkv[:, :, 0], cos, sin), rope.rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
        if plan is None:
            return self.proj(attention.bidirectional(q, k, v, self.impl).reshape(s, n, d))
        count, lengths = len(plan.lengths), None
        if plan.gather is not None:
            q, k, v = (jnp.take(a, plan.gather, axis=1) for a in (q, k, v))
            lengths = np.tile(plan.lengths, s)
        q, k, v = (a.reshape(s * count, -1, *a.shape[2:]) for a in (q, k, v))
        out = attention.bidirectional(q, k, v, self.impl, lengths).reshape(s, -1, d)
        if plan.gather is not None:
            out = jnp.take(out, plan.slots_of, axis=1)
        return self.proj(out)

    def watch(self, x_snd, cos, sin):
        """Full attention's probabilities received by each token, mean over heads and queries, float32 [S, n]; and the
        keys before rotation, mean over heads, [S, n, h]. Holds S * heads * n * n numbers."""
        s, n, _ = x_snd.shape
        q, k, _ = jnp.moveaxis(self.qkv(x_snd).reshape(s, n, 3, self.num_heads, -1), 2, 0)
        scaled = rope.rotate(q, cos, sin) * q.shape[-1] ** -0.5
        scores = jnp.einsum("sqmh,skmh->smqk", scaled, rope.rotate(k, cos, sin), preferred_element_type=jnp.float32)
        return jnp.mean(jax.nn.softmax(scores, axis=-1), axis=(1, 2)), jnp.mean(k, axis=2)


class VisionBlock(nnx.Module):
    def __init__(self, cfg: VisionConfig, runtime: Runtime, stack=()):
        self.norm1 = RMSNorm(cfg.hidden_size, 1e-6, stack)
        self.attn = VisionAttention(cfg, runtime, stack)
        self.norm2 = RMSNorm(cfg.hidden_size, 1e-6, stack)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size, bias=True, stack=stack)

    def __call__(self, x, cos, sin, plan):
        x = constrain_batch(x + self.attn(self.norm1(x), cos, sin, plan))
        return constrain_batch(x + self.mlp(self.norm2(x)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched:
    """What the last full-attention block of the tower looked at, per visual token (its four patches averaged).

    Attributes:
      received_sp: float32 [S, p]; attention received, mean over heads and over all queries of the temporal patch; a
        patch's values have the mean 1 / n.
      key_sph: [S, p, h]; keys before rotation, mean over heads.
    """

    received_sp: jax.Array
    key_sph: jax.Array


class Merger(nnx.Module):
    """RMSNorm per patch, four patches side by side, Linear, exact GELU, Linear."""

    def __init__(self, cfg: VisionConfig):
        wide = cfg.hidden_size * cfg.spatial_merge_size**2
        self.norm = RMSNorm(cfg.hidden_size, 1e-6)
        self.fc1 = Linear((wide, wide), ("embed", "mlp"), bias=True)
        self.fc2 = Linear((wide, cfg.out_hidden_size), ("mlp", "embed"), bias=True)
        self.wide = wide

    def __call__(self, x_snv):
        x = self.norm(x_snv).reshape(x_snv.shape[0], -1, self.wide)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def _period(kinds: tuple[bool, ...]) -> int:
    """The shortest period of the pattern of full and window blocks (a divisor of the depth)."""
    depth = len(kinds)
    return next(p for p in range(1, depth + 1) if depth % p == 0 and kinds == kinds[:p] * (depth // p))


class VisionTower(nnx.Module):
    def __init__(self, cfg: VisionConfig, runtime: Runtime):
        self.patch_embed = Linear((cfg.patch_dim, cfg.hidden_size), (None, "embed"))
        self.blocks = VisionBlock(cfg, runtime, (cfg.depth,))
        self.merger = Merger(cfg)
        self.cfg, self.runtime = cfg, runtime

    def features(self, patches_snc: jax.Array, grid_hw: tuple[int, int]) -> jax.Array:
        """Last block's output [S, n, V] of patches [S, n, C], both in merge-block-major order; grid in patches."""
        return self._features(patches_snc, grid_hw, False)[0]

    def watched_features(self, patches_snc: jax.Array, grid_hw: tuple[int, int]) -> tuple[jax.Array, Watched]:
        """`features`, and what the last full-attention block looked at. ValueError: the tower has no such block."""
        x, (received_sn, key_snh) = self._features(patches_snc, grid_hw, True)
        s, n, h = key_snh.shape
        four = self.cfg.spatial_merge_size**2
        received_sp = received_sn.reshape(s, n // four, four).mean(2)
        return x, Watched(received_sp, key_snh.reshape(s, n // four, four, h).mean(2))

    def _features(self, patches_snc, grid_hw, watch: bool):
        """Features, and of the last full-attention block what `VisionAttention.watch` gives (None unless `watch`)."""
        cfg = self.cfg
        plan = windows(tuple(grid_hw), cfg.spatial_merge_size, cfg.window)
        if patches_snc.shape[1] != len(plan.rows):
            raise ValueError(f"grid {tuple(grid_hw)} has {len(plan.rows)} patches, got {patches_snc.shape[1]}")
        cos, sin = rope.vision_cos_sin(plan.rows, plan.cols, cfg.hidden_size // cfg.num_heads)
        x = self.patch_embed(patches_snc.astype(self.runtime.dtype))
        if plan.order is not None:
            x = jnp.take(x, plan.order, axis=1)
        out = self._blocks(x, cos, sin, plan if len(plan.lengths) > 1 else None, watch)
        return out if plan.order is None else jax.tree.map(lambda a: jnp.take(a, np.argsort(plan.order), axis=1), out)

    def _blocks(self, x, cos, sin, plan, watch=False):
        """One scan over the stack; its body is one period of the window/full pattern (one layer if all are alike).

        `watch` looks at the last full block of every period, and the last period's is returned.
        """
        depth = self.cfg.depth
        kinds = tuple(plan is None or i in self.cfg.fullatt_block_indexes for i in range(depth))
        period = _period(kinds)
        make, stacked = stack_of(self.blocks)
        full = [i for i in range(period) if kinds[i]]
        if watch and not full:
            raise ValueError("no block of the vision tower has full attention: there is none to look at")

        def body(x, weights):
            seen = None
            for i in range(period):
                block = make(weights if period == 1 else jax.tree.map(lambda w, i=i: w[i], weights))
                if watch and i == full[-1]:
                    seen = block.attn.watch(block.norm1(x), cos, sin)
                x = block(x, cos, sin, None if kinds[i] else plan)
            return x, seen

        if period > 1:
            stacked = jax.tree.map(lambda w: w.reshape(depth // period, period, *w.shape[1:]), stacked)
        x, seen = jax.lax.scan(maybe_remat(body, self.runtime), x, stacked)
        return x, jax.tree.map(lambda a: a[-1], seen)

    def merge(self, features_snv: jax.Array) -> jax.Array:
        """Merged tokens [S, n / 4, D] of `features`, in raster order."""
        return self.merger(features_snv.astype(self.runtime.dtype))
