"""Bounds that hold at every look at once, so that a rollout may be watched as often as one likes. Pure.

The boundary is the one-sided normal mixture of Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021): a sum with variance ``v``
ever passes ``sqrt(2 (v + r) ln(1 + sqrt((v + r)/r) / (2 alpha)))`` with chance at most ``alpha``. With an
estimated variance that is so asymptotically: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform
central limit theory and asymptotic confidence sequences", Annals of Statistics 52 (2024). ``v`` is counted in
independent messages, so that a few large batches are few.

Variances are those of ratio estimators between clusters (Cochran, Sampling Techniques, 1977, chapters 6 and
9A): a batch that fails as a whole is one event, and so is a key that always fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from inferfleet.summaries import SCALE, Clustered, Histogram

LEAST_EFFECTIVE = 25.0
"""Independent messages in each arm below which nothing is concluded: asymptotics have not begun."""
LEAST_CLUSTERS = 10
_TAIL_EVENTS = 5.0


class Estimate(NamedTuple):
    """A share or mean with its variance; ``effective`` is how many independent messages tell as much."""

    value: float
    variance: float
    effective: float


class Test(NamedTuple):
    """A one-sided test that may be looked at at any time.

    ``excess`` is how far the estimate lies above its margin, ``z`` the same in standard errors, ``bound``
    what ``z`` has to pass now, and ``lower`` the always-valid lower bound of the excess.
    """

    excess: float
    z: float
    bound: float
    lower: float

    @property
    def passed(self) -> bool:
        """Whether the margin has been passed, at the level of the test over all looks together."""
        return self.z > self.bound


UNKNOWN = Test(0.0, 0.0, math.inf, -math.inf)


@lru_cache(maxsize=256)
def mixture_variance(tuned_at: float, alpha: float) -> float:
    """Return ``r`` for which the boundary is tightest about ``v = tuned_at``.

    That is ``v / (-W(-(2 alpha)^2 / e) - 1)`` with the lower branch of Lambert's W (Howard et al. on tuning,
    the one-sided level doubled).
    """
    target = -((2 * alpha) ** 2) / math.e
    # The lower branch: w <= -1 with w e^w = target; Newton on w + ln(-w) = ln(-target).
    wanted = math.log(-target)
    w = wanted - math.log(-wanted)
    for _ in range(50):
        step = (w + math.log(-w) - wanted) / (1 + 1 / w)
        w -= step
        if abs(step) < 1e-13:
            break
    return tuned_at / (-w - 1)


def boundary(effective: float, alpha: float, tuned_at: float) -> float:
    """Return what a standardised sum of ``effective`` independent messages may reach, at all times."""
    if effective <= 0:
        return math.inf
    r = mixture_variance(tuned_at, alpha)
    wide = effective + r
    return math.sqrt(2 * wide / effective * math.log1p(math.sqrt(wide / r) / (2 * alpha)))


def ratio_variance(clusters: Clustered) -> float:
    """Return the variance of events over trials, from what differs between clusters; infinite below two."""
    if clusters.clusters < 2 or clusters.trials <= 0:
        return math.inf
    share = clusters.events / clusters.trials
    squares = clusters.events_2 - 2 * share * clusters.product + share * share * clusters.trials_2
    return max(0.0, squares) / clusters.trials**2 * clusters.clusters / (clusters.clusters - 1)


def of_groups(groups: Mapping[int, tuple[float, float]]) -> Clustered:
    """Return the clusters that groups of keys are, each ``(trials, events)`` with some trials."""
    flat = np.fromiter(chain.from_iterable(groups.values()), np.float64, 2 * len(groups))
    trials, events = flat[::2], flat[1::2]
    return Clustered(
        len(groups),
        float(trials.sum()),
        float(events.sum()),
        float(np.einsum("i,i", trials, trials)),
        float(np.einsum("i,i", events, events)),
        float(np.einsum("i,i", trials, events)),
    )


def kish(clusters: Clustered) -> float:
    """Return how many messages count if members of a cluster are all alike (Kish, Survey Sampling, 1965)."""
    return clusters.trials**2 / clusters.trials_2 if clusters.trials_2 > 0 else 0.0


def proportion(
    batches: Clustered, groups: Mapping[int, tuple[float, float]] | None = None, *, effect: float = 1.0
) -> Estimate:
    """Return a share of events with the largest of its variances: as if independent, by batch, by key.

    ``effect`` is a design effect known from elsewhere, at least: how many messages count for one.
    The binomial variance is taken at (events + 1/2)/(trials + 1), so that no event at all is not certainty.
    """
    trials = batches.trials
    if trials <= 0:
        return Estimate(0.0, math.inf, 0.0)
    smooth = (batches.events + 0.5) / (trials + 1)
    alone = smooth * (1 - smooth) / trials
    variance = alone * max(1.0, effect)
    if batches.clusters >= LEAST_CLUSTERS:
        variance = max(variance, ratio_variance(batches))
    elif batches.events and batches.trials_2:
        # Too few batches to see what they differ by: each of them is taken for one message.
        variance = max(variance, alone * trials / max(kish(batches), 1e-9))
    if groups and len(groups) >= LEAST_CLUSTERS:
        variance = max(variance, ratio_variance(of_groups(groups)))
    return Estimate(batches.events / trials, variance, trials * alone / variance)


def mean(clusters: Clustered) -> Estimate:
    """Return events for each trial as a mean between clusters, each of which counts as one message."""
    return Estimate(clusters.share, ratio_variance(clusters), kish(clusters))


def contrast(
    treated: Estimate, control: Estimate, *, ratio: float, points: float, alpha: float, tuned_at: float
) -> Test:
    """Test whether ``treated`` is above ``ratio * control + points``."""
    effective = min(treated.effective, control.effective)
    if effective <= 0:
        return UNKNOWN
    error = math.sqrt(treated.variance + ratio * ratio * control.variance)
    if not 0 < error < math.inf:
        return UNKNOWN
    excess = treated.value - ratio * control.value - points
    bound = boundary(effective, alpha, tuned_at)
    return Test(excess, excess / error, bound, excess - bound * error)


def worse_share(
    treated: Estimate, control: Estimate, *, points: float, ratio: float, alpha: float, tuned_at: float
) -> Test:
    """Test whether a share is above the control's by ``points`` and above ``ratio`` times the control's.

    Both have to be shown, for the larger of the two margins counts; each at the whole level, because to pass
    wrongly the one that is truly not exceeded has to be passed.
    """
    if min(treated.effective, control.effective) < LEAST_EFFECTIVE:
        return UNKNOWN
    by_points = contrast(treated, control, ratio=1, points=points, alpha=alpha, tuned_at=tuned_at)
    by_ratio = contrast(treated, control, ratio=ratio, points=0, alpha=alpha, tuned_at=tuned_at)
    return min(by_points, by_ratio, key=lambda test: test.z - test.bound)


def worse_mean(
    treated: Clustered, control: Clustered, *, ratio: float, alpha: float, tuned_at: float
) -> Test:
    """Test whether a mean between clusters is above ``ratio`` times the control's."""
    if min(treated.clusters, control.clusters) < LEAST_CLUSTERS:
        return UNKNOWN
    return contrast(mean(treated), mean(control), ratio=ratio, points=0, alpha=alpha, tuned_at=tuned_at)


class Times(NamedTuple):
    """Spans of an arm, and how many of its messages count as independent."""

    spans: Histogram
    effective: float


def worse_quantile(
    treated: Times, control: Times, *, share: float, ratio: float, alpha: float, tuned_at: float
) -> Test:
    """Test whether the ``share`` quantile is above ``ratio`` times the control's.

    It is if more of the treated values than of the control's lie above their thresholds, ``ratio * q`` and
    ``q``, where ``q`` is the control's own quantile. If the quantiles stand in just that ratio, both are
    sampled with the same error, so the variance is the sum of both. Thresholds fall on bounds of buckets: up
    to 4.4 % more than ``ratio`` passes unseen.
    """
    effective = min(treated.effective, control.effective)
    if effective * (1 - share) < _TAIL_EVENTS:
        return UNKNOWN
    total = len(control.spans)
    bucket, beyond = tail_bucket(control.spans, (1 - share) * total)
    if bucket is None:
        return UNKNOWN
    # The threshold is the upper bound of the first bucket whose bound is at least ratio * q.
    first = bucket + math.ceil(math.log2(ratio) * SCALE - 1e-9)
    above = sum([count for each, count in treated.spans.buckets.items() if each > first]) / len(treated.spans)
    expected = beyond / total
    tail = max(1 - share, expected)
    variance = tail * (1 - tail) * (1 / treated.effective + 1 / control.effective)
    excess = above - expected
    error = math.sqrt(variance)
    bound = boundary(effective, alpha, tuned_at)
    return Test(excess, excess / error, bound, excess - bound * error)


def tail_bucket(spans: Histogram, most: float) -> tuple[int | None, int]:
    """Return the bucket of the quantile with at most ``most`` values above it, and how many are above.

    ``None`` where that quantile is not above 0.
    """
    beyond = 0
    for bucket in sorted(spans.buckets, reverse=True):
        count = spans.buckets[bucket]
        if beyond + count > most:
            return bucket, beyond
        beyond += count
    return None, beyond


def srm_e_value(counts: tuple[int, int], expected_share: float) -> float:
    """Return the evidence against ``counts`` being split with ``expected_share`` to the first arm.

    A Bayes factor of a Beta prior about that share (Lindon and Malek, "Anytime-valid inference for
    multinomial count data", NeurIPS 2022): where the share is right it ever reaches ``1/p`` with chance at
    most ``p``, however often one looks. Averages of such values keep that, whatever they depend on.
    """
    first, second = counts
    a, b = 50 * expected_share, 50 * (1 - expected_share)
    log = (
        _log_beta(a + first, b + second)
        - _log_beta(a, b)
        - first * math.log(expected_share)
        - second * math.log(1 - expected_share)
    )
    return math.exp(min(log, 700.0))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
