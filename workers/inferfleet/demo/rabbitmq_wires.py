"""The demo's own client of RabbitMQ: sends requests, collects answers, and knows when work is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError

from inferfleet.demo.processes import DemoError
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Request, decode_answer
from inferfleet.rabbitmq_access import AmqpPlace, open_amqp

_TIMEOUT_S = 15.0
_HEARTBEAT_S = 60
"""Nothing beats while no method runs, so the broker must be patient."""


class RabbitWires:
    """Implements :class:`~inferfleet.demo.broker.Wires` with aio-pika; ``held`` counts a queue's messages.

    Everything happens within its methods: the event loop runs no longer than they do.
    """

    def __init__(
        self, url: str, routes: Sequence[str], tally: Tally, held: Callable[[], Mapping[str, int]]
    ) -> None:
        self._place = AmqpPlace((url,), heartbeat_s=_HEARTBEAT_S, timeout_s=_TIMEOUT_S)
        self._routes = list(routes)
        self._tally = tally
        self._held = held
        self._arrived: list[tuple[str, AbstractIncomingMessage, float]] = []
        self._runner = asyncio.Runner()
        try:
            self._runner.run(self._open())
        except BaseException:
            self._runner.close()
            raise

    async def _open(self) -> None:
        self._connection: AbstractConnection = await open_amqp(self._place, "inferfleet demo")
        self._exchange: AbstractExchange = (await self._connection.channel()).default_exchange
        # The broker may forget an answer once it is sent to us: nobody but this demo counts on it.
        self._answers: AbstractChannel = await self._connection.channel()
        for route in self._routes:
            queue = await self._answers.get_queue(f"{route}.results")
            await queue.consume(self._taker(route), no_ack=True)

    def _taker(self, route: str) -> Callable[[AbstractIncomingMessage], Awaitable[None]]:
        async def take(message: AbstractIncomingMessage) -> None:
            self._arrived.append((route, message, time.monotonic()))

        return take

    def send(self, requests: Iterable[Request]) -> None:
        """Send requests and return when the broker has confirmed them all."""
        try:
            self._runner.run(self._send(list(requests)))
        except (AMQPError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise DemoError(f"the broker did not take every request: {reason}") from None

    async def _send(self, requests: Sequence[Request]) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            for request in requests:
                self._tally.note_sent(request.route, request.id, time.monotonic())
            await asyncio.gather(*(self._publish(request) for request in requests))

    async def _publish(self, request: Request) -> None:
        headers = {name: value.decode() for name, value in request.headers}
        message = aio_pika.Message(
            request.value,
            content_type=headers.pop("content-type", "application/json"),
            headers={"inferfleet-key": request.key.decode(), **headers},
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await self._exchange.publish(message, f"{request.route}.requests", mandatory=True)

    def collect(self, seconds: float) -> int:
        """Take the answers that arrive within ``seconds``; returns how many came."""
        self._runner.run(asyncio.sleep(seconds))
        arrived, self._arrived = self._arrived, []
        for route, message, at in arrived:
            self._tally.note_answer(decode_answer(route, message.body, plain_headers(message.headers)), at)
        if self._connection.is_closed:
            raise DemoError("reading answers: RabbitMQ closed the connection")
        return len(arrived)

    def unsettled(self) -> list[str]:
        """Return which request queues hold messages that no worker has acknowledged."""
        held = self._held()
        queues = [f"{route}.requests" for route in self._routes]
        return [f"{queue} with {held[queue]}" for queue in queues if held.get(queue)]

    def unread(self) -> list[str]:
        """Return which queues of outcomes hold messages."""
        return self._runner.run(self._unread()) + [f"{len(self._arrived)} here"] * bool(self._arrived)

    async def _unread(self) -> list[str]:
        found = []
        for route in self._routes:
            queue = await self._answers.get_queue(f"{route}.results")
            if queue.declaration_result.message_count:
                found.append(f"{queue.name} with {queue.declaration_result.message_count}")
        return found

    def close(self) -> None:
        """Give the connection back."""
        try:
            self._runner.run(asyncio.wait_for(self._connection.close(), _TIMEOUT_S))
        except (AMQPError, OSError, TimeoutError):
            pass  # it is over either way
        finally:
            self._runner.close()


def plain_headers(table: Mapping[str, object]) -> dict[str, bytes]:
    """Return a header table's texts as bytes, as they stand on Kafka."""
    return {
        name: value.encode() if isinstance(value, str) else bytes(value)
        for name, value in table.items()
        if isinstance(value, str | bytes | bytearray)
    }
