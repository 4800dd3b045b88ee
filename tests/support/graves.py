"""Dead letters that tests put into a route's topic or queue, and what is found where they are sent again."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

from confluent_kafka import Consumer, Producer, TopicPartition

from inferfleet.errors import Code
from inferfleet.records import Chunk, Header, Stream
from inferfleet.worker.deadletter import CUT, dead_letter_headers
from tests.support.fleet import Fleet
from tests.support.kafka_server import KafkaServer

NOW_MS = 1_790_000_000_000
FIRST_DELAY_MS = 5000


class Letter(NamedTuple):
    """A dead letter to be: a request and why it failed."""

    id: str | None = None
    body: bytes = b"{}"
    code: Code = Code.MODEL
    failed_ms: int = NOW_MS
    version: str = "1"
    headers: tuple[tuple[str, bytes], ...] = ()
    cut: bool = False
    key: bytes | None = b"k"

    def headers_at(self, source: str, offset: int) -> list[Header]:
        """Return the headers that a worker gives it."""
        given: list[Header] = [*([("inferfleet-id", self.id.encode())] if self.id else []), *self.headers]
        chunk = Chunk(
            Stream(source, 0), 1, [offset], [self.key], [self.body], [given], [NOW_MS - 1000], taken_at=0.0
        )
        served = f"route=r;model=m;version={self.version};variant=stable;revision=x;worker=w"
        own: Header = ("inferfleet-served", served.encode())
        headers = dead_letter_headers(chunk, 0, self.code, f"why {offset}", own, b"%d" % self.failed_ms)
        return [*headers, (CUT, b"body headers")] if self.cut else headers


class Arrived(NamedTuple):
    """What stands in a retry topic or queue."""

    key: bytes | None
    body: bytes
    headers: list[tuple[str, bytes]]

    def header(self, name: str) -> bytes:
        """Return the first header of a name, empty where there is none."""
        return next((value for key, value in self.headers if key == name), b"")


class Grave(Protocol):
    """The dead letters of the route ``r`` on one broker."""

    fleet: Fleet

    def bury(self, *letters: Letter) -> None:
        """Put letters there as a worker would."""

    def retried(self) -> list[Arrived]:
        """Return what was sent again; on RabbitMQ it is taken."""


class KafkaGrave:
    """A dead-letter topic."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._buried = 0

    def bury(self, *letters: Letter) -> None:
        """Put letters there as a worker would."""
        producer = Producer(self.fleet.kafka.client_config())
        for each in letters:
            headers = each.headers_at(self.fleet.source("r"), self._buried)
            topic = self.fleet.dead_letters("r")
            producer.produce(topic, each.body, each.key, partition=0, headers=headers)
            self._buried += 1
        assert producer.flush(10) == 0

    def retried(self) -> list[Arrived]:
        """Return what stands in the shortest retry topic."""
        return committed(self.fleet.kafka, self.fleet.retries("r", FIRST_DELAY_MS))


class RabbitGrave:
    """A dead-letter queue."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._buried = 0

    def bury(self, *letters: Letter) -> None:
        """Put letters there as a worker would."""
        for each in letters:
            headers = each.headers_at(f"rabbitmq:{self.fleet.source('r')}", self._buried)
            table: dict[str, Any] = {name: (value or b"").decode() for name, value in headers}
            if each.key is not None:
                table["inferfleet-key"] = each.key.decode()
            properties = {"message_id": f"m-{self._buried}", "correlation_id": "c", "reply_to": "amq.gen-x"}
            queue = self.fleet.dead_letters("r")
            self.fleet.rabbitmq.publish(queue, each.body, headers=table, **properties)
            self._buried += 1

    def retried(self) -> list[Arrived]:
        """Take what stands in the ready queue."""
        queue = self.fleet.retries("r", "ready")
        arrived = []
        for each in self.fleet.rabbitmq.take(queue, self.fleet.rabbitmq.depth(queue)):
            headers = [(name, str(value).encode()) for name, value in each.headers.items()]
            key = each.headers.get("inferfleet-key")
            arrived.append(Arrived(None if key is None else key.encode(), each.body, headers))
        return arrived


def committed(kafka: KafkaServer, topic: str) -> list[Arrived]:
    """Return all that readers of committed records see in partition 0."""
    consumer = Consumer(kafka.client_config() | {"group.id": "reader", "enable.partition.eof": True})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[Arrived] = []
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            message = consumer.poll(1.0)
            if message is not None and message.error():
                return found
            if message is not None:
                found.append(Arrived(message.key(), message.value(), message.headers() or []))
    finally:
        consumer.close()
    raise AssertionError(f"{topic} was not read to its end")
