"""The brokers' outlets as one; a destination's address says whose it is."""

from __future__ import annotations

from inferfleet.addresses import on_rabbitmq
from inferfleet.ports import Clock, Outlet, Receipt
from inferfleet.records import Envelopes


class Outlets:
    """An :class:`~inferfleet.ports.Outlet` over two, each of which may come later or never."""

    def __init__(self, kafka: Outlet | None, rabbitmq: Outlet | None, clock: Clock) -> None:
        self._kafka = kafka
        self._rabbitmq = rabbitmq
        self._clock = clock

    def add(self, *, kafka: Outlet | None = None, rabbitmq: Outlet | None = None) -> None:
        """Publish to a broker too that no route has named so far; what stands is not replaced."""
        self._kafka, self._rabbitmq = self._kafka or kafka, self._rabbitmq or rabbitmq

    def __repr__(self) -> str:
        return f"Outlets({self._kafka}, {self._rabbitmq})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand over to the broker that the destination belongs to."""
        outlet = self._rabbitmq if on_rabbitmq(envelopes.destination) else self._kafka
        if outlet is None:
            raise LookupError(f"nothing publishes to {envelopes.destination}")
        outlet.publish(envelopes, receipt)

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Deliver what has arrived from either."""
        if self._rabbitmq is not None:
            self._rabbitmq.poll(0.0 if self._kafka is not None else max_wait_s)
        if self._kafka is not None:
            self._kafka.poll(max_wait_s)

    def pending(self) -> int:
        """Return how many envelopes are neither confirmed nor refused."""
        return sum(each.pending() for each in (self._kafka, self._rabbitmq) if each is not None)

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for all; return how many envelopes stay unconfirmed."""
        until = self._clock.monotonic() + timeout_s
        unconfirmed = 0
        for each in (self._kafka, self._rabbitmq):
            if each is not None:
                unconfirmed += each.close(max(0.0, until - self._clock.monotonic()))
        return unconfirmed
