"""A short connection to RabbitMQ that takes messages as they are, and publishes others as they should be.

Messages are cut out of the connection's bytes and read as the worker reads them, because callers write
headers that a general client chokes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiormq.abc import AbstractChannel
from aiormq.connection import Connection

from inferfleet.brokers.rabbitmq_columns import columns
from inferfleet.brokers.rabbitmq_frames import Route, message, route
from inferfleet.brokers.rabbitmq_link import rabbit_options
from inferfleet.brokers.rabbitmq_tap import Tap, open_tapped
from inferfleet.config import Config
from inferfleet.errors import BrokerError
from inferfleet.rabbitmq_access import AMQP_FAILURES, amqp_failure, amqp_place, ends_are_failures
from inferfleet.records import Amqp, Headers

_MAX_BODY_BYTES = 512 << 20
_CLOSE_S = 10.0


class Arrived(NamedTuple):
    """A message that was taken and not acknowledged."""

    tag: int
    key: bytes | None
    headers: Headers
    body: bytes
    amqp: Amqp


class Line(NamedTuple):
    """A connection, and the channel that takes."""

    connection: Connection
    tap: Tap
    channel: AbstractChannel
    watch: asyncio.Task[None]

    async def consume(self, queue: str, prefetch: int) -> Arrivals:
        """Take up to ``prefetch`` messages of a queue."""
        arrivals = Arrivals(self.channel)
        self.tap.splitter.sinks[self.channel.number] = arrivals
        await self.channel.basic_qos(prefetch_count=prefetch)
        await self.channel.basic_consume(queue, _unused)
        return arrivals

    async def close(self) -> None:
        """Close it within a bound: what was not acknowledged is given back, what was is gone."""
        self.watch.cancel()
        with contextlib.suppress(*AMQP_FAILURES):
            async with asyncio.timeout(_CLOSE_S), ends_are_failures():
                await self.channel.close()
                await self.connection.close()
        self.tap.abort()


async def open_line(config: Config) -> Line:
    """Return a line to the first node that lets us in. Raises BrokerError with the mend."""
    options, place = rabbit_options(config), amqp_place(config)
    failure: BaseException = ConnectionError("[rabbitmq] url names no node")
    for url in options.urls:
        try:
            async with asyncio.timeout(place.timeout_s):
                connection, tap = await open_tapped(
                    options.address(url), _MAX_BODY_BYTES, f"{options.client_name} (operator)"
                )
                channel = await connection.channel(publisher_confirms=False)
                return Line(connection, tap, channel, asyncio.create_task(_tell_the_end(tap)))
        except AMQP_FAILURES as error:
            failure = error
    raise amqp_failure(place, failure) from failure


async def _tell_the_end(tap: Tap) -> None:
    """Tell every channel that waits when the connection under it is gone."""
    await tap.lost.wait()
    for sink in list(tap.splitter.sinks.values()):
        sink.closed()


class _Sink:
    """Hears nothing; see :class:`~inferfleet.brokers.rabbitmq_frames.Sink`."""

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """Nothing is taken here."""

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        """Nothing is published here."""

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """Nothing is published here."""

    def closed(self) -> None:
        """Nobody waits."""

    def flush(self) -> None:
        """Nobody waits."""


class Arrivals(_Sink):
    """What the taking channel has brought."""

    def __init__(self, channel: AbstractChannel) -> None:
        self._channel = channel
        self._arrived: asyncio.Queue[Arrived | None] = asyncio.Queue()

    async def next(self, timeout_s: float) -> Arrived | None:
        """Return the next message, ``None`` if none comes in time. Raises what ended the channel."""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._arrived.get()
        except TimeoutError:
            return None
        if found is None:
            raise await _end_of(self._channel)
        return found

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """Keep a message; nothing that its headers hold raises."""
        keys, headers, _, amqp, _ = columns([(tag, redelivered, header, body, 0)])
        self._arrived.put_nowait(Arrived(tag, keys[0], headers[0], body, amqp[0]))

    def closed(self) -> None:
        """Nothing more comes."""
        self._arrived.put_nowait(None)


class Confirms(_Sink):
    """Publishes to one queue, and hears what the broker says of each message, by the order of publishing."""

    def __init__(self, line: Line, channel: AbstractChannel, queue: str, timeout_s: float) -> None:
        self.queue = queue
        self._line = line
        self._channel = channel
        self._way: Route = route(channel.number, b"", queue.encode())
        self._timeout_s = timeout_s
        self._open: dict[int, asyncio.Future[bool]] = {}
        self._last = 0
        self._unroutable = False

    @classmethod
    async def opened(cls, line: Line, queue: str, timeout_s: float) -> Confirms:
        """Return one on a channel of its own."""
        channel = await line.connection.channel(publisher_confirms=True)
        found = line.tap.splitter.sinks[channel.number] = cls(line, channel, queue, timeout_s)
        return found

    async def publish(self, messages: Sequence[tuple[bytes, bytes]]) -> list[str]:
        """Publish (properties, body) pairs; return for each why it was not kept, ``""`` if it was.

        Raises BrokerError where the queue is missing or the broker does not confirm in time, and what ended
        the channel.
        """
        if self._line.tap.lost.is_set():
            raise await _end_of(self._channel)
        frame_max = self._line.connection.connection_tune.frame_max or 131_072
        pieces: list[bytes] = []
        results = [""] * len(messages)
        waiting: dict[int, asyncio.Future[bool]] = {}
        for index, (properties, body) in enumerate(messages):
            try:
                pieces += message(self._way, properties, body, frame_max)
            except ValueError as error:
                results[index] = str(error)
            else:
                waiting[index] = self._next()
        self._line.tap.write(b"".join(pieces))
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.gather(*waiting.values())
        except TimeoutError:
            raise BrokerError(
                f"queue {self.queue} did not confirm within {self._timeout_s:g} s; whether it has the last "
                f"{len(waiting)} is not known"
            ) from None
        except ConnectionError:
            raise await _end_of(self._channel) from None
        if self._unroutable:
            raise BrokerError(
                f"queue {self.queue} does not exist; `inferfleet topics plan` prints how to create it"
            )
        for index, future in waiting.items():
            if not future.result():
                results[index] = f"queue {self.queue} did not take it; it is full"
        return results

    def _next(self) -> asyncio.Future[bool]:
        self._last += 1
        found = self._open[self._last] = asyncio.get_running_loop().create_future()
        return found

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:  # noqa: ARG002
        """No queue took a message; all of them go to the same."""
        self._unroutable = True

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """Tell who waits."""
        for each in [number for number in self._open if number <= tag] if multiple else [tag]:
            future = self._open.pop(each, None)
            if future is not None and not future.done():
                future.set_result(accepted)

    def closed(self) -> None:
        """What is open is not confirmed any more."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(ConnectionError("the broker has closed the channel"))
        self._open.clear()


async def _end_of(channel: AbstractChannel) -> BaseException:
    """Return why a channel ended, given a moment in which the library hears it."""
    closing = channel.closing
    await asyncio.wait([closing], timeout=1.0)
    error = closing.exception() if closing.done() and not closing.cancelled() else None
    return error or ConnectionError("the broker has closed the channel")


async def _unused(_: Any) -> None:
    """Take the place of the library's callback: the splitter has the messages already."""
