"""A cluster moves slots, forgets scripts and loses a node while results are written to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis.crc import key_slot
from structlog.testing import capture_logs

from inferfleet.redis_access import Place
from inferfleet.results.redis import OutletOptions
from inferfleet.wire.stored import again_key, result_key
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_server import RedisServer
from tests.support.redis_writer import FLEET, OPTIONS, ROUTE, Writer, missing, repeats, replied
from tests.support.scale import pick
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]
Record = Any
"""``record_property`` of pytest: a figure for the summary of faults."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A cluster that these tests move about and break."""
    with RedisCluster(tmp_path_factory.mktemp("own-cluster")) as started:
        yield started


@pytest.fixture
def writer(cluster: RedisCluster) -> Iterator[Writer]:
    cluster.on_all("FLUSHALL")
    made = Writer(Place(mode="cluster", nodes=cluster.addresses, timeout_s=1.0))
    yield made
    made.outlet.close(0.5)


def slot_of(number: int) -> int:
    return key_slot(result_key(FLEET, ROUTE, f"r-{number}").encode())


def test_a_counter_is_in_the_slot_of_its_result() -> None:
    """The braces hold the whole of the result's key, so no script reaches across slots."""
    for name in ("order-42", "digits.requests-3-17", "ü:*"):
        one, other = result_key("fleet", "digits", name), again_key("fleet", "digits", name)
        assert key_slot(one.encode()) == key_slot(other.encode())


def test_slots_that_move_lose_nothing(cluster: RedisCluster, writer: Writer, record_property: Record) -> None:
    """Slots go from node to node with their keys under a stream of new and repeated results."""
    count = pick(3000, 30_000)
    slots = sorted({slot_of(number) for number in range(count)})[: pick(100, 1500)]
    rounds = 0
    with capture_logs() as logs, ThreadPoolExecutor(1) as pool:
        moves = pool.submit(lambda: [cluster.move_slots(slots[at::3], at) for at in range(3)])
        while not moves.done() or rounds < 2:
            for low in range(0, count, 500):
                writer.publish_again(range(low, low + 500), reply="c")
                writer.wait_done("every row is confirmed while slots move", 60)
            rounds += 1
        moves.result()
    with cluster.client() as client:
        assert missing(client, count) == []
        counted = repeats(client, count)
        assert replied(client, "c")
    assert set(counted) == {"same"}
    record_property(
        "F16 MOVED, outlet",
        f"{len(slots)} slots moved, {rounds} x {count} results: 0 lost, {counted['same']} repeats counted",
    )
    assert counted["same"] <= (rounds - 1) * count
    assert counted["same"] >= (rounds - 1) * count - len(slots) * rounds * 5
    assert writer.lost == {}
    assert [entry for entry in logs if entry["event"] == "results_away"] == []


def test_a_slot_that_is_half_moved_takes_new_and_repeated_results(
    cluster: RedisCluster, writer: Writer
) -> None:
    """New keys are asked for at the new node, old ones at the old: write-once holds, and nothing waits."""
    writer.publish(10)
    writer.wait_done("the first rows are confirmed")
    slot = slot_of(3)
    source = cluster.owner_of(result_key(FLEET, ROUTE, "r-3"))
    fresh = next(n for n in range(10, 1_000_000) if slot_of(n) == slot)
    with cluster.moving(slot, (source + 1) % 3):
        writer.publish_again([3, fresh, 3, fresh], reply="c")
        writer.wait_done("rows are confirmed while their slot is half moved")
        with cluster.nodes[source].client() as old:
            assert old.exists(result_key(FLEET, ROUTE, "r-3")) == 1
    writer.publish_again([3, fresh])
    writer.wait_done("rows are confirmed where their slot is now")
    assert writer.outlet.away_since is None
    with cluster.client() as client:
        assert missing(client, 10) == []
        counts = {n: client.hgetall(again_key(FLEET, ROUTE, f"r-{n}")) for n in (3, fresh)}
        assert replied(client, "c") == {"r-3", f"r-{fresh}"}
    # The counter of a result whose slot is on its way has no home yet: its repeats are not counted.
    assert counts == {3: {b"same": b"1"}, fresh: {b"same": b"2"}}


def test_forgotten_scripts_are_loaded_again_on_every_node(cluster: RedisCluster, writer: Writer) -> None:
    """SCRIPT FLUSH on all nodes costs one more round trip and is no outage."""
    writer.publish(100, reply="c")
    writer.wait_done("the first rows are confirmed")
    cluster.on_all("SCRIPT", "FLUSH")
    cluster.on_all("FUNCTION", "FLUSH")
    writer.publish(100, reply="c")
    writer.wait_done("rows after the flush are confirmed")
    assert writer.outlet.away_since is None
    with cluster.client() as client:
        assert missing(client, 200) == []
        assert repeats(client, 200) == {}
        assert replied(client, "c") == {f"r-{n}" for n in range(200)}


def test_a_node_that_dies_is_waited_for(cluster: RedisCluster, writer: Writer) -> None:
    """Rows of the other nodes are written once meanwhile, and not again with every try."""
    writer.publish(200)
    writer.wait_done("the first rows are confirmed")
    cluster.nodes[1].kill()
    writer.publish(100)
    writer.wait_away()
    wait_until(lambda: writer.outlet._tries >= 3, 20, "the outlet tried more than once")
    assert not writer.done
    cluster.nodes[1].start()
    writer.wait_done("every row is confirmed after the restart", 30)
    assert writer.outlet.away_since is None
    with cluster.client() as client:
        assert missing(client, 300) == []
        # Only what a dying node took and did not confirm may have been sent to it twice.
        assert repeats(client, 300)["same"] <= OPTIONS.rows_per_step
    assert writer.lost == {}


def test_a_cluster_keeps_pace(
    cluster: RedisCluster, redis_server: RedisServer, record_property: Record
) -> None:
    """Rows go to each node side by side: a cluster is a few times slower than one server, not a hundred."""
    total = pick(5000, 50_000)
    rates = {}
    for name, place in (
        ("single", Place(redis_server.url)),
        ("cluster", Place(mode="cluster", nodes=cluster.addresses)),
    ):
        writer = Writer(place, options=OutletOptions())
        writer.publish(200)
        writer.wait_done("the outlet is connected")
        started_at = time.perf_counter()
        for _ in range(total // 500):
            writer.publish(500, body_bytes=200)
        writer.wait_done("every row is confirmed", 60)
        rates[name] = total / (time.perf_counter() - started_at)
        assert writer.outlet.close(5) == 0
    ratio = rates["single"] / rates["cluster"]
    record_property(
        "redis cluster",
        f"{rates['single']:,.0f}/s single, {rates['cluster']:,.0f}/s cluster, ratio {ratio:.1f}",
    )
    assert ratio < 25
