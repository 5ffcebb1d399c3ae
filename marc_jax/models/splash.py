"""Splash attention: flash attention for TPUs that skips blocks its mask leaves empty (a Pallas kernel of JAX's own).

One mask serves prompts and groups: G suffixes of R tokens over a shared prefix of P keys, where a prompt is the case
P = 0, G = 1. All rows of a group are one long query axis, so the kernel reads the prefix once per block of queries and
never holds [B, G, .., P] scores; blocks that would join two suffixes, or look ahead, are not in its grid.

    keys:          prefix     g=0     g=1          which keys are real is data: segment ids (0 = padding)
    query g=0      1 1 1 1    1 0     . .          `.`: whole blocks, skipped
                   1 1 1 1    1 1     . .
    query g=1      1 1 1 1    . .     1 0
                   1 1 1 1    . .     1 1

Backward is the kernel's own. Pallas calls are not partitioned by XLA: on a mesh each call is split by
`sharding.split_attention`. Devices that are not TPUs run the same kernel in Pallas' interpreter, which is for tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as library

from marc_jax.sharding import mesh_of, split_attention, ways_of_heads

LANES = 128  # the kernel's smallest block
BLOCKS = (512, 256, LANES)
WINDOW = 2 * LANES  # rows shorter than this leave most of a block empty


@dataclasses.dataclass(frozen=True)
class Suffixes(library.Mask):
    """Static mask [queries, prefix + queries]: all of the prefix, and causally those of the own suffix of `length`."""

    prefix: int
    length: int
    queries: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries, self.prefix + self.queries

    def __getitem__(self, index) -> np.ndarray:
        query, key = (np.arange(*part.indices(size)) for part, size in zip(index, self.shape, strict=True))
        query, key = query[:, None], key[None, :] - self.prefix
        return (key < 0) | ((query >= key) & (query // self.length == key // self.length))


def fits(length: int) -> bool:
    """Whether rows of this length are worth the kernel (one head of one row is at least one block of 128 x 128).

    A vision window (64 patches) would fill a quarter of the smallest block and take a grid step for each of its heads,
    thousands per layer; as a batched matmul of XLA its scores are small and the matrix unit is full.
    """
    return length >= WINDOW


def causal(q_blnh, k_blkh, v_blkh, mask_bl, segment_bl=None) -> jax.Array:
    """As `attention.causal`; the segments of packed rows are the kernel's own segment ids (0 = padding)."""
    length = mask_bl.shape[1]
    block = _block(length)
    q, k, v = (_to(a, block).swapaxes(1, 2) for a in (q_blnh * q_blnh.shape[-1] ** -0.5, k_blkh, v_blkh))
    mask = Suffixes(0, q.shape[2], q.shape[2])
    if segment_bl is None:
        keys, queries = _to(mask_bl, block), None
    else:
        queries = _to(segment_bl, block)
        keys = jnp.where(_to(mask_bl, block), queries, 0)
    return _call(mask, (block, block), q, k, v, keys, queries).swapaxes(1, 2)[:, :length]


def bidirectional(q_blnh, k_blnh, v_blnh, lengths=None) -> jax.Array:
    """As `attention.bidirectional`."""
    b, length = q_blnh.shape[:2]
    block = _block(length)
    q, k, v = (_to(a, block).swapaxes(1, 2) for a in (q_blnh * q_blnh.shape[-1] ** -0.5, k_blnh, v_blnh))
    ends = jnp.full((b,), length) if lengths is None else jnp.asarray(lengths)
    real = None if lengths is None and q.shape[2] == length else jnp.arange(q.shape[2]) < ends[:, None]
    mask = library.FullMask((q.shape[2], q.shape[2]))
    return _call(mask, (block, block), q, k, v, real).swapaxes(1, 2)[:, :length]


def prefix_causal(q_bgrnh, k_bgrkh, v_bgrkh, mask_bgr, k_bpkh, v_bpkh, prefix_mask_bp) -> jax.Array:
    """As `attention.prefix_causal`."""
    b, g, r, n, h = q_bgrnh.shape
    # From a block on, suffixes begin at block borders: then only diagonal blocks are partly masked.
    length = r if r < LANES else -(-r // LANES) * LANES
    block = _block(length if r >= LANES else g * length)

    def flat(a):  # [b, g, r, ...] -> [b, whole blocks, ...]
        a = _to(a, length, axis=2)
        return _to(a.reshape(b, g * length, *a.shape[3:]), block)

    keys = min(block, _block(prefix_mask_bp.shape[1]))
    k, v, real = (
        jnp.concatenate([_to(prefix, keys), flat(own)], axis=1)
        for prefix, own in ((k_bpkh, k_bgrkh), (v_bpkh, v_bgrkh), (prefix_mask_bp, mask_bgr))
    )
    q = flat(q_bgrnh * h**-0.5)
    mask = Suffixes(k.shape[1] - q.shape[1], length, q.shape[1])
    out = _call(mask, (block, keys), *(a.swapaxes(1, 2) for a in (q, k, v)), real)
    return out.swapaxes(1, 2)[:, : g * length].reshape(b, g, length, n, h)[:, :, :r]


def _block(length: int) -> int:
    """The largest block whose padding adds at most an eighth."""
    return next((size for size in BLOCKS if 8 * (-length % size) <= length), LANES)


def _to(a: jax.Array, block: int, axis: int = 1) -> jax.Array:
    """Padded with zeros (False) to a multiple of `block`."""
    short = -a.shape[axis] % block
    return a if not short else jnp.pad(a, [(0, short if i == axis else 0) for i in range(a.ndim)])


@functools.lru_cache(maxsize=128)
def _kernel(mask: library.Mask, heads: int, blocks: tuple[int, int], interpret: bool):
    queries, keys = blocks
    with jax.ensure_compile_time_eval():  # its tables are constants, also when first met inside a trace
        return library.make_splash_mha(
            library.MultiHeadMask([mask] * heads),
            block_sizes=library.BlockSizes(
                block_q=queries, block_kv=keys, block_q_dkv=queries, block_kv_dkv=keys, block_q_dq=queries,
                block_kv_dq=keys,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )  # fmt: skip


def _call(mask, blocks, q_bnqh, k_bksh, v_bksh, key_bs, query_bq=None) -> jax.Array:
    """Scaled queries [b, n, q, h] over keys and values [b, k, s, h]. -> [b, n, q, h].

    `key_bs`: which keys are real; with `query_bq`, the segments of keys and queries, who see those of their own.
    """
    mesh = mesh_of(q_bnqh)
    device = None if mesh is None else getattr(mesh, "abstract_device", None)
    platform = jax.default_backend() if device is None else device.platform
    n, kv = q_bnqh.shape[1], k_bksh.shape[1]
    kernel = _kernel(mask, n // ways_of_heads(mesh, n, kv), blocks, platform != "tpu")

    def local(q, k, v, keys, queries):
        if keys is None:
            return jax.vmap(kernel)(q, k, v)
        if queries is None:
            queries = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
        return jax.vmap(lambda q, k, v, own, key: kernel(q, k, v, library.SegmentIds(own, key)))(q, k, v, queries, keys)

    key_bs = None if key_bs is None else key_bs.astype(jnp.int32)
    return split_attention(local, q_bnqh, (k_bksh, v_bksh), key_bs, query_bq, heads=-3)
