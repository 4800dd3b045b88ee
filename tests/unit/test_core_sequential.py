"""Bounds that hold at every look: by random walks, by their formulas, and for clustered messages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from inferfleet.core import sequential
from inferfleet.core.sequential import Estimate, Times
from inferfleet.summaries import Clustered, Histogram

CLUSTERS = st.lists(
    st.integers(1, 20).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))), min_size=2
)


def clustered(pairs: list[tuple[int, int]]) -> Clustered:
    total = Clustered()
    for trials, events in pairs:
        total.add(trials, events)
    return total


@given(alpha=st.floats(1e-5, 0.1), tuned=st.floats(100, 1e6))
def test_the_mixture_is_tuned_by_lamberts_function(alpha: float, tuned: float) -> None:
    """The parameter is scipy's, and near it no other gives a boundary that is clearly tighter there."""
    wanted = tuned / (-special.lambertw(-((2 * alpha) ** 2) / math.e, -1).real - 1)

    assert sequential.mixture_variance(tuned, alpha) == pytest.approx(wanted, rel=1e-9)


def test_the_boundary_is_tight_where_it_is_tuned() -> None:
    """Other tunings are no better there, by 1 %."""
    best = sequential.boundary(5_000, 0.001, 5_000)

    assert all(
        sequential.boundary(5_000, 0.001, each) > 0.99 * best for each in (500, 2_000, 20_000, 100_000)
    )
    assert sequential.boundary(0, 0.001, 5_000) == math.inf


def test_random_walks_pass_the_boundary_no_more_often_than_alpha() -> None:
    """4,000 walks of 20,000 steps, looked at every 20th: at most 5 % pass at 0.05, at all looks together.

    The seed is fixed; were the true share 5 %, one run in 30,000 would exceed 5 % plus 4 standard deviations.
    """
    rng = np.random.default_rng(4)
    looks = np.arange(20, 20_001, 20)
    walks = rng.normal(0, math.sqrt(20), (4_000, len(looks))).cumsum(axis=1)
    bounds = np.array([sequential.boundary(n, 0.05, 5_000) * math.sqrt(n) for n in looks])
    share = (walks > bounds).any(axis=1).mean()

    assert share < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4_000)
    assert share > 0.01, "a boundary that is never passed finds nothing either"


def test_proportions_pass_no_more_often_than_alpha() -> None:
    """Rare failures, equal in both arms, no margin, looks from 200 messages on: still at most the level.

    Seed fixed; the bound is the level plus 4 standard deviations of 500 runs.
    """
    rng = np.random.default_rng(5)
    passed = 0
    for _ in range(500):
        ours, theirs = (rng.binomial(200, 0.01, 50).cumsum() for _ in range(2))
        trials = np.arange(200, 10_001, 200)
        for n, a, b in zip(trials.tolist(), ours.tolist(), theirs.tolist(), strict=True):
            mine, other = (Clustered(n, n, each, n, each, each) for each in (a, b))
            test = sequential.contrast(
                sequential.proportion(mine),
                sequential.proportion(other),
                ratio=1,
                points=0,
                alpha=0.05,
                tuned_at=5_000,
            )
            if test.passed:
                passed += 1
                break

    assert passed <= 500 * 0.05 + 4 * math.sqrt(500 * 0.05 * 0.95)


@given(CLUSTERS)
def test_the_ratio_variance_is_that_of_its_definition(pairs: list[tuple[int, int]]) -> None:
    """Squares of (events - share * trials) over clusters (Cochran 6.3)."""
    trials, events = np.array(pairs, dtype=float).T
    share = events.sum() / trials.sum()
    count = len(pairs)
    wanted = ((events - share * trials) ** 2).sum() / trials.sum() ** 2 * count / (count - 1)

    assert sequential.ratio_variance(clustered(pairs)) == pytest.approx(wanted, abs=1e-12)


def test_without_two_clusters_nothing_is_known() -> None:
    """One cluster has no variance, no cluster no share."""
    assert sequential.ratio_variance(clustered([(3, 1)])) == math.inf
    assert sequential.proportion(Clustered()) == Estimate(0.0, math.inf, 0.0)


@given(CLUSTERS)
def test_messages_never_count_for_more_than_they_are(pairs: list[tuple[int, int]]) -> None:
    """The effective number is at most the number of messages, and positive."""
    total = clustered(pairs)
    found = sequential.proportion(total)

    assert 0 < found.effective <= total.trials + 1e-9
    assert found.variance > 0


def test_a_batch_that_fails_as_a_whole_is_one_failure() -> None:
    """10 of 100 batches of 8: as many independent messages as there are batches, give or take."""
    whole = sequential.proportion(clustered([(8, 8)] * 10 + [(8, 0)] * 90))
    spread = sequential.proportion(clustered([(8, 1)] * 80 + [(8, 0)] * 20))

    assert whole.value == spread.value == 0.1
    assert whole.effective == pytest.approx(100, rel=0.05)
    assert spread.effective == pytest.approx(800, rel=0.01)


def test_few_batches_count_as_few_messages() -> None:
    """Below ten batches their differences say nothing yet: each is one message, if anything failed."""
    assert sequential.proportion(clustered([(100, 100)] * 2)).effective == pytest.approx(2)
    assert sequential.proportion(clustered([(100, 0)] * 2)).effective == 200


def test_a_key_that_always_fails_is_one_failure() -> None:
    """Failures of one group of keys, spread over all batches, are not independent."""
    batches = clustered([(8, 1)] * 50 + [(8, 0)] * 50)
    even = dict.fromkeys(range(100), (8.0, 0.5))
    one = {group: (8.0, 50.0 if group == 0 else 0.0) for group in range(100)}

    assert sequential.proportion(batches, even).effective > 400
    assert sequential.proportion(batches, one).effective < 20


@given(st.dictionaries(st.integers(0, 127), st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1))
def test_groups_are_clusters(groups: dict[int, tuple[int, int]]) -> None:
    """Adding them at once is adding them one by one."""
    found = sequential.of_groups(groups)
    wanted = clustered(list(groups.values()))

    assert found == wanted


def test_the_larger_margin_counts() -> None:
    """At 0.1 % the points decide, at 10 % the ratio; both have to be passed."""

    def test(ours: float, theirs: float) -> sequential.Test:
        known = [
            Estimate(share, share * (1 - share) / 50_000, 50_000) for share in (ours, theirs)
        ]  # fmt: skip
        return sequential.worse_share(*known, points=0.005, ratio=1.25, alpha=0.001, tuned_at=5_000)

    assert not test(0.004, 0.001).passed
    assert test(0.010, 0.001).passed
    assert not test(0.12, 0.10).passed
    assert test(0.14, 0.10).passed
    assert test(0.14, 0.10).lower > 0


def test_too_little_is_no_answer() -> None:
    """Below 25 independent messages, ten windows or five values in the tail nothing is concluded."""
    known, few = Estimate(0.5, 0.001, 100), Estimate(0.1, 0.001, 20)
    assert (
        sequential.worse_share(known, few, points=0, ratio=1, alpha=0.01, tuned_at=100) is sequential.UNKNOWN
    )
    assert (
        sequential.worse_mean(
            clustered([(1, 1)] * 9), clustered([(1, 1)] * 9), ratio=1, alpha=0.1, tuned_at=100
        )
        is sequential.UNKNOWN
    )
    spans = Histogram()
    spans.add(np.ones(50))
    times = Times(spans, 50)
    assert (
        sequential.worse_quantile(times, times, share=0.95, ratio=1, alpha=0.1, tuned_at=100)
        is sequential.UNKNOWN
    )
    assert not sequential.UNKNOWN.passed


def spans_of(values: np.ndarray[tuple[int], np.dtype[np.float64]], effective: float) -> Times:
    histogram = Histogram()
    histogram.add(values)
    return Times(histogram, effective)


def test_a_slower_tail_is_found_and_an_equal_one_is_not() -> None:
    """1.5 times slower passes a margin of 1.2; the same distribution does not, and nor does 1.1 times."""
    rng = np.random.default_rng(6)
    base = rng.lognormal(0, 0.3, 20_000)

    def test(factor: float) -> bool:
        ours = spans_of(rng.lognormal(0, 0.3, 20_000) * factor, 20_000)
        return sequential.worse_quantile(
            ours, spans_of(base, 20_000), share=0.95, ratio=1.2, alpha=0.001, tuned_at=5_000
        ).passed

    assert test(1.5)
    assert not test(1.0)
    assert not test(1.1)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
def test_the_bucket_of_the_tail_is_the_quantiles(values: list[float], share: float) -> None:
    """At most the tail's share lies above, and with the bucket itself it would be more."""
    histogram = Histogram()
    histogram.add(np.array(values))
    most = (1 - share) * len(values)
    bucket, beyond = sequential.tail_bucket(histogram, most)

    assert bucket is not None
    assert beyond == sum(count for each, count in histogram.buckets.items() if each > bucket)
    assert beyond <= most < beyond + histogram.buckets[bucket]


def test_spans_of_zero_have_no_tail() -> None:
    """A quantile of 0 cannot be exceeded by a factor."""
    times = spans_of(np.zeros(1_000), 1_000)

    assert (
        sequential.worse_quantile(times, times, share=0.95, ratio=1.2, alpha=0.1, tuned_at=100)
        is sequential.UNKNOWN
    )


def test_a_dearer_version_is_found() -> None:
    """Twice the seconds for each request pass a margin of 1.3; equal ones do not."""
    rng = np.random.default_rng(7)
    windows = [(100, 1.0 + noise) for noise in rng.normal(0, 0.05, 60).tolist()]
    control, dear = Clustered(), Clustered()
    for trials, seconds in windows:
        control.add(trials, seconds)
        dear.add(trials, 2 * seconds)

    assert sequential.worse_mean(dear, control, ratio=1.3, alpha=0.001, tuned_at=100).passed
    assert not sequential.worse_mean(control, control, ratio=1.3, alpha=0.001, tuned_at=100).passed


def test_keys_that_are_split_as_planned_raise_no_alarm() -> None:
    """500 watched splits of 10,000 keys: the alarm at 0.01 comes in no more than 1 % of them (+ 4 sd)."""
    rng = np.random.default_rng(8)
    firsts = rng.binomial(100, 0.5, (500, 100)).cumsum(axis=1)
    totals = 100 * np.arange(1, 101)
    alarmed = 0
    for row in firsts.tolist():
        values = [
            sequential.srm_e_value((first, total - first), 0.5)
            for first, total in zip(row, totals.tolist(), strict=True)
        ]
        alarmed += max(values) >= 100

    assert alarmed <= 5 + 4 * math.sqrt(500 * 0.01 * 0.99)


def test_a_wrong_split_is_found() -> None:
    """46 to 54 of 10,000 keys, or an arm that gets none of 60."""
    assert sequential.srm_e_value((4_600, 5_400), 0.5) > 1e6
    assert sequential.srm_e_value((0, 60), 0.5) > 1_000
    assert sequential.srm_e_value((0, 0), 0.5) == pytest.approx(1)
