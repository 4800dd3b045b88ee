"""Alerts fire by real faults and end after the mend: the committed rules, on scrapes of real workers.

Every duration of the rules (windows, ``for``, intervals) is divided by FACTOR, see
:func:`tests.support.alert_rules.hurried_rules`; conditions, labels and texts are those that are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.alert_rules import hurried_rules, rules
from tests.support.coordinators import Coordinator
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import OpenLoop, Sender, row_of, v2_body
from tests.support.prometheus import Alert, PrometheusServer
from tests.support.rollout_scene import QUICK, Scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(420)]

FACTOR = 40.0
EVERY_S = 0.5
PATIENCE_S = 120.0
RATE = 20.0
MANY = 3000
"""So many requests are more than five minutes' work for two workers that answer four rows a second each."""
UNHAPPENED = {"route:inferfleet_failures:rate5m", "route:inferfleet_dead_letters:rate5m"}
HANDLER = """
import pathlib
import time
import numpy as np

class Model:
    '''Sums rows; while the file `slow` stands, a batch takes a second.'''

    def load(self, folder, device, parameters):
        self.slow = pathlib.Path(parameters["flags"]) / "slow"

    def predict(self, tensors):
        if self.slow.exists():
            time.sleep(1.0)
        first = tensors["x"][:, 0].astype(np.int64)
        return {"check": np.stack([first, first], axis=1)}
"""


class Watch(NamedTuple):
    """A fleet under steady load, its control plane's own Redis, and the Prometheus that watches them."""

    scene: Scene
    kafka: KafkaServer
    redis: RedisServer
    coordinator: Coordinator
    server: PrometheusServer
    slow: Path

    @property
    def answered(self) -> float:
        """How many requests have been answered, as far as was scraped."""
        return self.server.value("sum(inferfleet_requests_total)")

    def fires(self, name: str, meanwhile: Callable[[], None] | None = None, **labels: str) -> Alert:
        """Return the alert of this name and labels once it fires; until then ``meanwhile`` is called."""

        def found() -> list[Alert]:
            if meanwhile is not None:
                meanwhile()
            return [each for each in self.server.firing(name) if labels.items() <= each.labels.items()]

        return wait_until(found, PATIENCE_S, f"{name} fires {labels or ''}", every_s=0.2)[0]

    def ends(self, *names: str) -> None:
        """Return once none of these fires."""
        wait_until(
            lambda: not [each for each in self.server.firing() if each.name in names],
            PATIENCE_S,
            f"{names} have ended",
            every_s=0.2,
        )

    def healthy(self) -> None:
        """Return once requests are answered and nothing fires; raise with what does otherwise."""
        wait_until(
            lambda: self.server.value("route:inferfleet_requests:rate2m") > 0 and not self.server.firing(),
            PATIENCE_S,
            "requests are answered and no alert fires",
            every_s=0.2,
        )


@pytest.fixture(scope="module")
def watch(kafka: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """Two workers that answer to a topic, a coordinator, and Redis for the control plane alone."""
    folder = tmp_path_factory.mktemp("alerts")
    settings: dict[str, dict[str, object]] = {
        "worker": {"state": "state"},
        "batching": {"max_batch_size": 4},
    }
    with (
        RedisServer(folder / "redis") as redis,
        Fleet(folder / "fleet", kafka, redis, settings=settings) as fleet,
    ):
        fleet.handler(HANDLER, flags=str(folder))
        fleet.route(goal_p99_ms=60_000)
        fleet.prepare()
        scene = Scene(fleet, QUICK)
        try:
            scene.run("route", "apply", str(fleet.routes_file))
            workers = scene.workers("w-1", "w-2")
            coordinator = scene.coordinator("c-1")
            targets = {
                "worker": addresses(workers),
                "coordinator": [admin_of(coordinator)],
            }
            quick = hurried_rules(folder / "rules", FACTOR)
            with (
                PrometheusServer(folder / "prometheus", targets, rules=quick, every_s=EVERY_S) as server,
                OpenLoop(kafka.client_config(), fleet.source("sums"), 2, RATE),
            ):
                server.all_up()
                yield Watch(scene, kafka, redis, coordinator, server, folder / "slow")
        finally:
            scene.close()


def addresses(workers: list[WorkerProcess]) -> list[str]:
    return [each.address for each in workers]


def admin_of(coordinator: Coordinator) -> str:
    return str(coordinator.events("coordinator_started")[0]["admin"])


def test_a_healthy_fleet_fires_nothing_and_every_rule_has_what_it_asks_for(watch: Watch) -> None:
    """Each recorded series is there but those of events that have not happened yet."""
    watch.healthy()
    names = {rule["record"] for rule in rules() if "record" in rule} - UNHAPPENED

    def missing() -> list[str]:
        return sorted(name for name in names if not watch.server.query(name))

    wait_until(lambda: not missing(), PATIENCE_S, f"all of {sorted(names)} are recorded", every_s=0.5)

    assert watch.server.broken_rules() == []


def test_a_caller_that_sends_rubbish_is_a_dead_letter_storm(watch: Watch) -> None:
    watch.healthy()
    source, sender = watch.scene.fleet.source("sums"), Sender(watch.kafka.client_config())

    def send() -> None:
        for partition in (0, 1):
            sender.send(source, b"this is no tensor", partition=partition)

    alert = watch.fires("InferfleetDeadLetterStorm", send, route="sums")
    sender.flush()

    assert alert.labels["severity"] == "critical"
    assert alert.annotations["runbook_url"] == "docs/runbooks/InferfleetDeadLetterStorm.md"
    assert watch.server.value('sum(inferfleet_dead_letters_total{code="E_DECODE"})') > 0
    assert watch.server.firing("InferfleetErrorRate") == []  # it is the caller's fault
    watch.ends("InferfleetDeadLetterStorm")


def test_a_control_plane_that_hangs_makes_routes_stale_and_leaves_nobody_leading(watch: Watch) -> None:
    watch.healthy()
    watch.redis.pause()
    try:
        stale = watch.fires("InferfleetStaleRoutes")
        watch.fires("InferfleetNoLeader")
        answered = watch.answered
        wait_until(lambda: watch.answered > answered, PATIENCE_S, "requests are answered by the known routes")
    finally:
        watch.redis.resume()

    assert stale.labels["severity"] == "warning"
    watch.ends("InferfleetStaleRoutes", "InferfleetNoLeader")


def test_lag_of_a_slow_model_then_everybody_is_killed_while_requests_wait(watch: Watch) -> None:
    watch.healthy()
    watch.slow.touch()
    sender = Sender(watch.kafka.client_config())
    for number in range(MANY):
        name = f"burst-{number}"
        body = v2_body([row_of(number)])
        sender.send(watch.scene.fleet.source("sums"), body, id=name, partition=number % 2)
    sender.flush()

    lag = watch.fires("InferfleetLag", route="sums")
    assert lag.labels["severity"] == "warning"

    for process in (*watch.scene.fleet.workers, watch.coordinator):
        process.kill()
    watch.slow.unlink()
    nobody = watch.fires("InferfleetNoReadyWorker")
    outage = watch.fires("InferfleetOutage", route="sums")
    assert nobody.labels["severity"] == outage.labels["severity"] == "critical"

    watch.fires("InferfleetCoordinatorAway")

    fresh = watch.scene.workers("w-3", "w-4")
    watch.server.aim("worker", addresses(fresh))
    watch.server.aim("coordinator", [admin_of(watch.scene.coordinator("c-2"))])
    watch.ends("InferfleetNoReadyWorker", "InferfleetOutage", "InferfleetLag", "InferfleetCoordinatorAway")
    watch.healthy()
