"""What a batch of a lane costs: a line fitted to batch time against rows while it runs.

Exponentially weighted least squares: each observation weighs ``FORGET`` times the one after it, so the
line follows a device that slows down or warms up.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.records import Requests

FORGET = 0.95


class CostLine:
    """Seconds of a batch as ``intercept + slope * rows``."""

    __slots__ = ("_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observed(self, rows: int, seconds: float) -> None:
        """Learn that a batch of ``rows`` took ``seconds``."""
        self._n = self._n * FORGET + 1.0
        self._x = self._x * FORGET + rows
        self._y = self._y * FORGET + seconds
        self._xx = self._xx * FORGET + rows * rows
        self._xy = self._xy * FORGET + rows * seconds

    def expect(self, rows: int) -> float:
        """Return the expected seconds of a batch of ``rows``; 0 before anything was observed."""
        if not self._n:
            return 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread <= 1e-9 * self._xx * self._n:
            return self._y / self._n
        slope = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        return max(0.0, (self._y - slope * self._x) / self._n + slope * rows)


def padding(parts: Sequence[Requests]) -> float | None:
    """Return which share of a batch would be filling if each request were as long as the longest.

    By the costs of requests, which are the sizes of their bodies; ``None`` where these have none.
    """
    costs = [cost for part in parts for cost in part.costs or ()]
    largest = max(costs, default=0)
    return 1 - sum(costs) / (largest * len(costs)) if largest else None
