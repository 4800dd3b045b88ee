"""Labels and outcomes from a real Kafka: every reader that starts anew finds all of them again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from confluent_kafka import Producer

from inferfleet.brokers.kafka_feedback import KafkaFeedback
from inferfleet.feedback import Answered, Feedback, Label, Sought
from inferfleet.routes import Destination
from tests.conftest import TopicFactory
from tests.support.kafka_server import KafkaServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PATIENCE_S = 30.0
SERVED = b"route=digits;model=digits;version=%d;variant=%s;revision=7;worker=w-1"


@pytest.fixture
def producer(kafka: KafkaServer) -> Iterator[Producer]:
    """A producer; whoever sends flushes."""
    made = Producer(kafka.client_config())
    yield made
    made.flush(10)


def sought(answers: str, labels: str, since_ms: int = 0) -> Sought:
    return Sought(
        Destination("kafka", labels),
        Destination("kafka", answers),
        "digits",
        frozenset({"1", "2"}),
        7,
        since_ms,
        "p",
        "r-1",
    )


def answer(producer: Producer, topic: str, request_id: str, version: int, largest: int) -> None:
    data = [1.0 if i == largest else 0.0 for i in range(10)]
    body = {"outputs": [{"name": "p", "shape": [1, 10], "datatype": "FP32", "data": data}]}
    producer.produce(
        topic,
        json.dumps(body).encode(),
        key=f"k-{request_id}".encode(),
        headers=[("inferfleet-id", request_id), ("inferfleet-served", SERVED % (version, b"canary"))],
    )


def read_all(feed: KafkaFeedback) -> Feedback:
    """Poll until nothing more waits; return everything."""
    answers: list[Answered] = []
    labels: list[Label] = []
    unread = 0

    def done() -> bool:
        nonlocal unread
        found = feed.poll()
        answers.extend(found.answers)
        labels.extend(found.labels)
        unread += found.unread
        return found.caught_up

    wait_until(done, PATIENCE_S, "the feed has caught up")
    return Feedback(answers, labels, True, unread)


def test_all_is_read_and_read_again_by_the_next(
    kafka: KafkaServer, topic: TopicFactory, producer: Producer
) -> None:
    """Nothing is committed: a coordinator that takes over starts where the rollout started."""
    answers, labels = topic(partitions=2), topic(partitions=2)
    for i in range(50):
        answer(producer, answers, f"r-{i}", 1 + i % 2, i % 10)
        producer.produce(labels, json.dumps({"id": f"r-{i}", "label": i % 10, "clicks": i}).encode())
    producer.produce(labels, b"nonsense")
    assert producer.flush(10) == 0

    found = []
    for _ in range(2):
        with closing(
            KafkaFeedback(kafka.client_config(), "t.coordinator.r-1", sought(answers, labels))
        ) as feed:
            found.append(read_all(feed))
            assert feed.stale == ""

    first = found[0]
    assert sorted(each.id for each in first.answers) == sorted(f"r-{i}" for i in range(50))
    assert {each.id: each.classes for each in first.answers} == {f"r-{i}": (i % 10,) for i in range(50)}
    assert all(each.unit == f"k-{each.id}".encode() for each in first.answers)
    assert sorted(each.values["clicks"] for each in first.labels) == list(range(50))
    assert first.unread == 1
    assert sorted(found[1].answers) == sorted(first.answers)


def test_topics_that_never_stand_still_are_caught_up_with(
    kafka: KafkaServer, topic: TopicFactory, producer: Producer
) -> None:
    """A reader that waited for all partitions to be at their ends at once would never be done."""
    answers, labels = topic(partitions=3), topic(partitions=3)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.001):
            answer(producer, answers, f"r-{number}", 1, 0)
            producer.produce(labels, json.dumps({"id": f"r-{number}", "x": 1}).encode())
            producer.poll(0)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with closing(
            KafkaFeedback(kafka.client_config(), "t.coordinator.r-1", sought(answers, labels))
        ) as feed:
            read = 0

            def much_and_all() -> bool:
                nonlocal read
                found = feed.poll()
                read += len(found.labels)
                return read > 1_000 and found.caught_up

            wait_until(much_and_all, PATIENCE_S, "the feed has caught up while more comes")
    finally:
        stop.set()
        writer.join()


def test_only_what_came_since_the_start_is_read(
    kafka: KafkaServer, topic: TopicFactory, producer: Producer
) -> None:
    """Labels of last week are not gone through; a topic without anything newer is read from its end."""
    answers, labels = topic(), topic()
    now = time.time_ns() // 1_000_000
    for request_id, at_ms in (("old", now - 100_000), ("new", now + 1_000)):
        producer.produce(labels, json.dumps({"id": request_id, "x": 1}).encode(), timestamp=at_ms)
    answer(producer, answers, "old", 1, 0)
    assert producer.flush(10) == 0

    with closing(
        KafkaFeedback(kafka.client_config(), "t.coordinator.r-1", sought(answers, labels, now + 500))
    ) as feed:
        found = read_all(feed)
        answer(producer, answers, "fresh", 2, 0)
        assert producer.flush(10) == 0
        later = wait_until(lambda: feed.poll().answers, PATIENCE_S, "what comes later is read")

    assert [each.id for each in found.labels] == ["new"]
    assert found.answers == []
    assert [each.id for each in later] == ["fresh"]


def test_a_topic_that_is_missing_is_said_and_looked_for_again(
    kafka: KafkaServer, topic: TopicFactory, producer: Producer
) -> None:
    """A rollout waits for its labels, and says what it waits for."""
    clock = [100.0]
    answers = topic()
    with closing(
        KafkaFeedback(
            kafka.client_config(), "t.coordinator.r-1", sought(answers, "no-such-topic"), lambda: clock[0]
        )
    ) as feed:
        feed.poll()
        assert feed.stale == "topic no-such-topic does not exist or may not be read"

        kafka.create_topics({"no-such-topic": 1})
        producer.produce("no-such-topic", b'{"id": "a", "x": 1}')
        assert producer.flush(10) == 0

        def labels() -> list[Label]:
            clock[0] += 15.0
            return feed.poll().labels

        assert wait_until(labels, PATIENCE_S, "labels are read")[0].id == "a"
        assert feed.stale == ""
