"""Kernels for decoding on a Hopper GPU (H100, H200): a few rows against large weights, and one step of attention.

Decoding reads every weight once per token, so its floor is bytes over bandwidth. XLA's matrix products of a few rows
stop at about half of it and leave the memory idle in between; here one resident block per multiprocessor keeps a queue
of bulk copies in flight, and asks for the next matrices before it leaves (Pallas, Mosaic GPU back end, jax >= 0.11).
`available` says whether they can run; `marc_jax.models.packed` falls back to XLA where they cannot.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 8  # rows are padded to a multiple of this: the narrowest tensor-core product
TILE = 64  # outputs per block: the tensor core's other side
MAX_ROWS = 64  # beyond, a product is no longer bound by the bytes of its weights
PROCESSORS = 132  # multiprocessors of an H100 or H200
QUEUE = 128 * 1024  # bytes of weights in flight per block
STAGED = 72 * 1024  # bytes of x that a block holds
KEYS = 128  # keys per block of attention
QUERIES = 64  # queries per block of attention
NEG = -1e30


@functools.cache
def _pallas():
    """(pallas, its Mosaic GPU module), or None where this jax has no such back end."""
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError:
        return None
    return (pl, plgpu) if jax.__version_info__ >= (0, 11) else None


@functools.cache
def available() -> bool:
    """Whether the one device is a Hopper GPU and this jax can compile for it."""
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"
    return hopper and jax.device_count() == 1 and bool(_pallas())


def plan(m: int, n: int, k: int, itemsize: int = 2) -> tuple[int, int, int] | None:
    """(pieces of the contraction, columns per copy, copies per piece) for x [m, k] and w [n, k]; None if it won't fit.

    Pieces give every multiprocessor a block when there are few outputs, and bound what of x a block must hold. The
    last piece may reach past k: the copies fill in zeros.
    """
    if m % ROWS or m > MAX_ROWS or n % TILE or k % (128 // itemsize):
        return None
    width = 256 if k % 256 == 0 else 128
    tiles, steps = n // TILE, -(-k // width)
    pieces = 1

    def staged():
        return -(-steps // pieces) * width * m * 2

    while (tiles * 2 * pieces <= PROCESSORS and steps // (2 * pieces) >= 2) or staged() > STAGED:
        pieces *= 2
    return pieces, width, -(-steps // pieces)


def _tiled(dtype):
    pl, plgpu = _pallas()
    return (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))


@functools.partial(jax.jit, static_argnames=("ahead_bytes",))  # traced once, not once per layer
def stream(x_mk: jax.Array, w_nk: jax.Array, ahead: tuple = (), ahead_bytes: tuple = ()) -> jax.Array:
    """x @ w.T of a few rows, weights streamed: float32 [pieces, M, N], to be summed over the first axis.

    Weights are the left operand of the tensor core (64 outputs high), x the right one (M columns), so no row of either
    is padding. A block holds its piece of x and walks over (tile of outputs, columns) without a break:

        block 0:  tile 0: k0 k1 k2 .. | tile 132: k0 k1 k2 ..      copies run ahead over the border
        block 1:  tile 1: k0 k1 k2 .. | tile 133: ..

    Args:
      x_mk: bfloat16, M a multiple of 8 and at most 64.
      w_nk: bfloat16 or int8 (unscaled), N a multiple of 64, each output's weights contiguous.
      ahead: weights [N', K'] that the next kernels will read; `ahead_bytes` of each are asked into the second-level
        cache when a block is done, so that memory works on while small kernels run.
    """
    pl, plgpu = _pallas()
    (m, k), (n, _) = x_mk.shape, w_nk.shape
    size = w_nk.dtype.itemsize
    pieces, width, steps = plan(m, n, k, size)
    x_mk = jnp.pad(x_mk, ((0, 0), (0, pieces * steps * width - k)))
    tiles = n // TILE
    blocks = min(tiles * pieces, max(PROCESSORS // pieces, 1) * pieces)
    lanes = blocks // pieces  # blocks that share a piece of x
    narrow = w_nk.dtype == jnp.int8

    def kernel(w_gmem, x_gmem, *rest):
        *ahead_gmem, out_gmem, x_smem, barrier = rest
        block = lax.axis_index("block")
        piece, lane = lax.rem(block, pieces), lax.div(block, pieces)
        mine = lax.div(tiles - lane + lanes - 1, lanes)  # tiles lane, lane + lanes, ..
        for i in range(steps):
            columns = pl.ds((piece * steps + i) * width, width)
            plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem.at[i], barrier)

        def body(at, w_smem, acc):
            i = lax.rem(at[0], steps)
            pl.when(at[0] == 0)(lambda: plgpu.barrier_wait(barrier))

            def product(ref):
                plgpu.wgmma(ref, w_smem[...].astype(jnp.bfloat16) if narrow else w_smem, x_smem.at[i].T)
                plgpu.wgmma_wait(0)
                return ref[...]

            kept = lax.broadcast_in_dim(jnp.where(i == 0, 0.0, 1.0), acc.shape, ())
            acc = acc * kept + pl.run_scoped(product, plgpu.ACC((TILE, m), jnp.float32))

            @pl.when(i == steps - 1)
            def _():
                rows = pl.ds((lane + lax.div(at[0], steps) * lanes) * TILE, TILE)
                out_gmem.at[piece].T[rows, :] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)

            return acc

        def where(i):
            return lane + lax.div(i, steps) * lanes, piece * steps + lax.rem(i, steps)

        plgpu.emit_pipeline(
            body,
            grid=(mine * steps,),
            in_specs=[plgpu.BlockSpec((TILE, width), where, transforms=_tiled(w_nk.dtype))],
            max_concurrent_steps=QUEUE // (TILE * width * size),
            init_carry=plgpu.layout_cast(jnp.zeros((TILE, m), jnp.float32), plgpu.Layout.WGMMA),
        )(w_gmem)
        for ref, limit in zip(ahead_gmem, ahead_bytes, strict=True):
            rows, columns = ref.shape
            across = columns // 256
            boxes = min(limit // (TILE * 256 * ref.dtype.itemsize), rows // TILE * across)
            for i in range(-(-boxes // blocks)):
                box = lax.min(block + i * blocks, boxes - 1)
                at = pl.ds(lax.div(box, across) * TILE, TILE), pl.ds(lax.rem(box, across) * 256, 256)
                plgpu.async_prefetch(ref.at[at])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((pieces, m, n), jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=(
            plgpu.SMEM((steps, m, width), jnp.bfloat16, transforms=_tiled(jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=steps),
        ),
    )(w_nk, x_mk, *ahead)


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


@functools.partial(jax.jit, static_argnames=("heads", "spread"))
def partial_attention(q_bkxh, prefix, own, layer, index, bias_bs, *, heads: int, spread: int):
    """Attention of one decoding step over pieces of the keys, to be joined by `join`.

        slots:   prefix piece 0 | prefix piece 1 | .. | own keys of completion 0 | .. of completion G-1

    A piece is walked block by block with a running maximum (flash attention). It is read by all 64 queries of a tile;
    those of other completions are computed and dropped by `join`.

    Args:
      q_bkxh: bfloat16 [B, kv, X, 128], scaled and rotated; X = G * heads padded to a multiple of 64; row
        g * heads + j is query head j of completion g.
      prefix, own: KV of the whole model, [layers, B, P, kv, 128] and [layers, B, kv, G, R, 128], bfloat16, P and R
        multiples of 8: read in place.
      layer, index: int32 [1]: whose keys, and how many own slots are written.
      bias_bs: of `key_bias`.
      heads: query heads per key head, a power of two up to 64.
      spread: pieces of the prefix, at most.

    Returns:
      (weighted values [B, kv, slots, 64, 128], top scores [B, kv, slots, 64], sums of weights likewise), float32.
      Slots: tile by tile the pieces of the prefix, then one per completion.
    """
    pl, plgpu = _pallas()
    b, kv, x, h = q_bkxh.shape
    p, g = prefix.k.shape[2], own.k.shape[3]
    pieces, per = blocks(p, spread)
    tiles = x // QUERIES
    shared = tiles * pieces
    tiled = _tiled(jnp.bfloat16)
    wide = plgpu.Layout.WGMMA

    def kernel(layer_gmem, index_gmem, q_gmem, kp_gmem, vp_gmem, ko_gmem, vo_gmem, bias_gmem,
               out_gmem, top_gmem, sum_gmem, q_smem, w_smem, barrier):
        row, slot = lax.axis_index("bk"), lax.axis_index("slot")
        i, head, depth = lax.div(row, kv), lax.rem(row, kv), layer_gmem[0]
        g_own = lax.max(slot - shared, 0)
        tile = jnp.where(slot < shared, lax.div(slot, pieces), lax.div(g_own * heads, QUERIES))
        plgpu.copy_gmem_to_smem(q_gmem.at[i, head, pl.ds(tile * QUERIES, QUERIES)], q_smem, barrier)
        plgpu.barrier_wait(barrier)

        def walk(k_gmem, v_gmem, spec, first, count, offset):
            def body(at, k_smem, v_smem, carry):
                acc, top_x, sum_x = carry

                def scores(ref):
                    plgpu.wgmma(ref, q_smem, k_smem.T)
                    plgpu.wgmma_wait(0)
                    return ref[...]

                s_xk = pl.run_scoped(scores, plgpu.ACC((QUERIES, KEYS), jnp.float32))
                keys = pl.ds(offset + (first + at[0]) * KEYS, KEYS)
                bias = plgpu.load(bias_gmem.at[i, keys], layout=wide.reduce(0), optimized=False)
                s_xk = s_xk + lax.broadcast_in_dim(bias, s_xk.shape, [1])
                higher = jnp.maximum(top_x, s_xk.max(axis=1))
                weights = jnp.exp(s_xk - lax.broadcast_in_dim(higher, s_xk.shape, [0]))
                fade = jnp.exp(top_x - higher)
                w_smem[...] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()

                def values(ref):
                    plgpu.wgmma(ref, w_smem, v_smem)
                    plgpu.wgmma_wait(0)
                    return ref[...]

                new = pl.run_scoped(values, plgpu.ACC((QUERIES, h), jnp.float32))
                acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0]) + new
                return acc, higher, sum_x * fade + weights.sum(axis=1)

            start = tuple(
                plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
                for shape, value, layout in (
                    ((QUERIES, h), 0.0, wide), ((QUERIES,), NEG, wide.reduce(1)), ((QUERIES,), 0.0, wide.reduce(1))
                )
            )
            block = plgpu.BlockSpec(*spec, transforms=tiled)
            end = plgpu.emit_pipeline(
                body, grid=(count,), in_specs=[block, block], max_concurrent_steps=2, init_carry=start
            )(k_gmem, v_gmem)
            for ref, value in zip((out_gmem, top_gmem, sum_gmem), end, strict=True):
                ref[i, head, slot] = value

        @pl.when(slot < shared)
        def _():
            first = lax.rem(slot, pieces) * per
            spec = (KEYS, h), lambda at: (first + at, 0)
            count = lax.min(per, -(-p // KEYS) - first)
            walk(kp_gmem.at[depth, i, :, head], vp_gmem.at[depth, i, :, head], spec, first, count, 0)

        @pl.when(slot >= shared)
        def _():
            spec = (KEYS, h), lambda at: (at, 0)
            count = lax.div(index_gmem[0] + KEYS - 1, KEYS)
            refs = (ref.at[depth, i, head, g_own] for ref in (ko_gmem, vo_gmem))
            walk(*refs, spec, 0, count, p + -p % KEYS)

    slots = shared + g
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=(f32((b, kv, slots, QUERIES, h)), f32((b, kv, slots, QUERIES)), f32((b, kv, slots, QUERIES))),
        grid=(b * kv, slots),
        grid_names=("bk", "slot"),
        scratch_types=(
            plgpu.SMEM((QUERIES, h), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((QUERIES, KEYS), jnp.bfloat16, transforms=tiled),
            plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, index, q_bkxh, prefix.k, prefix.v, own.k, own.v, bias_bs)


def join(parts, s_bkgm: jax.Array, v_bkgh: jax.Array) -> jax.Array:
    """Joins `partial_attention` with the step's own token (score s, value v): float32 [B, kv, G, heads, 128].

    Written slot by slot, so that XLA makes one elementwise kernel of it.
    """
    out, top, total = parts
    b, kv, g, heads = s_bkgm.shape
    per_tile = QUERIES // heads
    tiles = -(-g // per_tile)
    pieces = (out.shape[2] - g) // tiles

    def of_prefix(a, piece):  # [B, kv, slots, 64, ..] -> [B, kv, G, heads, ..]
        a = a[:, :, piece : tiles * pieces : pieces]
        return a.reshape(b, kv, tiles * per_tile, heads, *a.shape[4:])[:, :, :g]

    def of_own(a):
        a = a[:, :, tiles * pieces :].reshape(b, kv, g, per_tile, heads, *a.shape[4:])
        return jnp.stack([a[:, :, i, i % per_tile] for i in range(g)], axis=2)

    slots = [tuple(of_prefix(a, piece) for a in (out, top, total)) for piece in range(pieces)]
    slots.append(tuple(of_own(a) for a in (out, top, total)))
    highest = functools.reduce(jnp.maximum, [t for _, t, _ in slots], s_bkgm)
    weight = jnp.exp(s_bkgm - highest)
    summed, weights = weight[..., None] * v_bkgh.astype(jnp.float32)[:, :, :, None], weight
    for values, t, w in slots:
        scale = jnp.exp(t - highest)
        summed, weights = summed + values * scale[..., None], weights + w * scale
    return summed / weights[..., None]


def padded_heads(heads: int) -> int:
    """Query heads per key head, padded to a power of two (at most 64)."""
    return 2 ** math.ceil(math.log2(heads))
