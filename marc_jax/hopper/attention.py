"""One decoding step of attention on a Hopper GPU: a prompt's keys read once for all completions, then their own.

    slots:   prefix piece 0 | prefix piece 1 | .. | completion 0: new token, own keys | .. | completion G-1

Every slot is a block. It walks over its keys with a running maximum (flash attention) for all 64 queries of a tile
(64 / `padded_heads` completions); `join` drops those of other completions and adds the slots up.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax import hopper

KEYS = 128  # keys read at once
QUERIES = 64  # queries per block
NEG = -1e30


def blocks(p: int, spread: int) -> tuple[int, int]:
    """(pieces of the prefix, blocks of keys per piece): at most `spread` pieces."""
    count = -(-p // KEYS)
    per = -(-count // spread)
    return -(-count // per), per


def key_bias(prefix_mask_bp: jax.Array, index: jax.Array, r: int) -> jax.Array:
    """float32 [B, keys]: 0 where a key may be read, NEG elsewhere; prefix, then own slots, each padded to KEYS."""
    b, p = prefix_mask_bp.shape
    ok_prefix = jnp.pad(prefix_mask_bp, ((0, 0), (0, -p % KEYS)))
    ok_own = jnp.broadcast_to(jnp.arange(r + -r % KEYS) < index, (b, r + -r % KEYS))
    return jnp.where(jnp.concatenate([ok_prefix, ok_own], 1), 0.0, NEG).astype(jnp.float32)


class Slots(NamedTuple):
    """Who reads what: `pieces` of the prefix for each tile of completions (`shared` slots), then one per completion."""

    g: int
    kv: int
    wide: int  # padded query heads per key head
    per_tile: int  # completions per tile
    pieces: int
    per_piece: int  # blocks of keys
    shared: int
    keys: int  # of the prefix


def slots(g: int, kv: int, heads: int, p: int, spread: int) -> Slots:
    wide = padded_heads(heads)
    per_tile = QUERIES // wide
    pieces, per_piece = blocks(p, spread)
    return Slots(g, kv, wide, per_tile, pieces, per_piece, -(-g // per_tile) * pieces, p)


@functools.partial(jax.jit, static_argnames=("heads", "spread"))
def partial_attention(x_bgjh, prefix, own, layer, index, bias_bs, *, heads: int, spread: int):
    """Attention of one decoding step, slot by slot, to be joined by `join`.

    Args:
      x_bgjh: bfloat16 [B, G, J, 128], of `step_rows`: this step's queries (rotated and scaled), keys (rotated), values.
      prefix, own: KV of the whole model, [layers, B, P, kv, 128] and [layers, B, kv, G, R, 128], bfloat16, P and R
        multiples of 8: read in place.
      layer, index: int32 [1]: whose keys, and how many own slots are written.
      bias_bs: of `key_bias`.
      heads: query heads per key head.
      spread: pieces of the prefix, at most.

    Returns:
      (weighted values [B, kv, slots, 64, 128], top scores [B, kv, slots, 64], sums of weights likewise), float32.
      Slots: tile by tile the pieces of the prefix, then one per completion.
    """
    _, plgpu = hopper.pallas()
    b, g, _, h = x_bgjh.shape
    plan = slots(g, prefix.k.shape[3], heads, prefix.k.shape[2], spread)
    count, tiled = plan.shared + g, hopper.tiled(jnp.bfloat16)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = (b, plan.kv, count, QUERIES)
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(f32((*out, h)), f32(out), f32(out)),
        grid=(b * plan.kv, count),
        grid_names=("bk", "slot"),
        scratch_types=(
            plgpu.SMEM((QUERIES, h), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((QUERIES, KEYS), jnp.bfloat16, transforms=tiled),
            plgpu.Barrier(num_arrivals=plan.per_tile),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, index, x_bgjh, prefix.k, prefix.v, own.k, own.v, bias_bs)


def _kernel(plan: Slots, layer, index, x_gmem, kp_gmem, vp_gmem, ko_gmem, vo_gmem, bias_gmem,
            out_gmem, top_gmem, sum_gmem, q_smem, w_smem, barrier):
    pl, plgpu = hopper.pallas()
    row, slot, depth = lax.axis_index("bk"), lax.axis_index("slot"), layer[0]
    i, head = lax.div(row, plan.kv), lax.rem(row, plan.kv)
    mine = lax.max(slot - plan.shared, 0)  # whose completion's slot this is, if it is one
    tile = jnp.where(slot < plan.shared, lax.div(slot, plan.pieces), lax.div(mine, plan.per_tile))
    for j in range(plan.per_tile):  # past G rows repeat: dropped by join
        queries = x_gmem.at[i, lax.min(tile * plan.per_tile + j, plan.g - 1), pl.ds(head * plan.wide, plan.wide)]
        plgpu.copy_gmem_to_smem(queries, q_smem.at[pl.ds(j * plan.wide, plan.wide)], barrier)
    walk = functools.partial(_walk, q_smem, w_smem, barrier, bias_gmem.at[i])

    def store(*end):
        for ref, value in zip((out_gmem, top_gmem, sum_gmem), end, strict=True):
            ref[i, head, slot] = value

    @pl.when(slot < plan.shared)
    def _():
        first = lax.rem(slot, plan.pieces) * plan.per_piece
        count = lax.min(plan.per_piece, -(-plan.keys // KEYS) - first)
        store(*walk(kp_gmem.at[depth, i, :, head], vp_gmem.at[depth, i, :, head], first, count, 0))

    @pl.when(slot >= plan.shared)
    def _():
        count = lax.div(index[0] + KEYS - 1, KEYS)
        offset = plan.keys + -plan.keys % KEYS
        end = walk(ko_gmem.at[depth, i, head, mine], vo_gmem.at[depth, i, head, mine], 0, count, offset)
        pl.when(count == 0)(lambda: plgpu.barrier_wait(barrier))
        first_new = plan.kv * plan.wide + head
        store(*_with_new_token(*end, q_smem, *(x_gmem.at[i, mine, first_new + n * plan.kv] for n in range(2))))


def _walk(q_smem, w_smem, barrier, bias_gmem, k_gmem, v_gmem, first, count, offset):
    """Flash attention over `count` blocks of keys from `first`: (weighted values, top scores, sums of weights)."""
    pl, plgpu = hopper.pallas()
    grid, h = plgpu.Layout.WGMMA, q_smem.shape[1]

    def body(at, k_smem, v_smem, carry):
        acc, top_x, sum_x = carry
        pl.when(at[0] == 0)(lambda: plgpu.barrier_wait(barrier))
        keys = pl.ds(offset + (first + at[0]) * KEYS, KEYS)
        bias = plgpu.load(bias_gmem.at[keys], layout=grid.reduce(0), optimized=False)
        s_xk = _product(q_smem, k_smem.T, KEYS)
        s_xk = s_xk + lax.broadcast_in_dim(bias, s_xk.shape, [1])
        higher = jnp.maximum(top_x, s_xk.max(axis=1))
        weights = jnp.exp(s_xk - lax.broadcast_in_dim(higher, s_xk.shape, [0]))
        fade = jnp.exp(top_x - higher)
        w_smem[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0]) + _product(w_smem, v_smem, h)
        return acc, higher, sum_x * fade + weights.sum(axis=1)

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    block = plgpu.BlockSpec((KEYS, h), lambda at: (first + at, 0), transforms=hopper.tiled(jnp.bfloat16))
    start = full((QUERIES, h), 0.0, grid), *(full((QUERIES,), value, grid.reduce(1)) for value in (NEG, 0.0))
    return plgpu.emit_pipeline(
        body, grid=(count,), in_specs=[block, block], max_concurrent_steps=2, init_carry=start
    )(k_gmem, v_gmem)


def _product(a_smem, b_smem, n: int):
    pl, plgpu = hopper.pallas()

    def product(acc):
        plgpu.wgmma(acc, a_smem, b_smem)
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((QUERIES, n), jnp.float32))


def _with_new_token(acc, top_x, sum_x, q_smem, k_gmem, v_gmem):
    """The walk's end with the step's own key and value [h] added: they are not in the cache yet."""
    _, plgpu = hopper.pallas()
    grid = plgpu.Layout.WGMMA

    def wide(ref):
        row = plgpu.load(ref, layout=grid.reduce(0), optimized=False).astype(jnp.float32)
        return lax.broadcast_in_dim(row, acc.shape, [1])

    score = (plgpu.load(q_smem, layout=grid).astype(jnp.float32) * wide(k_gmem)).sum(axis=1)
    higher = jnp.maximum(top_x, score)
    fade, weight = jnp.exp(top_x - higher), jnp.exp(score - higher)
    fade_xh, weight_xh = (lax.broadcast_in_dim(a, acc.shape, [0]) for a in (fade, weight))
    return acc * fade_xh + wide(v_gmem) * weight_xh, higher, sum_x * fade + weight


def step_rows(q_bgnh: jax.Array, k_bgkh: jax.Array, v_bgkh: jax.Array) -> jax.Array:
    """What `partial_attention` reads of a step: [B, G, J, h], the heads of each group padded to `padded_heads`.

        q of group 0 (padded) | q of group 1 (padded) | .. | k 0 k 1 .. | v 0 v 1 .. | zeros to a multiple of 8
    """
    b, g, n, h = q_bgnh.shape
    kv = k_bgkh.shape[2]
    wide = padded_heads(n // kv)
    q = jnp.pad(q_bgnh.reshape(b, g, kv, n // kv, h), ((0, 0),) * 3 + ((0, wide - n // kv), (0, 0)))
    rows = jnp.concatenate([q.reshape(b, g, kv * wide, h), k_bgkh, v_bgkh], 2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 8), (0, 0)))


def join(parts, g: int, heads: int) -> jax.Array:
    """Joins `partial_attention`'s slots: float32 [B, G, kv, heads, 128].

    Written slot by slot, so that XLA makes one elementwise kernel of it.
    """
    b, kv, slots = parts[0].shape[:3]
    wide = padded_heads(heads)
    per_tile = QUERIES // wide
    tiles = -(-g // per_tile)
    pieces = (slots - g) // tiles

    def of_prefix(a, piece):  # [B, kv, slots, 64, ..] -> [B, kv, G, heads, ..]
        a = a[:, :, piece : tiles * pieces : pieces]
        return a.reshape(b, kv, tiles * per_tile, wide, *a.shape[4:])[:, :, :g, :heads]

    def of_own(a):
        a = a[:, :, tiles * pieces :].reshape(b, kv, g, per_tile, wide, *a.shape[4:])
        return jnp.stack([a[:, :, i, i % per_tile, :heads] for i in range(g)], axis=2)

    each = [tuple(of_prefix(a, piece) for a in parts) for piece in range(pieces)]
    each.append(tuple(of_own(a) for a in parts))
    highest = functools.reduce(jnp.maximum, [top for _, top, _ in each])
    summed, weights = 0.0, 0.0
    for values, top, total in each:
        scale = jnp.exp(top - highest)
        summed, weights = summed + values * scale[..., None], weights + total * scale
    return (summed / weights[..., None]).swapaxes(1, 2)


def padded_heads(heads: int) -> int:
    """Query heads per key head, padded to a power of two from 8 to 64."""
    return max(8, 2 ** math.ceil(math.log2(heads)))
