"""A broken version under a backlog: how many requests meet it, and for how long, before it is taken back.

The new version raises at nearly every request and has 5 % of the keys. Fifty thousand requests are written
after it came into force, so all of them lie under its revision, and two workers take about a minute for them.
The policy is the default one without its shadow stage, which would not have let this version through.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferfleet.coordinator.messages import RolloutView
from inferfleet.core.revisions import in_force
from tests.support.fleet_traffic import RAW_HEADERS, Outcome, Reader, Sender, raw_body, row_of
from tests.support.rollout_scene import USUAL, Scene, rollout_scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

PARTITIONS = 4
WORKERS = 2
BATCH = 64
PERCENT = 5
PATIENCE_S = 300.0
SETTINGS = {**USUAL, "INFERFLEET__BATCHING__MAX_BATCH_SIZE": str(BATCH)}
POLICY = f"""\
kind = "canary"
[shadow]
enabled = false
[[step]]
percent = {PERCENT}
dwell_s = 900
minimum = 2000
"""


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
        scene = leaving.enter_context(
            rollout_scene(
                folder / "fleet",
                kafka,
                redis,
                partitions=PARTITIONS,
                stored=False,
                delay_ms=BATCH * WORKERS * 1000 / per_s,
                settings=SETTINGS,
            )
        )
        scene.workers(*(f"w-{number + 1}" for number in range(WORKERS)))
        scene.coordinator("coordinator")
        return _roll(scene, kafka, count, tell)


def _roll(scene: Scene, kafka: KafkaServer, count: int, tell: Callable[[str], None]) -> dict[str, Any]:
    rollout = scene.json("rollout", "start", "sums", "--to", "3", "--policy", scene.policy(POLICY))["id"]

    def met() -> bool:
        """Whether the new version's revision is in force, and not only announced."""
        view = scene.rollouts.get(rollout)
        if view.ended:
            raise RuntimeError(f"the rollout ended before its step: {view.outcome}")
        found = in_force(scene.store.load().kept["sums"], int(time.time() * 1000))
        return found is not None and found.route is not None and len(found.route.variants) > 1

    wait_until(met, PATIENCE_S, "the new version's revision is in force", every_s=0.1)
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
        return _figures(answers.outcomes, scene.rollouts.get(rollout), count)


def _figures(outcomes: list[Outcome], view: RolloutView, count: int) -> dict[str, Any]:
    bad = sorted(each.timestamp_ms for each in outcomes if each.served.get("version") == "3")
    stamps = sorted(each.timestamp_ms for each in outcomes)
    return {
        "requests": count,
        "answered": len({each.id for each in outcomes}),
        "answered_by_the_broken_version": len(bad),
        "its_share_would_have_been": count * PERCENT // 100,
        "seconds_from_its_first_to_its_last_answer": (bad[-1] - bad[0]) / 1000 if bad else 0.0,
        "seconds_for_all": (stamps[-1] - stamps[0]) / 1000,
        "phase": view.phase,
        "outcome": view.outcome,
    }
