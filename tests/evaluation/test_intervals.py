"""Intervals contain their point, shrink with data, cover what they promise; paired tests agree with scipy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_jax.evaluation import intervals

stats = pytest.importorskip("scipy.stats")


@st.composite
def successes_of(draw):
    n = draw(st.integers(1, 5000))
    return draw(st.integers(0, n)), n


@given(successes_of())
def test_wilson_contains_the_proportion_and_stays_a_proportion(case):
    k, n = case
    low, high = intervals.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@given(successes_of(), st.integers(2, 50))
def test_wilson_shrinks_with_more_of_the_same(case, times):
    k, n = case
    low, high = intervals.wilson(k, n)
    low_more, high_more = intervals.wilson(k * times, n * times)
    assert high_more - low_more < high - low


@given(successes_of())
def test_wilson_is_symmetric_and_agrees_with_scipy(case):
    k, n = case
    low, high = intervals.wilson(k, n)
    flipped = intervals.wilson(n - k, n)
    assert flipped == pytest.approx((1 - high, 1 - low), abs=1e-12)
    reference = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_wilson_by_hand():
    # p = 0.5, n = 4, z = 1.95996: centre 0.5, half = z/(1 + z^2/4) * sqrt(1/16 + z^2/64) = 0.349945
    assert intervals.wilson(2, 4) == pytest.approx((0.150039, 0.849961), abs=1e-5)
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("k, n, confidence", [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_nonsense(k, n, confidence):
    with pytest.raises(ValueError):
        intervals.wilson(k, n, confidence)


def test_wilson_covers_what_it_promises():
    rng = np.random.default_rng(0)
    for p in (0.05, 0.3, 0.95):
        hits = rng.binomial(200, p, size=2000)
        inside = [low <= p <= high for low, high in (intervals.wilson(int(k), 200) for k in hits)]
        assert 0.93 < np.mean(inside) < 0.975


scores = st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=60)


@settings(max_examples=40, deadline=None)
@given(scores, st.integers(0, 5))
def test_bootstrap_contains_the_mean_and_repeats(values, seed):
    low, high = intervals.bootstrap_ratio(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9
    assert (low, high) == intervals.bootstrap_ratio(values, resamples=200, seed=seed)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=5, max_size=30).filter(lambda v: len(set(v)) > 1))
def test_bootstrap_shrinks_like_the_square_root_of_n(values):
    low, high = intervals.bootstrap_ratio(values * 4)
    low_more, high_more = intervals.bootstrap_ratio(values * 64)
    assert (high - low) / (high_more - low_more) == pytest.approx(4, rel=0.35)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(1).uniform(size=900)
    low, high = intervals.bootstrap_ratio(x, resamples=4000)
    half = 1.96 * x.std() / 30
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


def test_bootstrap_of_a_ratio_agrees_with_plain_resampling():
    rng = np.random.default_rng(2)
    teacher = (rng.uniform(size=400) < 0.8).astype(float)
    student = teacher * (rng.uniform(size=400) < 0.7)
    rows = rng.integers(400, size=(4000, 400))
    plain = np.quantile(student[rows].sum(1) / teacher[rows].sum(1), [0.025, 0.975])
    assert intervals.bootstrap_ratio(student, teacher, resamples=4000) == pytest.approx(tuple(plain), abs=0.006)


def test_questions_about_one_video_widen_the_interval():
    video_score = np.random.default_rng(3).integers(0, 2, size=40).astype(float)
    scores, clusters = np.repeat(video_score, 10), np.repeat(np.arange(40), 10)
    alone = intervals.bootstrap_ratio(scores)
    together = intervals.bootstrap_ratio(scores, clusters=clusters)
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(math.sqrt(10), rel=0.15)


def test_bootstrap_refuses_what_has_no_value():
    with pytest.raises(ValueError, match="sums to zero"):
        intervals.bootstrap_ratio([1.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="no rows"):
        intervals.bootstrap_ratio([])
    with pytest.raises(ValueError, match="equal vectors"):
        intervals.bootstrap_ratio([1.0], [1.0, 1.0])


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_agrees_with_the_exact_binomial_test(b, c):
    reference = stats.binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    assert intervals.mcnemar_exact(b, c) == pytest.approx(reference, rel=1e-9)


def test_mcnemar_by_hand_and_at_size():
    assert intervals.mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert intervals.mcnemar_exact(1, 4) == pytest.approx(2 * (1 + 5) / 32)
    assert intervals.mcnemar_exact(2000, 2000) == 1.0
    assert 0 < intervals.mcnemar_exact(1900, 2100) < 0.01
    with pytest.raises(ValueError):
        intervals.mcnemar_exact(-1, 2)


def test_paired_bootstrap_separates_and_does_not():
    rng = np.random.default_rng(4)
    a = rng.uniform(size=300)
    assert intervals.paired_bootstrap(a + 0.1, a + 0.02 * rng.normal(size=300)) < 0.001
    assert intervals.paired_bootstrap(a, a + 0.1 * rng.normal(size=300)) > 0.01
    assert intervals.paired_bootstrap(a, a) == 1.0


def test_paired_bootstrap_agrees_with_mcnemar_on_zero_one_scores():
    a = np.array([1.0] * 60 + [0.0] * 40)
    b = np.array([1.0] * 45 + [0.0] * 15 + [1.0] * 8 + [0.0] * 32)
    exact = intervals.mcnemar_exact(15, 8)
    assert intervals.paired_bootstrap(a, b) == pytest.approx(exact, abs=0.08)
