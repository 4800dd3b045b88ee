"""Tests of two arms against scipy, and procedures for many metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from inferfleet.core import comparing, distributions
from inferfleet.summaries import Histogram

P_VALUES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1)


@given(a=st.floats(0.1, 500), x=st.floats(0.001, 800))
def test_the_incomplete_gamma_function_is_scipys(a: float, x: float) -> None:
    """Both forms, the series and the continued fraction, over the whole plane."""
    assert distributions.gamma_q(a, x) == pytest.approx(special.gammaincc(a, x), rel=1e-8, abs=1e-12)


@given(a=st.floats(0.1, 500), b=st.floats(0.1, 500), x=st.floats(0, 1))
def test_the_incomplete_beta_function_is_scipys(a: float, b: float, x: float) -> None:
    """Both sides of its symmetry."""
    assert distributions.beta_i(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-7, abs=1e-12)


@given(t=st.floats(-30, 30), df=st.floats(1, 500))
def test_tails_are_scipys(t: float, df: float) -> None:
    """Normal and Student's tails, and the normal quantile as the inverse."""
    assert distributions.t_sf(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-7, abs=1e-12)
    assert distributions.normal_sf(t) == pytest.approx(stats.norm.sf(t), rel=1e-9, abs=1e-300)
    assert distributions.chi_square_sf(abs(t), 3) == pytest.approx(stats.chi2.sf(abs(t), 3), rel=1e-8)
    assert distributions.chi_square_sf(5e-324, 3) == 1.0  # half of it is zero


@given(n=st.integers(1, 300), share=st.floats(0.01, 0.99), data=st.data())
def test_the_binomial_is_scipys(n: int, share: float, data: st.DataObject) -> None:
    """At most k events, for any k."""
    k = data.draw(st.integers(-1, n + 1))

    assert distributions.binomial_cdf(k, n, share) == pytest.approx(stats.binom.cdf(k, n, share), abs=1e-9)


@given(counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=5), data=st.data())
def test_the_sample_ratio_is_pearsons_chi_square(counts: list[int], data: st.DataObject) -> None:
    """The p-value is scipy's against the planned shares."""
    size = len(counts)
    shares = data.draw(st.lists(st.floats(0.05, 1), min_size=size, max_size=size))
    total = sum(counts)
    if not total:
        assert comparing.srm_p(counts, shares) == 1
        return
    expected = np.array(shares) / sum(shares) * total

    assert comparing.srm_p(counts, shares) == pytest.approx(
        stats.chisquare(counts, expected).pvalue, abs=1e-9
    )


@given(a=st.integers(0, 400), b=st.integers(0, 400))
def test_mcnemar_is_the_fair_coins_test(a: int, b: int) -> None:
    """Exact in small numbers."""
    wanted = stats.binomtest(min(a, b), a + b, 0.5).pvalue if a + b else 1.0

    assert comparing.mcnemar(a, b) == pytest.approx(wanted, abs=1e-9)


def test_mcnemar_is_normal_in_large_numbers() -> None:
    """With the correction for continuity, near the exact value."""
    exact = stats.binomtest(900, 2_000, 0.5).pvalue

    assert comparing.mcnemar(900, 1_100) == pytest.approx(exact, rel=0.02)
    assert comparing.mcnemar(1_000, 1_000) == 1


@given(n=st.integers(1, 5_000), data=st.data())
def test_wilsons_interval_is_scipys(n: int, data: st.DataObject) -> None:
    """The interval of one proportion."""
    k = data.draw(st.integers(0, n))
    wanted = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    found = comparing.wilson(k, n)

    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_newcombes_interval_is_that_of_his_paper() -> None:
    """Table II of Newcombe (1998), method 10: 56/70 against 48/80, and 9/10 against 3/10."""
    first = comparing.newcombe((56, 70), (48, 80))
    second = comparing.newcombe((9, 10), (3, 10))

    assert (first.low, first.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert (second.low, second.high) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert comparing.newcombe((0, 0), (1, 2)).low <= comparing.newcombe((0, 0), (1, 2)).high


def test_welch_is_scipys_on_winsorised_values() -> None:
    """Outliers are set to the quantile, then the means are compared."""
    rng = np.random.default_rng(1)
    first, second = rng.lognormal(0, 1, 3_000), rng.lognormal(0.1, 1, 2_000)
    first[0] = 1e9
    one, two = comparing.winsorised(first), comparing.winsorised(second)
    t, p = comparing.welch(comparing.moments(one), comparing.moments(two))
    wanted = stats.ttest_ind(one, two, equal_var=False)

    assert one.max() < 1e9
    assert (t, p) == pytest.approx((wanted.statistic, wanted.pvalue))
    assert len(comparing.winsorised(np.zeros(0))) == 0


def test_equal_constants_do_not_differ() -> None:
    """Without any variance a difference is certain, and none is none."""
    same = comparing.Moments(5, 1.0, 0.0)

    assert comparing.welch(same, same) == (0.0, 1.0)
    assert comparing.welch(same, comparing.Moments(5, 2.0, 0.0)) == (-math.inf, 0.0)


def test_moments_of_a_histogram_are_near_those_of_its_values() -> None:
    """Within the width of the buckets, the cap included."""
    values = np.random.default_rng(2).lognormal(0, 0.7, 20_000)
    histogram = Histogram()
    histogram.add(values)
    found = comparing.winsorised_moments(histogram, 4.0)
    wanted = comparing.moments(np.minimum(values, 4.0))

    assert found.size == 20_000
    assert found.mean == pytest.approx(wanted.mean, rel=0.01)
    assert found.variance == pytest.approx(wanted.variance, rel=0.03)
    assert comparing.winsorised_moments(Histogram(), 1.0).variance == math.inf


@given(P_VALUES, st.floats(0.001, 0.2))
def test_holm_rejects_no_less_than_bonferroni(p_values: dict[str, float], alpha: float) -> None:
    """And what it rejects has smaller p-values than what it does not; alone, it is the plain test."""
    found = comparing.holm(p_values, alpha)

    assert {name for name, p in p_values.items() if p <= alpha / len(p_values)} <= found
    assert all(p_values[name] <= alpha for name in found)
    assert max((p_values[name] for name in found), default=0) <= min(
        (p for name, p in p_values.items() if name not in found), default=1
    )


@given(P_VALUES, st.floats(0.001, 0.2))
def test_benjamini_hochberg_is_scipys(p_values: dict[str, float], rate: float) -> None:
    """What is rejected is what has an adjusted p-value of at most the rate."""
    names = sorted(p_values)
    adjusted = stats.false_discovery_control([p_values[name] for name in names])
    near = [abs(p - rate) < 1e-12 for p in adjusted]
    wanted = {name for name, p in zip(names, adjusted, strict=True) if p <= rate}

    assert any(near) or comparing.benjamini_hochberg(p_values, rate) == wanted


def test_holm_stops_at_the_first_that_is_too_large() -> None:
    """The textbook case: 0.01 < 0.05/3, 0.03 > 0.05/2."""
    assert comparing.holm({"a": 0.01, "b": 0.03, "c": 0.04}, 0.05) == {"a"}
    assert comparing.benjamini_hochberg({"a": 0.01, "b": 0.03, "c": 0.04}, 0.05) == {"a", "b", "c"}


def test_the_bounds_of_four_looks_are_the_published_ones() -> None:
    """O'Brien and Fleming at 0.05: 4.05, 2.86, 2.34, 2.02; five end at 2.04; one is the plain test."""
    assert [round(each, 2) for each in comparing.obrien_fleming(4, 0.05)] == [4.05, 2.86, 2.34, 2.02]
    assert comparing.obrien_fleming(5, 0.05)[-1] == pytest.approx(2.040, abs=1e-3)
    assert comparing.obrien_fleming(1, 0.05) == pytest.approx((1.95996,), abs=1e-4)


def test_the_bounds_are_passed_by_chance_as_often_as_they_say() -> None:
    """200,000 random walks of four steps: 5 % pass, within 4 standard deviations."""
    steps = np.random.default_rng(3).standard_normal((200_000, 4)).cumsum(axis=1)
    z = np.abs(steps) / np.sqrt(np.arange(1, 5))
    share = (z >= comparing.obrien_fleming(4, 0.05)).any(axis=1).mean()

    assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 200_000))


def test_sizes_are_those_of_the_textbook() -> None:
    """One look: 2 (1.96 + 0.8416)^2 p(1-p) / d^2; four looks ask for a little more."""
    one = comparing.keys_needed(0.5, 0.02, 0.05, 0.8)

    assert one == math.ceil(2 * (0.5 * (1.959964 + 0.841621) / 0.02) ** 2)
    assert one < comparing.keys_needed(0.5, 0.02, 0.05, 0.8, 4) < 1.06 * one
