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

from marc_jax.hopper import maxima

MARGIN = 8  # least number of rows nominated beyond k before the exact ranking of an archive search
SCORES = 1 << 23  # scores that an archive search holds at a time
TILE_BYTES = 2 << 20  # rows that are multiplied at a time on a CPU
ANEW = 1 << 16  # rows at a time when a question is answered anew
FOLD = 8  # rows of which only the best score is kept until the best are scored again
STRIDE = 64  # numbers of a row that are added to as many partial sums at a time, in the order that decides
EVEN = 1024  # large tiles are multiples of it: whole tiles of a matrix unit
LANES = 8  # partial sums of a row's product on a CPU: one AVX register
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
    """Exact top-k of an archive, block by block: only [block, Q] scores exist at any time.

    A matrix product rounds equal rows differently in different places, so it only nominates: of every FOLD rows the
    best score is kept, and the rows behind some more than k of those maxima are scored again, each by the same sum in
    the same order, and ranked by (score, id). If the last nominated maximum is not below the k-th score by more than
    rounding can explain (more near-equal rows than nominees), the question is answered anew by that sum over all
    rows. So equal rows tie exactly, the smaller id wins, and the answer does not depend on blocks or shards.

    Args:
      query_qd: [Q, D]; emb_nd: [N, D], both L2-normalised; scores are float32 whatever their dtype. The product runs
        in bfloat16 (with float32 sums) only if both are bfloat16: rounding the questions alone would lose exactness.
      k: events per question.
      mask_n: optional bool [N]; False rows are never returned.
      owner_n, owner_q: optional int32 [N] and [Q], together; a question is answered only from rows with its owner (a
        video or a camera), from all rows if its owner is negative.
      block: rows scored at a time; default, as many as keep block x Q at SCORES (on a CPU, in the cache).
      approx: nominate by `lax.approx_max_k` in place of the maxima, and do not check the nominees. Each of the true
        nominees is found with probability 0.95 or better on TPU (2206.14286), where it is faster; elsewhere XLA
        computes it exactly.

    Returns:
      score_qk float32 [Q, k], best first, -inf where fewer than k rows qualify; ids_qk int32, -1 there.
    """
    query_qd, emb_nd = jnp.asarray(query_qd), jnp.asarray(emb_nd)
    num, (n, d) = query_qd.shape[0], emb_nd.shape
    if n == 0:
        return jnp.full((num, k), -jnp.inf, jnp.float32), jnp.full((num, k), -1, jnp.int32)
    mask_n, owner_n, owner_q = jax.tree.map(jnp.asarray, (mask_n, owner_n, owner_q))
    if owner_n is None or owner_q is None:  # nothing to compare; comparing costs, with many questions
        owner_n = owner_q = None
    wide = k + max(MARGIN, k // 4) * (2 if _half(query_qd, emb_nd) else 1)
    rows = (emb_nd, mask_n, owner_n)
    if n <= 2 * FOLD * wide:  # so few that all are nominated
        ids_c = jnp.pad(jnp.arange(n, dtype=jnp.int32), (0, max(k - n, 0)), constant_values=-1)
        ids_qc = jnp.broadcast_to(ids_c, (num, ids_c.shape[0]))
        return _score_again(query_qd, owner_q, rows, ids_qc, k)
    if approx:
        pick = functools.partial(lax.approx_max_k, recall_target=0.95)
        ids_qc = _best_rows(query_qd, owner_q, rows, wide, block or SCORES // max(num, 1), _product, pick)
        return _score_again(query_qd, owner_q, rows, ids_qc, k)
    ids_qc, rest_q = _behind_maxima(query_qd, owner_q, rows, wide, block)
    score_qk, ids_qk = _score_again(query_qd, owner_q, rows, ids_qc, k)
    # Both sums are off by at most d * 2^-24 for unit vectors, in whatever order; twice that for other accumulators.
    slack = 4 * d * 2.0**-24
    sure_q = (rest_q + slack < score_qk[:, -1]) | (rest_q == -jnp.inf)

    def anew(found):
        sure_q, score_qk, ids_qk = found
        q = jnp.argmin(sure_q)
        one = (query_qd[q][None], None if owner_q is None else owner_q[q][None], rows)
        score_k, ids_k = _score_again(*one, _best_rows(*one, wide, block or ANEW, _ordered, _top_k), k)
        return sure_q.at[q].set(True), score_qk.at[q].set(score_k[0]), ids_qk.at[q].set(ids_k[0])

    found = (sure_q, score_qk, ids_qk)
    # Not only an early exit: XLA moves work that does not depend on q out of the loop, but not out of the condition.
    again = functools.partial(lax.while_loop, lambda found: ~jnp.all(found[0]), anew)
    return lax.cond(jnp.all(sure_q), lambda found: found, again, found)[1:]


def _product(query_qd, emb_nd, start, size, dtype=jnp.float32):
    """Scores [size, Q] of the rows from `start` on."""
    emb_md = lax.dynamic_slice_in_dim(emb_nd, start, size)
    return jnp.einsum("md,qd->mq", emb_md, query_qd, precision="highest", preferred_element_type=dtype)


def _reduction(query_qd, emb_nd, start, size):
    """[size, 1] of one question: on a GPU it reads at full speed, where a product with one column may not."""
    emb_md = lax.dynamic_slice_in_dim(emb_nd, start, size).astype(jnp.float32)
    return jnp.sum(emb_md * query_qd.astype(jnp.float32), axis=1, keepdims=True)


def _ordered(query_qd, emb_nd, start, size):
    """[size, 1] of one question, rounded alike for equal rows."""
    return _ordered_sum(query_qd, lax.dynamic_slice_in_dim(emb_nd, start, size))[:, None]


def _ordered_sum(query_d, emb_d):
    """float32 sum of products over the last axis, in a written order: a compiler's own order changes with shapes.

    The clip changes no finite number; it keeps product and sum from being contracted to one rounding in some places.
    """
    limit = jnp.finfo(jnp.float32).max
    part_d = jnp.clip(emb_d.astype(jnp.float32) * query_d.astype(jnp.float32), -limit, limit)
    part_d = jnp.pad(part_d, [(0, 0)] * (part_d.ndim - 1) + [(0, -part_d.shape[-1] % STRIDE)])
    part_l = sum(part_d[..., i : i + STRIDE] for i in range(0, part_d.shape[-1], STRIDE))
    # Written out before they are added up: fused, each thread of a GPU would read half a row on its own, and slowly.
    part_l = lax.optimization_barrier(part_l)
    while (half := part_l.shape[-1] // 2) > 0:
        part_l = part_l[..., :half] + part_l[..., half:]
    return part_l[..., 0]


def _lane_sum(query_qd, emb_nd, start, size):
    """[size, 1] of one question in the order in which memory reads fastest on a CPU.

    XLA's matrix-vector product walks eight rows at a time, too short a stretch of each for the prefetcher. Here LANES
    neighbours of one row are added to LANES sums, row after row: one stream, as fast as memory gives it.
    """
    d = emb_nd.shape[1]
    cut = lambda i, width: lax.dynamic_slice(emb_nd, (start, i), (size, width)).astype(jnp.float32)  # noqa: E731
    query_qd = query_qd.astype(jnp.float32)
    even = d - d % LANES
    lanes_ml = sum(cut(i, LANES) * query_qd[:, i : i + LANES] for i in range(0, even, LANES))
    score_m1 = jnp.dot(lanes_ml, jnp.ones((LANES, 1)), precision="highest")  # a `sum` would be fused and lose the lanes
    if even < d:
        score_m1 += jnp.sum(cut(even, d - even) * query_qd[:, even:], axis=1, keepdims=True)
    return score_m1


def _only(score_mq, owner_q, mask_m, owner_m):
    """Scores [M, Q], -inf where a row may not answer a question. Whatever is None does not matter."""
    if mask_m is not None:
        score_mq = jnp.where(mask_m[:, None], score_mq, -jnp.inf)
    if owner_m is not None:
        score_mq = jnp.where((owner_q < 0) | (owner_q == owner_m[:, None]), score_mq, -jnp.inf)
    return score_mq


def _behind_maxima(query_qd, owner_q, rows, wide, block):
    """The rows behind the `wide` best maxima, one of every FOLD rows: (ids int32 [Q, wide * FOLD], rest_q).

    No row outside has a product above rest_q. Ids are -1 where a row is there already.
    """
    num, (n, d) = query_qd.shape[0], rows[0].shape

    def nominated(best_gq, tile, last):
        # Entry i of a tile is the best of its rows i, i + step, ..; the tile at the end starts no later than `last`.
        step = tile // FOLD
        near_qc, group_qc = _top_k(best_gq, wide)
        first_qc = group_qc // step * tile
        at_qc = jnp.minimum(first_qc, last) + group_qc % step
        ids_qcj = at_qc[:, :, None] + step * jnp.arange(FOLD)
        ids_qcj = jnp.where((ids_qcj >= first_qc[:, :, None]) & (ids_qcj < n), ids_qcj, -1)
        rest_q = near_qc[:, -1].astype(jnp.float32)
        if best_gq.dtype == jnp.bfloat16:  # what was rounded to rest_q may have been that much more
            rest_q = jnp.where(rest_q > -jnp.inf, rest_q + jnp.abs(rest_q) * 2.0**-8, rest_q)
        return ids_qcj.reshape(num, wide * FOLD).astype(jnp.int32), rest_q

    def tiled(score, size, dtype=jnp.float32):
        # All tiles of one size, a multiple of FOLD; the last one starts earlier, so that it ends with the rows.
        tiles = max(-(-n // max(block or size, FOLD)), 2 if n % FOLD else 1)
        tile = -(-n // (tiles * FOLD)) * FOLD
        if tiles > 1 and tile >= 4 * EVEN:
            tile = min(-(-tile // EVEN) * EVEN, n // FOLD * FOLD)
        step = tile // FOLD

        def visit(i, best_gq):
            start = jnp.minimum(i * tile, n - tile)
            only = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, tile), rows[1:])
            score_mq = _only(score(query_qd, rows[0], start, tile), owner_q, *only)
            best_sq = functools.reduce(jnp.maximum, (score_mq[j * step : (j + 1) * step] for j in range(FOLD)))
            return lax.dynamic_update_slice(best_gq, best_sq, (i * step, 0))

        tiles = -(-n // tile)
        return nominated(lax.fori_loop(0, tiles, visit, jnp.zeros((tiles * step, num), dtype)), tile, n - tile)

    def on_gpu():
        if num == 1:
            return tiled(_reduction, SCORES)
        if rows[1:] == (None, None) and maxima.fits(query_qd, rows[0]):
            return nominated(maxima.maxima(query_qd, rows[0], FOLD), maxima.ROWS, n)
        # Scores leave the chip and come back: half the bytes if the product is one of halves anyway.
        kept = jnp.bfloat16 if _half(query_qd, rows[0]) else jnp.float32
        return tiled(functools.partial(_product, dtype=kept), SCORES // max(num, 1), kept)

    in_cache = TILE_BYTES // max(d * rows[0].dtype.itemsize, 4 * num)
    return lax.platform_dependent(
        cpu=lambda: tiled(_lane_sum if num == 1 and d >= LANES else _product, in_cache),
        cuda=on_gpu,
        default=lambda: tiled(_product, SCORES // max(num, 1)),
    )


def _half(query_qd, emb_nd):
    return query_qd.dtype == emb_nd.dtype == jnp.bfloat16


def _best_rows(query_qd, owner_q, rows, wide, size, score, pick):
    """Ids [Q, wide] of the rows with the largest `score`, the smaller id on a tie; -1 beyond those there are."""
    num, n = query_qd.shape[0], rows[0].shape[0]
    size = max(min(size, n), 1)

    def visit(i, best):
        first = i * size
        start = jnp.minimum(first, n - size)  # the last block overlaps the one before it: one shape for all
        only = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), rows[1:])
        score_mq = _only(score(query_qd, rows[0], start, size), owner_q, *only)
        score_mq = _only(score_mq, None, start + jnp.arange(size) >= first, None)
        score_qc, at_qc = pick(score_mq if pick is _top_k else score_mq.T, min(wide, size))
        ids_qc = jnp.concatenate([best[1], start + at_qc], axis=1)
        score_qc, at_qc = lax.top_k(jnp.concatenate([best[0], score_qc], axis=1), wide)
        return score_qc, jnp.take_along_axis(ids_qc, at_qc, axis=1)

    best = (jnp.full((num, wide), -jnp.inf, jnp.float32), jnp.full((num, wide), -1, jnp.int32))
    score_qc, ids_qc = lax.fori_loop(0, -(-n // size), visit, best)
    return jnp.where(score_qc > -jnp.inf, ids_qc, -1)


def _top_k(score_mq, k):
    """`lax.top_k` of every column, [Q, k] each, by maxima of GROUP neighbours: the k best lie in the k best groups.

    Also on a tie: groups go by (maximum, smaller id), and each of k groups holds one that is as good as any left out.
    """
    size, num = score_mq.shape
    if size // GROUP < 4 * k:
        return lax.top_k(score_mq.T, k)
    score_mq = jnp.pad(score_mq, ((0, -size % GROUP), (0, 0)), constant_values=-jnp.inf)
    score_gmq = score_mq.reshape(-1, GROUP, num)
    _, group_qk = lax.top_k(jnp.max(score_gmq, axis=1).T, k)
    group_qk = jnp.sort(group_qk, axis=1)  # ids ascend, so that the smaller one wins a tie
    left_kmq = jnp.take_along_axis(score_gmq, group_qk.T[:, None, :], axis=0)
    best_qk, at_qk = lax.top_k(left_kmq.reshape(k * GROUP, num).T, k)
    return best_qk, jnp.take_along_axis(group_qk, at_qk // GROUP, axis=1) * GROUP + at_qk % GROUP


def _score_again(query_qd, owner_q, rows, ids_qc, k):
    """The best k of the rows `ids_qc` (-1: none), each scored by the same sum in the same order."""
    emb_qcd, mask_qc, owner_qc = jax.tree.map(lambda x: x[jnp.maximum(ids_qc, 0)], rows)
    score_qc = _ordered_sum(query_qd[:, None, :], emb_qcd)
    open_qc = ids_qc >= 0
    if mask_qc is not None:
        open_qc &= mask_qc
    if owner_qc is not None:
        open_qc &= (owner_q[:, None] < 0) | (owner_q[:, None] == owner_qc)
    return rank(jnp.where(open_qc, score_qc, -jnp.inf), ids_qc, k)


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
