"""The system's two clocks."""

from __future__ import annotations

import time


class SystemClock:
    """Implements :class:`~inferfleet.ports.Clock`."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin; never goes back."""
        return time.monotonic()

    def utc_ms(self) -> int:
        """Return epoch milliseconds."""
        return time.time_ns() // 1_000_000
