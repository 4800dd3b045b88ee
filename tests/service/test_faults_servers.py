"""Kafka and Redis freeze, die and come back under a working fleet: it waits, and answers everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import (
    OpenLoop,
    Reader,
    Sender,
    answered_since,
    judge,
    now_ms,
    row_of,
    v2_body,
)
from tests.support.scale import pick
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]

RATE = 200


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A broker that these tests freeze and kill."""
    with KafkaServer(tmp_path_factory.mktemp("own-kafka")) as server:
        yield server


@pytest.fixture
def own_redis(data_folder: Path) -> Iterator[RedisServer]:
    """A Redis that a test freezes and kills."""
    with RedisServer(data_folder) as server:
        yield server


def settled(load: OpenLoop, reader: Reader) -> None:
    """Return once every partition is answered after now."""
    wait_until(answered_since(reader, load, now_ms()), 90, "every partition is answered")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_kafka_freezes_and_restarts(own_kafka: KafkaServer, tmp_path: Path, protocol: str) -> None:
    """A broker frozen for five seconds, then killed and started: nothing is lost, the worker lives on."""
    client = own_kafka.client_config()
    with Fleet(tmp_path, own_kafka, settings={"kafka": {"group_protocol": protocol}}) as fleet:
        fleet.checksum(delay_ms=5)
        fleet.route(partitions=3)
        with fleet.prepare().running() as worker:
            with (
                Reader(client, fleet.results("sums")) as reader,
                OpenLoop(client, fleet.source("sums"), 3, RATE) as load,
            ):
                settled(load, reader)
                own_kafka.pause()
                load.wait_sent(5 * RATE)
                own_kafka.resume()
                settled(load, reader)
                own_kafka.kill()
                load.wait_sent(RATE)
                assert worker.running
                own_kafka.start()
                settled(load, reader)
                load.stop()
                reader.wait_ids(load.rows, 60)
                verdict = judge(load.rows, reader)
            assert worker.metric("dead_letters_total") == 0

    print(f"\n{protocol}, broker frozen and killed: {verdict}")
    assert verdict.right, verdict


def wait_paused(worker: WorkerProcess, route: str) -> str:
    """Return why a route is paused, once it is."""
    return str(wait_until(lambda: worker.status()["paused"].get(route), 30, f"{route} is paused"))


@pytest.mark.slow
def test_redis_dies_and_freezes(
    own_kafka: KafkaServer, own_redis: RedisServer, tmp_path: Path, record_property: Any
) -> None:
    """Without Redis its route pauses and says so, the worker stays ready, the other route goes on."""
    client = own_kafka.client_config()
    with Fleet(tmp_path, own_kafka, own_redis) as fleet:
        fleet.checksum()
        fleet.route("stored", redis=True, partitions=2)
        fleet.route("plain", partitions=1)
        with fleet.prepare().running() as worker:
            with (
                Reader(client, fleet.results("stored")) as reader,
                Reader(client, fleet.results("plain")) as other,
                OpenLoop(client, fleet.source("stored"), 2, RATE) as load,
            ):
                sender = Sender(client)
                for number, fault in enumerate((own_redis.kill, own_redis.pause)):
                    settled(load, reader)
                    fault()
                    assert "redis" in wait_paused(worker, "stored")
                    assert worker.ready
                    sender.send(fleet.source("plain"), v2_body([row_of(1)]), id=f"plain-{number}")
                    sender.flush()
                    other.wait_ids([f"plain-{number}"])
                    load.wait_sent(pick(1, 30) * RATE)
                    assert "stored" in worker.status()["paused"]
                    own_redis.resume() if number else own_redis.start()
                    wait_until(lambda: not worker.status()["paused"], 30, "the route resumes")
                settled(load, reader)
                load.stop()
                reader.wait_ids(load.rows, 60)
                verdict = judge(load.rows, reader)
            assert worker.metric("dead_letters_total") == 0
            keys = [f"{fleet.name}:result:stored:{name}" for name in load.rows]
            with own_redis.client() as redis:
                wait_until(lambda: all(redis.mget(keys)), 20, "all results in Redis")
                bodies = [json.loads(body)["outputs"][0]["data"] for body in redis.mget(keys)]

    record_property("F13 redis", f"killed and frozen, {pick(1, 30)} s each and more: {verdict}")
    assert verdict.right, verdict
    assert verdict.duplicates == 0
    assert bodies == [list(reader.only(name).check) for name in load.rows]


@pytest.mark.slow
def test_a_deleted_result_topic_holds_its_route_only(own_kafka: KafkaServer, tmp_path: Path) -> None:
    """A route without its result topic waits, with the reason in /status, until the topic is back."""
    client = own_kafka.client_config()
    with Fleet(tmp_path, own_kafka) as fleet:
        fleet.checksum()
        fleet.route("gone", partitions=2)
        fleet.route("stays", partitions=1)
        with fleet.prepare().running() as worker:
            sender = Sender(client)
            sender.send(fleet.source("gone"), v2_body([row_of(0)]), id="before")
            sender.flush()
            with Reader(client, fleet.results("gone")) as reader:
                reader.wait_ids(["before"])
            own_kafka.delete_topics([fleet.results("gone")])
            sent = {f"held-{n}": row_of(n) for n in range(600)}
            for name, row in sent.items():
                sender.send(fleet.source("gone"), v2_body([row]), id=name)
            sender.flush()
            reason = wait_paused(worker, "gone")
            sender.send(fleet.source("stays"), v2_body([row_of(1)]), id="meanwhile")
            sender.flush()
            with Reader(client, fleet.results("stays")) as other:
                other.wait_ids(["meanwhile"])
            assert worker.ready
            own_kafka.create_topics({fleet.results("gone"): 2})
            with Reader(client, fleet.results("gone")) as reader:
                reader.wait_ids(sent, 60)
                verdict = judge(sent, reader)
            wait_until(lambda: not worker.status()["paused"], 30, "the route resumes")
            assert worker.metric("dead_letters_total") == 0

    print(f"\nresult topic deleted ({reason}): {verdict}")
    assert fleet.results("gone") in reason
    assert verdict.right, verdict


def test_a_deleted_dead_letter_topic_stops_its_route(own_kafka: KafkaServer, tmp_path: Path) -> None:
    """F38: what should be buried stays uncommitted until its topic is back; nothing is skipped."""
    client = own_kafka.client_config()
    with Fleet(tmp_path, own_kafka) as fleet:
        fleet.checksum()
        fleet.route("sums", partitions=1)
        with fleet.prepare().running() as worker:
            own_kafka.delete_topics([fleet.dead_letters("sums")])
            sender = Sender(client)
            sender.send(fleet.source("sums"), b"not json", id="bad")
            sender.flush()
            reason = wait_paused(worker, "sums")
            assert fleet.dead_letters("sums") in reason
            assert worker.metric("in_flight_rows", route="sums") == 1
            own_kafka.create_topics({fleet.dead_letters("sums"): 1})
            with Reader(client, fleet.dead_letters("sums")) as dead:
                (letter,) = dead.wait_count(1, 60)
            assert letter.value == b"not json"
            sender.send(fleet.source("sums"), v2_body([row_of(1)]), id="good")
            sender.flush()
            with Reader(client, fleet.results("sums")) as reader:
                reader.wait_ids(["bad", "good"], 60)
                assert reader.only("bad").code == "E_DECODE"
                assert reader.only("good").code == ""


def test_an_answer_too_large_for_its_topic_is_an_error(own_kafka: KafkaServer, tmp_path: Path) -> None:
    """F37: one error and one dead letter; the answers beside it are given, and nothing is tried for ever."""
    client = own_kafka.client_config()
    with Fleet(tmp_path, own_kafka) as fleet:
        fleet.checksum()
        fleet.route("sums", partitions=1, max_queue_delay_ms=200)
        fleet.prepare()
        own_kafka.delete_topics([fleet.results("sums")])
        own_kafka.create_topics({fleet.results("sums"): 1}, config={"max.message.bytes": "4000"})
        with fleet.running():
            sender = Sender(client)
            small = {f"s-{n}": row_of(n) for n in range(20)}
            for name, row in small.items():
                sender.send(fleet.source("sums"), v2_body([row]), id=name)
            sender.send(fleet.source("sums"), v2_body([row_of(n) for n in range(500)]), id="large")
            sender.flush()
            with (
                Reader(client, fleet.results("sums")) as reader,
                Reader(client, fleet.dead_letters("sums")) as dead,
            ):
                reader.wait_ids([*small, "large"], 60)
                (letter,) = dead.wait_count(1)
                assert reader.only("large").code == "E_RESULT_TOO_LARGE"
                reader.by_id.pop("large")
                verdict = judge(small, reader)
    assert verdict.right, verdict
    assert letter.id == "large"
    assert letter.headers["inferfleet-code"] == b"E_RESULT_TOO_LARGE"


def test_sigterm_does_not_wait_for_a_broker_that_is_frozen(own_kafka: KafkaServer, tmp_path: Path) -> None:
    """With Kafka frozen the worker still ends with 0 inside its drain time, and nothing is lost."""
    client = own_kafka.client_config()
    sent = {f"f-{n}": row_of(n) for n in range(500)}
    with Fleet(tmp_path, own_kafka, settings={"worker": {"drain_timeout_s": 3}}) as fleet:
        fleet.checksum(delay_ms=50)
        fleet.route(max_batch_size=10)
        worker = fleet.prepare().worker("w-1")
        sender = Sender(client)
        for name, row in sent.items():
            sender.send(fleet.source("sums"), v2_body([row]), id=name)
        sender.flush()
        wait_until(lambda: worker.status()["in_flight_rows"] > 0, 20, "rows in flight")
        own_kafka.pause()
        assert worker.finish(15) == 0
        own_kafka.resume()
        with fleet.running("w-2"), Reader(client, fleet.results("sums")) as reader:
            reader.wait_ids(sent)
            verdict = judge(sent, reader)

    assert verdict.right, verdict
