"""Frame selectors against plain numpy."""

import jax
import numpy as np
import pytest

from marc_jax.baselines import aks, bolt, topk

B, T = 40, 23
SELECT = {"topk": topk.select, "bolt": bolt.select, "aks": aks.select}
RUN = {name: jax.jit(select, static_argnums=2) for name, select in SELECT.items()}


@pytest.fixture(scope="module")
def scores():
    """Bumps of relevance on noise, holes in the mask, budgets from 1 to 8."""
    rng = np.random.default_rng(0)
    mask = rng.random((B, T)) < 0.8
    mask[:, 3] = True
    peak = np.exp(-0.5 * ((np.arange(T) - rng.integers(0, T, (B, 1))) / rng.uniform(0.5, 4, (B, 1))) ** 2)
    score = (peak + rng.uniform(0, 0.3, (B, 1)) * rng.random((B, T))).astype(np.float32)
    return score, mask, rng.integers(1, 9, B).astype(np.int32)


def chosen(name, scores, keep=8, **how):
    score, mask, target = scores
    slot, valid = RUN[name](np.where(mask, score, np.nan), mask, keep, target_b=target, **how)
    slot, valid = np.asarray(slot), np.asarray(valid)
    assert slot.shape == (B, keep) and not slot[~valid].any() and (np.diff(valid.astype(int), axis=1) <= 0).all()
    return [row[ok].tolist() for row, ok in zip(slot, valid, strict=True)]


@pytest.mark.parametrize("name", SELECT)
def test_slots_are_valid_in_time_order_and_within_the_budget(name, scores):
    for slots, mask, n in zip(chosen(name, scores), *scores[1:], strict=True):
        assert mask[slots].all() and 0 < len(slots) <= n and slots == sorted(slots)
    empty = RUN[name](scores[0], np.zeros_like(scores[1]), 8)
    assert not np.asarray(empty[1]).any() and not np.asarray(empty[0]).any()


@pytest.mark.parametrize("apart", [1, 4])
def test_topk(scores, apart):
    for slots, score, mask, n in zip(chosen("topk", scores, apart=apart), *scores, strict=True):
        left, want = list(np.flatnonzero(mask)), []
        while left and len(want) < n:
            want.append(max(left, key=lambda i: (score[i], -i)))
            left = [i for i in left if abs(i - want[-1]) >= apart]
        assert slots == sorted(want)


def test_bolt(scores):
    for slots, score, mask, n in zip(chosen("bolt", scores), *scores, strict=True):
        at = np.flatnonzero(mask)
        s = score[at].astype(np.float64) - score[at].min()
        s = (s / s.max()) ** 3
        cdf = np.cumsum(s / s.sum())
        u = np.linspace(1 / n, 1 - 1 / n, n) if n > 1 else np.array([0.5])
        assert slots == at[np.searchsorted(cdf, u)].tolist()
    same = np.ones((1, 8), np.float32)
    assert np.asarray(bolt.select(same, same > 0, 4)[0]).tolist() == [[1, 3, 4, 5]]


def aks_reference(score, n, t1=0.8, depth=5):
    if len(score) <= n:
        return list(range(len(score)))
    score = (score - score.min()) / (score.max() - score.min())

    def part(a, b, d):
        best = sorted(range(a, b), key=lambda i: (-score[i], i))
        if d == depth or n >> (d + 1) == 0 or score[best[:n]].mean() - score[a:b].mean() > t1:
            return best[: n >> d]
        middle = a + (b - a) // 2
        return [i for x, y in ((a, middle), (middle, b)) if y > x for i in part(x, y, d + 1)]

    return sorted(part(0, len(score), 0))


def test_aks(scores):
    seen = set()
    for slots, score, mask, n in zip(chosen("aks", scores), *scores, strict=True):
        at = np.flatnonzero(mask)
        want = at[aks_reference(score[at], int(n))].tolist()
        assert slots == want
        seen.add(want != np.sort(at[np.argsort(-score[at], kind="stable")[:n]]).tolist())
    assert seen == {True, False}  # some videos were halved, some not
