"""Rollouts on real Kafka and Redis: two workers, coordinators that die, versions good and broken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet_traffic import OpenLoop, Reader, judge
from tests.support.rollout_scene import PATIENCE_S, Scene, rollout_scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PARTITIONS = 2
RATE = 100.0
POLICY = """
kind = "canary"
bake_s = 3
step_limit_s = 120
[shadow]
duration_s = 2
minimum_pairs = 50
stop_at = "never"
[[step]]
percent = 10
dwell_s = 3
minimum = 20
[[step]]
percent = 50
dwell_s = 3
minimum = 100
"""
AT_ONCE = POLICY.replace("[shadow]", "[shadow]\nenabled = false")
"""The same without a shadow: a broken version is met by users."""


@pytest.fixture
def scene(kafka: KafkaServer, redis_server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    """Route sums is answered by version 1; version 2 is as good, version 3 raises at every request."""
    with rollout_scene(tmp_path / "fleet", kafka, redis_server, partitions=PARTITIONS) as made:
        yield made


def test_a_good_version_is_promoted_although_its_coordinators_die_and_stay_away(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty
) -> None:
    """Killed in a step (F23), none for a while (F25), another goes on: no step twice, nothing fails."""
    fleet, client = scene.fleet, kafka.client_config()
    workers = scene.workers("w-1", "w-2")
    first = scene.coordinator("c-1")
    with (
        Reader(client, fleet.results("sums")) as answers,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        began = time.monotonic()
        policy = scene.policy(POLICY)
        said = scene.json("rollout", "start", "sums", "--to", "2", "--policy", policy, "--reason", "better")
        rollout = said["id"]
        stood = scene.reached(rollout, "step")
        first.kill()

        load.wait_sent(int(4 * RATE))
        wait_until(
            lambda: "no coordinator leads" in scene.run("rollout", "status", rollout),
            PATIENCE_S,
            "the lease has run out",
        )
        assert scene.rollouts.get(rollout).step == stood.step
        assert all(each.ready for each in workers)

        scene.coordinator("c-2")
        ended = scene.reached(rollout, "done", "aborted", "inconclusive")
        assert ended.phase == "done", ended
        took = time.monotonic() - began
        load.stop()
        answers.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))
        assert verdict.right, str(verdict)

    assert scene.actions() == [
        "apply",
        *["rollout shadow", "activate"],
        *["rollout step", "activate"] * 2,
        *["rollout bake", "activate"],
        "rollout done",
    ]
    assert scene.versions() == {"2"}
    by_version = _by_version(answers)
    record_property("rollout_promoted", f"in {took:.0f} s with one kill; answered {by_version}; {verdict}")
    assert [each.finish() for each in workers] == [0, 0]


def test_a_leader_that_stands_still_in_a_rollout_and_goes_on_steps_nothing_twice(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty
) -> None:
    """SIGSTOP in a step (F24), SIGCONT while the other has gone on: one set of steps, and nothing fails."""
    fleet, client = scene.fleet, kafka.client_config()
    workers = scene.workers("w-1", "w-2")
    first = scene.coordinator("c-1")
    wait_until(lambda: first.leads, PATIENCE_S, "the first leads")
    second = scene.coordinator("c-2")
    with (
        Reader(client, fleet.results("sums")) as answers,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        policy = scene.policy(AT_ONCE)
        rollout = scene.json("rollout", "start", "sums", "--to", "2", "--policy", policy)["id"]
        wait_until(lambda: scene.actions()[-1] == "activate", PATIENCE_S, "the first step has its time")
        first.pause()
        taken = len(scene.actions())

        wait_until(lambda: second.leads, PATIENCE_S, "the second leads")
        wait_until(lambda: len(scene.actions()) > taken, PATIENCE_S, "the second takes a step")
        first.resume()
        ended = scene.reached(rollout, "done", "aborted", "inconclusive")
        assert ended.phase == "done", ended
        wait_until(
            lambda: first.events("leading_ends"), PATIENCE_S, "the first has seen that it was replaced"
        )
        assert second.leads
        assert not first.leads
        load.stop()
        answers.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))
        assert verdict.right, str(verdict)

    assert scene.actions() == [
        "apply",
        *["rollout step", "activate"] * 2,
        *["rollout bake", "activate"],
        "rollout done",
    ]
    numbers = [each.number for each in reversed(scene.store.history("sums"))]
    assert numbers == list(range(1, len(numbers) + 1))
    record_property("rollout_two_leaders", f"one set of steps, {len(numbers)} revisions; {verdict}")
    assert [each.finish() for each in workers] == [0, 0]


def test_a_broken_version_is_taken_back_before_its_share_of_the_backlog_is_through(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty
) -> None:
    """What waits is answered by the old version; who met the broken one got an error, once."""
    fleet, client = scene.fleet, kafka.client_config()
    workers = scene.workers("w-1", "w-2")
    scene.coordinator("c-1")
    with (
        Reader(client, fleet.results("sums")) as answers,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        load.wait_sent(int(RATE))
        policy = scene.policy(AT_ONCE)
        rollout = scene.json("rollout", "start", "sums", "--to", "3", "--policy", policy)["id"]
        ended = scene.reached(rollout, "done", "aborted", "inconclusive")
        assert ended.phase == "aborted", ended
        load.wait_sent(int(3 * RATE))
        load.stop()
        answers.wait_ids(load.rows)

    bad = [each for each in answers.outcomes if each.served["version"] == "3"]
    assert {each.code for each in bad} <= {"E_MODEL"}
    verdict = judge(load.rows, answers, ("1",))
    assert set(verdict.wrong) == {each.id for each in bad}, str(verdict)
    assert (verdict.lost, verdict.unequal) == ([], [])
    stamps = sorted(each.timestamp_ms for each in bad)
    lasted = (stamps[-1] - stamps[0]) / 1000 if stamps else 0.0
    record_property(
        "rollout_aborted",
        f"{len(bad)} of {len(load.rows)} answered by it, within {lasted:.1f} s; {ended.outcome}",
    )
    assert scene.versions() == {"1"}
    assert [each.status()["paused"] for each in workers] == [{}, {}]
    assert [each.finish() for each in workers] == [0, 0]


def _by_version(answers: Reader) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in answers.outcomes:
        counts[each.served["version"]] = counts.get(each.served["version"], 0) + 1
    return dict(sorted(counts.items()))
