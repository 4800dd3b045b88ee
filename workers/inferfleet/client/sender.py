"""What puts requests into topics and queues: one face for both brokers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from inferfleet.client.outcome import SubmitError

Failed: TypeAlias = Callable[[str, SubmitError], None]
Replied: TypeAlias = Callable[[str, bytes], None]


class Message(NamedTuple):
    """One request on its way out.

    ``topic`` is an address (:mod:`inferfleet.addresses`); ``by_reply`` asks for the answer on the sender's
    own reply queue, which only RabbitMQ has.
    """

    id: str
    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]
    by_reply: bool = False


class Sender(Protocol):
    """Sends messages; any thread may call it, and every wait is bounded.

    Whoever made it gave it a function that hears of each failure, on a thread of the sender's. A failure is
    also raised by the next ``send`` or ``flush``, so that a caller who never waits for results hears of it.
    """

    def send(self, message: Message, timeout_s: float = 30.0) -> None:
        """Hand over; waits up to ``timeout_s`` while the sender is full. Raises SubmitError."""

    def try_send(self, message: Message) -> bool:
        """Hand over without waiting; false while the sender is full. Raises SubmitError."""

    def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is delivered. Raises SubmitError if something is not."""

    def close(self, timeout_s: float) -> int:
        """Deliver what is left within ``timeout_s`` and end; return how many stay undelivered."""


class Failures:
    """Failures that the next call is to raise; added to on the sender's thread, raised on the caller's."""

    def __init__(self) -> None:
        self._kept: list[SubmitError] = []

    def add(self, failure: SubmitError) -> None:
        """Keep a failure."""
        self._kept.append(failure)

    def raise_kept(self) -> None:
        """Raise the first failure kept, with the count of the others, and forget them all."""
        if self._kept:
            failures, self._kept = self._kept, []
            more = f" (and {len(failures) - 1} more requests)" if len(failures) > 1 else ""
            raise SubmitError(f"{failures[0]}{more}", failures[0].id)
