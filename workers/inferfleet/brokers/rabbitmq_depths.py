"""How many messages wait in queues: asked by passive declares, on a channel of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from inferfleet.brokers.rabbitmq_consumer import Consumer
from inferfleet.brokers.rabbitmq_link import Connected, Line
from inferfleet.rabbitmq_access import AMQP_FAILURES

LAG_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 5.0


class Depths:
    """Asks the broker on one line; everything here runs on the link's thread."""

    def __init__(self, line: Line, every_s: float) -> None:
        self._line = line
        self._every_s = every_s
        self._one_at_a_time = asyncio.Lock()
        self._opened: tuple[Connected, AbstractChannel] | None = None

    async def of(self, queue: str) -> int:
        """Return how many messages are ready in a queue; in one that does not exist there are none.

        Raises what the client library raises where the broker does not say.
        """
        async with self._one_at_a_time:
            channel = await self._channel()
            try:
                found = await channel.queue_declare(queue, passive=True, timeout=ANSWER_TIMEOUT_S)
            except ChannelNotFoundEntity:
                self._opened = None
                return 0
            except BaseException:
                self._opened = None
                raise
            return found.message_count or 0

    async def _channel(self) -> AbstractChannel:
        connected = self._line.now
        if connected is None:
            raise ConnectionError("there is no connection to RabbitMQ")
        if self._opened is None or self._opened[0] is not connected or self._opened[1].is_closed:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                channel = await connected.connection.channel(publisher_confirms=False)
            self._opened = (connected, channel)
        return self._opened[1]

    async def follow(self, consumers: Callable[[], Sequence[Consumer]]) -> None:
        """Keep the depths of these consumers' queues fresh; ends when it is cancelled."""
        while True:
            for consumer in consumers():
                if consumer.arrivals is None or (self._line.now is not None and self._line.now.tap.held):
                    continue
                try:
                    consumer.depth = await self.of(consumer.queue)
                except (*AMQP_FAILURES, RuntimeError):
                    consumer.depth = None
            await asyncio.sleep(self._every_s)
