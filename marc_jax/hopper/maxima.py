"""The best of every few scores of a search on a Hopper GPU, taken inside the matrix product.

XLA writes all scores and reads them again to take maxima. Here a block keeps a tile of scores in its accumulators and
writes one number for every `fold` of them: the scores themselves never exist in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax import hopper

QUERIES, ROWS, STEP = 128, 256, 64  # a block's tile, and the columns of one copy
WARPGROUPS = 2  # each computes half of the questions
QUEUE = 4  # copies in flight
BAND = 16  # tiles of rows that the questions visit while they lie in the second-level cache


def fits(query_qd: jax.Array, emb_nd: jax.Array) -> bool:
    """Whether the kernel can multiply these here."""
    halves = query_qd.dtype == emb_nd.dtype == jnp.bfloat16
    return halves and emb_nd.shape[1] % STEP == 0 and hopper.available()


@functools.partial(jax.jit, static_argnames="fold")
def maxima(query_qd: jax.Array, emb_nd: jax.Array, fold: int) -> jax.Array:
    """float32 [tiles * ROWS / fold, Q]: the best of `fold` scores, float32 sums of bfloat16 products.

        tile t, entry i:  rows t * ROWS + i + (ROWS / fold) * j,  j = 0 .. fold - 1     (rows past the end score 0)

        warpgroup 0:  questions 0..63    x  256 rows   (64 x 256 accumulators)
        warpgroup 1:  questions 64..127  x  the same
        warpgroup 2:  copies columns of both, four steps ahead

    Args:
      query_qd: bfloat16 [Q, D], D a multiple of 64. emb_nd: bfloat16 [N, D].
      fold: a divisor of ROWS / 8.
    """
    _, plgpu = hopper.pallas()
    (num, _), n = query_qd.shape, len(emb_nd)
    query_qd = jnp.pad(query_qd, ((0, -num % QUERIES), (0, 0)))  # what is written is whole tiles
    best_gq = plgpu.kernel(
        functools.partial(_kernel, fold),
        out_type=jax.ShapeDtypeStruct((-(-n // ROWS) * ROWS // fold, len(query_qd)), jnp.float32),
        grid=(hopper.PROCESSORS,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(query_qd, emb_nd)
    return best_gq[:, :num]


def _kernel(fold: int, q_gmem, x_gmem, out_gmem):
    pl, plgpu = hopper.pallas()

    def pipeline(body, context):
        box = functools.partial(
            plgpu.BlockSpec, index_map=lambda k: (0, k), transforms=hopper.tiled(jnp.bfloat16), delay_release=1
        )
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(q_gmem.shape[1] // STEP,),
            memory_registers=40,
            in_specs=[box((QUERIES, STEP)), box((ROWS, STEP))],
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=QUEUE,
            compute_context=context,
        )

    def nothing(*_):
        """Stands for the body where only the buffers are asked for."""

    buffers = pipeline(nothing, nothing).get_allocations(q_gmem, x_gmem)
    walk = functools.partial(_walk, pipeline, fold, q_gmem, x_gmem, out_gmem)
    pl.run_scoped(walk, buffers, collective_axes="warpgroup")


def _walk(pipeline, fold: int, q_gmem, x_gmem, out_gmem, buffers):
    """All tiles of this block, bands of rows first."""
    pl, plgpu = hopper.pallas()
    group, entries = lax.axis_index("warpgroup"), ROWS // fold
    grid = (q_gmem.shape[0] // QUERIES, out_gmem.shape[0] // entries)
    mine = QUERIES // WARPGROUPS

    @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
    def _(at):
        i, tile = plgpu.planar_snake(at.index[0], grid, 0, BAND)

        def step(_, q_smem, x_smem, acc):
            plgpu.wgmma(acc, q_smem.at[pl.ds(group * mine, mine)], x_smem.T)
            plgpu.wgmma_wait(1)  # the step before is done with its buffers
            return acc

        def compute(run):
            def with_accumulator(acc):
                run(acc)
                scores = acc[...]
                best = functools.reduce(
                    jnp.maximum, [scores[:, j * entries : (j + 1) * entries] for j in range(fold)]
                )
                to = pl.ds(i * QUERIES + group * mine, mine), pl.ds(tile * entries, entries)
                out_gmem.T[to] = plgpu.layout_cast(best, plgpu.Layout.WGMMA_TRANSPOSED)

            pl.run_scoped(with_accumulator, plgpu.ACC((mine, ROWS), jnp.float32))

        rows = (q_gmem.at[pl.ds(i * QUERIES, QUERIES)], x_gmem.at[pl.ds(tile * ROWS, ROWS)])
        pipeline(step, compute)(*rows, allocations=buffers)
