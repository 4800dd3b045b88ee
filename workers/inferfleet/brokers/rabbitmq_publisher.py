"""Publishing to one exchange, on the link's thread: what waits, what is out, what the broker said of it.

Messages are numbered by the order in which they are published on a channel, and confirmed by that number.
What was out when a connection broke is published again on the next one: nobody knows what became of it, and
a second copy carries the same id.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import structlog
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from inferfleet.brokers.rabbitmq_channels import cancelled, channel_ends, close_channel, in_one_line
from inferfleet.brokers.rabbitmq_frames import Route, message, route
from inferfleet.brokers.rabbitmq_link import Connected, RabbitLink
from inferfleet.brokers.rabbitmq_properties import BODY_SIZE_AT, write_properties
from inferfleet.brokers.rabbitmq_tables import Encoded, to_bytes
from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Envelopes

log = structlog.get_logger(__name__)

ANSWER_TIMEOUT_S = 10.0
AGAIN_AFTER_S = 0.5
WRITE_BYTES = 256 << 10
"""How much is made into one write, about."""
_TOO_LARGE = re.compile(r"message size \d+ (?:is )?larger than configured max size (\d+)")
_DENIED = (ChannelNotFoundEntity, ChannelAccessRefused)
_MEND = "`inferfleet topics plan` prints what the routes need"


class Group:
    """One published column set; ``rows`` are those of it that may leave."""

    __slots__ = ("deadline", "encoded", "envelopes", "exchange", "key", "receipt", "reply", "rows")

    def __init__(
        self, envelopes: Envelopes, receipt: Receipt, exchange: str, key: str, deadline: float, *, reply: bool
    ) -> None:
        self.envelopes = envelopes
        self.receipt = receipt
        self.exchange = exchange
        self.key = to_bytes(key)
        self.deadline = deadline
        self.reply = reply
        self.rows: Sequence[int] = range(len(envelopes))
        self.encoded: Encoded = {}

    def key_of(self, row: int) -> bytes:
        """Return the routing key of one envelope."""
        if self.reply and self.envelopes.amqp is not None:
            return to_bytes(self.envelopes.amqp[row].reply_to or "")
        return self.key

    def properties_of(self, row: int) -> bytes:
        """Return the properties of one envelope. Raises ValueError where something is too long for AMQP."""
        each = self.envelopes
        return write_properties(
            each.headers[row],
            each.keys[row],
            None if each.amqp is None else each.amqp[row],
            None if each.expirations_ms is None else each.expirations_ms[row],
            self.encoded,
            reply=self.reply,
        )


class Hears(Protocol):
    """Whoever tells receipts what became of their envelopes, and knows how large one may be."""

    max_message_bytes: int
    replies_unroutable: int

    def confirmed(self, group: Group, count: int) -> None:
        """``count`` more envelopes of the group are durable."""

    def refused(self, group: Group, row: int, refusal: Refusal) -> None:
        """Envelope ``row`` is not durable and is not tried again here."""

    def ring(self) -> None:
        """There is news."""


class Publisher:
    """Publishes to one exchange, one channel after the other; also the sink of what its channel hears.

    A channel of its own, because the broker closes the whole channel where an exchange does not exist.
    """

    def __init__(self, link: RabbitLink, exchange: str, hears: Hears) -> None:
        self.exchange = exchange
        self._link = link
        self._hears = hears
        self._waiting: deque[tuple[Group, deque[int]]] = deque()
        self._sent: dict[int, tuple[Group, int]] = {}
        self._lowest = self._next = 1
        self._search_from = 1
        self._returned: dict[int, str] = {}
        self._counts: dict[Group, int] = {}
        self._open: tuple[Connected, int] | None = None
        self._refusing = False
        self._routes: dict[bytes, Route] = {}
        self._work = asyncio.Event()
        self._over = asyncio.Event()
        link.every_tick(self._tick)
        link.keep(self._run())

    def __repr__(self) -> str:
        return f"Publisher({self.exchange!r}, waiting={len(self._waiting)}, out={len(self._sent)})"

    def publish(self, group: Group) -> None:
        """Publish a group as soon as may be."""
        self._waiting.append((group, deque(group.rows)))
        self._work.set()
        self.pump()

    def pump(self) -> None:
        """Write what waits, while the socket takes it and the broker does not block."""
        while self._waiting and self._open is not None and not self._refusing:
            connected, number = self._open
            tap = connected.tap
            if not tap.writable or tap.splitter.blocked or tap.lost.is_set():
                break
            frame_max = connected.connection.connection_tune.frame_max or 131_072
            tap.write(b"".join(chain.from_iterable(self._pieces(number, frame_max))))
        self._hears.ring()

    def _pieces(self, number: int, frame_max: int) -> Iterator[list[bytes]]:
        """Yield the pieces of about as many messages as one write takes, and number them."""
        size = 0
        while self._waiting and size < WRITE_BYTES:
            group, rows = self._waiting[0]
            values = group.envelopes.values
            while rows and size < WRITE_BYTES:
                row = rows.popleft()
                body = values[row] or b""
                pieces = self._message(group, row, body, number, frame_max)
                if pieces is not None:
                    size += len(body) + 200
                    self._sent[self._next] = (group, row)
                    self._next += 1
                    yield pieces
            if not rows:
                self._waiting.popleft()

    def _message(
        self, group: Group, row: int, body: bytes, number: int, frame_max: int
    ) -> list[bytes] | None:
        if len(body) > self._hears.max_message_bytes:
            limit = self._hears.max_message_bytes
            text = f"a message of {len(body)} bytes; the broker takes {limit}"
        else:
            try:
                way = self._route(number, group.key_of(row))
                return message(way, group.properties_of(row), body, frame_max)
            except ValueError as error:
                text = str(error)
            except Exception as error:
                log.exception("message_not_written", exchange=self.exchange, private=True)
                self._hears.refused(group, row, Refusal(RefusalKind.LATER, in_one_line(error)))
                return None
        self._hears.refused(group, row, Refusal(RefusalKind.TOO_LARGE, text))
        return None

    def _route(self, number: int, key: bytes) -> Route:
        found = self._routes.get(key)
        if found is None or found.number != number:
            if len(self._routes) > 256:  # replies go to a queue each
                self._routes.clear()
            found = self._routes[key] = route(number, to_bytes(self.exchange), key)
        return found

    # What the channel hears

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """Nothing is taken here."""

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """One message, or all up to it, is durable or refused."""
        if not multiple:
            self._settled(tag, accepted)
            self._lowest += tag == self._lowest
            return
        last = min(tag, self._next - 1) if tag else self._next - 1  # 0: all that are out
        for each in range(self._lowest, last + 1):
            self._settled(each, accepted)
        self._lowest = max(self._lowest, last + 1)

    def _settled(self, tag: int, accepted: bool) -> None:
        found = self._sent.pop(tag, None)
        if found is None:
            return
        group, row = found
        text = self._returned.pop(tag, None) if self._returned else None
        if not accepted:
            self._refusing = True
            text = (
                f"the broker could not keep a message for exchange {self.exchange!r} (its queue may be full)"
            )
            self._hears.refused(group, row, Refusal(RefusalKind.LATER, text))
        elif text is not None and not group.reply:
            self._hears.refused(group, row, Refusal(RefusalKind.DENIED, text))
        else:
            if text is not None:
                self._hears.replies_unroutable += 1
            self._counts[group] = self._counts.get(group, 0) + 1

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        """A message that no queue took comes back, with all that it has but its number."""
        size = int.from_bytes(header[BODY_SIZE_AT : BODY_SIZE_AT + 8], "big")
        # They come back in the order in which they were published.
        tags: Iterable[int] = chain(
            range(self._search_from, self._next), range(self._lowest, self._search_from)
        )
        for tag in tags:
            found = self._sent.get(tag)
            if found is None or tag in self._returned:
                continue
            group, row = found
            value = group.envelopes.values[row] or b""
            if group.key_of(row) == key and len(value) == size and value.startswith(body):
                self._search_from = tag + 1
                where = f"exchange {self.exchange!r} and key {key.decode('utf-8', 'replace')!r}"
                self._returned[tag] = f"no queue is bound to {where} ({code} {text}); {_MEND}"
                return
        log.error("returned_message_unknown", exchange=self.exchange, code=code, error=text)

    def closed(self) -> None:
        """The broker has closed the channel."""
        self._open = None

    def flush(self) -> None:
        """Tell what was confirmed in one read, and write what waits.

        A channel that has refused is left once nothing is out on it: one that published while a quorum queue
        had no leader is refused for ever, although others are not.
        """
        if self._refusing and not self._sent and self._open is not None:
            self._open = None
            self._over.set()
        if self._counts:
            counts, self._counts = self._counts, {}
            for group, count in counts.items():
                self._hears.confirmed(group, count)
        self.pump()

    # Channels

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            connected = await self._link.publishing.connected()
            if connected.tap.splitter.blocked:
                await asyncio.sleep(AGAIN_AFTER_S / 5)
                continue
            try:
                failure = await self._serve(connected)
            except (Exception, asyncio.CancelledError) as error:
                if cancelled():
                    raise
                failure = error
            if connected.tap.lost.is_set():
                self._again()
                await asyncio.sleep(0)  # the line hears of it as well
            else:
                self._failed(failure)
                await asyncio.sleep(AGAIN_AFTER_S)
            self._work.clear()
            if self._waiting:
                self._work.set()

    async def _serve(self, connected: Connected) -> BaseException | None:
        """Publish on one channel until it ends; return why, or ``None`` where it was given up here."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            channel = await connected.connection.channel(publisher_confirms=True)
        tap = connected.tap
        self._lowest = self._next = self._search_from = 1
        self._returned.clear()
        self._routes.clear()
        self._over.clear()
        self._refusing = False
        tap.splitter.sinks[channel.number] = self
        tap.on_writable.append(self.pump)
        self._open = (connected, channel.number)
        try:
            self.pump()
            return await channel_ends(channel, tap.lost, self._over)
        finally:
            self._open = None
            tap.on_writable.remove(self.pump)
            await close_channel(connected, channel)

    def _again(self) -> None:
        """Put what was out in front of what waits."""
        for group, row in reversed(self._sent.values()):
            if self._waiting and self._waiting[0][0] is group:
                self._waiting[0][1].appendleft(row)
            else:
                self._waiting.appendleft((group, deque([row])))
        self._sent.clear()

    def _failed(self, error: BaseException | None) -> None:
        if error is None:
            return
        text = in_one_line(error)
        too_large = _TOO_LARGE.search(text)
        if too_large is not None:
            # The broker says how large a message may be: who is larger is refused when its turn comes again.
            self._hears.max_message_bytes = int(too_large[1])
            log.warning("message_too_large", exchange=self.exchange, max_bytes=self._hears.max_message_bytes)
            self._again()
        elif isinstance(error, _DENIED):
            refusal = Refusal(RefusalKind.DENIED, f"exchange {self.exchange!r}: {text}; {_MEND}")
            self._again()
            self._refuse_waiting(refusal)
        else:
            log.warning("channel_closed", exchange=self.exchange, error=text)
            self._refuse_sent(f"exchange {self.exchange!r}: {text}")
        self._hears.ring()

    def _refuse_waiting(self, refusal: Refusal, until: float | None = None) -> None:
        while self._waiting and (until is None or self._waiting[0][0].deadline <= until):
            group, rows = self._waiting.popleft()
            for row in rows:
                self._hears.refused(group, row, refusal)

    def _refuse_sent(self, text: str) -> None:
        refusal = Refusal(RefusalKind.LATER, text)
        for group, row in self._sent.values():
            self._hears.refused(group, row, refusal)
        self._sent.clear()

    def _tick(self) -> None:
        """Refuse what has waited for too long, for its turn or for its confirmation."""
        now = self._link.clock.monotonic()
        oldest = next(iter(self._sent.values()), None)
        expired = oldest is not None and oldest[0].deadline <= now
        late = bool(self._waiting) and self._waiting[0][0].deadline <= now
        if not (expired or late):
            return
        text = f"no confirmation within {self._link.options.publish_timeout_s:g} s: {self._state()}"
        log.warning("publish_timed_out", exchange=self.exchange, out=len(self._sent), reason=self._state())
        if expired:
            self._open = None
            self._refuse_sent(text)
            self._over.set()
        self._refuse_waiting(Refusal(RefusalKind.LATER, text), now)
        self._hears.ring()

    def _state(self) -> str:
        line = self._link.publishing
        if line.now is None:
            return line.away or "there is no connection"
        if line.now.tap.splitter.blocked:
            return "the broker blocks publishers (it is short of memory or disk)"
        return "the broker does not answer"
