"""RabbitMQ as the intake and outlet suites see it, and small things that its own tests do to it."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from typing import Any

import pika

from inferfleet.addresses import exchange_and_key, on_rabbitmq, plain, rabbitmq_source, to_queue
from inferfleet.brokers.rabbitmq_frames import acknowledgement
from inferfleet.brokers.rabbitmq_intake import RabbitIntake
from inferfleet.brokers.rabbitmq_link import RabbitLink, RabbitOptions
from inferfleet.records import Header, Stream
from tests.contract.intake_bench import Bench, Place, Reader, Sent
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

PREFETCH = 1000
KEY = "inferfleet-key"


def queue_name(stem: str = "queue") -> str:
    return f"{stem}.{secrets.token_hex(4)}"


def new_link(server: RabbitServer, **options: Any) -> RabbitLink:
    given: dict[str, Any] = {"urls": (server.url,), "heartbeat_s": 5, "client_name": "tests", **options}
    return RabbitLink(RabbitOptions(**given))


def put(server: RabbitServer, queue: str, records: Sequence[Sent]) -> None:
    """Send records as a plain client does: the key is a header, and a body is never nothing."""
    with server.channel() as channel:
        for value, key, headers in records:
            table: dict[str, Any] = {name: _text(each) for name, each in headers or ()}
            if key is not None:
                table[KEY] = _text(key)
            properties = pika.BasicProperties(headers=table or None, delivery_mode=2)
            channel.basic_publish("", queue, value or b"", properties, mandatory=True)


def _text(value: bytes | None) -> Any:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def as_bytes(value: Any) -> bytes | None:
    """Return a header's value as pika has it, as bytes."""
    return value.encode() if isinstance(value, str) else value


def last_of_each(headers: Sequence[Header]) -> tuple[Header, ...]:
    """Return headers as a table has them: each name once."""
    return tuple({name: (name, value) for name, value in headers}.values())


def break_channel(link: RabbitLink, number: int = 1) -> None:
    """Make the broker close a channel, as it does when a delivery was out for too long: by error 406."""

    def acknowledge_what_never_came() -> None:
        connected = link.taking.now
        assert connected is not None
        connected.tap.write(acknowledgement(number, 1 << 40))

    link.call(acknowledge_what_never_came)


def drop_connection(link: RabbitLink) -> None:
    """Let the sockets of a link end without a word."""

    def abort() -> None:
        for line in (link.taking, link.publishing):
            if line.now is not None:
                line.now.tap.abort()

    link.call(abort)


def deliver_frames(number: int, tag: int, header: bytes, *bodies: bytes) -> bytes:
    """Return a delivery as a broker sends it; ``header`` begins with the flags."""
    method = struct.pack(">HHB", 60, 60, 1) + b"c" + struct.pack(">QB", tag, 0) + b"\x00\x01q"
    content = struct.pack(">HHQ", 60, 0, sum(map(len, bodies))) + header
    parts = [(1, method), (2, content), *((3, body) for body in bodies)]
    return b"".join(struct.pack(">BHI", kind, number, len(part)) + part + b"\xce" for kind, part in parts)


class RabbitBench(Bench):
    """A real node; each member has a link of its own, as each worker has."""

    first_position = 1

    def __init__(self, server: RabbitServer) -> None:
        super().__init__()
        self.server = server
        self.links: dict[int, RabbitLink] = {}
        self._sent: dict[str, int] = {}

    def topic(self, partitions: int = 1) -> str:
        assert partitions == 1, "a queue has no partitions"
        queue = queue_name("intake")
        self.server.declare(queue)
        return rabbitmq_source(queue)

    def places(self, count: int) -> list[Place]:
        return [(self.topic(), 0) for _ in range(count)]

    def place_of(self, stream: Stream) -> Place:
        return (stream.source, 0)

    def send(self, topic: str, partition: int, *records: Sent) -> None:
        put(self.server, plain(topic), records)
        self._sent[topic] = self._sent.get(topic, 0) + len(records)

    def kept(self, sent: Sent) -> Sent:
        headers = [(name.lower(), value) for name, value in last_of_each(sent.headers or ())]
        return Sent(sent.value or b"", sent.key, headers or None)

    def leave_a_gap(self, topic: str, partition: int) -> None:
        raise NotImplementedError("delivery tags have no gaps")

    def intake(self, start: str) -> RabbitIntake:
        link = new_link(self.server)
        intake = RabbitIntake(link, prefetch=lambda _: PREFETCH, lag_every_s=0.1)
        self.links[id(intake)] = link
        return intake

    def stall(self, reader: Reader) -> None:
        break_channel(self.links[id(reader.intake)])

    def bring_back(self, reader: Reader, other: Reader) -> None:
        other.close()
        self.stall(reader)

    def committed(self, topic: str, partition: int = 0) -> int | None:
        raise NotImplementedError("a queue forgets what was acknowledged; see settled")

    def settled(self, topic: str, partition: int = 0) -> int:
        """Return how many messages have left the queue."""
        return self._sent.get(topic, 0) - self.server.depth(plain(topic)) - self.server.unacked(plain(topic))

    def close(self) -> None:
        super().close()
        for link in self.links.values():
            link.close()


def read_all(server: RabbitServer, destination: str, seen: list[Any]) -> list[Any]:
    """Take everything out of a queue, behind what was taken before."""
    queue = exchange_and_key(destination)[1] if on_rabbitmq(destination) else destination
    with server.channel() as channel:
        left = channel.queue_declare(queue, passive=True).method.message_count
        if left:
            for received in channel.consume(queue, auto_ack=True):
                seen.append(received)
                left -= 1
                if not left:
                    break
    return seen


def new_queue(server: RabbitServer, **arguments: Any) -> str:
    """Declare a queue; return the destination that reaches it."""
    queue = queue_name("outlet")
    server.declare(queue, **arguments)
    return to_queue(queue)


def until_up(link: RabbitLink, *, publishing: bool = False) -> None:
    """Return once a connection is open."""
    line = link.publishing if publishing else link.taking
    wait_until(lambda: line.now is not None, 30.0, f"{line.use} is connected")
