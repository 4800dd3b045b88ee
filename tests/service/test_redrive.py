"""Dead letters sent again through running workers: answers replace errors, and nobody else sees them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from inferfleet.testing.checksum import expected_checksum
from inferfleet.wire.stored import result_key
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import Row, v2_body
from tests.support.rabbitmq_fleet import moody, rows, special
from tests.support.servers import KafkaServer, RabbitServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
NOT_YET = special(-777)
ROUTE = "moody"


@pytest.fixture(params=["kafka", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    """Each broker in turn."""
    return str(request.param)


@pytest.fixture
def fleet(
    broker: str, request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path
) -> Iterator[Fleet]:
    """A fleet whose model fails some rows until the file ``mended`` stands."""
    kafka: KafkaServer | None = request.getfixturevalue("kafka") if broker == "kafka" else None
    rabbit: RabbitServer | None = request.getfixturevalue("rabbitmq") if broker == "rabbitmq" else None
    settings = {"retry": {"delays_ms": [400]}, "worker": {"state": "state"}}
    with Fleet(tmp_path / "fleet", kafka, redis_server, rabbitmq=rabbit, settings=settings) as made:
        moody(made)
        made.route(ROUTE, model="moody", partitions=1, topic=False, redis=True)
        yield made.prepare()


def send(fleet: Fleet, broker: str, sent: dict[str, Row]) -> None:
    """Send requests whose ids stand in their bodies alone."""
    source = fleet.source(ROUTE)
    if broker == "rabbitmq":
        for name, row in sent.items():
            fleet.rabbitmq.publish(source, v2_body([row], id=name))
        return
    producer = Producer(fleet.kafka.client_config())
    for name, row in sent.items():
        producer.produce(source, v2_body([row], id=name), name)
    assert producer.flush(20) == 0


class Stored:
    """What stands in Redis for the route's requests."""

    def __init__(self, fleet: Fleet, redis: RedisServer) -> None:
        self._fleet = fleet
        self._redis = redis

    def __getitem__(self, name: str) -> dict[str, Any]:
        with self._redis.client() as client:
            return dict(json.loads(client.get(result_key(self._fleet.name, ROUTE, name)) or b"{}"))

    def answered(self, names: Iterable[str]) -> list[str]:
        """Return the ids that have an answer."""
        return [name for name in names if "outputs" in self[name]]

    def wait(self, names: Iterable[str], member: str) -> None:
        """Return once the outcome of every id has a member: ``outputs`` or ``code``."""
        left = set(names)

        def none_left() -> bool:
            left.difference_update([name for name in left if member in self[name]])
            return not left

        wait_until(none_left, 60, f"{member} of every request", every_s=0.1)


class Bystander:
    """A consumer group of its own on a topic, that was there first."""

    def __init__(self, kafka: KafkaServer, topic: str) -> None:
        properties = {"group.id": f"{topic}.bystander", "auto.offset.reset": "earliest"}
        self._consumer = Consumer(kafka.client_config() | properties)
        self._consumer.subscribe([topic])
        wait_until(lambda: self._consumer.poll(0.1) or self._consumer.assignment(), 30, "it has joined")

    def close(self) -> int:
        """Return how many records it has seen, once nothing more comes."""
        count = 0
        while self._consumer.poll(2.0) is not None:
            count += 1
        self._consumer.close()
        return count


def test_a_mended_model_answers_what_it_failed(fleet: Fleet, broker: str, redis_server: RedisServer) -> None:
    """Each answer replaces its error in Redis, no letter goes twice, and no reader of the source sees one."""
    stored = Stored(fleet, redis_server)
    failed = {f"bad-{n}": NOT_YET for n in range(5)}
    sent = {**rows("good", 20), **failed}
    other = Bystander(fleet.kafka, fleet.source(ROUTE)) if broker == "kafka" else None
    with fleet.running():
        send(fleet, broker, sent)
        stored.wait(failed, "code")
        stored.wait(sent.keys() - failed.keys(), "outputs")
        assert {stored[name]["code"] for name in failed} == {"E_MODEL"}
        (fleet.folder / "mended").touch()
        assert fleet.run("dlt", "redrive", ROUTE, "--yes", "--limit", "3").stdout.endswith("sent 3\n")
        wait_until(lambda: len(stored.answered(failed)) == 3, 60, "three are answered", every_s=0.1)
    assert fleet.run("dlt", "redrive", ROUTE, "--yes").stdout.endswith("sent 2\n")
    assert fleet.run("dlt", "redrive", ROUTE, "--yes").stdout.endswith("sent 0\n")
    # A transaction's end is an offset without a record: nothing that a worker waits for.
    assert fleet.launch("w-2", "--until-idle", "0.5").wait(60) == 0

    for name, row in sent.items():
        assert tuple(stored[name]["outputs"][0]["data"]) == expected_checksum("1", row)
    if other is not None:
        assert other.close() == len(sent)
    else:
        for queue in (fleet.source(ROUTE), fleet.dead_letters(ROUTE), fleet.retries(ROUTE, "ready")):
            assert fleet.rabbitmq.depth(queue) == 0
