"""The bounded flight of ``map``: what is under way, what is ready, and what may be handed out next."""

from __future__ import annotations

from typing import NamedTuple

from inferfleet.client.outcome import Outcome


class _Flight(NamedTuple):
    id: str
    ends_at: float


class Window:
    """At most ``max_in_flight`` requests that were sent and not yet handed out; no clock, no I/O.

    ``ordered`` hands out in the order of sending, else in the order of arrival. Every request has
    ``timeout_s`` from its sending.
    """

    def __init__(self, max_in_flight: int, timeout_s: float, *, ordered: bool) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is at least 1, not {max_in_flight}")
        self._max = max_in_flight
        self._timeout_s = timeout_s
        self._ordered = ordered
        self._waiting: dict[int, _Flight] = {}
        self._ready: dict[int, Outcome] = {}
        self._sent = 0
        self._next = 0

    @property
    def has_room(self) -> bool:
        """Whether one more may be sent."""
        return len(self._waiting) + len(self._ready) < self._max

    @property
    def empty(self) -> bool:
        """Whether everything sent was handed out."""
        return not self._waiting and not self._ready

    @property
    def number(self) -> int:
        """The number of the next request to be sent."""
        return self._sent

    def sent(self, request_id: str, now: float) -> None:
        """Note that the next request is under way."""
        self._waiting[self._sent] = _Flight(request_id, now + self._timeout_s)
        self._sent += 1

    def arrived(self, number: int, outcome: Outcome) -> None:
        """Note an outcome."""
        if self._waiting.pop(number, None) is not None:
            self._ready[number] = outcome

    def take(self) -> Outcome | None:
        """Return what is to be handed out now, if anything."""
        number = self._next if self._ordered else next(iter(self._ready), -1)
        outcome = self._ready.pop(number, None)
        if outcome is not None and self._ordered:
            self._next += 1
        return outcome

    def first(self) -> tuple[str, float]:
        """Return the id that has waited longest and when its time ends; only while something is under way."""
        return next(iter(self._waiting.values()))

    def ids(self) -> list[str]:
        """Return the ids under way."""
        return [flight.id for flight in self._waiting.values()]
