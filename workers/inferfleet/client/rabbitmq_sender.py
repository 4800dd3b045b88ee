"""Puts requests into RabbitMQ queues: confirmed, persistent, mandatory; failures are never silent.

A thread of its own runs an event loop with aio-pika. Many publishes wait for their confirms at once. When the
connection breaks, what it had not confirmed is sent again over a new one: perhaps a second time, under the
same id, which is why a request is written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import DeliveryError, PublishError

from inferfleet.addresses import plain
from inferfleet.client.outcome import SubmitError
from inferfleet.client.sender import Failed, Failures, Message, Replied
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.rabbitmq_access import (
    AMQP_FAILURES,
    AmqpPlace,
    amqp_failure,
    ends_are_failures,
    open_amqp,
    refuses_for_good,
)
from inferfleet.wire.headers import CONTENT_TYPE

KEY = "inferfleet-key"
MAX_QUEUED = 10_000
MAX_IN_FLIGHT = 256
_PAUSE_S = 0.25
_CLOSE_S = 2.0


class _Line(NamedTuple):
    """A connection that is up, its exchange for queues by name, and the queue that replies come to."""

    connection: AbstractConnection
    exchange: AbstractExchange
    reply_to: str | None


class RabbitSender:
    """Owns a connection and the thread that it lives on; ``failed`` and ``replied`` are called there."""

    def __init__(self, place: AmqpPlace, name: str, failed: Failed, replied: Replied) -> None:
        self._place = place
        self._name = name
        self._failed = failed
        self._replied = replied
        self._failures = Failures()
        self._changed = threading.Condition()
        self._open = 0
        self._line: _Line | None = None
        self._wants_replies = False
        self._why = ""
        self._loop = asyncio.new_event_loop()
        self._queue: asyncio.Queue[tuple[Message, float]] = asyncio.Queue()
        self._connecting = asyncio.Lock()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="inferfleet-sender", daemon=True)
        self._thread.start()

    def send(self, message: Message, timeout_s: float = 30.0) -> None:
        """Hand over; waits up to ``timeout_s`` while too much is under way. Raises SubmitError."""
        gives_up_at = time.monotonic() + timeout_s
        while not self.try_send(message):
            with self._changed:
                left = gives_up_at - time.monotonic()
                if not self._changed.wait_for(lambda: self._open < MAX_QUEUED, max(0.0, left)):
                    raise SubmitError(
                        f"request {message.id}: the send queue stayed full for {timeout_s:g} s{self._why}",
                        message.id,
                    )

    def try_send(self, message: Message) -> bool:
        """Hand over without waiting; false while too much is under way. Raises SubmitError."""
        self._failures.raise_kept()
        with self._changed:
            if self._open >= MAX_QUEUED:
                return False
            self._open += 1
        gives_up_at = self._loop.time() + self._place.publish_timeout_s
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (message, gives_up_at))
        return True

    def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is confirmed. Raises SubmitError if something is not."""
        left = self._settled(timeout_s)
        self._failures.raise_kept()
        if left:
            raise SubmitError(f"{left} requests were not delivered within {timeout_s:g} s{self._why}")

    def close(self, timeout_s: float) -> int:
        """Deliver what is left within ``timeout_s`` and end the thread; return how many stay undelivered."""
        left = self._settled(timeout_s)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * _CLOSE_S)
        return left

    def _settled(self, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0, timeout_s)
            return self._open

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._work())

    async def _work(self) -> None:
        lanes = [asyncio.create_task(self._lane()) for _ in range(MAX_IN_FLIGHT)]
        await self._stop.wait()
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        await self._drop(self._line)

    async def _lane(self) -> None:
        """Publish one message after the other; as many lanes as may be in flight run at once."""
        while True:
            message, gives_up_at = await self._queue.get()
            try:
                text = await self._deliver(message, gives_up_at)
            except Exception as error:
                text = f"cannot be sent ({type(error).__name__}: {error})"
            if text:
                failure = SubmitError(f"request {message.id}: {text}", message.id)
                self._failures.add(failure)
                self._failed(message.id, failure)
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    async def _deliver(self, message: Message, gives_up_at: float) -> str:
        """Publish until confirmed, refused or out of time; return what went wrong, ``""`` for nothing."""
        queue = plain(message.topic)
        while True:
            line = None
            try:
                async with asyncio.timeout_at(gives_up_at), ends_are_failures():
                    line = await self._opened(message.by_reply)
                    await line.exchange.publish(_amqp(message, line.reply_to), queue, mandatory=True)
                self._why = ""
                return ""
            except PublishError:
                return f"queue {queue} does not exist; `inferfleet topics plan` prints how to create it"
            except DeliveryError:
                return f"queue {queue} did not take it; it is full, or its leader is away"
            except ConfigError as error:
                return str(error)
            except (BrokerError, *AMQP_FAILURES) as error:
                failure = error if isinstance(error, BrokerError) else amqp_failure(self._place, error)
                if refuses_for_good(error):
                    return str(failure)
                late = self._loop.time() >= gives_up_at
                if not (late and isinstance(error, TimeoutError)):
                    self._why = f" ({failure})"
                await self._drop(line)
                if late:
                    took_s = self._place.publish_timeout_s
                    return f"queue {queue} did not confirm it within {took_s:g} s{self._why}"
            await asyncio.sleep(min(_PAUSE_S, max(0.0, gives_up_at - self._loop.time())))

    async def _opened(self, wants_replies: bool) -> _Line:
        """Return the line; connect if there is none, or none that replies can come by."""
        async with self._connecting:
            self._wants_replies = self._wants_replies or wants_replies
            line = self._line
            if line is not None and line.connection.is_closed:
                await self._drop(line)
                line = None
            if line is None:
                connection = await open_amqp(self._place, self._name)
                try:
                    channel = await connection.channel(on_return_raises=True)
                except BaseException:
                    await _close(connection)
                    raise
                line = self._line = _Line(connection, channel.default_exchange, None)
            if self._wants_replies and line.reply_to is None:
                # A channel of its own, because a refused publish closes the other.
                channel = await line.connection.channel(publisher_confirms=False)
                queue = await channel.declare_queue(exclusive=True)
                await queue.consume(self._on_reply, no_ack=True)
                line = self._line = line._replace(reply_to=queue.name)
            return line

    async def _on_reply(self, reply: AbstractIncomingMessage) -> None:
        self._replied(reply.correlation_id or "", reply.body)

    async def _drop(self, line: _Line | None) -> None:
        """Close a line that failed, once; who uses it fails too and comes for a new one."""
        if line is None:
            return
        if self._line is not None and self._line.connection is line.connection:
            self._line = None
        await _close(line.connection)


async def _close(connection: AbstractConnection) -> None:
    with contextlib.suppress(*AMQP_FAILURES):
        async with asyncio.timeout(_CLOSE_S):
            await connection.close()


def _amqp(message: Message, reply_to: str | None) -> aio_pika.Message:
    """Return the message as AMQP carries it; the key, for which AMQP has no place, is a header."""
    headers: dict[str, Any] = table(message.headers)
    if message.key is not None:
        headers[KEY] = text_or_bytes(message.key)
    return aio_pika.Message(
        message.value,
        headers=headers,
        content_type=str(headers.get(CONTENT_TYPE, "application/json")),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=message.id,
        correlation_id=message.id if message.by_reply else None,
        reply_to=reply_to if message.by_reply else None,
    )


def table(headers: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """Return headers as AMQP's table: text where the bytes are UTF-8; of a repeated name the first counts."""
    return {name: text_or_bytes(value) for name, value in reversed(headers)}


def text_or_bytes(value: bytes) -> str | bytearray:
    """Return what AMQP's table can hold of a header's bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return bytearray(value)
