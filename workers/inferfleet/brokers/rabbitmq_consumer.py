"""One queue that is taken from, on the link's thread: its channel, what has arrived, what is given back."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource, ChannelNotFoundEntity

from inferfleet.addresses import plain
from inferfleet.brokers.rabbitmq_channels import (
    CLOSE_TIMEOUT_S,
    cancelled,
    channel_ends,
    close_channel,
    in_one_line,
)
from inferfleet.brokers.rabbitmq_columns import Message
from inferfleet.brokers.rabbitmq_frames import acknowledgement
from inferfleet.brokers.rabbitmq_link import Connected, RabbitLink
from inferfleet.ports import Clock
from inferfleet.records import Stream

log = structlog.get_logger(__name__)

CONSUMER_TAG = "inferfleet"
ANSWER_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 5.0
STUCK_AFTER_S = 30.0
_MISSING = (ChannelNotFoundEntity, ChannelAccessRefused, ChannelLockedResource)
_numbers = itertools.count(1)
"""Of channels, in this process: a delivery tag counts from 1 on each, so no number may come twice."""


class Arrivals:
    """What one channel has brought and nobody has taken yet.

    The link's thread appends, the worker's takes from the front; each count is written by one of them.
    """

    def __init__(self, stream: Stream, arrived: Callable[[], None], clock: Clock) -> None:
        self.stream = stream
        self.messages: deque[Message] = deque()
        self.live = True
        """Whether the channel is open; what it brought before it closed will come again."""
        self.last_tag = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._arrived = arrived
        self._clock = clock
        self._now_ms = 0

    @property
    def held_bytes(self) -> int:
        """Return how many bytes wait here."""
        return self.bytes_in - self.bytes_out if self.live else 0

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """Keep a message."""
        now_ms = self._now_ms
        if not now_ms:
            now_ms = self._now_ms = self._clock.utc_ms()
        self.messages.append((tag, redelivered, header, body, now_ms))
        self.last_tag = tag
        self.bytes_in += len(body) + len(header)

    def flush(self) -> None:
        """Tell whoever waits for messages."""
        self._now_ms = 0
        self._arrived()

    def closed(self) -> None:
        """The broker has closed the channel."""
        self.live = False

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        """Nothing is published here."""

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """Nothing is published here."""


class Consumer:
    """Consumes from one queue for as long as it is wanted, on one channel after the other.

    ``assigned`` and ``lost`` are told each channel's arrivals, ``arrived`` that there is something to take.
    """

    def __init__(
        self,
        link: RabbitLink,
        source: str,
        prefetch: int,
        *,
        assigned: Callable[[Arrivals], None],
        lost: Callable[[Arrivals], None],
        arrived: Callable[[], None],
    ) -> None:
        self.source = source
        self.queue = plain(source)
        self.prefetch = prefetch
        self.denied: str | None = None
        """Why the broker lets nobody take from the queue, where a person must mend it."""
        self.depth: int | None = None
        """How many messages wait in the queue, as far as it was asked."""
        self.given_back = False
        self._link = link
        self._assigned, self._lost, self._arrived = assigned, lost, arrived
        self.arrivals: Arrivals | None = None
        """Of the channel that is consumed on; ``_incoming`` is there before the broker has agreed to that."""
        self._incoming: Arrivals | None = None
        self._connected: Connected | None = None
        self._number = 0
        self._acked = 0
        self._task: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._paused_at: float | None = None
        self._heard = (0, 0.0)
        self._patience_s = STUCK_AFTER_S

    def __repr__(self) -> str:
        return f"Consumer({self.queue}, {'consuming' if self.arrivals else self.denied or 'away'})"

    @property
    def joined(self) -> bool:
        """Whether it consumes, or would if it had not given back what it held."""
        return self.arrivals is not None or self.given_back

    @property
    def out(self) -> int:
        """Return how many messages were delivered and not acknowledged."""
        arrivals = self.arrivals
        return 0 if arrivals is None else arrivals.last_tag - self._acked

    @property
    def held_bytes(self) -> int:
        """Return how many bytes wait to be taken."""
        incoming = self._incoming
        return 0 if incoming is None else incoming.held_bytes

    def start(self) -> None:
        """Consume from now on."""
        self._task = self._link.keep(self._run())

    def ack(self, stream: Stream, position: int) -> None:
        """Acknowledge every message below ``position``, if ``stream`` is what is consumed now."""
        arrivals, connected, tag = self.arrivals, self._connected, position - 1
        if arrivals is None or connected is None or arrivals.stream != stream or not arrivals.live:
            return
        if self._acked < tag <= arrivals.last_tag:
            self._acked = tag
            connected.tap.write(acknowledgement(self._number, tag))

    def pause(self) -> None:
        """Hold what was delivered, for half of the time that the broker allows."""
        if self._paused_at is None:
            self._paused_at = self._link.clock.monotonic()

    def resume(self) -> None:
        """Consume again, if what was held had to be given back."""
        self._paused_at = None
        self.given_back = False
        self._wanted.set()

    @property
    def paused(self) -> bool:
        """Whether nobody takes what arrives here."""
        return self._paused_at is not None

    def give_back(self, reason: str) -> bool:
        """Close the channel, so that the queue has everything again; :meth:`resume` opens another.

        Return whether there was one.
        """
        if self.arrivals is None or self.given_back:
            return False
        log.warning("deliveries_given_back", queue=self.queue, messages=self.out, reason=reason)
        self.given_back = True
        self._wanted.clear()
        self._over.set()
        return True

    async def leave(self, stream: Stream | None = None, position: int = 0) -> None:
        """Acknowledge below ``position`` and stop; returns when the broker has closed the channel."""
        if stream is not None:
            self.ack(stream, position)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)

    def tick(self) -> None:
        """Give back what is held for too long, and notice that nothing comes although it should."""
        now = self._link.clock.monotonic()
        arrivals = self.arrivals
        if arrivals is None:
            return
        if self._paused_at is not None:
            if now - self._paused_at > self._link.options.consumer_timeout_s / 2:
                self.give_back("paused for half of the broker's consumer timeout")
            self._heard = (arrivals.last_tag, now)
        elif arrivals.last_tag != self._heard[0]:
            self._patience_s = STUCK_AFTER_S
            self._heard = (arrivals.last_tag, now)
        elif not self.depth or self.out >= self.prefetch or self._held():
            self._heard = (arrivals.last_tag, now)
        elif now - self._heard[1] > self._patience_s:
            # Where only one of several consumers is served, it may be right: then ask less and less often.
            self._patience_s = min(self._patience_s * 2, 20 * STUCK_AFTER_S)
            self._heard = (arrivals.last_tag, now)
            self._link.taking.rebuild(f"queue {self.queue} holds {self.depth} messages and none arrives")

    def _held(self) -> bool:
        return self._connected is not None and self._connected.tap.held

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            await self._wanted.wait()
            connected = await self._link.taking.connected()
            began = self._link.clock.monotonic()
            try:
                failure = await self._consume(connected)
            except (Exception, asyncio.CancelledError) as error:
                # The library cancels who waits for it when its connection ends.
                if cancelled():
                    raise
                failure = error
            if connected.tap.lost.is_set() or failure is None:
                await asyncio.sleep(0)  # the line hears of it as well
                continue
            if self._link.clock.monotonic() - began > STUCK_AFTER_S:
                pause_s = FIRST_PAUSE_S
            self._failed(failure, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    async def _consume(self, connected: Connected) -> BaseException | None:
        """Consume until the channel ends; return why, or ``None`` where it was given back."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            channel = await connected.connection.channel(publisher_confirms=False)
        arrivals = Arrivals(Stream(self.source, next(_numbers)), self._arrived, self._link.clock)
        connected.tap.splitter.sinks[channel.number] = self._incoming = arrivals
        ended = asyncio.Event()
        channel.on_consumer_cancel_callbacks.add(lambda _: ended.set())
        self._over.clear()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await channel.basic_qos(prefetch_count=self.prefetch)
                await channel.basic_consume(self.queue, _unused, consumer_tag=CONSUMER_TAG)
            self._begin(arrivals, connected, channel.number)
            failure = await channel_ends(channel, connected.tap.lost, self._over, ended)
            return LookupError("the broker ended it: deleted, or moved") if ended.is_set() else failure
        finally:
            self._end(arrivals)
            await close_channel(connected, channel)

    def _begin(self, arrivals: Arrivals, connected: Connected, number: int) -> None:
        if self.denied is not None:
            log.info("queue_found", queue=self.queue)
        self.denied = None
        self._connected, self._number, self._acked = connected, number, 0
        self._heard = (0, self._link.clock.monotonic())
        self.arrivals = arrivals
        self._assigned(arrivals)
        self._arrived()

    def _end(self, arrivals: Arrivals) -> None:
        arrivals.live = False
        self._incoming = None
        if self.arrivals is arrivals:
            self.arrivals = None
            self._lost(arrivals)

    def _failed(self, error: BaseException, pause_s: float) -> None:
        reason = in_one_line(error)
        if isinstance(error, (*_MISSING, LookupError)):
            told = self.denied is not None
            self.denied = (
                f"rabbitmq queue {self.queue}: {reason}; "
                "`inferfleet topics plan` prints the queues and rights that the routes need"
            )
            if told:
                return
            log.error("queue_lost", queue=self.queue, error=reason)
        else:
            log.warning("channel_closed", queue=self.queue, error=reason, next_try_s=pause_s)


async def _unused(message: Any) -> None:
    """Take the place of the library's callback: the splitter has the messages already."""
