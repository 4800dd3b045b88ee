"""What only RabbitMQ does to those who publish: returned messages, closed channels, alarms, replies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pika
import pytest

from inferfleet.addresses import exchange_and_key
from inferfleet.brokers.rabbitmq_intake import RabbitIntake
from inferfleet.brokers.rabbitmq_outlet import RabbitOutlet
from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Amqp, Envelopes, Header
from tests.contract.intake_bench import Reader, Sent
from tests.contract.rabbitmq_bench import (
    drop_connection,
    new_link,
    new_queue,
    put,
    queue_name,
    read_all,
    until_up,
)
from tests.support.rabbitmq_queues import DIRECT_REPLY
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PATIENCE_S = 30.0


class Told:
    """A receipt that fails at once when anything is told twice."""

    def __init__(self, published: int) -> None:
        self.published = published
        self.confirmed_rows = 0
        self.refusals: dict[int, Refusal] = {}

    def confirmed(self, count: int) -> None:
        self.confirmed_rows += count
        assert self.done <= self.published

    def refused(self, index: int, refusal: Refusal) -> None:
        assert index not in self.refusals
        self.refusals[index] = refusal
        assert self.done <= self.published

    @property
    def done(self) -> int:
        return self.confirmed_rows + len(self.refusals)

    @property
    def kinds(self) -> set[RefusalKind]:
        return {refusal.kind for refusal in self.refusals.values()}


class Sender:
    """An outlet on a link of its own."""

    def __init__(self, server: RabbitServer, *, reply_allowed: Sequence[str] = (), **options: Any) -> None:
        self.link = new_link(server, **options)
        self.outlet = RabbitOutlet(self.link, reply_allowed)

    def hand_over(self, destination: str, values: Sequence[bytes], **columns: Any) -> Told:
        told = Told(len(values))
        headers: list[list[Header]] = columns.pop("headers", [[] for _ in values])
        self.outlet.publish(
            Envelopes(destination, [None] * len(values), list(values), headers, **columns), told
        )
        return told

    def until_told(self, *told: Told, within_s: float = PATIENCE_S) -> None:
        def all_told() -> bool:
            self.outlet.poll(0.02)
            return all(each.done == each.published for each in told)

        wait_until(all_told, within_s, "every envelope is confirmed or refused", every_s=0.001)

    def publish(self, destination: str, values: Sequence[bytes], **columns: Any) -> Told:
        told = self.hand_over(destination, values, **columns)
        self.until_told(told)
        return told

    def close(self) -> None:
        self.outlet.close(1.0)
        self.link.close()


@pytest.fixture
def sender(rabbitmq: RabbitServer) -> Iterator[Sender]:
    """An outlet to the shared node."""
    made = Sender(rabbitmq)
    yield made
    made.close()


def held(server: RabbitServer, destination: str) -> list[bytes]:
    return [body for _, _, body in read_all(server, destination, [])]


def values(count: int, stem: str = "v") -> list[bytes]:
    return [f"{stem}{n}".encode() for n in range(count)]


# Where nothing takes it


def test_what_no_queue_takes_is_denied_and_its_neighbours_are_not(
    rabbitmq: RabbitServer, sender: Sender
) -> None:
    """A returned message carries no number: it is found again by where it went and what it was."""
    exchange, queue = queue_name("exchange"), queue_name()
    rabbitmq.declare(queue)
    rabbitmq.declare_exchange(exchange)
    rabbitmq.bind(queue, exchange, "bound")
    told = []
    for n in range(20):
        told.append(sender.hand_over(f"rabbitmq:{exchange}/bound", values(30, f"{n}.")))
        told.append(sender.hand_over(f"rabbitmq:{exchange}/nobody", values(30, "same")))
    sender.until_told(*told)
    for bound, nobody in zip(told[::2], told[1::2], strict=True):
        assert (bound.confirmed_rows, bound.refusals) == (30, {})
        assert nobody.kinds == {RefusalKind.DENIED}
        assert len(nobody.refusals) == 30
    text = told[1].refusals[0].text
    assert "no queue is bound" in text
    assert exchange in text
    assert "nobody" in text
    assert "`inferfleet topics plan`" in text
    assert len(held(rabbitmq, queue)) == 600


def test_an_exchange_that_is_not_there_is_denied_until_it_is(rabbitmq: RabbitServer, sender: Sender) -> None:
    """It closes its own channel, never another one's; nothing has to be restarted."""
    exchange, queue = queue_name("exchange"), new_queue(rabbitmq)
    missing = sender.hand_over(f"rabbitmq:{exchange}/k", values(50))
    good = sender.hand_over(queue, values(50))
    sender.until_told(missing, good)
    assert missing.kinds == {RefusalKind.DENIED}
    assert exchange in missing.refusals[0].text
    assert good.confirmed_rows == 50
    rabbitmq.declare_exchange(exchange)
    rabbitmq.bind(exchange_and_key(queue)[1], exchange, "k")
    assert sender.publish(f"rabbitmq:{exchange}/k", values(50)).confirmed_rows == 50
    assert len(held(rabbitmq, queue)) == 100


def test_who_may_not_write_is_denied(rabbitmq: RabbitServer) -> None:
    """The broker's own words, and the mend."""
    user, queue = queue_name("user"), new_queue(rabbitmq)
    rabbitmq.add_user(user, "secret")
    sender = Sender(rabbitmq, credentials=lambda: (user, "secret"))
    told = sender.publish(queue, values(3))
    assert told.kinds == {RefusalKind.DENIED}
    assert "ACCESS_REFUSED" in told.refusals[0].text
    sender.close()


def test_a_full_queue_refuses_for_now(rabbitmq: RabbitServer, sender: Sender) -> None:
    """What does not fit may fit later."""
    queue = new_queue(rabbitmq, x_max_length=5, x_overflow="reject-publish")
    told = [sender.publish(queue, values(20)) for _ in range(2)]
    assert told[1].kinds == {RefusalKind.LATER}
    assert sum(each.confirmed_rows for each in told) == len(held(rabbitmq, queue))


# What is published


def test_a_message_has_what_amqp_clients_look_for(rabbitmq: RabbitServer, sender: Sender) -> None:
    """Persistent JSON with its id, the caller's correlation id, and the time that it may wait."""
    queue = new_queue(rabbitmq)
    sender.publish(
        queue,
        [b"{}"],
        headers=[[("inferfleet-id", b"r-1"), ("inferfleet-status", b"ok")]],
        amqp=[Amqp(reply_to="back", correlation_id="c-1", table={"kept": "as it was"})],
        expirations_ms=[60_000],
    )
    ((_, properties, body),) = read_all(rabbitmq, queue, [])
    assert body == b"{}"
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    assert (properties.message_id, properties.correlation_id) == ("r-1", "c-1")
    assert (properties.reply_to, properties.expiration) == ("back", "60000")
    properties.headers.pop("x-delivery-count", None)
    assert properties.headers == {"inferfleet-id": "r-1", "inferfleet-status": "ok", "kept": "as it was"}


def test_bodies_larger_than_a_frame_arrive_whole(rabbitmq: RabbitServer, sender: Sender) -> None:
    """In as many frames as they need, between small ones."""
    queue = new_queue(rabbitmq)
    bodies = [b"small", b"L" * 3_000_000, b"", b"x" * 131_064, b"y" * 131_065]
    assert sender.publish(queue, bodies).confirmed_rows == 5
    assert held(rabbitmq, queue) == bodies


# Replies


def asked(*queues: str | None) -> list[Amqp]:
    return [Amqp(reply_to=queue, correlation_id=f"c{n}") for n, queue in enumerate(queues)]


@pytest.mark.parametrize("direct", [False, True], ids=["exclusive", "direct"])
def test_a_reply_reaches_the_caller_by_its_own_queue(rabbitmq: RabbitServer, direct: bool) -> None:
    """A plain client's exclusive queue, and the broker's direct reply-to; the request's table stays away."""
    sender = Sender(rabbitmq, reply_allowed=["amq.gen-*", f"{DIRECT_REPLY}.*"])
    requests = queue_name()
    rabbitmq.declare(requests)
    reader = Reader()
    reader.intake = RabbitIntake(sender.link, prefetch={})
    reader.intake.subscribe([f"rabbitmq:{requests}"], reader)
    with rabbitmq.connection() as connection:
        channel = connection.channel()
        name = DIRECT_REPLY if direct else channel.queue_declare("", exclusive=True).method.queue
        replies: list[Any] = []
        channel.basic_consume(name, lambda *received: replies.append(received), auto_ack=True)
        for n in range(10):
            properties = pika.BasicProperties(reply_to=name, correlation_id=f"c{n}", headers={"mine": "1"})
            channel.basic_publish("", requests, b"%d" % n, properties)

        def answered() -> bool:
            for chunk in reader.turn():
                told = sender.hand_over(
                    "reply:",
                    [b"answer " + (value or b"") for value in chunk.values],
                    headers=[[("inferfleet-status", b"ok")] for _ in chunk.values],
                    amqp=chunk.amqp,
                )
                sender.until_told(told)
                assert told.confirmed_rows == len(chunk)
            connection.process_data_events(0.01)
            return len(replies) == 10

        wait_until(answered, PATIENCE_S, "ten replies arrive")
    for _, _, properties, body in replies:
        assert body == b"answer " + properties.correlation_id[1:].encode()
        assert properties.headers == {"inferfleet-status": "ok"}
    assert sender.outlet.replies_unroutable == 0
    reader.close()
    sender.close()


def test_a_caller_that_has_gone_is_counted_and_nobody_waits_for_it(rabbitmq: RabbitServer) -> None:
    """Its request was answered: nothing is left to do, and others are answered meanwhile."""
    sender = Sender(rabbitmq, reply_allowed=["*"])
    there = exchange_and_key(new_queue(rabbitmq))[1]
    told = sender.publish("reply:", values(4), amqp=asked("amq.gen-gone", there, "amq.gen-gone", there))
    assert (told.confirmed_rows, told.refusals) == (4, {})
    assert sender.outlet.replies_unroutable == 2
    assert held(rabbitmq, there) == [b"v1", b"v3"]
    sender.close()


def test_no_reply_goes_where_a_request_may_not_send_it(rabbitmq: RabbitServer) -> None:
    """The worker may write where a caller may not: only queues that are allowed are answered."""
    sender = Sender(rabbitmq, reply_allowed=["amq.gen-*"])
    victim = exchange_and_key(new_queue(rabbitmq))[1]
    told = sender.publish("reply:", values(3), amqp=asked(victim, None, "amq.gen-gone"))
    assert {row: refusal.kind for row, refusal in told.refusals.items()} == {
        0: RefusalKind.DENIED,
        1: RefusalKind.DENIED,
    }
    assert victim in told.refusals[0].text
    assert told.confirmed_rows == 1
    assert held(rabbitmq, victim) == []
    nobody = Sender(rabbitmq)
    assert nobody.publish("reply:", values(1), amqp=asked("amq.gen-x")).kinds == {RefusalKind.DENIED}
    nobody.close()
    sender.close()


# A broker that is away, blocks, or is killed


def test_what_nobody_takes_in_time_is_refused_for_now(rabbitmq: RabbitServer) -> None:
    """A broker that is away holds nothing for ever; the text says what is wrong."""
    sender = Sender(rabbitmq, urls=("amqp://127.0.0.1:1/",), publish_timeout_s=0.5)
    told = sender.publish("rabbitmq:/queue", values(20))
    assert told.kinds == {RefusalKind.LATER}
    assert "127.0.0.1:1" in told.refusals[0].text
    assert sender.outlet.pending() == 0
    sender.close()


def test_a_lost_connection_repeats_what_was_out(rabbitmq: RabbitServer, sender: Sender) -> None:
    """Every envelope is told once, and what was confirmed is there; some may be there twice."""
    queue = new_queue(rabbitmq)
    until_up(sender.link, publishing=True)
    told = [sender.hand_over(queue, values(100, f"{n}.")) for n in range(20)]
    drop_connection(sender.link)
    sender.until_told(*told)
    assert [each.confirmed_rows for each in told] == [100] * 20
    found = held(rabbitmq, queue)
    assert set(found) == {f"{n}.{m}".encode() for n in range(20) for m in range(100)}


def test_an_alarm_stops_publishing_and_nothing_else(rabbitmq: RabbitServer) -> None:
    """Publishes time out, taking and acknowledging go on; when the alarm ends publishing does, too."""
    sender = Sender(rabbitmq, publish_timeout_s=1.0)
    queue, requests = new_queue(rabbitmq), queue_name()
    rabbitmq.declare(requests)
    put(rabbitmq, requests, [Sent(b"%d" % n) for n in range(5)])
    assert sender.publish(queue, values(5)).confirmed_rows == 5
    rabbitmq.set_memory_alarm(True)
    try:
        told = [sender.hand_over(queue, values(50, f"during{n}.")) for n in range(3)]
        sender.until_told(*told)
        assert all(each.kinds == {RefusalKind.LATER} for each in told)
        again = sender.publish(queue, values(1, "blocked"))
        assert again.kinds == {RefusalKind.LATER}
        assert "blocks publishers" in again.refusals[0].text
        reader = Reader()
        reader.intake = RabbitIntake(sender.link, prefetch={})
        reader.intake.subscribe([f"rabbitmq:{requests}"], reader)
        wait_until(lambda: reader.turn() or len(reader.values()) == 5, PATIENCE_S, "messages are taken")
        (stream,) = reader.owned
        reader.intake.settle({stream: 6})
        wait_until(lambda: reader.intake.drained(5.0), PATIENCE_S, "they are acknowledged")
        reader.close()
    finally:
        rabbitmq.set_memory_alarm(False)
    began = time.monotonic()

    def accepted() -> bool:
        return sender.publish(queue, values(1, "after")).confirmed_rows == 1

    wait_until(accepted, PATIENCE_S, "publishing goes on")
    assert time.monotonic() - began < 10.0
    sender.close()


def test_what_the_node_calls_too_large_is_refused_alone(rabbitmq: RabbitServer) -> None:
    """The broker closes the channel over it and names its limit; neighbours are published again."""
    sender, queue = Sender(rabbitmq), new_queue(rabbitmq)
    rabbitmq.ctl("eval", "application:set_env(rabbit, max_message_size, 100000).")
    try:
        bodies = [*values(30, "small"), b"x" * 100_001, *values(30, "neighbour")]
        told = sender.publish(queue, bodies)
    finally:
        rabbitmq.ctl("eval", "application:set_env(rabbit, max_message_size, 134217728).")
    assert {row: r.kind for row, r in told.refusals.items()} == {30: RefusalKind.TOO_LARGE}
    assert told.confirmed_rows == 60
    assert sender.outlet.max_message_bytes == 100_000
    assert set(held(rabbitmq, queue)) == {*values(30, "small"), *values(30, "neighbour")}
    sender.close()
