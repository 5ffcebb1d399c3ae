"""Intervals and paired tests for scores of questions. numpy only, float64, seeded.

Two rules decide everything here. A 0/1 accuracy of independent questions gets Wilson's interval, which behaves at 0 %
and 100 %. Everything else (soft scores, questions that share a video, a ratio or a difference of two arms) is the ratio
of two sums and gets one bootstrap, `bootstrap_ratio`.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

import numpy as np

_CHUNK = 4_000_000  # resampled numbers held at once: 32 MB


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (low, high) in [0, 1].

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2)   (Wilson 1927)

    Args:
      successes: how many of the n were right, 0 <= successes <= n.
      n: number of independent trials; 0 gives the uninformed (0, 1).
      confidence: coverage aimed at.
    Raises:
      ValueError: successes outside [0, n], or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, {n}], got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def bootstrap_ratio(
    numerator: np.ndarray,
    denominator: np.ndarray | None = None,
    *,
    clusters: np.ndarray | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerator) / sum(denominator): (low, high).

    A mean is a ratio whose denominator is all ones; the retention of a student is sum(student) / sum(teacher) over the
    same questions, resampled together; a difference of two arms has numerator a - b.

    Args:
      numerator: float [n].
      denominator: float [n], ones when None.
      clusters: [n] labels of the unit to resample (a video with several questions); each question alone when None.
      resamples: bootstrap samples.
      confidence: coverage aimed at.
      seed: of the generator; equal seeds give equal intervals.
    Raises:
      ValueError: no rows, lengths that differ, or a denominator that sums to zero.
    """
    num = np.asarray(numerator, np.float64)
    den = np.ones_like(num) if denominator is None else np.asarray(denominator, np.float64)
    if num.shape != den.shape or num.ndim != 1:
        raise ValueError(f"numerator {num.shape} and denominator {den.shape} must be equal vectors")
    if not len(num):
        raise ValueError("no rows to resample")
    if den.sum() == 0:
        raise ValueError("the denominator sums to zero, so the ratio has no value")
    if clusters is not None:
        _, unit = np.unique(np.asarray(clusters), return_inverse=True)
        num, den = np.bincount(unit, num), np.bincount(unit, den)
    ratios = _resampled_ratios(num, den, resamples, np.random.default_rng(seed))
    point = num.sum() / den.sum()
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(min(low, point)), float(max(high, point))


def _resampled_sums(rows: np.ndarray, resamples: int, rng: np.random.Generator):
    """Column sums of `resamples` bootstrap samples of rows [n, k], in parts [r, k].

    Equal rows are one multinomial cell: the same law, less work.
    """
    cells, counts = np.unique(rows, axis=0, return_counts=True)
    share, n = counts / counts.sum(), len(rows)
    step = max(1, _CHUNK // len(cells))
    for start in range(0, resamples, step):
        yield rng.multinomial(n, share, size=min(step, resamples - start)) @ cells


def _resampled_ratios(num: np.ndarray, den: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Ratios of `resamples` bootstrap samples."""
    parts = _resampled_sums(np.stack([num, den], axis=1), resamples, rng)
    sums = np.concatenate([drawn[drawn[:, 1] != 0] for drawn in parts])
    return sums[:, 0] / sums[:, 1] if len(sums) else np.asarray([num.sum() / den.sum()])


@dataclasses.dataclass(frozen=True)
class Macro:
    """A weighted mean of group means with its bootstrap: value, (low, high), two-sided p that it is 0."""

    value: float
    ci95: tuple[float, float]
    p: float


def macro(
    values: np.ndarray,
    groups: np.ndarray,
    weights: Mapping,
    *,
    clusters: np.ndarray | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Macro:
    """sum_g w_g mean(values of g) / sum_g w_g over the groups that occur; for a difference of two arms, values a - b.

    Args:
      values: float [n].
      groups: [n] labels, keys of `weights`. One group: the plain mean.
      clusters: [n] labels of the unit to resample; each value alone when None. A resample without any row of a group
        leaves the group out.
    Raises:
      ValueError: no values, or lengths that differ.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or len(values) != len(groups):
        raise ValueError(f"{len(values)} values of {len(groups)} groups: they must be as many, and some")
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    share = np.array([weights[name] for name in names.tolist()], np.float64)
    unit = np.arange(len(values)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, counts = np.zeros((2, unit.max() + 1, len(names)))
    np.add.at(sums, (unit, group), values)
    np.add.at(counts, (unit, group), 1.0)

    def mean(drawn: np.ndarray) -> np.ndarray:
        total, n = drawn[:, : len(names)], drawn[:, len(names) :]
        there = np.where(n > 0, share, 0.0)
        return (total / np.maximum(n, 1) * there).sum(1) / there.sum(1)

    rows = np.concatenate([sums, counts], axis=1)
    value = float(mean(rows.sum(0, keepdims=True))[0])
    resampled = np.concatenate([mean(d) for d in _resampled_sums(rows, resamples, np.random.default_rng(seed))])
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Macro(value, (float(min(low, value)), float(max(high, value))), _two_sided(value, resampled))


def _two_sided(value: float, resampled: np.ndarray) -> float:
    """(1 + #{|v* - v| >= |v|}) / (1 + resamples)."""
    return float((1 + np.sum(np.abs(resampled - value) >= abs(value) - 1e-12)) / (1 + len(resampled)))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: p-value that both arms are equally good.

    Under the null the questions that only one arm got right fall to either arm like a fair coin:
    p = min(1, 2 * P[Binomial(only_a + only_b, 1/2) <= min(only_a, only_b)]).
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts must not be negative, got {only_a} and {only_b}")
    n, k = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1  # C(n, 0) and the sum of C(n, i) so far, exact integers: the one rounding is the last division
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, clusters: np.ndarray | None = None, resamples: int = 4000, seed: int = 0
) -> float:
    """Two-sided p-value that mean(a) == mean(b) on the same questions, by a bootstrap of the shifted difference.

    p = (1 + #{|d* - d| >= |d|}) / (1 + resamples), d = mean(a) - mean(b), d* its value in a resample.
    """
    diff = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    ones = np.ones_like(diff)
    if clusters is not None:
        _, unit = np.unique(np.asarray(clusters), return_inverse=True)
        diff, ones = np.bincount(unit, diff), np.bincount(unit, ones)
    resampled = _resampled_ratios(diff, ones, resamples, np.random.default_rng(seed))
    return _two_sided(diff.sum() / ones.sum(), resampled)
