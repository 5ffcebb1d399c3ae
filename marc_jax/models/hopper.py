"""Kernels for decoding on a Hopper GPU (H100, H200): a few rows against large weights, and one step of attention.

Decoding reads every weight once per token, so its floor is bytes over bandwidth. XLA's matrix products of a few rows
stop at about half of it; here one resident block per multiprocessor keeps a queue of bulk copies in flight (Pallas,
Mosaic GPU back end, jax >= 0.11; docs/performance.md has what they reach). `available` says whether they can run;
`marc_jax.models.packed` falls back to XLA where they cannot.
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


@functools.partial(jax.jit, static_argnames="glu")  # traced once, not once per layer
def stream(x_mk: jax.Array, w_nk: jax.Array, *, glu: bool = False) -> jax.Array:
    """x @ w.T of a few rows, weights streamed: float32 [pieces, M, N], to be summed over the first axis.

    Weights are the left operand of the tensor core (64 outputs high), x the right one (M columns), so no row of either
    is padding. A block holds its piece of x and walks over (tile of outputs, columns) without a break:

        block 0:  tile 0: k0 k1 k2 .. | tile 132: k0 k1 k2 ..      copies run ahead over the border
        block 1:  tile 1: k0 k1 k2 .. | tile 133: ..

    Args:
      x_mk: bfloat16, M a multiple of 8 and at most 64.
      w_nk: bfloat16 or int8 (unscaled), N a multiple of 64, each output's weights contiguous.
      glu: w is [gate; up]: returns silu(x @ gate.T) * (x @ up.T), bfloat16 [M, N / 2]. A block walks over a tile of the
        gate, then over the same tile of up. Needs `plan` to give one piece, and bfloat16 weights.
    """
    pl, plgpu = _pallas()
    (m, k), (n, _) = x_mk.shape, w_nk.shape
    size = w_nk.dtype.itemsize
    pieces, width, steps = plan(m, n, k, size)
    halves = 2 if glu else 1
    tiles = n // TILE // halves
    walk = halves * steps  # copies per tile
    rounds = -(-tiles // max(PROCESSORS // pieces, 1))
    lanes = -(-tiles // rounds)  # blocks that share a piece of x, each with as many tiles as the others
    block_count = lanes * pieces
    narrow = w_nk.dtype == jnp.int8

    def kernel(w_gmem, x_gmem, out_gmem, x_smem, barrier):
        block = lax.axis_index("block")
        piece, lane = lax.rem(block, pieces), lax.div(block, pieces)
        mine = lax.div(tiles - lane + lanes - 1, lanes)  # tiles lane, lane + lanes, ..
        for i in range(steps):  # columns past the end are filled with zeros, of x as of the weights
            columns = pl.ds((piece * steps + i) * width, width)
            plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem.at[i], barrier)

        def store(at, acc, gate):
            rows = pl.ds((lane + lax.div(at, walk) * lanes) * TILE, TILE)
            turned = plgpu.Layout.WGMMA_TRANSPOSED
            if not glu:
                out_gmem.at[piece].T[rows, :] = plgpu.layout_cast(acc, turned)
                return
            # Products and activation round to bfloat16 where the plain layer does.
            gate = gate.astype(jnp.bfloat16).astype(jnp.float32)
            gate = (gate / (1.0 + jnp.exp(-gate))).astype(jnp.bfloat16).astype(jnp.float32)
            y_nm = (gate * acc.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
            out_gmem.T[rows, :] = plgpu.layout_cast(y_nm, turned)

        def body(at, w_smem, carry):
            acc, *gate = carry
            j = lax.rem(at[0], walk)
            i = lax.rem(j, steps)
            pl.when(at[0] == 0)(lambda: plgpu.barrier_wait(barrier))

            def product(ref):
                plgpu.wgmma(ref, w_smem[...].astype(jnp.bfloat16) if narrow else w_smem, x_smem.at[i].T)
                plgpu.wgmma_wait(0)
                return ref[...]

            def flag(yes):
                return lax.broadcast_in_dim(jnp.where(yes, 1.0, 0.0), acc.shape, ())

            if glu:
                turn = flag(j == steps)
                gate = [gate[0] * (1.0 - turn) + acc * turn]
            acc = acc * flag(i != 0) + pl.run_scoped(product, plgpu.ACC((TILE, m), jnp.float32))
            pl.when(j == walk - 1)(lambda: store(at[0], acc, *(gate or [None])))
            return (acc, *gate)

        def where(at):
            j = lax.rem(at, walk)
            tile = lane + lax.div(at, walk) * lanes + lax.div(j, steps) * tiles
            return tile, piece * steps + lax.rem(j, steps)

        zeros = plgpu.layout_cast(jnp.zeros((TILE, m), jnp.float32), plgpu.Layout.WGMMA)
        plgpu.emit_pipeline(
            body,
            grid=(mine * walk,),
            in_specs=[plgpu.BlockSpec((TILE, width), where, transforms=_tiled(w_nk.dtype))],
            max_concurrent_steps=QUEUE // (TILE * width * size),
            init_carry=(zeros,) * halves,
        )(w_gmem)

    if glu:
        out = jax.ShapeDtypeStruct((m, n // 2), jnp.bfloat16)
    else:
        out = jax.ShapeDtypeStruct((pieces, m, n), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(block_count,),
        grid_names=("block",),
        scratch_types=(
            plgpu.SMEM((steps, m, width), jnp.bfloat16, transforms=_tiled(jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=steps),
        ),
    )(w_nk, x_mk)


@functools.partial(jax.jit, static_argnames="eps")
def add_norm(x_md: jax.Array, parts_pmd: jax.Array, scale_d: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x + the sum of `stream`'s parts, its RMSNorm), bfloat16 [M, D], D a multiple of 512; one block per row.

    Rounds where the plain layers do.
    """
    pl, plgpu = _pallas()
    p, m, d = parts_pmd.shape
    rows = plgpu.Layout.WG_STRIDED((d,), vec_size=4)

    def kernel(x_gmem, parts_gmem, scale_gmem, out_gmem, norm_gmem):
        row = lax.axis_index("row")

        def read(ref):
            return plgpu.load(ref, layout=rows, optimized=False).astype(jnp.float32)

        def rounded(a):
            return a.astype(jnp.bfloat16).astype(jnp.float32)

        added = functools.reduce(jnp.add, [read(parts_gmem.at[i, row]) for i in range(p)])
        x = rounded(read(x_gmem.at[row]) + rounded(added))
        inverse = lax.rsqrt(jnp.sum(x * x) / d + eps)
        out_gmem[row] = x.astype(jnp.bfloat16)
        normed = rounded(x * lax.broadcast_in_dim(inverse, (d,), ())) * read(scale_gmem)
        norm_gmem[row] = normed.astype(jnp.bfloat16)

    row = jax.ShapeDtypeStruct((m, d), jnp.bfloat16)
    return plgpu.kernel(kernel, out_type=(row, row), grid=(m,), grid_names=("row",))(x_md, parts_pmd, scale_d)


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
def partial_attention(x_bgjh, prefix, own, layer, index, bias_bs, *, heads: int, spread: int):
    """Attention of one decoding step over pieces of the keys, to be joined by `join`.

        slots:   prefix piece 0 | prefix piece 1 | .. | completion 0: new token, own keys | .. | completion G-1

    A piece is walked block by block with a running maximum (flash attention). It is read by all 64 queries of a tile
    (64 / `padded_heads` completions); those of other completions are computed and dropped by `join`.

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
    pl, plgpu = _pallas()
    b, g, _, h = x_bgjh.shape
    kv, p = prefix.k.shape[3], prefix.k.shape[2]
    wide = padded_heads(heads)
    per_tile = QUERIES // wide
    pieces, per = blocks(p, spread)
    shared = -(-g // per_tile) * pieces
    tiled, grid = _tiled(jnp.bfloat16), plgpu.Layout.WGMMA

    def kernel(layer_gmem, index_gmem, x_gmem, kp_gmem, vp_gmem, ko_gmem, vo_gmem, bias_gmem,
               out_gmem, top_gmem, sum_gmem, q_smem, w_smem, barrier):
        row, slot = lax.axis_index("bk"), lax.axis_index("slot")
        i, head, depth = lax.div(row, kv), lax.rem(row, kv), layer_gmem[0]
        mine = lax.max(slot - shared, 0)
        tile = jnp.where(slot < shared, lax.div(slot, pieces), lax.div(mine, per_tile))
        for j in range(per_tile):  # past G rows repeat: dropped by join
            queries = x_gmem.at[i, lax.min(tile * per_tile + j, g - 1), pl.ds(head * wide, wide)]
            plgpu.copy_gmem_to_smem(queries, q_smem.at[pl.ds(j * wide, wide)], barrier)

        def walk(k_gmem, v_gmem, first, count, offset):
            def body(at, k_smem, v_smem, carry):
                acc, top_x, sum_x = carry
                pl.when(at[0] == 0)(lambda: plgpu.barrier_wait(barrier))
                keys = pl.ds(offset + (first + at[0]) * KEYS, KEYS)
                bias = plgpu.load(bias_gmem.at[i, keys], layout=grid.reduce(0), optimized=False)

                def scores(ref):
                    plgpu.wgmma(ref, q_smem, k_smem.T)
                    plgpu.wgmma_wait(0)
                    return ref[...]

                s_xk = pl.run_scoped(scores, plgpu.ACC((QUERIES, KEYS), jnp.float32))
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

            def full(shape, value, layout):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            block = plgpu.BlockSpec((KEYS, h), lambda at: (first + at, 0), transforms=tiled)
            start = full((QUERIES, h), 0.0, grid), *(full((QUERIES,), value, grid.reduce(1)) for value in (NEG, 0.0))
            return plgpu.emit_pipeline(
                body, grid=(count,), in_specs=[block, block], max_concurrent_steps=2, init_carry=start
            )(k_gmem, v_gmem)

        def store(*end):
            for ref, value in zip((out_gmem, top_gmem, sum_gmem), end, strict=True):
                ref[i, head, slot] = value

        @pl.when(slot < shared)
        def _():
            first = lax.rem(slot, pieces) * per
            refs = (ref.at[depth, i, :, head] for ref in (kp_gmem, vp_gmem))
            store(*walk(*refs, first, lax.min(per, -(-p // KEYS) - first), 0))

        @pl.when(slot >= shared)
        def _():
            def new(which):
                ref = x_gmem.at[i, mine, kv * wide + which * kv + head]
                wide_h = plgpu.load(ref, layout=grid.reduce(0), optimized=False).astype(jnp.float32)
                return lax.broadcast_in_dim(wide_h, (QUERIES, h), [1])

            refs = (ref.at[depth, i, head, mine] for ref in (ko_gmem, vo_gmem))
            count = lax.div(index_gmem[0] + KEYS - 1, KEYS)
            acc, top_x, sum_x = walk(*refs, 0, count, p + -p % KEYS)
            pl.when(count == 0)(lambda: plgpu.barrier_wait(barrier))
            score = (plgpu.load(q_smem, layout=grid).astype(jnp.float32) * new(0)).sum(axis=1)
            higher = jnp.maximum(top_x, score)
            fade, weight = jnp.exp(top_x - higher), jnp.exp(score - higher)
            fade_xh, weight_xh = (lax.broadcast_in_dim(a, acc.shape, [0]) for a in (fade, weight))
            store(acc * fade_xh + new(1) * weight_xh, higher, sum_x * fade + weight)

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
            plgpu.Barrier(num_arrivals=per_tile),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, index, x_bgjh, prefix.k, prefix.v, own.k, own.v, bias_bs)


def step_rows(q_bgnh: jax.Array, k_bgkh: jax.Array, v_bgkh: jax.Array) -> jax.Array:
    """What `partial_attention` reads of a step: [B, G, J, h], the heads of each group padded to `padded_heads`.

        q of group 0 (padded) | q of group 1 (padded) | .. | k 0 k 1 .. | v 0 v 1 .. | zeros to a multiple of 8
    """
    b, g, n, h = q_bgnh.shape
    kv = k_bgkh.shape[2]
    wide = padded_heads(n // kv)
    q = jnp.pad(q_bgnh.reshape(b, g, kv, n // kv, h), ((0, 0),) * 3 + ((0, wide - n // kv), (0, 0)))
    rows = jnp.concatenate([q.reshape(b, g, kv * wide, h), k_bgkh, v_bgkh], 2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % ROWS), (0, 0)))


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
