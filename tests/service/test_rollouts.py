"""Rollouts on real Kafka and Redis: two workers, coordinators that die, versions good and broken."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from inferfleet.cli.control import RepositoryCatalogue, open_store
from inferfleet.config import load as load_settings
from inferfleet.coordinator.messages import RolloutView
from inferfleet.coordinator.rollouts import RolloutControl
from inferfleet.worker.clock import SystemClock
from tests.support.coordinators import ControlPlane, Coordinator
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import OpenLoop, Reader, judge
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PARTITIONS = 2
RATE = 100.0
PATIENCE_S = 90.0
QUICK = {
    "INFERFLEET__ROUTES__SOURCE": "fleet",
    "INFERFLEET__REPORTS__EVERY_S": "0.25",
    "INFERFLEET__REPORTS__HEARTBEAT_S": "0.25",
    "INFERFLEET__ROUTING__LEAD_MS": "500",
    "INFERFLEET__COORDINATOR__ADDRESS": "127.0.0.1:0",
    "INFERFLEET__COORDINATOR__ADMIN_ADDRESS": "127.0.0.1:0",
}
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
BROKEN = """if (tensors["x"][:, 1] == tensors["x"][:, 0] + 0.5).any():
            raise ValueError("this version is broken on purpose")"""
"""Fails at every request of these tests, and not at the self-check of whoever loads it."""


class Scene:
    """A fleet that follows the control plane: its command line, its workers, its coordinators."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.folder = fleet.folder
        self.config = fleet.config
        self.coordinators: list[Coordinator] = []
        settings = load_settings(self.config, QUICK)
        self.store = open_store(settings)
        self.rollouts = RolloutControl(self.store, RepositoryCatalogue(fleet.repository), SystemClock())

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a coordinator."""
        return {**os.environ, **QUICK, **more}

    def run(self, *arguments: str, code: int = 0) -> str:
        done = self.fleet.run(*arguments, code=code, env=QUICK)
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def policy(self, text: str) -> str:
        file = self.folder / "policy.toml"
        file.write_text(text)
        return str(file)

    def workers(self, *names: str) -> list[WorkerProcess]:
        found = [self.fleet.launch(name, env=QUICK) for name in names]
        return [each.wait_ready() for each in found]

    def coordinator(self, name: str) -> Coordinator:
        made = Coordinator(name, cast(ControlPlane, self), {}).launch()
        self.coordinators.append(made)
        return made.up()

    def reached(self, rollout: str, *phases: str) -> RolloutView:
        """Return the rollout once it is in one of these phases."""
        last: list[RolloutView] = []

        def there() -> bool:
            last[:] = [self.rollouts.get(rollout)]
            return last[0].phase in phases

        try:
            wait_until(there, PATIENCE_S, f"{rollout} is {' or '.join(phases)}", every_s=0.2)
        except AssertionError as error:
            logs = "\n".join(each.log_tail(10) for each in self.coordinators)
            raise AssertionError(f"{error}\n{last}\n{logs}") from None
        return last[0]

    def actions(self) -> list[str]:
        """Return what was done to the route, in order."""
        return [each.action for each in reversed(self.store.history("sums"))]

    def versions(self) -> set[str]:
        """Return the versions that answer the route."""
        return {each.version for each in self.store.load().table().named("sums").variants}


@pytest.fixture
def scene(kafka: KafkaServer, redis_server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    """Route sums is answered by version 1; version 2 is as good, version 3 raises at every request."""
    with Fleet(tmp_path / "fleet", kafka, redis_server) as fleet:
        fleet.settings["worker"]["state"] = "state"
        fleet.checksum(version="1")
        fleet.checksum(version="2")
        source = (fleet.folder / "models" / "sums" / "1").glob("*.py")
        text = next(iter(source)).read_text()
        text = text.replace('int(parameters["version"])', "3")
        fleet.handler(
            text.replace("sums = checksums(tensors", f"{BROKEN}\n        sums = checksums(tensors"),
            version="3",
        )
        fleet.route(redis=True, partitions=PARTITIONS)
        fleet.prepare()
        made = Scene(fleet)
        made.run("route", "apply", str(fleet.routes_file))
        yield made
        for each in made.coordinators:
            each.kill()
        made.store.close()


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
