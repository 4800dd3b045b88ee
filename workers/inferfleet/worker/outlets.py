"""Kafka's and RabbitMQ's outlet as one; a destination's address says whose it is."""

from __future__ import annotations

from inferfleet.addresses import on_rabbitmq
from inferfleet.ports import Clock, Outlet, Receipt
from inferfleet.records import Envelopes


class Outlets:
    """An :class:`~inferfleet.ports.Outlet` over two."""

    def __init__(self, kafka: Outlet, rabbitmq: Outlet, clock: Clock) -> None:
        self._kafka = kafka
        self._rabbitmq = rabbitmq
        self._clock = clock

    def __repr__(self) -> str:
        return f"Outlets({self._kafka}, {self._rabbitmq})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand over to the broker that the destination belongs to."""
        outlet = self._rabbitmq if on_rabbitmq(envelopes.destination) else self._kafka
        outlet.publish(envelopes, receipt)

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Deliver what has arrived from either."""
        self._rabbitmq.poll(0.0)
        self._kafka.poll(max_wait_s)

    def pending(self) -> int:
        """Return how many envelopes are neither confirmed nor refused."""
        return self._kafka.pending() + self._rabbitmq.pending()

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for both; return how many envelopes stay unconfirmed."""
        until = self._clock.monotonic() + timeout_s
        unconfirmed = self._kafka.close(timeout_s)
        return unconfirmed + self._rabbitmq.close(max(0.0, until - self._clock.monotonic()))
