"""A Redis that is full, cannot save, is slow or moves its slots, under a working fleet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis.crc import key_slot

from inferfleet.wire.stored import again_key, result_key
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import OpenLoop, Reader, Sender, judge, now_ms, row_of, v2_body
from tests.support.redis_cluster import RedisCluster
from tests.support.scale import full, pick
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]
Record = Any
"""``record_property`` of pytest: a figure for the summary of faults."""
RATE = 200


class Place(NamedTuple):
    """A fleet with a route that keeps results in Redis and one that does not."""

    fleet: Fleet
    worker: WorkerProcess
    redis: RedisServer
    client: Any


@pytest.fixture(scope="module")
def place(kafka: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("redis-worker")
    with RedisServer(folder / "server") as redis, Fleet(folder / "fleet", kafka, redis) as fleet:
        fleet.checksum()
        fleet.route("stored", redis=True, partitions=2)
        fleet.route("plain", partitions=1)
        with fleet.prepare().running() as worker:
            yield Place(fleet, worker, redis, kafka.client_config())


def bodies_in(get: Callable[[str], bytes | None], fleet: Fleet, names: Any) -> dict[str, list[int]]:
    """The stored answers, once all stand."""
    keys = {name: result_key(fleet.name, "stored", name) for name in names}
    found: dict[str, list[int]] = {}

    def all_stand() -> bool:
        for name, key in keys.items():
            if name not in found and (body := get(key)) is not None:
                found[name] = json.loads(body)["outputs"][0]["data"]
        return len(found) == len(keys)

    wait_until(all_stand, 30, "all results stand in Redis")
    return found


def out_of_memory(redis: RedisServer) -> Callable[[], None]:
    """Fill the server to its bound; returns the mend."""
    with redis.client() as admin:
        admin.set("filler", b"x" * 8_000_000)
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", 8_000_000)

    def mend() -> None:
        with redis.client() as admin:
            admin.config_set("maxmemory", 0)
            admin.delete("filler")

    return mend


def cannot_save(redis: RedisServer) -> Callable[[], None]:
    """Let the server fail to write its snapshot; returns the mend."""
    blocked = redis.folder / "dump.rdb"

    def save(status: str) -> None:
        with redis.client() as admin:
            admin.bgsave()

            def ended() -> bool:
                found = admin.info("persistence")
                return not found["rdb_bgsave_in_progress"] and found["rdb_last_bgsave_status"] == status

            wait_until(ended, 20, f"saving ends as {status}")

    def mend() -> None:
        blocked.rmdir()
        save("ok")

    blocked.mkdir()
    with redis.client() as admin:
        admin.config_set("save", "3600 1000000")
    save("err")
    return mend


@pytest.mark.parametrize("fault", [out_of_memory, cannot_save])
def test_a_redis_that_refuses_writes_holds_its_route_only(
    place: Place, fault: Callable[[RedisServer], Callable[[], None]], record_property: Record
) -> None:
    """OOM and MISCONF are back-pressure: no dead letter, other routes go on, this one resumes by itself."""
    fleet, worker, redis, client = place
    prefix = fault.__name__
    with (
        Reader(client, fleet.results("stored")) as reader,
        Reader(client, fleet.results("plain")) as other,
    ):
        sender = Sender(client)
        sent = {f"{prefix}-{n}": row_of(n) for n in range(pick(400, 20_000))}
        names = list(sent)
        half = len(names) // 2
        for name in names[:half]:
            sender.send(fleet.source("stored"), v2_body([sent[name]]), id=name)
        sender.flush()
        reader.wait_ids(names[:10])
        mend = fault(redis)
        for name in names[half:]:
            sender.send(fleet.source("stored"), v2_body([sent[name]]), id=name)
        sender.flush()
        reason = wait_until(lambda: worker.status()["paused"].get("stored"), 30, "the route is paused")
        sender.send(fleet.source("plain"), v2_body([row_of(1)]), id=f"{prefix}-plain")
        sender.flush()
        other.wait_ids([f"{prefix}-plain"])
        assert worker.ready
        mended_at = time.monotonic()
        mend()
        wait_until(lambda: not worker.status()["paused"], 30, "the route resumes")
        resumed_s = time.monotonic() - mended_at
        reader.wait_ids(sent, 60)
        reader.by_id = {name: found for name, found in reader.by_id.items() if name in sent}
        verdict = judge(sent, reader)
    with redis.client() as stored:
        found = bodies_in(stored.get, fleet, sent)
        counted = [stored.hgetall(again_key(fleet.name, "stored", name)) for name in sent]
    said = f"{reason}: {verdict}, 0 dead letters, resumed {resumed_s:.1f} s after the mend"
    record_property(f"F14 {prefix}", said)
    assert verdict.right, verdict
    assert worker.metric("dead_letters_total") == 0
    assert found == {name: list(reader.only(name).check) for name in sent}
    assert all(set(counts) <= {b"same"} for counts in counted)


def latencies(place: Place, prefix: str, count: int) -> list[float]:
    """Send ``count`` requests to the plain route, one each 5 ms; return what each took, in milliseconds."""
    fleet, _, _, client = place
    sender = Sender(client)
    sender.send(fleet.source("plain"), v2_body([row_of(0)]), id=f"{prefix}-first")
    sender.flush()  # else the first of those that are timed would wait for the producer to connect
    sent_at: dict[str, int] = {}
    started = time.monotonic()

    def send_next() -> bool:
        while len(sent_at) < min(count, int((time.monotonic() - started) / 0.005) + 1):
            name = f"{prefix}-{len(sent_at)}"
            sent_at[name] = now_ms()
            sender.send(fleet.source("plain"), v2_body([row_of(len(sent_at))]), id=name)
        sender.poll()
        return len(sent_at) == count

    wait_until(send_next, 60, "all requests are sent", every_s=0.001)
    sender.flush()
    with Reader(client, fleet.results("plain")) as reader:
        reader.wait_ids(sent_at)
        return sorted(float(reader.only(name).timestamp_ms - sent_at[name]) for name in sent_at)


def test_a_slow_redis_leaves_other_routes_alone(place: Place, record_property: Record) -> None:
    """While Redis answers no write, a route without it is as fast as before."""
    fleet, worker, redis, client = place
    count = pick(200, 4000)
    with (
        Reader(client, fleet.results("stored")) as reader,
        OpenLoop(client, fleet.source("stored"), 2, RATE) as load,
    ):
        load.wait_sent(RATE // 2)
        calm = latencies(place, "calm", count)
        with redis.client() as admin:
            admin.client_pause(100_000, all=False)  # of writes, until it is ended
        paused = latencies(place, "slow", count)
        with redis.client() as admin:
            sent = list(load.rows)
            stood = sum(admin.exists(result_key(fleet.name, "stored", name)) for name in sent)
            assert stood < len(sent), "the pause did not bite"
            admin.client_unpause()
        load.stop()
        reader.wait_ids(load.rows, 60)
        reader.by_id = {name: found for name, found in reader.by_id.items() if name in load.rows}
        verdict = judge(load.rows, reader)
    p50, p99 = ([values[int(share * len(values))] for values in (calm, paused)] for share in (0.5, 0.99))
    said = f"route without redis: p50 {p50[0]} -> {p50[1]} ms, p99 {p99[0]} -> {p99[1]} ms"
    record_property("F17 slow redis", said)
    assert verdict.right, verdict
    assert worker.metric("dead_letters_total") == 0
    assert p99[1] <= 1.1 * p99[0] + (20 if full() else 200)


def test_a_worker_on_a_cluster_whose_slots_move(
    kafka: KafkaServer, redis_cluster: RedisCluster, tmp_path: Path, record_property: Record
) -> None:
    """Slots with results move while requests are answered: each stands once, with its own answer."""
    client = kafka.client_config()
    settings = {"redis": {"mode": "cluster", "nodes": list(redis_cluster.addresses)}}
    with Fleet(tmp_path, kafka, settings=settings) as fleet:
        fleet.checksum()
        fleet.route("stored", redis=True, partitions=2)
        with fleet.prepare().running() as worker:
            with (
                Reader(client, fleet.results("stored")) as reader,
                OpenLoop(client, fleet.source("stored"), 2, RATE) as load,
            ):
                load.wait_sent(RATE)
                keys = [result_key(fleet.name, "stored", f"r-{number}") for number in range(pick(60, 1500))]
                slots = sorted({key_slot(key.encode()) for key in keys})
                for node in range(3):
                    redis_cluster.move_slots(slots[node::3], node)
                load.wait_sent(RATE // 2)
                load.stop()
                reader.wait_ids(load.rows, 60)
                verdict = judge(load.rows, reader)
            with redis_cluster.client() as stored:
                found = bodies_in(stored.get, fleet, load.rows)
                counted = [stored.hgetall(again_key(fleet.name, "stored", name)) for name in load.rows]
            assert worker.metric("dead_letters_total") == 0
            assert worker.metric("results_lost_total") == 0
            assert worker.events("results_away") == []
    record_property("F16 MOVED, worker", f"{len(slots)} slots moved: {verdict}")
    assert verdict.right, verdict
    assert verdict.duplicates == 0
    assert found == {name: list(reader.only(name).check) for name in load.rows}
    assert not any(counted)
