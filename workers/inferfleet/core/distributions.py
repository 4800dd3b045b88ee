"""Probabilities of the normal, chi-square, t and binomial distributions, without a library of statistics.

Formulas: NIST Digital Library of Mathematical Functions, chapters 7 and 8 (error, incomplete gamma and beta
functions); the continued fractions are evaluated by Lentz's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

_NORMAL = NormalDist()
_TINY = 1e-300
_EPSILON = 1e-15
_MOST_TERMS = 10_000


def normal_sf(z: float) -> float:
    """Return the chance that a standard normal value is above ``z``."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def normal_quantile(share: float) -> float:
    """Return the value that a standard normal one is below with chance ``share``, in (0, 1)."""
    return _NORMAL.inv_cdf(share)


def chi_square_sf(x: float, df: int) -> float:
    """Return the chance that a chi-square value with ``df`` degrees of freedom is above ``x``."""
    return gamma_q(df / 2, x / 2)


def t_sf(t: float, df: float) -> float:
    """Return the chance that Student's t with ``df`` degrees of freedom is above ``t``."""
    tail = 0.5 * beta_i(df / 2, 0.5, df / (df + t * t))
    return tail if t >= 0 else 1 - tail


def binomial_cdf(k: int, n: int, share: float) -> float:
    """Return the chance of at most ``k`` events in ``n`` trials of chance ``share``, in (0, 1)."""
    if k < 0:
        return 0.0
    return 1.0 if k >= n else beta_i(n - k, k + 1, 1 - share)


def gamma_q(a: float, x: float) -> float:
    """Return the regularised upper incomplete gamma function Q(a, x) for a > 0, x >= 0 (DLMF 8.2.4)."""
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _MOST_TERMS):
            term *= x / (a + n)
            total += term
            if term < total * _EPSILON:
                break
        return max(0.0, 1 - total * scale)
    # DLMF 8.9.2, its even part: 1/(x+1-a- 1(1-a)/(x+3-a- ...)).
    fraction = _lentz(x + 1 - a, lambda n: (-n * (n - a), x + 2 * n + 1 - a))
    return scale / fraction


def beta_i(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) for a, b > 0 (DLMF 8.17)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    scale = math.exp(log_scale + a * math.log(x) + b * math.log1p(-x))
    if x > (a + 1) / (a + b + 2):
        return 1 - scale / (b * _beta_fraction(b, a, 1 - x))
    return scale / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    def term(n: int) -> tuple[float, float]:
        m = n // 2
        if n % 2:
            return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)), 1.0
        return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), 1.0

    return _lentz(1.0, term)


def _lentz(first: float, term: Callable[[int], tuple[float, float]]) -> float:
    """Return ``first + a1/(b1 + a2/(b2 + ...))`` where ``term(n)`` is ``(an, bn)``."""
    value = first or _TINY
    c, d = value, 0.0
    for n in range(1, _MOST_TERMS):
        a, b = term(n)
        d = b + a * d or _TINY
        c = b + a / c or _TINY
        d = 1 / d
        value *= c * d
        if abs(c * d - 1) < _EPSILON:
            break
    return value
