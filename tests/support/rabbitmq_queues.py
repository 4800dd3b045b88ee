"""What tests do on a RabbitMQ node by a plain client: declare, publish with confirms, take, call."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pika
from pika.exceptions import ChannelClosedByBroker

from tests.support.waiting import wait_until

DIRECT_REPLY = "amq.rabbitmq.reply-to"
_NOT_FOUND = 404
_PATIENCE_S = 30.0


class Received(NamedTuple):
    """One message as it was delivered; ``properties`` are pika's (``headers``, ``correlation_id`` ...)."""

    body: bytes
    properties: Any
    redelivered: bool
    exchange: str
    key: str

    @property
    def headers(self) -> dict[str, Any]:
        """The header table, empty when there is none."""
        return self.properties.headers or {}


class RabbitQueues:
    """Short synchronous helpers on the node at ``url``; each opens a connection of its own and closes it.

    Queues are durable quorum queues, messages persistent and mandatory, and publishing waits for confirms.
    Nothing waits longer than 30 s: a node that blocks publishers raises
    ``pika.exceptions.ConnectionBlockedTimeout``.
    """

    url: str

    @contextlib.contextmanager
    def connection(self, **parameters: Any) -> Iterator[Any]:
        """Yield a ``BlockingConnection``; ``parameters`` are set on pika's connection parameters."""
        wanted = pika.URLParameters(self.url)
        wanted.socket_timeout = wanted.blocked_connection_timeout = _PATIENCE_S
        for name, value in parameters.items():
            setattr(wanted, name, value)
        connection = pika.BlockingConnection(wanted)
        try:
            yield connection
        finally:
            if connection.is_open:
                connection.close()

    @contextlib.contextmanager
    def channel(self, **parameters: Any) -> Iterator[Any]:
        """Yield a channel with publisher confirms on a connection of its own."""
        with self.connection(**parameters) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel

    def declare(self, *queues: str, **arguments: Any) -> None:
        """Declare durable quorum queues; ``x_message_ttl=50`` is the argument ``x-message-ttl``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        with self.channel() as channel:
            for queue in queues:
                channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum", **named})

    def declare_exchange(self, name: str, kind: str = "direct") -> None:
        """Declare a durable exchange."""
        with self.channel() as channel:
            channel.exchange_declare(name, kind, durable=True)

    def bind(self, queue: str, exchange: str, key: str = "") -> None:
        """Let ``exchange`` send what is published with ``key`` to ``queue``."""
        with self.channel() as channel:
            channel.queue_bind(queue, exchange, key)

    def delete_queue(self, *queues: str) -> None:
        """Delete queues with all that is in them; those that do not exist are no error."""
        with self.channel() as channel:
            for queue in queues:
                channel.queue_delete(queue)

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange; one that does not exist is no error."""
        with self.channel() as channel:
            channel.exchange_delete(name)

    def exists(self, queue: str) -> bool:
        """Say whether there is a queue of this name."""
        with self.channel() as channel:
            try:
                channel.queue_declare(queue, passive=True)
            except ChannelClosedByBroker as error:
                if error.reply_code != _NOT_FOUND:
                    raise
                return False
        return True

    def depth(self, queue: str) -> int:
        """Return how many messages are ready (taken and unacknowledged ones do not count)."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def publish(
        self,
        key: str,
        *bodies: bytes,
        exchange: str = "",
        headers: Mapping[str, Any] | None = None,
        **properties: Any,
    ) -> None:
        """Publish bodies; return once all are confirmed. Without ``exchange`` the key is a queue's name.

        ``properties`` are AMQP's, as ``message_id="m-1"``. Raises pika's ``UnroutableError``, ``NackError``.
        """
        given = {"delivery_mode": 2, "headers": None if headers is None else dict(headers), **properties}
        with self.channel() as channel:
            for body in bodies:
                channel.basic_publish(exchange, key, body, pika.BasicProperties(**given), mandatory=True)

    def get(self, queue: str) -> Received | None:
        """Take and acknowledge the first message; None when none is ready."""
        with self.channel() as channel:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
            return None if method is None else _received(method, properties, body)

    def take(self, queue: str, count: int, timeout_s: float = 20.0) -> list[Received]:
        """Consume and acknowledge ``count`` messages, which must come within ``timeout_s``."""
        found: list[Received] = []
        gives_up_at = time.monotonic() + timeout_s
        with self.channel() as channel:
            channel.basic_qos(prefetch_count=min(count, 1000))
            for method, properties, body in channel.consume(queue, inactivity_timeout=0.05):
                if method is not None:
                    found.append(_received(method, properties, body))
                    channel.basic_ack(method.delivery_tag)
                if len(found) >= count:
                    return found
                if time.monotonic() > gives_up_at:
                    break
        raise AssertionError(f"{queue}: {len(found)} of {count} messages came within {timeout_s:g} s")

    def wait_depth(self, queue: str, count: int, timeout_s: float = 20.0) -> None:
        """Return once exactly ``count`` messages are ready."""
        with self.channel() as channel:

            def ready() -> bool:
                found = channel.queue_declare(queue, passive=True).method.message_count
                return bool(found == count)

            wait_until(ready, timeout_s, f"{count} messages are ready in {queue}")

    def call(
        self,
        queue: str,
        *bodies: bytes,
        direct: bool = False,
        timeout_s: float = 20.0,
        headers: Mapping[str, Any] | None = None,
    ) -> list[Received]:
        """Be a plain RPC client: send requests with ``reply_to`` and ``correlation_id``, return the replies.

        Replies are in the order of the requests and arrive on an exclusive queue, or with ``direct`` by the
        broker's direct reply-to. A reply that nobody waits for raises.
        """
        replies: dict[str, Received] = {}
        ids = [uuid.uuid4().hex for _ in bodies]

        def on_reply(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            if properties.correlation_id not in ids or properties.correlation_id in replies:
                raise AssertionError(f"an unexpected reply: {properties.correlation_id!r} {body[:200]!r}")
            replies[properties.correlation_id] = _received(method, properties, body)

        with self.connection() as connection:
            channel = connection.channel()
            name = DIRECT_REPLY if direct else channel.queue_declare("", exclusive=True).method.queue
            channel.basic_consume(name, on_reply, auto_ack=True)
            for request_id, body in zip(ids, bodies, strict=True):
                asked = pika.BasicProperties(
                    reply_to=name,
                    correlation_id=request_id,
                    delivery_mode=2,
                    headers=None if headers is None else dict(headers),
                )
                channel.basic_publish("", queue, body, asked, mandatory=True)
            gives_up_at = time.monotonic() + timeout_s
            while len(replies) < len(ids):
                if time.monotonic() > gives_up_at:
                    raise AssertionError(f"{len(replies)} of {len(ids)} replies within {timeout_s:g} s")
                connection.process_data_events(0.05)
        return [replies[request_id] for request_id in ids]


def _received(method: Any, properties: Any, body: bytes) -> Received:
    return Received(body, properties, method.redelivered, method.exchange, method.routing_key)
