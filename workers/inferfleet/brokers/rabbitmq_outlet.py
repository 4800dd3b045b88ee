"""Publishing envelopes to RabbitMQ: every message is confirmed or refused, on the caller's thread."""

from __future__ import annotations

import fnmatch
import re
import threading
from collections import deque
from collections.abc import Sequence

from inferfleet.addresses import REPLY, exchange_and_key
from inferfleet.brokers.rabbitmq_link import RabbitLink
from inferfleet.brokers.rabbitmq_publisher import Group, Publisher
from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Envelopes

MAX_MESSAGE_BYTES = 128 << 20
"""What a RabbitMQ of today takes at most; one that takes less says so, once."""


class RabbitOutlet:
    """Implements :class:`~inferfleet.ports.Outlet` for ``rabbitmq:EXCHANGE/KEY`` and ``reply:``.

    ``reply_allowed`` lists, with ``*``, the queues that a request may name as its own: a request must not
    make us write anywhere else. Messages are persistent, mandatory and confirmed.
    """

    def __init__(
        self,
        link: RabbitLink,
        reply_allowed: Sequence[str] = (),
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.replies_unroutable = 0
        """Answers whose callers had gone."""
        self._link = link
        self._allowed = re.compile("|".join(map(fnmatch.translate, reply_allowed)) or r"(?!)")
        self._pending = 0
        self._handed: deque[Group] = deque()
        self._told: deque[tuple[Group, int, Refusal | None]] = deque()
        self._scheduled = False
        self._bell = threading.Event()
        self._rung = False
        self._publishers: dict[tuple[str, bool], Publisher] = {}
        link.call(link.open, link.publishing)

    def __repr__(self) -> str:
        return f"RabbitOutlet(pending={self._pending})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand the whole column set to the link's thread."""
        if not len(envelopes):
            return
        self._pending += len(envelopes)
        destination = envelopes.destination
        exchange, key = ("", "") if destination == REPLY else exchange_and_key(destination)
        deadline = self._link.clock.monotonic() + self._link.options.publish_timeout_s
        group = Group(envelopes, receipt, exchange, key, deadline, reply=destination == REPLY)
        if group.reply:
            self._keep_allowed(group)
        self._handed.append(group)
        if not self._scheduled:
            self._scheduled = True
            self._link.call(self._take_over)

    def _keep_allowed(self, group: Group) -> None:
        """Refuse the envelopes whose requests name no queue that they may name."""
        amqp = group.envelopes.amqp
        rows: list[int] = []
        for row in group.rows:
            queue = None if amqp is None else amqp[row].reply_to
            if queue and self._allowed.match(queue):
                rows.append(row)
            else:
                text = f"reply_to {queue!r} is none of [rabbitmq] reply_to"
                self._told.append((group, row, Refusal(RefusalKind.DENIED, text)))
        group.rows = rows

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Tell the receipts what was confirmed or refused, waiting for the first."""
        self._bell.clear()
        self._rung = False  # before looking: what comes from here on rings again
        if not self._told and max_wait_s > 0:
            self._bell.wait(max_wait_s)
        for _ in range(len(self._told)):  # what a receipt publishes is told in its own time
            group, number, refusal = self._told.popleft()
            if refusal is None:
                self._pending -= number
                group.receipt.confirmed(number)
            else:
                self._pending -= 1
                group.receipt.refused(number, refusal)

    def pending(self) -> int:
        """Return how many envelopes are neither confirmed nor refused."""
        return self._pending

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for what is pending; the link closes the connection."""
        clock = self._link.clock
        until = clock.monotonic() + timeout_s
        while self._pending and (left := until - clock.monotonic()) > 0:
            self.poll(min(left, 0.05))
        return self._pending

    # What follows runs on the link's thread.

    def _take_over(self) -> None:
        self._scheduled = False
        while self._handed:
            group = self._handed.popleft()
            where = (group.exchange, group.reply)
            publisher = self._publishers.get(where)
            if publisher is None:
                publisher = self._publishers[where] = Publisher(self._link, group.exchange, self)
            if group.rows:
                publisher.publish(group)

    def confirmed(self, group: Group, count: int) -> None:
        """Keep the news for the next poll."""
        self._told.append((group, count, None))

    def refused(self, group: Group, row: int, refusal: Refusal) -> None:
        """Keep the news for the next poll."""
        self._told.append((group, row, refusal))

    def ring(self) -> None:
        """Wake whoever waits for news."""
        if self._told and not self._rung:
            self._rung = True
            self._bell.set()
            self._link.wake()
