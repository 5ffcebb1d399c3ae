"""What token compressors return, and the few steps they share.

A token compressor keeps single tokens, not whole temporal patches. Signature of all of them, as `memory.compress` but
counted in tokens: `compress(vis_btpd, mask_bt, event_bt, keep, *, target_b=None, ...) -> KeptTokens`, with `keep` the
static number of tokens returned and `target_b` (int32 [B]) how many of them each video gets, default all. Those that
take `tokens_b` (int32 [B]) read that many tokens of a video's patches, the rest pads them to P; default P.

Axes: b video, t temporal patch, p token of a patch, d width, n kept token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """N tokens of each of B videos, in the order of the places they stand at, valid ones first.

    Attributes:
      tokens_bnd: [B, N, D], dtype of the input; zero where masked.
      at_bn: int32 [B, N]; the place t * P + p of the source token (a merged one has its anchor's); 0 where masked.
      mask_bn: bool [B, N].
    """

    tokens_bnd: jax.Array
    at_bn: jax.Array
    mask_bn: jax.Array


def real_tokens(mask_bt, p: int, tokens_b=None) -> jax.Array:
    """bool [B, T, P]: of valid patches the first `tokens_b` (int32 [B]) tokens, the others pad; default all."""
    real_bp = jnp.arange(p) < jnp.reshape(p if tokens_b is None else tokens_b, (-1, 1))
    return mask_bt[:, :, None] & real_bp[:, None]


def budget(mask_bt, tokens_per_patch, keep: int, target_b=None) -> jax.Array:
    """int32 [B]: tokens that each video gets, `target_b` within 0..keep and within those it has.

    `tokens_per_patch`: an int, or int32 [B].
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 token, not {keep}")
    has_b = jnp.sum(mask_bt, axis=1, dtype=jnp.int32) * tokens_per_patch
    return jnp.clip(has_b if target_b is None else target_b, 0, jnp.minimum(keep, has_b))


def gather(tokens_btpd, keep_btp, size: int) -> KeptTokens:
    """The marked tokens, at most `size` of them, in order of place."""
    b, t, p, d = tokens_btpd.shape
    keep_bm = keep_btp.reshape(b, t * p)
    order_bn = jnp.argsort(~keep_bm, axis=1, stable=True)[:, :size]
    order_bn = jnp.pad(order_bn, ((0, 0), (0, size - order_bn.shape[1])))
    mask_bn = jnp.arange(size) < jnp.sum(keep_bm, axis=1, keepdims=True)
    tokens_bnd = jnp.take_along_axis(tokens_btpd.reshape(b, t * p, d), order_bn[:, :, None], axis=1)
    return KeptTokens(
        jnp.where(mask_bn[:, :, None], tokens_bnd, 0), jnp.where(mask_bn, order_bn, 0).astype(jnp.int32), mask_bn
    )


def smallest(score, valid, count) -> jax.Array:
    """bool, marks the `count` (an array of the leading axes) smallest valid scores of the last axis; ties go first."""
    order = jnp.argsort(jnp.where(valid, score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return valid & (rank < jnp.asarray(count)[..., None])


def evenly(count_b, mask_bt) -> jax.Array:
    """int32 [B, T], sums to count_b over the valid patches: as equal as can be, what is left spread over time."""
    rank_bt = jnp.cumsum(mask_bt, axis=1) - 1
    valid_b = jnp.maximum(jnp.sum(mask_bt, axis=1, keepdims=True), 1)
    ends_bt = lambda r: (2 * r * count_b[:, None] + valid_b) // (2 * valid_b)  # noqa: E731
    return jnp.where(mask_bt, ends_bt(rank_bt + 1) - ends_bt(rank_bt), 0).astype(jnp.int32)


def clean(vis_btpd, mask_bt) -> jax.Array:
    """float32 tokens without gradient, 0 where masked: what decisions are made from."""
    return jnp.where(mask_bt[:, :, None, None], lax.stop_gradient(vis_btpd), 0).astype(jnp.float32)


def unit(x) -> jax.Array:
    """x / |x| along the last axis; 0 stays 0."""
    return x * lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-30)


def change(vis_btpd, mask_bt) -> jax.Array:
    """float32 [B, T, P]: 1 - cos(x_tp, x_sp), s the valid patch before t; infinite in the first."""
    x_btpd = unit(clean(vis_btpd, mask_bt))
    t = mask_bt.shape[1]
    last_bt = lax.cummax(jnp.where(mask_bt, jnp.arange(t), -1), axis=1)
    before_bt = jnp.concatenate([jnp.full_like(last_bt[:, :1], -1), last_bt[:, :-1]], axis=1)
    past_btpd = jnp.take_along_axis(x_btpd, jnp.maximum(before_bt, 0)[:, :, None, None], axis=1)
    return jnp.where((before_bt >= 0)[:, :, None], 1 - jnp.sum(x_btpd * past_btpd, axis=-1), jnp.inf)


def compact(mask_bt, *arrays):
    """Arrays [B, T, ...] with the valid patches first: (*arrays, but the mask second, and the patch at each place)."""
    order_bt = jnp.argsort(~mask_bt, axis=1, stable=True)
    move = lambda a: jnp.take_along_axis(a, order_bt.reshape(*order_bt.shape, *[1] * (a.ndim - 2)), axis=1)  # noqa: E731
    first, *rest = (move(a) for a in arrays)
    return (first, move(mask_bt), *rest, order_bt)
