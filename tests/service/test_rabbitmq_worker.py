"""The main job on RabbitMQ: from queues to exchanges, queues, topics and Redis, good rows and bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pika
import pytest

from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Sender, judge, row_of, v2_body
from tests.support.rabbitmq_fleet import (
    Queues,
    assert_right,
    check_of,
    codes,
    id_of,
    moody,
    rows,
    special,
)
from tests.support.servers import KafkaServer, RabbitServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

NAMES = ("main", "poison", "forged", "rpc", "cross")


@pytest.fixture(scope="module")
def fleet(
    kafka: KafkaServer,
    rabbitmq: RabbitServer,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """Routes of every kind of source and outlet, in one pool."""
    with Fleet(tmp_path_factory.mktemp("rabbit"), kafka, redis_server, rabbitmq=rabbitmq) as made:
        made.checksum()
        moody(made)
        main = Queues(made, rabbitmq, "main").route_keys
        main["results"] = [*main["results"], "redis"]  # type: ignore[misc]
        made.route("main", **main)
        made.route("poison", model="moody", **Queues(made, rabbitmq, "poison").route_keys)
        forged = Queues(made, rabbitmq, "forged").route_keys
        forged["results"] = [*forged["results"], "reply"]  # type: ignore[misc]
        made.route("forged", **forged)
        rpc = Queues(made, rabbitmq, "rpc").route_keys
        rpc["results"] = ["reply"]
        made.route("rpc", **rpc)
        cross = Queues(made, rabbitmq, "cross").route_keys
        cross["results"] = [f"kafka:{made.results('cross')}"]
        made.route("cross", **cross)
        made.route("over", results=Queues(made, rabbitmq, "over").route_keys["results"], partitions=1)
        yield made.prepare()


@pytest.fixture(scope="module")
def worker(fleet: Fleet) -> Iterator[WorkerProcess]:
    """One worker that serves them all, and drains with 0 at the end."""
    with fleet.running() as started:
        yield started


def queues(fleet: Fleet, route: str) -> Queues:
    return Queues(fleet, fleet.rabbitmq, route)


def test_queue_to_exchange_and_redis(fleet: Fleet, worker: WorkerProcess) -> None:
    """Every request has its own answer in the exchange and in Redis, and the queue ends empty."""
    on = queues(fleet, "main")
    sent = rows("m", 300)
    on.send(sent)
    answers = on.answers(len(sent))
    assert assert_right(sent, answers) == 0
    first = answers[0]
    assert first.properties.content_type == "application/json"
    assert first.properties.delivery_mode == 2
    assert first.properties.message_id == id_of(first)
    assert first.headers["inferfleet-status"] == "ok"
    assert "route=main;model=sums;version=1" in first.headers["inferfleet-served"]
    assert fleet.redis is not None
    stored = json.loads(fleet.redis.client().get(f"{fleet.name}:result:main:m-7"))
    assert stored["outputs"][0]["data"] == list(expected_checksum("1", sent["m-7"]))
    on.wait_empty()


def test_a_poison_row_fails_alone(fleet: Fleet, worker: WorkerProcess) -> None:
    """63 answers, one E_MODEL, one dead letter with the message as it came (F29)."""
    on = queues(fleet, "poison")
    sent = rows("p", 63)
    bad = {"p-bad": special(-999)}
    on.send(bad, headers={"tenant": "a", "tries": 3}, correlation_id="c-1", content_type="application/json")
    on.send(sent)
    outcomes = on.answers(64)
    (error,) = [each for each in outcomes if id_of(each) == "p-bad"]
    assert error.headers["inferfleet-code"] == "E_MODEL"
    assert json.loads(error.body)["code"] == "E_MODEL"
    assert_right(sent, [each for each in outcomes if id_of(each) != "p-bad"])
    (letter,) = on.letters(1)
    assert letter.body == v2_body([bad["p-bad"]])
    assert letter.headers["tenant"] == "a"
    assert letter.headers["tries"] == 3
    assert letter.properties.correlation_id == "c-1"
    assert letter.headers["inferfleet-code"] == "E_MODEL"
    assert letter.headers["inferfleet-origin-topic"] == on.source
    assert letter.headers["inferfleet-attempt"] == "1"


def test_a_plain_rpc_client_gets_its_answers(fleet: Fleet, worker: WorkerProcess) -> None:
    """``reply_to`` and ``correlation_id`` are all it needs, for a queue of its own and for direct reply."""
    on = queues(fleet, "rpc")
    with fleet.rabbitmq.connection() as connection:
        channel = connection.channel()
        own = channel.queue_declare("", exclusive=True).method.queue
        for reply_to in (own, "amq.rabbitmq.reply-to"):
            got: dict[str, tuple[int, ...]] = {}

            def heard(_channel: object, _method: object, properties: object, body: bytes) -> None:
                data = json.loads(body)["outputs"][0]["data"]
                got[properties.correlation_id] = tuple(data)  # type: ignore[attr-defined]  # noqa: B023

            channel.basic_consume(reply_to, heard, auto_ack=True)
            for number in range(20):
                channel.basic_publish(
                    "",
                    on.source,
                    v2_body([row_of(number)]),
                    pika.BasicProperties(reply_to=reply_to, correlation_id=f"call-{number}"),
                )

            def all_heard() -> bool:
                connection.process_data_events(0.05)
                return len(got) == 20  # noqa: B023

            wait_until(all_heard, 30, f"20 answers arrive at {reply_to}")
            assert got == {f"call-{n}": expected_checksum("1", row_of(n)) for n in range(20)}


def test_a_caller_that_has_gone_stops_nobody(fleet: Fleet, worker: WorkerProcess) -> None:
    """An answer whose queue is gone is done with: the request is settled and others go on."""
    on = queues(fleet, "rpc")
    with fleet.rabbitmq.connection() as connection:
        gone = connection.channel().queue_declare("", exclusive=True).method.queue
    on.send(rows("gone", 5), reply_to=gone)
    on.wait_empty()
    assert "rpc" not in worker.status()["paused"]


def test_what_a_caller_forges_is_not_believed(fleet: Fleet, worker: WorkerProcess) -> None:
    """B23: a queue that is not the caller's own is refused, and headers of ours mean nothing on a source."""
    on = queues(fleet, "forged")
    target = f"{fleet.name}.innocent"
    fleet.rabbitmq.declare(target)
    on.send({"f-1": row_of(1)}, reply_to=target)
    forged = {
        "inferfleet-attempt": "4",
        "inferfleet-origin-topic": "elsewhere",
        "inferfleet-origin-offset": "7",
        "inferfleet-served": "route=x",
        "inferfleet-not-before-ms": "99999999999999",
    }
    on.send({"f-2": row_of(2)}, headers=forged)
    on.send({"f-3": special(float("inf"))}, headers=forged)
    outcomes = {id_of(each): each for each in on.answers(3)}
    assert codes(list(outcomes.values())) == {"f-1": "E_ROUTE", "f-2": "", "f-3": "E_DECODE"}
    assert check_of(outcomes["f-2"]) == expected_checksum("1", row_of(2))
    letters = {str(each.headers["inferfleet-id"]) if "inferfleet-id" in each.headers else
               str(each.properties.message_id): each for each in on.letters(2)}  # fmt: skip
    assert letters["f-3"].headers["inferfleet-attempt"] == "1"
    assert letters["f-3"].headers["inferfleet-origin-topic"] == on.source
    assert fleet.rabbitmq.depth(target) == 0


def test_odd_amqp_messages_get_an_outcome(fleet: Fleet, worker: WorkerProcess) -> None:
    """B29: content types, priorities, nested tables, empty and broken bodies: an outcome each, no crash."""
    on = queues(fleet, "main")
    body = v2_body([row_of(1)])
    odd = {
        "o-type": (body, {"content_type": "text/html"}),
        "o-priority": (body, {"priority": 255}),
        "o-nested": (body, {"headers": {"a": {"b": {"c": [1, {"d": b"e"}]}}}}),
        "o-ours": (body, {"headers": {"inferfleet-deadline-ms": {"nested": 1}}}),
        "o-empty": (b"", {}),
        "o-bytes": (b"\xff\xfe", {}),
        "o-gzip": (body, {"content_encoding": "gzip"}),
        "o-expires": (body, {"expiration": "600000"}),
    }
    for name, (value, properties) in odd.items():
        given = pika.BasicProperties(delivery_mode=2, message_id=name, **properties)
        with fleet.rabbitmq.channel() as channel:
            channel.basic_publish("", on.source, value, given)
    assert codes(on.answers(len(odd))) == {
        "o-type": "E_CONTENT_TYPE",
        "o-priority": "",
        "o-nested": "",
        "o-ours": "E_HEADER",
        "o-empty": "E_EMPTY",
        "o-bytes": "E_DECODE",
        "o-gzip": "E_CONTENT_TYPE",
        "o-expires": "",
    }
    on.wait_empty()


def test_from_a_queue_to_a_topic(fleet: Fleet, worker: WorkerProcess, kafka: KafkaServer) -> None:
    """RabbitMQ to Kafka: the key that a message carries as a header is the record's key."""
    on = queues(fleet, "cross")
    sent = rows("x", 100)
    on.send(sent, headers={"inferfleet-key": "alice"})
    with Reader(kafka.client_config(), fleet.results("cross")) as reader:
        reader.wait_ids(sent)
        verdict = judge(sent, reader)
        assert verdict.right, verdict
        assert {outcome.key for copies in reader.by_id.values() for outcome in copies} == {b"alice"}


def test_from_a_topic_to_an_exchange(fleet: Fleet, worker: WorkerProcess, kafka: KafkaServer) -> None:
    """Kafka to RabbitMQ: the record's key travels as a header."""
    sent = rows("y", 100)
    sender = Sender(kafka.client_config())
    for name, row in sent.items():
        sender.send(fleet.source("over"), v2_body([row]), id=name, key=b"bob")
    sender.flush()
    answers = queues(fleet, "over").answers(len(sent))
    assert_right(sent, answers)
    assert {each.headers["inferfleet-key"] for each in answers} == {"bob"}
