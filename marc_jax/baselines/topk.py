"""Frame selection by relevance alone: the patches most similar to the question, optionally kept apart in time.

With apart = a, greedily: take the best open patch, close all within a - 1 patches of it, until nothing is open
(non-maximum suppression over time). a = 1 is plain top-k, the baseline of BOLT (2503.21483) and AKS (2502.21271).

Signature of all frame selectors: `select(score_bt, mask_bt, keep, *, target_b=None, ...) -> (slot_bk, valid_bk)`, with
score float [B, T] (similarity of each temporal patch and the question), mask bool [B, T], `keep` the static number of
places and `target_b` (int32 [B]) how many of them each video gets, default all. Slots int32 ascend, valid ones first,
0 where not valid.
"""

import jax.numpy as jnp
from jax import lax

from marc_jax.memory.retrieve import in_time_order


def select(score_bt, mask_bt, keep, *, target_b=None, apart=1):
    """Arguments and result as above."""
    b, t = mask_bt.shape
    count_b = jnp.full(b, keep) if target_b is None else target_b

    def take(i, state):
        open_bt, slot_bk, valid_bk = state
        best_b = jnp.argmax(jnp.where(open_bt, score_bt, -jnp.inf), axis=1)
        take_b = jnp.any(open_bt, axis=1) & (i < count_b)
        open_bt &= jnp.abs(jnp.arange(t) - best_b[:, None]) >= apart
        return open_bt, slot_bk.at[:, i].set(best_b), valid_bk.at[:, i].set(take_b)

    state = (mask_bt, jnp.zeros((b, keep), jnp.int32), jnp.zeros((b, keep), bool))
    _, slot_bk, valid_bk = lax.fori_loop(0, keep, take, state)
    return in_time_order(slot_bk, valid_bk)
