"""Tests that are looked at once, or a few planned times: two arms, two answers, many metrics. Pure.

Sources stand with each function; scipy is the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from inferfleet.core.distributions import (
    binomial_cdf,
    chi_square_sf,
    normal_quantile,
    normal_sf,
    t_sf,
)
from inferfleet.records import Array
from inferfleet.summaries import SCALE, Histogram

_EXACT_BELOW = 1_000


class Interval(NamedTuple):
    """An estimate and the bounds about it."""

    estimate: float
    low: float
    high: float


def two_sided(z: float) -> float:
    """Return the chance of a standard normal value at least as far from 0 as ``z``."""
    return min(1.0, 2 * normal_sf(abs(z)))


def srm_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return Pearson's chi-square p-value of ``counts`` against the shares that were planned."""
    total = sum(counts)
    if total == 0 or len(counts) < 2:
        return 1.0
    whole = sum(shares)
    wanted = [total * share / whole for share in shares]
    statistic = sum((count - want) ** 2 / want for count, want in zip(counts, wanted, strict=True))
    return chi_square_sf(statistic, len(counts) - 1)


def mcnemar(right_wrong: int, wrong_right: int) -> float:
    """Return McNemar's two-sided p-value of the two discordant counts.

    Exact below 1,000 of them (a fair coin), else the normal form with a correction for continuity.
    """
    total = right_wrong + wrong_right
    if total == 0:
        return 1.0
    if total < _EXACT_BELOW:
        return min(1.0, 2 * binomial_cdf(min(right_wrong, wrong_right), total, 0.5))
    return two_sided(max(0.0, abs(right_wrong - wrong_right) - 1) / math.sqrt(total))


def wilson(events: float, trials: float, level: float = 0.95) -> Interval:
    """Return Wilson's interval of a proportion (Wilson, JASA 22, 1927)."""
    if trials <= 0:
        return Interval(0.0, 0.0, 1.0)
    z = normal_quantile(0.5 + level / 2)
    share = events / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def newcombe(first: tuple[float, float], second: tuple[float, float], level: float = 0.95) -> Interval:
    """Return Newcombe's hybrid score interval of the difference of two proportions ``(events, trials)``.

    Newcombe, Statistics in Medicine 17 (1998), method 10.
    """
    one, two = wilson(*first, level), wilson(*second, level)
    difference = one.estimate - two.estimate
    low = math.hypot(one.estimate - one.low, two.high - two.estimate)
    high = math.hypot(one.high - one.estimate, two.estimate - two.low)
    return Interval(difference, difference - low, difference + high)


def winsorised(values: Array, share: float = 0.999) -> Array:
    """Return the values with those above the quantile ``share`` (and below its mirror) set to it."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return values
    low, high = np.quantile(values, [1 - share, share])
    return np.clip(values, low, high)


class Moments(NamedTuple):
    """Number, mean and variance of single values."""

    size: float
    mean: float
    variance: float


def moments(values: Array) -> Moments:
    """Return the moments of at least two values."""
    return Moments(len(values), float(np.mean(values)), float(np.var(values, ddof=1)))


def winsorised_moments(histogram: Histogram, cap: float) -> Moments:
    """Return the moments of a histogram's values, those above ``cap`` set to it.

    A bucket's values count as its geometric middle: 2.2 % off at most, and alike in all arms.
    """
    count = len(histogram)
    if count < 2:
        return Moments(count, 0.0, math.inf)
    total = squares = 0.0
    for bucket, number in histogram.buckets.items():
        value = min(cap, 2.0 ** ((bucket - 0.5) / SCALE))
        total += number * value
        squares += number * value * value
    return Moments(count, total / count, max(0.0, squares - total * total / count) / (count - 1))


def welch(first: Moments, second: Moments) -> tuple[float, float]:
    """Return Welch's t of the difference of two means, and its two-sided p-value (Biometrika 34, 1947)."""
    one, two = first.variance / first.size, second.variance / second.size
    if one + two == 0:
        same = first.mean == second.mean
        return (0.0, 1.0) if same else (math.copysign(math.inf, first.mean - second.mean), 0.0)
    t = (first.mean - second.mean) / math.sqrt(one + two)
    df = (one + two) ** 2 / (one**2 / (first.size - 1) + two**2 / (second.size - 1))
    return t, min(1.0, 2 * t_sf(abs(t), df))


def holm(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Return what is rejected so that a single wrong rejection has chance at most ``alpha`` (Holm, 1979)."""
    found: set[str] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        if p_values[name] > alpha / (len(p_values) - rank):
            break
        found.add(name)
    return found


def benjamini_hochberg(p_values: Mapping[str, float], rate: float) -> set[str]:
    """Return what is rejected so that at most ``rate`` of it is expected to be wrong (JRSS B 57, 1995)."""
    ordered = sorted(p_values, key=lambda name: (p_values[name], name))
    passed = [
        rank for rank, name in enumerate(ordered, 1) if p_values[name] <= rate * rank / len(ordered)
    ]  # fmt: skip
    return set(ordered[: max(passed, default=0)])


@lru_cache(maxsize=32)
def obrien_fleming(looks: int, alpha: float) -> tuple[float, ...]:
    """Return the two-sided bounds of |z| at equally spaced looks (O'Brien and Fleming, Biometrics 35, 1979).

    They are ``c sqrt(looks / k)``; ``c`` is found so that the chance to pass any of them is ``alpha``, by the
    recursion of Armitage, McPherson and Rowe (JRSS A 132, 1969) on a grid of the sums. Four looks at 0.05:
    4.05, 2.86, 2.34, 2.02.
    """
    low, high = normal_quantile(1 - alpha / 2), normal_quantile(1 - alpha / 2) + 2.0
    for _ in range(40):
        middle = (low + high) / 2
        if _crossing_chance(middle, looks) > alpha:
            low = middle
        else:
            high = middle
    return tuple(high * math.sqrt(looks / k) for k in range(1, looks + 1))


def _crossing_chance(c: float, looks: int) -> float:
    """Return the chance that a sum of standard normals ever reaches ``c sqrt(looks)`` in absolute value."""
    edge = c * math.sqrt(looks)
    grid = np.linspace(-edge, edge, 801)
    weight = np.full(len(grid), grid[1] - grid[0])
    weight[[0, -1]] /= 2
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    kernel = np.exp(-((grid[:, None] - grid[None, :]) ** 2) / 2) / math.sqrt(2 * math.pi)
    for _ in range(looks - 1):
        density = kernel @ (density * weight)
    return 1 - float(np.sum(density * weight))


def keys_needed(spread: float, effect: float, alpha: float, power: float, looks: int = 1) -> int:
    """Return the keys that each arm needs to find ``effect``; ``spread`` is the standard deviation of a key.

    The usual formula of two equal arms, with the normal quantile replaced by the last bound of the looks.
    """
    bound = obrien_fleming(looks, alpha)[-1]
    return math.ceil(2 * (spread * (bound + normal_quantile(power)) / effect) ** 2)
