"""A worker whose wall clock is an hour off (F26): a record is answered by what its own time says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inferfleet.plane import Draft
from inferfleet.routes import route_of
from tests.support.control import change
from tests.support.fleet_traffic import OpenLoop, Reader, judge, now_ms
from tests.support.rollout_scene import PATIENCE_S, Scene, rollout_scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]

PARTITIONS = 4
RATE = 100.0
LEAD_MS = 2_000
SHIFTED = Path(__file__).parents[1] / "support/shifted_clock"


@pytest.fixture
def scene(kafka: KafkaServer, redis_server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    """Route sums is answered by version 1; version 2 is as good."""
    with rollout_scene(tmp_path / "fleet", kafka, redis_server, partitions=PARTITIONS) as made:
        yield made


@pytest.mark.parametrize("hours", [1, -1])
def test_a_worker_whose_clock_is_an_hour_off_switches_with_the_others(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty, hours: int
) -> None:
    """Nothing is lost and no record is answered by the version of another time, on either worker (I7)."""
    fleet, client = scene.fleet, kafka.client_config()
    clock = {"PYTHONPATH": str(SHIFTED), "CLOCK_SHIFT_S": str(hours * 3600)}
    first = fleet.launch("w-1", env=scene.settings)
    off = fleet.launch("w-2", env={**scene.settings, **clock})
    for each in (first, off):
        each.wait_ready()
    wait_until(lambda: len(scene.store.workers()) == 2, PATIENCE_S, "both have registered")
    apart_ms = max(abs(each.at_ms - now_ms()) for each in scene.store.workers())
    assert abs(apart_ms - 3_600_000) < 600_000
    with (
        Reader(client, fleet.results("sums")) as answers,
        Reader(client, fleet.source("sums")) as asked,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        load.wait_sent(int(RATE))
        wanted = route_of({**fleet.routes["sums"], "version": "2"}, fleet.name, "test")
        scene.store.commit(change(Draft("sums", wanted, None, "announce")))
        wait_until(
            lambda: all("sums:2" in each.ready for each in scene.store.workers()), PATIENCE_S, "both have it"
        )
        switch_ms = now_ms() + LEAD_MS
        scene.store.commit(change(Draft("sums", wanted, switch_ms, "activate")))
        load.wait_sent(int(5 * RATE))
        load.stop()
        answers.wait_ids(load.rows)
        asked.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))
        assert verdict.right, str(verdict)

        amiss = [
            name
            for name in load.rows
            if answers.only(name).served["version"]
            != ("2" if asked.only(name).timestamp_ms >= switch_ms else "1")
        ]
        by_worker = {"w-1": 0, "w-2": 0}
        for name in load.rows:
            by_worker[answers.only(name).served["worker"]] += 1
    assert amiss == []
    assert min(by_worker.values()) > 0
    record_property(f"F26 {hours:+d} h", f"{verdict}; none by the version of another time; {by_worker}")
    assert [each.finish() for each in (first, off)] == [0, 0]
