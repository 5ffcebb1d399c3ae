"""A few rows against large weights on a Hopper GPU: the floor is the bytes of the weights over the bandwidth.

XLA's matrix products of a few rows stop at about half of it. Here one resident block per multiprocessor keeps a queue
of bulk copies in flight. Weights are the left operand of the tensor core (64 outputs high), x the right one (M
columns), so no row of either is padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax import hopper

ROWS = 8  # rows are padded to a multiple of this: the narrowest tensor-core product
TILE = 64  # outputs per block: the tensor core's other side
MAX_ROWS = 64  # beyond, a product is no longer bound by the bytes of its weights
QUEUE = 128 * 1024  # bytes of weights in flight per block
STAGED = 72 * 1024  # bytes of x that a block holds


class Plan(NamedTuple):
    """How the contraction is cut: `pieces` of `steps` copies of `width` columns; the last may reach past its end."""

    pieces: int
    width: int
    steps: int


class Walk(NamedTuple):
    """Who computes what: `lanes` blocks share a piece of x, and own tiles lane, lane + lanes, ... of `tiles`.

    block 0:  tile 0: k0 k1 k2 .. | tile 132: k0 k1 k2 ..      copies run ahead over the border
    block 1:  tile 1: k0 k1 k2 .. | tile 133: ..

    With `halves` = 2 a tile of the gate is followed by the same tile of up.
    """

    plan: Plan
    tiles: int
    lanes: int
    halves: int

    @property
    def copies(self) -> int:
        """Of one tile."""
        return self.halves * self.plan.steps


def plan(m: int, n: int, k: int, itemsize: int = 2) -> Plan | None:
    """For x [m, k] and w [n, k]; None if it won't fit.

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

    while (tiles * 2 * pieces <= hopper.PROCESSORS and steps // (2 * pieces) >= 2) or staged() > STAGED:
        pieces *= 2
    return Plan(pieces, width, -(-steps // pieces))


@jax.jit  # traced once, not once per layer
def matmul(x_mk: jax.Array, w_nk: jax.Array) -> jax.Array:
    """x @ w.T of a few rows: float32 [pieces, M, N], to be summed over the first axis.

    Args:
      x_mk: bfloat16, M a multiple of 8 and at most 64.
      w_nk: bfloat16 or int8 (unscaled), N a multiple of 64, each output's weights contiguous.
    """
    m, n = len(x_mk), len(w_nk)
    pieces = plan(m, *w_nk.shape, w_nk.dtype.itemsize).pieces
    return _stream(x_mk, w_nk, jax.ShapeDtypeStruct((pieces, m, n), jnp.float32), 1)


@jax.jit
def glu(x_mk: jax.Array, w_nk: jax.Array) -> jax.Array:
    """silu(x @ gate.T) * (x @ up.T), bfloat16 [M, N / 2], of w = [gate; up].

    As `matmul`, for bfloat16 weights, and where `plan` gives one piece.
    """
    return _stream(x_mk, w_nk, jax.ShapeDtypeStruct((len(x_mk), len(w_nk) // 2), jnp.bfloat16), 2)


def _stream(x_mk, w_nk, out, halves: int):
    _, plgpu = hopper.pallas()
    (m, k), n = x_mk.shape, len(w_nk)
    how = plan(m, n, k, w_nk.dtype.itemsize)
    tiles = n // TILE // halves
    rounds = -(-tiles // max(hopper.PROCESSORS // how.pieces, 1))
    walk = Walk(how, tiles, -(-tiles // rounds), halves)  # each lane as many tiles as the others
    return plgpu.kernel(
        functools.partial(_kernel, walk),
        out_type=out,
        grid=(walk.lanes * how.pieces,),
        grid_names=("block",),
        scratch_types=(
            plgpu.SMEM((how.steps, m, how.width), jnp.bfloat16, transforms=hopper.tiled(jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=how.steps),
        ),
    )(w_nk, x_mk)


def _kernel(walk: Walk, w_gmem, x_gmem, out_gmem, x_smem, barrier):
    pl, plgpu = hopper.pallas()
    (pieces, width, steps), block = walk.plan, lax.axis_index("block")
    piece, lane = lax.rem(block, pieces), lax.div(block, pieces)
    mine = lax.div(walk.tiles - lane + walk.lanes - 1, walk.lanes)
    for i in range(steps):  # columns past the end are filled with zeros, of x as of the weights
        columns = pl.ds((piece * steps + i) * width, width)
        plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem.at[i], barrier)

    def tile_of(at):
        return lane + lax.div(at, walk.copies) * walk.lanes

    def body(at, w_smem, carry):
        acc, *gate = carry
        j = lax.rem(at[0], walk.copies)
        i = lax.rem(j, steps)
        pl.when(at[0] == 0)(lambda: plgpu.barrier_wait(barrier))

        def flag(yes):
            return lax.broadcast_in_dim(jnp.where(yes, 1.0, 0.0), acc.shape, ())

        if gate:
            turn = flag(j == steps)
            gate = [gate[0] * (1.0 - turn) + acc * turn]
        acc = acc * flag(i != 0) + _product(w_smem, x_smem.at[i])
        to = out_gmem if gate else out_gmem.at[piece]
        pl.when(j == walk.copies - 1)(lambda: _store(to, tile_of(at[0]), acc, *gate))
        return (acc, *gate)

    def box(at):
        j = lax.rem(at, walk.copies)
        return tile_of(at) + lax.div(j, steps) * walk.tiles, piece * steps + lax.rem(j, steps)

    zeros = plgpu.layout_cast(jnp.zeros((TILE, x_smem.shape[1]), jnp.float32), plgpu.Layout.WGMMA)
    plgpu.emit_pipeline(
        body,
        grid=(mine * walk.copies,),
        in_specs=[plgpu.BlockSpec((TILE, width), box, transforms=hopper.tiled(w_gmem.dtype))],
        max_concurrent_steps=QUEUE // (TILE * width * w_gmem.dtype.itemsize),
        init_carry=(zeros,) * walk.halves,
    )(w_gmem)


def _product(w_smem, x_smem):
    """w @ x.T of one copy, float32 [64, M]."""
    pl, plgpu = hopper.pallas()

    def product(acc):
        plgpu.wgmma(acc, w_smem[...].astype(jnp.bfloat16) if w_smem.dtype == jnp.int8 else w_smem, x_smem.T)
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((TILE, x_smem.shape[0]), jnp.float32))


def _store(out_gmem, tile, acc, gate=None):
    """Writes a tile; with a gate silu(gate) * acc, rounded to bfloat16 where the plain layer rounds."""
    pl, plgpu = hopper.pallas()
    if gate is not None:
        gate = hopper.rounded(gate)
        gate = hopper.rounded(gate / (1.0 + jnp.exp(-gate)))
        acc = (gate * hopper.rounded(acc)).astype(jnp.bfloat16)
    out_gmem.T[pl.ds(tile * TILE, TILE), :] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)


@functools.partial(jax.jit, static_argnames="eps")
def add_norm(x_md: jax.Array, parts_pmd: jax.Array, scale_d: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x + the sum of `matmul`'s parts, its RMSNorm), bfloat16 [M, D], D a multiple of 512; one block per row.

    Rounds where the plain layers do.
    """
    _, plgpu = hopper.pallas()
    p, m, d = parts_pmd.shape
    rows = plgpu.Layout.WG_STRIDED((d,), vec_size=4)

    def kernel(x_gmem, parts_gmem, scale_gmem, out_gmem, norm_gmem):
        row = lax.axis_index("row")

        def read(ref):
            return plgpu.load(ref, layout=rows, optimized=False).astype(jnp.float32)

        added = functools.reduce(jnp.add, [read(parts_gmem.at[i, row]) for i in range(p)])
        x = hopper.rounded(read(x_gmem.at[row]) + hopper.rounded(added))
        inverse = lax.rsqrt(jnp.sum(x * x) / d + eps)
        out_gmem[row] = x.astype(jnp.bfloat16)
        normed = hopper.rounded(x * lax.broadcast_in_dim(inverse, (d,), ())) * read(scale_gmem)
        norm_gmem[row] = normed.astype(jnp.bfloat16)

    row = jax.ShapeDtypeStruct((m, d), jnp.bfloat16)
    return plgpu.kernel(kernel, out_type=(row, row), grid=(m,), grid_names=("row",))(x_md, parts_pmd, scale_d)
