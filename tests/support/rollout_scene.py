"""A fleet on real servers that follows the control plane: its verbs, its workers, its coordinators."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from inferfleet.cli.control import RepositoryCatalogue, open_store
from inferfleet.config import load as load_settings
from inferfleet.coordinator.messages import RolloutView
from inferfleet.coordinator.rollouts import RolloutControl
from inferfleet.worker.clock import SystemClock
from tests.support.coordinators import ControlPlane, Coordinator
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

PATIENCE_S = 90.0
USUAL = {
    "INFERFLEET__ROUTES__SOURCE": "fleet",
    "INFERFLEET__COORDINATOR__ADDRESS": "127.0.0.1:0",
    "INFERFLEET__COORDINATOR__ADMIN_ADDRESS": "127.0.0.1:0",
}
QUICK = {
    **USUAL,
    "INFERFLEET__REPORTS__EVERY_S": "0.25",
    "INFERFLEET__REPORTS__HEARTBEAT_S": "0.25",
    "INFERFLEET__ROUTING__LEAD_MS": "500",
}
"""Reports and switches in fractions of a second."""
BROKEN = """if (tensors["x"][:, 1] == tensors["x"][:, 0] + 0.5).any():
            raise ValueError("this version is broken on purpose")"""
"""Fails at every request of these tests, and not at the self-check of whoever loads it."""


class Scene:
    """Route ``sums`` and everybody around it; to be closed."""

    def __init__(self, fleet: Fleet, settings: Mapping[str, str] = QUICK) -> None:
        self.fleet = fleet
        self.settings = dict(settings)
        self.folder = fleet.folder
        self.config = fleet.config
        self.coordinators: list[Coordinator] = []
        self.store = open_store(load_settings(self.config, self.settings))
        self.rollouts = RolloutControl(self.store, RepositoryCatalogue(fleet.repository), SystemClock())

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a coordinator."""
        return {**os.environ, **self.settings, **more}

    def run(self, *arguments: str, code: int = 0) -> str:
        """Return what a verb prints, on standard error where it is to fail."""
        done = self.fleet.run(*arguments, code=code, env=self.settings)
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        """Return what a verb prints as JSON."""
        return json.loads(self.run(*arguments, "--json"))

    def policy(self, text: str) -> str:
        """Write a policy and return its path."""
        file = self.folder / "policy.toml"
        file.write_text(text)
        return str(file)

    def workers(self, *names: str) -> list[WorkerProcess]:
        """Start workers and return them when all are ready."""
        found = [self.fleet.launch(name, env=self.settings) for name in names]
        return [each.wait_ready() for each in found]

    def coordinator(self, name: str) -> Coordinator:
        """Start a coordinator and return it when it serves."""
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

    def close(self) -> None:
        """End the coordinators."""
        for each in self.coordinators:
            each.kill()
        self.store.close()


@contextmanager
def rollout_scene(
    folder: Path,
    kafka: KafkaServer,
    redis: RedisServer,
    *,
    partitions: int = 2,
    stored: bool = True,
    delay_ms: float = 0,
    settings: Mapping[str, str] = QUICK,
) -> Iterator[Scene]:
    """Yield a fleet whose route ``sums`` is answered by version 1; 2 is as good, 3 is broken.

    A batch takes ``delay_ms``. With ``stored`` the results stand in Redis too.
    """
    with Fleet(folder, kafka, redis) as fleet:
        fleet.settings["worker"]["state"] = "state"
        fleet.checksum(version="1", delay_ms=delay_ms)
        fleet.checksum(version="2", delay_ms=delay_ms)
        text = next((fleet.folder / "models" / "sums" / "1").glob("*.py")).read_text()
        text = text.replace('int(parameters["version"])', "3")
        fleet.handler(
            text.replace("sums = checksums(tensors", f"{BROKEN}\n        sums = checksums(tensors"),
            version="3",
        )
        fleet.route(redis=stored, partitions=partitions)
        fleet.prepare()
        scene = Scene(fleet, settings)
        try:
            scene.run("route", "apply", str(fleet.routes_file))
            yield scene
        finally:
            scene.close()
