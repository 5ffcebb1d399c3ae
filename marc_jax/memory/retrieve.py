"""Which events a question is about: exact cosine top-k, always returned in time order.

Embeddings are L2-normalised beforehand, so cosine is a dot product. A tie goes to the smaller id, on one device and
on many. Exact search is bandwidth-bound and fast enough up to millions of events (`approx=True` uses the TPU's
`approx_max_k`), so there is no index to build and none to go stale.

Axes: b question (or video), e event of a video, n event of an archive, d embedding, k chosen event.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

MARGIN = 8  # least number of rows nominated beyond k before the exact ranking of an archive search
SCORES = 1 << 23  # scores that an archive search holds at a time
TILE_BYTES = 2 << 20  # rows that are multiplied at a time on a CPU
GROUP = 64  # scores of which only the maximum is looked at first


def topk_events(query_bd, event_emb_bed, event_mask_be, k, *, rule=None, **rule_args):
    """The k events of each question's own video that are nearest to the question.

    Args:
      query_bd: [B, D] L2-normalised question embeddings.
      event_emb_bed: [B, E, D] L2-normalised event embeddings, events in time order.
      event_mask_be: bool [B, E].
      k: most events returned.
      rule: None, always k; "mass" or "gap", fewer where the scores say so (see `enough`, which takes `rule_args`).

    Returns:
      ids_bk int32 [B, k], ascending (time order), valid ones first, 0 where not valid; valid_bk bool [B, k].
    """
    score_be = jnp.einsum("bd,bed->be", query_bd, event_emb_bed, precision="highest",
                          preferred_element_type=jnp.float32)  # fmt: skip
    return topk_scores(score_be, event_mask_be, k, rule=rule, **rule_args)


def topk_scores(score_be, event_mask_be, k, *, rule=None, **rule_args):
    """As `topk_events`, from scores [B, E]."""
    num_events = score_be.shape[1]
    score_be = jnp.where(event_mask_be, score_be, -jnp.inf)
    if num_events < k:
        score_be = jnp.pad(score_be, ((0, 0), (0, k - num_events)), constant_values=-jnp.inf)
    best_bk, ids_bk = lax.top_k(score_be, k)
    valid_bk = best_bk > -jnp.inf
    if rule is not None:
        valid_bk &= enough(score_be, k, rule=rule, **rule_args)
    return in_time_order(ids_bk, valid_bk)


def in_time_order(ids_bk, valid_bk):
    """Sorts chosen ids ascending, the invalid ones last and set to 0."""
    last = jnp.iinfo(jnp.int32).max
    ids_bk = jnp.sort(jnp.where(valid_bk, ids_bk, last).astype(jnp.int32), axis=1)
    valid_bk = ids_bk < last
    return jnp.where(valid_bk, ids_bk, 0), valid_bk


def enough(score_be, k_max, *, rule="mass", mass=0.8, temperature=0.05, k_min=1):
    """How many of the k_max best events are worth reading (compression.md 5). Masked scores are -inf.

    "mass": the fewest whose softmax(score / temperature) sums to at least `mass`.
    "gap": cut at the largest drop between neighbours among the k_max best.

    Returns bool [B, k_max] over events sorted by score, a prefix of True of length k_min..k_max.
    """
    best_bk, _ = lax.top_k(score_be, k_max)
    finite_bk = best_bk > -jnp.inf
    if rule == "mass":
        prob_bk = jnp.exp(best_bk / temperature - jax.nn.logsumexp(score_be / temperature, axis=1, keepdims=True))
        prob_bk = jnp.where(finite_bk, prob_bk, 0)
        count_b = 1 + jnp.sum(jnp.cumsum(prob_bk, axis=1) < mass, axis=1)
    elif rule == "gap":
        both_bk = finite_bk[:, 1:] & finite_bk[:, :-1]
        drop_bk = jnp.where(both_bk, best_bk[:, :-1] - best_bk[:, 1:], -jnp.inf)
        count_b = 1 + jnp.argmax(drop_bk, axis=1) if k_max > 1 else jnp.ones(score_be.shape[0], jnp.int32)
    else:
        raise ValueError(f"rule must be 'mass' or 'gap', not {rule!r}")
    return jnp.arange(k_max)[None, :] < jnp.clip(count_b, k_min, k_max)[:, None]


def gather_patches(ids_bk, valid_bk, event_start_be, event_len_be, max_len):
    """Temporal patches of the chosen events, each event padded to `max_len`.

    Args:
      ids_bk, valid_bk: chosen events, from `topk_events`.
      event_start_be, event_len_be: int32 [B, E], first temporal patch and number of patches of each event.
      max_len: static; longer events are cut to max_len patches spread evenly over them, first and last included.

    Returns:
      patch_bn int32 [B, k * max_len] (0 where masked), mask_bn bool, slot_bn int32 (0..k-1, which chosen event a
      patch belongs to: the `event_bt` of `memory.compress`).
    """
    b, k = ids_bk.shape
    start_bk = jnp.take_along_axis(event_start_be, ids_bk, axis=1)[:, :, None]
    len_bk = jnp.where(valid_bk, jnp.take_along_axis(event_len_be, ids_bk, axis=1), 0)[:, :, None]
    i = jnp.arange(max_len)[None, None, :]
    mask_bki = i < len_bk
    if max_len > 1:
        spread_bki = (i * (len_bk - 1) + (max_len - 1) // 2) // (max_len - 1)
    else:
        spread_bki = len_bk // 2
    patch_bki = jnp.where(mask_bki, start_bk + jnp.where(len_bk > max_len, spread_bki, i), 0)
    slot_bki = jnp.broadcast_to(jnp.arange(k)[None, :, None], (b, k, max_len))
    flat = functools.partial(jnp.reshape, shape=(b, k * max_len))
    return flat(patch_bki).astype(jnp.int32), flat(mask_bki), flat(slot_bki).astype(jnp.int32)


def gather_events(vis_btpd, ids_bk, valid_bk, event_start_be, event_len_be, max_len):
    """Visual tokens of the chosen events: (tokens [B, k * max_len, P, D], mask_bn, slot_bn, patch_bn)."""
    patch_bn, mask_bn, slot_bn = gather_patches(ids_bk, valid_bk, event_start_be, event_len_be, max_len)
    vis_bnpd = jnp.take_along_axis(vis_btpd, patch_bn[:, :, None, None], axis=1)
    return vis_bnpd, mask_bn, slot_bn, patch_bn


def search(query_qd, emb_nd, k, *, mask_n=None, owner_n=None, owner_q=None, block=None, approx=False):
    """Exact top-k of an archive, block by block: only [Q, block] scores exist at any time.

    A matrix product rounds equal rows differently in different places, so it only nominates some more than k rows;
    those are scored again, each by the same sum in the same order, and ranked by (score, id). If the last nominee's
    score is not below the k-th by more than rounding can explain (more near-equal rows than nominees), the question is
    answered anew by the plain sum over all rows. So equal rows tie exactly, the smaller id wins, and the answer does
    not depend on blocks or shards.

    Args:
      query_qd: [Q, D]; emb_nd: [N, D], both L2-normalised; scores are float32 whatever their dtype. The product runs
        in bfloat16 (with float32 sums) only if both are bfloat16: rounding the questions alone would lose exactness.
      k: events per question.
      mask_n: optional bool [N]; False rows are never returned.
      owner_n, owner_q: optional int32 [N] and [Q]; a question is answered only from rows with its owner (a video or
        a camera), from all rows if its owner is negative.
      block: rows scored at a time; default, as many as keep Q x block at SCORES, or all of them if they are fewer.
      approx: nominate by `lax.approx_max_k` in place of `lax.top_k`, and do not check the nominees. Each of the true
        nominees is found with probability 0.95 or better on TPU (2206.14286), where it is faster; elsewhere XLA
        computes it exactly.

    Returns:
      score_qk float32 [Q, k], best first, -inf where fewer than k rows qualify; ids_qk int32, -1 there.
    """
    query_qd, emb_nd = jnp.asarray(query_qd), jnp.asarray(emb_nd)
    n, d = emb_nd.shape
    if n == 0:
        shape = (query_qd.shape[0], k)
        return jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
    mask_n = jnp.ones(n, bool) if mask_n is None else mask_n
    owner_n = jnp.zeros(n, jnp.int32) if owner_n is None else owner_n
    owner_q = jnp.full(query_qd.shape[0], -1, jnp.int32) if owner_q is None else owner_q
    wide = k + max(MARGIN, k // 4)
    rows = (emb_nd, mask_n, owner_n)
    near_qc, ids_qc = _nominate(query_qd, owner_q, rows, wide, block, _product, approx)
    score_qk, ids_qk = _score_again(query_qd, emb_nd, near_qc, ids_qc, k)
    if approx or n <= wide:
        return score_qk, ids_qk
    # Both sums are off by at most d * 2^-24 for unit vectors, in whatever order; twice that for other accumulators.
    slack = 4 * d * 2.0**-24
    sure_q = (near_qc[:, -1] + slack < score_qk[:, -1]) | (near_qc[:, -1] == -jnp.inf)

    def answer(args):
        query_d, owner, sure, score_k, ids_k = args

        def anew():
            one = (query_d[None], owner[None])
            score_qk, ids_qk = _score_again(one[0], emb_nd, *_nominate(*one, rows, wide, block, _plain_sum, False), k)
            return score_qk[0], ids_qk[0]

        return lax.cond(sure, lambda: (score_k, ids_k), anew)

    return lax.cond(
        jnp.all(sure_q),
        lambda: (score_qk, ids_qk),
        lambda: lax.map(answer, (query_qd, owner_q, sure_q, score_qk, ids_qk)),
    )


def _product(query_qd, emb_nd):
    return jnp.einsum("qd,nd->qn", query_qd, emb_nd, precision="highest", preferred_element_type=jnp.float32)


def _plain_sum(query_qd, rows):
    """Rows [N, D], the same for every question, or [Q, C, D]."""
    return jnp.sum(query_qd.astype(jnp.float32)[:, None, :] * rows.astype(jnp.float32), axis=-1)


def _nominate(query_qd, owner_q, rows, wide, block, score, approx):
    """The `wide` rows with the largest `score`, the smaller id on a tie: (score_qc, ids_qc), -inf and -1 beyond."""
    num, (n, d) = query_qd.shape[0], rows[0].shape
    size = min(block or max(SCORES // max(num, 1), GROUP), n)
    tile = size
    if jax.default_backend() == "cpu":  # a tile is copied to the cache once; a larger slice goes to memory and back
        tile = min(size, max(TILE_BYTES // (d * rows[0].dtype.itemsize) // GROUP, 1) * GROUP)
    tiles = -(-size // tile)
    pick = functools.partial(lax.approx_max_k, recall_target=0.95) if approx else _top_k

    def score_tile(first):
        start = jnp.minimum(first, n - tile)  # the last tile overlaps the one before it: one shape for all
        emb_md, mask_m, owner_m = (lax.dynamic_slice_in_dim(x, start, tile) if tile < n else x for x in rows)
        new_m = start + jnp.arange(tile) >= first
        open_qm = (mask_m & new_m)[None, :] & ((owner_q[:, None] < 0) | (owner_q[:, None] == owner_m[None, :]))
        return jnp.where(open_qm, score(query_qd, emb_md), -jnp.inf)

    def score_block(first):
        if tiles == 1:
            return score_tile(first)
        put = lambda j, out: lax.dynamic_update_slice(out, score_tile(first + j * tile), (0, j * tile))  # noqa: E731
        return lax.fori_loop(0, tiles, put, jnp.zeros((num, tiles * tile), jnp.float32))

    def visit(i, best):
        first = i * tiles * tile
        score_qc, at_qc = pick(score_block(first), min(wide, tiles * tile))
        ids_qc = jnp.minimum(first + at_qc // tile * tile, n - tile) + at_qc % tile
        score_qc, at_qc = lax.top_k(jnp.concatenate([best[0], score_qc], axis=1), wide)
        return score_qc, jnp.take_along_axis(jnp.concatenate([best[1], ids_qc], axis=1), at_qc, axis=1)

    best = (jnp.full((num, wide), -jnp.inf, jnp.float32), jnp.full((num, wide), -1, jnp.int32))
    return lax.fori_loop(0, -(-n // (tiles * tile)), visit, best)


def _top_k(score_qm, k):
    """`lax.top_k`, by maxima of GROUP neighbours first: the k best lie in the k groups with the best maxima.

    Also on a tie: groups go by (maximum, smaller id), and each of k groups holds one that is as good as any left out.
    """
    num, size = score_qm.shape
    if size // GROUP < 4 * k:
        return lax.top_k(score_qm, k)
    score_qm = jnp.pad(score_qm, ((0, 0), (0, -size % GROUP)), constant_values=-jnp.inf)
    score_qgm = score_qm.reshape(num, -1, GROUP)
    _, group_qk = lax.top_k(jnp.max(score_qgm, axis=2), k)
    group_qk = jnp.sort(group_qk, axis=1)  # ids ascend, so that the smaller one wins a tie
    left_qc = jnp.take_along_axis(score_qgm, group_qk[:, :, None], axis=1).reshape(num, k * GROUP)
    best_qk, at_qk = lax.top_k(left_qc, k)
    return best_qk, jnp.take_along_axis(group_qk, at_qk // GROUP, axis=1) * GROUP + at_qk % GROUP


def _score_again(query_qd, emb_nd, near_qc, ids_qc, k):
    score_qc = _plain_sum(query_qd, emb_nd[jnp.maximum(ids_qc, 0)])
    return rank(jnp.where(near_qc > -jnp.inf, score_qc, -jnp.inf), ids_qc, k)


def rank(score_qc, ids_qc, k):
    """The best k of C candidates by (score, smaller id): (score_qk, ids_qk), id -1 where the score is -inf."""
    ids_qc = jnp.where(score_qc > -jnp.inf, ids_qc, jnp.iinfo(jnp.int32).max)
    negative_qc, ids_qc = lax.sort((-score_qc, ids_qc), dimension=1, num_keys=2)
    score_qk = -negative_qc[:, :k]
    return score_qk, jnp.where(score_qk > -jnp.inf, ids_qc[:, :k], -1)


def search_sharded(mesh, axis, query_qd, emb_nd, k, *, mask_n=None, owner_n=None, owner_q=None, **options):
    """`search` with the archive's rows sharded over one mesh axis (N divisible by its size; pad with mask_n).

    Each shard finds its own k winners; only those, shards x Q x k, travel. Same results and ties as `search`.
    """
    n, shards = emb_nd.shape[0], mesh.shape[axis]
    if n % shards:
        raise ValueError(f"{n} rows do not divide over {shards} shards of mesh axis {axis!r}: pad with mask_n")
    mask_n = jnp.ones(n, bool) if mask_n is None else mask_n
    owner_n = jnp.zeros(n, jnp.int32) if owner_n is None else owner_n
    owner_q = jnp.full(query_qd.shape[0], -1, jnp.int32) if owner_q is None else owner_q

    def local(query_qd, emb_nd, mask_n, owner_n, owner_q):
        score_qk, ids_qk = search(query_qd, emb_nd, k, mask_n=mask_n, owner_n=owner_n, owner_q=owner_q, **options)
        ids_qk = jnp.where(ids_qk >= 0, ids_qk + lax.axis_index(axis) * (n // shards), -1)
        # [shards, Q, k] winners become [Q, shards * k] candidates
        gather = functools.partial(lax.all_gather, axis_name=axis, axis=1, tiled=True)
        return rank(gather(score_qk), gather(ids_qk), k)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(axis), P(axis), P(axis), P()), out_specs=(P(), P()), check_vma=False
    )
    return sharded(query_qd, emb_nd, mask_n, owner_n, owner_q)
