"""The main job on real servers: every way in, every way out, several routes in one worker."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inferfleet.core.routing import bucket
from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import RAW_HEADERS, Reader, Sender, judge, raw_body, row_of, v2_body
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

VARIANTS = [
    {"name": "stable", "version": "1", "weight": 80},
    {"name": "canary", "version": "2", "weight": 20},
]


@pytest.fixture(scope="module")
def fleet(
    kafka: KafkaServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Six routes over three versions of two models."""
    with Fleet(tmp_path_factory.mktemp("main"), kafka, redis_server) as made:
        made.checksum("sums", "1")
        made.checksum("sums", "2")
        made.checksum("others", "7")
        made.route("forms", redis=True)
        made.route("both", redis=True)
        made.route("plain", input="columns")
        made.route("split", variants=VARIANTS, partitions=3)
        made.route("others", model="others", version="7")
        made.route("stored", topic=False, redis=True)
        yield made.prepare()


@pytest.fixture(scope="module")
def worker(fleet: Fleet) -> Iterator[WorkerProcess]:
    """One worker that serves them all, and drains at the end."""
    with fleet.running() as started:
        yield started


@pytest.fixture
def sender(kafka: KafkaServer) -> Sender:
    return Sender(kafka.client_config())


def test_every_wire_form_is_answered_in_its_own_form(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """V2 JSON is answered in JSON, binary and raw tensors in JSON + binary; each with its own checksum."""
    rows = {f"{form}-{n}": row_of(n) for n in range(100) for form in ("json", "binary", "raw")}
    for name, row in rows.items():
        if name.startswith("json"):
            body, headers = v2_body([row]), []
        elif name.startswith("raw"):
            body, headers = raw_body(row), RAW_HEADERS
        else:
            tensor = {
                "name": "x",
                "shape": [1, 4],
                "datatype": "FP32",
                "parameters": {"binary_data_size": 16},
            }
            head = json.dumps({"inputs": [tensor]}).encode()
            body = head + raw_body(row)
            headers = [RAW_HEADERS[0], ("inference-header-content-length", b"%d" % len(head))]
        sender.send(fleet.source("forms"), body, id=name, key=name.encode(), headers=headers)
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("forms")) as reader:
        reader.wait_ids(rows)
        verdict = judge(rows, reader)

    assert verdict.right, verdict
    assert verdict.duplicates == 0
    assert reader.only("json-1").headers.get("content-type") is None
    assert reader.only("raw-1").headers["content-type"] == b"application/octet-stream"
    assert reader.only("binary-1").key == b"binary-1"
    assert reader.only("json-1").served == {
        "route": "forms",
        "model": "sums",
        "version": "1",
        "variant": "stable",
        "revision": worker.status()["revision"],
        "worker": "w-1",
    }


def test_two_outlets_hold_the_same_answer(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer, redis_server: RedisServer
) -> None:
    """With a topic and Redis as results, both have each answer, and Redis lets go of it after its time."""
    names = [f"two-{n}" for n in range(200)]
    for number, name in enumerate(names):
        sender.send(fleet.source("both"), v2_body([row_of(number)]), id=name)
    sender.flush()
    keys = [f"{fleet.name}:result:both:{name}" for name in names]
    with Reader(kafka.client_config(), fleet.results("both")) as reader, redis_server.client() as redis:
        reader.wait_ids(names)
        wait_until(lambda: all(redis.mget(keys)), 20, "all results in Redis")
        stored = [json.loads(body)["outputs"] for body in redis.mget(keys)]
        ttl = redis.ttl(keys[0])

    assert stored == [reader.only(name).body["outputs"] for name in names]
    assert 3000 < ttl <= 3600


def test_columns_need_no_protocol(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A columns route takes plain JSON named as in the signature; an id in the body counts."""
    sender.send(fleet.source("plain"), json.dumps({"x": row_of(5)}).encode(), id="plain-5")
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("plain")) as reader:
        reader.wait_ids(["plain-5"])

    assert reader.only("plain-5").check == expected_checksum("1", row_of(5))


def test_variants_are_weighted_and_sticky_by_key(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A key always meets the variant that owns its bucket, whatever the partition; both are served."""
    sent = {f"s-{n}": row_of(n) for n in range(1200)}
    for number, (name, row) in enumerate(sent.items()):
        key = b"user-%d" % (number % 400)
        sender.send(fleet.source("split"), v2_body([row]), id=name, key=key, partition=number % 3)
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("split")) as reader:
        reader.wait_ids(sent)
        verdict = judge(sent, reader, ("1", "2"))

    assert verdict.right, verdict
    served = {name: reader.only(name).served["version"] for name in sent}
    owners = {
        name: "1" if bucket(f"{fleet.name}/split", reader.only(name).key or b"") < 8000 else "2"
        for name in sent
    }
    assert served == owners
    assert 0.05 < np.mean([version == "2" for version in served.values()]) < 0.4


def test_two_models_are_served_at_once(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """Routes of different models share a worker, and each answer names its own."""
    sender.send(fleet.source("others"), v2_body([row_of(1)]), id="o-1")
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("others")) as reader:
        reader.wait_ids(["o-1"])

    assert reader.only("o-1").check == expected_checksum("7", row_of(1))
    assert worker.status()["models"] == {"sums:1": "ready", "sums:2": "ready", "others:7": "ready"}


def test_kcat_in_and_redis_cli_out(fleet: Fleet, worker: WorkerProcess, redis_server: RedisServer) -> None:
    """A body that kcat sends is answered, and redis-cli GET prints the answer."""
    kcat, redis_cli = shutil.which("kcat"), shutil.which("redis-cli")
    if kcat is None or redis_cli is None:
        pytest.skip("kcat or redis-cli is not on PATH")
    place = [kcat, "-q", "-P", "-b", fleet.kafka.bootstrap_servers, "-t", fleet.source("stored"), "-k", "me"]
    subprocess.run(place, input=v2_body([row_of(9)], id="order-42"), check=True, timeout=30)

    def get() -> str:
        key = f"{fleet.name}:result:stored:order-42"
        command = [redis_cli, "-p", str(redis_server.port), "GET", key]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    answer = json.loads(wait_until(get, 20, "redis-cli prints the answer"))

    assert answer["id"] == "order-42"
    assert tuple(answer["outputs"][0]["data"]) == expected_checksum("1", row_of(9))


def test_requests_of_several_rows_and_of_more_than_a_batch_stay_whole(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A request of many rows is answered once, with as many rows, also where a batch holds fewer."""
    counts = {f"m-{count}": count for count in (2, 63, 65, 200, 1000)}
    for name, count in counts.items():
        sender.send(fleet.source("both"), v2_body([row_of(n) for n in range(count)]), id=name)
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("both")) as reader:
        reader.wait_ids(counts)

    for name, count in counts.items():
        (output,) = reader.only(name).body["outputs"]
        assert output["shape"] == [count, 2]
        expected = [value for n in range(count) for value in expected_checksum("1", row_of(n))]
        assert output["data"] == expected


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_both_group_protocols_and_until_idle(
    kafka: KafkaServer, tmp_path: Path, sender: Sender, protocol: str
) -> None:
    """--until-idle answers everything, also what a killed worker still holds, and exits 0."""
    with Fleet(tmp_path, kafka, settings={"kafka": {"group_protocol": protocol}}) as fleet:
        fleet.checksum()
        fleet.route(partitions=3)
        fleet.prepare()
        fleet.worker("w-0").kill()
        sent = {f"i-{n}": row_of(n) for n in range(2000)}
        for name, row in sent.items():
            sender.send(fleet.source("sums"), v2_body([row]), id=name)
        sender.flush()
        first = fleet.launch("w-1", "--until-idle", "1")
        assert first.wait() == 0, first.log_tail()
        second = fleet.launch("w-2", "--until-idle", "1")
        assert second.wait() == 0, second.log_tail()
        with Reader(kafka.client_config(), fleet.results("sums")) as reader:
            reader.wait_ids(sent, 5)
            verdict = judge(sent, reader)

    print(f"\n{protocol}: {verdict}")
    assert verdict.right
    assert verdict.duplicates == 0
