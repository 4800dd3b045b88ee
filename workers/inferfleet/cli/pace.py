"""How fast letters may go."""

from __future__ import annotations

import time

BATCH = 500


class Pace:
    """At most ``rate`` letters a second from now on; ``None`` is as fast as it goes."""

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._started_at = time.monotonic()

    @property
    def batch(self) -> int:
        """How many may go at once: those of a quarter of a second."""
        return BATCH if self._rate is None else max(1, min(BATCH, int(self._rate / 4)))

    def delay_s(self, sent: int) -> float:
        """Return how long to wait now that ``sent`` have gone in all."""
        if self._rate is None:
            return 0.0
        return max(0.0, self._started_at + sent / self._rate - time.monotonic())

    def most_within(self, seconds: float) -> int | None:
        """Return how many can go within a time; ``None`` for as many as one likes."""
        return None if self._rate is None else max(1, int(self._rate * seconds))
