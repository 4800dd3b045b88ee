"""A broken version under a backlog: how many requests meet it, and for how long, before it is taken back.

The new version raises at nearly every request and has 5 % of the keys. Fifty thousand requests are written
after it came into force, so all of them lie under its revision, and two workers take about a minute for them.
The policy is the default one without its shadow stage, which would not have let this version through.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from tests.support.coordinators import ControlPlane, Coordinator
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import RAW_HEADERS, Outcome, Reader, Sender, raw_body, row_of
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

PARTITIONS = 4
WORKERS = 2
BATCH = 64
PERCENT = 5
PATIENCE_S = 300.0
SETTINGS = {
    "INFERFLEET__ROUTES__SOURCE": "fleet",
    "INFERFLEET__COORDINATOR__ADDRESS": "127.0.0.1:0",
    "INFERFLEET__COORDINATOR__ADMIN_ADDRESS": "127.0.0.1:0",
    "INFERFLEET__BATCHING__MAX_BATCH_SIZE": str(BATCH),
}
POLICY = f"""\
kind = "canary"
[shadow]
enabled = false
[[step]]
percent = {PERCENT}
dwell_s = 900
minimum = 2000
"""
_BROKEN = """if float(tensors["x"].max()) > 10:
            raise ValueError("this version is broken on purpose")"""
"""Only on what users send: it passes the check of a model that has just been loaded."""


class _Scene:
    """A fleet on real servers that follows the control plane; what coordinators' processes ask of it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.folder = fleet.folder
        self.config = fleet.config

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a coordinator."""
        return {**os.environ, **SETTINGS, **more}

    def json(self, *arguments: str) -> Any:
        """Return what a verb prints."""
        return json.loads(self.fleet.run(*arguments, "--json", env=SETTINGS).stdout)


def measure(
    count: int = 50_000,
    *,
    per_s: float = 800.0,
    folder: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return how many of ``count`` requests the broken version answered, and for how many seconds.

    The workers together run about ``per_s`` requests a second.
    """
    with contextlib.ExitStack() as leaving:
        if folder is None:
            folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="inferfleet-loadtest-")))
        kafka = leaving.enter_context(KafkaServer(folder / "kafka"))
        redis = leaving.enter_context(RedisServer(folder / "redis"))
        fleet = leaving.enter_context(Fleet(folder / "fleet", kafka, redis))
        delay_ms = BATCH * WORKERS * 1000 / per_s
        fleet.checksum(version="1", delay_ms=delay_ms)
        handler = next((fleet.folder / "models" / "sums" / "1").glob("*.py")).read_text()
        handler = handler.replace('int(parameters["version"])', "3")
        handler = handler.replace("sums = checksums(tensors", f"{_BROKEN}\n        sums = checksums(tensors")
        fleet.handler(handler, version="3")
        fleet.route(redis=False, partitions=PARTITIONS)
        fleet.prepare()
        scene = _Scene(fleet)
        fleet.run("route", "apply", str(fleet.routes_file), env=SETTINGS)
        workers = [fleet.launch(f"w-{number + 1}", env=SETTINGS) for number in range(WORKERS)]
        for worker in workers:
            worker.wait_ready()
        coordinator = Coordinator("coordinator", cast(ControlPlane, scene), {}).launch()
        leaving.callback(coordinator.kill)
        coordinator.up()
        return _roll(scene, coordinator, kafka, count, tell)


def _roll(
    scene: _Scene, coordinator: Coordinator, kafka: KafkaServer, count: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    policy = scene.folder / "policy.toml"
    policy.write_text(POLICY)
    started = scene.json("rollout", "start", "sums", "--to", "3", "--policy", str(policy))
    path = f"/v1/rollouts/{started['id']}"

    def view() -> dict[str, Any]:
        return cast(dict[str, Any], coordinator.ask("GET", path).body)

    wait_until(lambda: view()["percent"] == PERCENT or view()["ended"], PATIENCE_S, "the step", every_s=0.2)
    if view()["ended"]:
        raise RuntimeError(f"the rollout ended before its step: {view()['outcome']}")
    wait_until(
        lambda: len(scene.json("route", "show", "sums")["in_force"]["route"]["variants"]) > 1,
        PATIENCE_S,
        "the new version's revision is in force",
        every_s=0.5,
    )
    tell(f"version 3 has {PERCENT} % of the keys; {count:,} requests are written at once")
    client = kafka.client_config()
    sender = Sender(client)
    with Reader(client, scene.fleet.results("sums")) as answers:
        ids = []
        for number in range(count):
            ids.append(f"r-{number}")
            sender.send(
                scene.fleet.source("sums"),
                raw_body(row_of(number)),
                key=b"user-%d" % number,
                headers=RAW_HEADERS,
                id=ids[-1],
            )
        sender.flush()
        answers.wait_ids(ids, PATIENCE_S)
        return _figures(answers.outcomes, view(), count)


def _figures(outcomes: list[Outcome], view: Mapping[str, Any], count: int) -> dict[str, Any]:
    bad = sorted(each.timestamp_ms for each in outcomes if each.served.get("version") == "3")
    stamps = sorted(each.timestamp_ms for each in outcomes)
    return {
        "requests": count,
        "answered": len({each.id for each in outcomes}),
        "answered_by_the_broken_version": len(bad),
        "its_share_would_have_been": count * PERCENT // 100,
        "seconds_from_its_first_to_its_last_answer": (bad[-1] - bad[0]) / 1000 if bad else 0.0,
        "seconds_for_all": (stamps[-1] - stamps[0]) / 1000,
        "phase": view["phase"],
        "outcome": view["outcome"],
    }
