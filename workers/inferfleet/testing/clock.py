"""A clock that moves when it is told to, and whose two faces cannot be mixed up unnoticed."""

from __future__ import annotations


class FakeClock:
    """Implements :class:`~inferfleet.ports.Clock`; the two origins have nothing to do with each other.

    Code that subtracts a calendar time from a monotonic one is off by decades, in either direction.
    """

    def __init__(self, monotonic_s: float = 5_000.0, utc_ms: int = 1_790_000_000_000) -> None:
        self._monotonic_s = monotonic_s
        self._utc_ms = float(utc_ms)

    def __repr__(self) -> str:
        return f"FakeClock(monotonic={self._monotonic_s:.3f}, utc_ms={self._utc_ms:.0f})"

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin."""
        return self._monotonic_s

    def utc_ms(self) -> int:
        """Return epoch milliseconds."""
        return int(self._utc_ms)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` (not negative) pass on both faces."""
        if seconds < 0:
            raise ValueError(f"monotonic time never goes back: {seconds}")
        self._monotonic_s += seconds
        self._utc_ms += seconds * 1000

    def step_utc(self, seconds: float) -> None:
        """Set the calendar forward or back, as an administrator or NTP does; spans stay as they are."""
        self._utc_ms += seconds * 1000
