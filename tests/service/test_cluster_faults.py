"""Whole workers on clusters of real nodes: RabbitMQ nodes stop one by one, Redis slots move meanwhile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import OpenLoop, Reader, judge
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.rabbitmq_fleet import Queues
from tests.support.rabbitmq_load import Load, plain
from tests.support.redis_cluster import RedisCluster
from tests.support.scale import pick
from tests.support.servers import KafkaServer

pytestmark = [pytest.mark.service, pytest.mark.fault, pytest.mark.slow]


@pytest.mark.timeout(400)
def test_rabbitmq_nodes_stop_one_at_a_time(data_folder: Path, tmp_path: Path, record_property: Any) -> None:
    """F18 on three nodes: with each one stopped in turn the other two carry on, and nothing is lost."""
    with RabbitCluster(data_folder) as cluster:
        settings = {
            "rabbitmq": {"url": ",".join(cluster.urls), "heartbeat_s": 2},
            "worker": {"state": "state"},
        }
        with Fleet(tmp_path / "fleet", None, rabbitmq=cluster.nodes[0], settings=settings) as fleet:
            fleet.checksum(delay_ms=2)
            on = Queues(fleet, cluster.nodes[0], "sums")
            fleet.route("sums", **on.route_keys)
            fleet.prepare()
            cluster.wait_ready()
            workers = [fleet.worker("w-0"), fleet.worker("w-1")]
            with Load(lambda: plain(cluster.up()), on.source, on.key, rate=150) as load:
                longest = 0.0
                for number in list(range(len(cluster.nodes))) * pick(1, 3):
                    load.wait_progress(100)
                    cluster.stop(number)
                    stopped = time.monotonic()
                    load.wait_progress(100, 60)
                    longest = max(longest, time.monotonic() - stopped)
                    cluster.start(number)
                    cluster.wait_ready()
                # A channel that publishes while a queue has no leader is refused for ever: it must be left.
                cluster.kill(cluster.leader(on.key))
                load.wait_progress(100, 60)
                judged = load.judged()
            assert all(worker.running for worker in workers)
            record_property(
                "F18 three nodes",
                f"{judged.sent} sent, 0 lost, {judged.duplicates} equal copies, "
                f"100 answers within {longest:.1f} s of a stop",
            )


def test_redis_slots_move_under_a_worker(
    kafka: KafkaServer, data_folder: Path, tmp_path: Path, record_property: Any
) -> None:
    """A cluster is resharded while results are written: each stands where clients look for it."""
    client = kafka.client_config()
    with RedisCluster(data_folder) as cluster:
        settings = {"redis": {"mode": "cluster", "nodes": list(cluster.addresses), "url": cluster.url}}
        with Fleet(tmp_path / "fleet", kafka, settings=settings) as fleet:
            fleet.checksum()
            fleet.route("sums", partitions=2, redis=True)
            with (
                fleet.prepare().running() as worker,
                Reader(client, fleet.results("sums")) as reader,
                OpenLoop(client, fleet.source("sums"), 2, 200) as load,
            ):
                moved = 0
                for _ in range(pick(4, 40)):
                    reader.wait_count(sum(map(len, reader.by_id.values())) + 100)
                    for name in list(load.rows)[-20:]:
                        key = f"{fleet.name}:result:sums:{name}"
                        target = (cluster.owner_of(key) + 1) % len(cluster.nodes)
                        cluster.move_slots([key_slot(key.encode())], target)
                        moved += 1
                load.stop()
                reader.wait_ids(load.rows, 60)
                verdict = judge(load.rows, reader)
                assert worker.metric("dead_letters_total") == 0
            with cluster.client() as redis:
                for name, row in load.rows.items():
                    stored = redis.get(f"{fleet.name}:result:sums:{name}")
                    assert stored is not None, name
                    found = tuple(json.loads(stored)["outputs"][0]["data"])
                    assert found == expected_checksum("1", row)
    assert verdict.right, verdict
    record_property(
        "slots moved", f"{moved} slots, {len(load.rows)} results, 0 lost, {verdict.duplicates} copies"
    )
