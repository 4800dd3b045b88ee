"""Publishing envelopes to the memory broker: at once, or held back until a test lets them through."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from inferfleet.brokers.memory import MemoryBroker
from inferfleet.ports import Receipt, Refusal
from inferfleet.records import Envelopes


class _Sent(NamedTuple):
    envelopes: Envelopes
    row: int
    receipt: Receipt


class MemoryOutlet:
    """Implements :class:`~inferfleet.ports.Outlet` on a :class:`~inferfleet.brokers.memory.MemoryBroker`.

    While ``holding``, what is published stays in the client until :meth:`let_through`. The broker's verdict
    reaches the receipts in :meth:`poll` only, so a record can be durable and not yet confirmed.
    """

    def __init__(self, broker: MemoryBroker, *, holding: bool = False) -> None:
        self._broker = broker
        self.holding = holding
        self._queue: deque[_Sent] = deque()
        self._verdicts: list[tuple[_Sent, Refusal | None]] = []
        self._gone = False

    def __repr__(self) -> str:
        return f"MemoryOutlet(queued={len(self._queue)}, unconfirmed={len(self._verdicts)})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand over without waiting."""
        self._queue.extend(_Sent(envelopes, index, receipt) for index in range(len(envelopes)))
        if not self.holding:
            self.let_through()

    def let_through(self, count: int | None = None) -> int:
        """Bring up to ``count`` queued envelopes to the broker, oldest first; return how many those were."""
        wanted = len(self._queue) if count is None else min(count, len(self._queue))
        for _ in range(wanted):
            sent = self._queue.popleft()
            envelopes, row = sent.envelopes, sent.row
            refusal = self._broker.offer(
                envelopes.destination,
                envelopes.keys[row],
                envelopes.values[row],
                envelopes.headers[row],
            )
            self._verdicts.append((sent, refusal))
        return wanted

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Tell the receipts what the broker has said since the last poll."""
        if max_wait_s > 0 and not self._verdicts:
            self._broker.wait(max_wait_s)
        verdicts, self._verdicts = self._verdicts, []
        for sent, refusal in verdicts:
            if self._gone:
                return
            if refusal is None:
                sent.receipt.confirmed(1)
            else:
                sent.receipt.refused(sent.row, refusal)

    def pending(self) -> int:
        """Return how many envelopes are neither confirmed nor refused."""
        return len(self._queue) + len(self._verdicts)

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for what is held back; return how many stay unconfirmed."""
        self.poll()
        if self._queue:
            self._broker.wait(timeout_s)
            self.poll()
        return self.pending()

    def vanish(self) -> None:
        """End as a killed process does: what is queued is lost, what is durable is told to nobody."""
        self._gone = True
        self._queue.clear()
        self._verdicts.clear()
