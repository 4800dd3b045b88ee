"""An A/B test by labels and a blue/green rollout, on real servers with two workers and a coordinator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet_traffic import OpenLoop, Outcome, Reader, Sender, judge
from tests.support.rollout_scene import PATIENCE_S, Scene, rollout_scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PARTITIONS = 2
RATE = 100.0
AB = """
kind = "ab"
bake_s = 2
[ab]
feedback = "kafka:{topic}"
keys = 300
[[metric]]
name = "bought"
baseline = 0.5
minimum_effect = 0.2
"""
SWITCH = """
kind = "blue-green"
bake_s = {bake}
[shadow]
enabled = false
"""


@pytest.fixture
def scene(kafka: KafkaServer, redis_server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    """Route sums is answered by version 1; version 2 is as good."""
    with rollout_scene(tmp_path / "fleet", kafka, redis_server, partitions=PARTITIONS) as made:
        yield made


class Buyers:
    """Says of each answer whether somebody bought: of ten who see version 2 nine do, of version 1 five."""

    def __init__(self, kafka: KafkaServer, topic: str) -> None:
        self._sender = Sender(kafka.client_config())
        self._topic = topic
        self._told = 0

    def tell(self, answers: Reader) -> None:
        """Write a label for each answer that came since."""
        answers.pull()
        for each in answers.outcomes[self._told :]:
            of_ten = 9 if each.served["version"] == "2" else 5
            label = {"id": each.id, "bought": int(self._told % 10 < of_ten)}
            self._sender.send(self._topic, json.dumps(label).encode(), key=each.key)
            self._told += 1
        self._sender.flush()


def test_an_ab_test_is_decided_by_labels_from_a_topic_and_its_winner_answers_all(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty
) -> None:
    """Nothing but the labels tells the versions apart; keys stay, and nothing fails."""
    client = kafka.client_config()
    topic = f"{scene.fleet.name}.bought"
    kafka.create_topics({topic: PARTITIONS})
    workers = scene.workers("w-1", "w-2")
    scene.coordinator("c-1")
    with (
        Reader(client, scene.fleet.results("sums")) as answers,
        OpenLoop(client, scene.fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        buyers = Buyers(kafka, topic)
        policy = scene.policy(AB.format(topic=topic))
        rollout = scene.json("rollout", "start", "sums", "--to", "2", "--policy", policy)["id"]

        def ended() -> bool:
            buyers.tell(answers)
            return scene.rollouts.get(rollout).ended

        wait_until(ended, PATIENCE_S, "the test is decided", every_s=0.2)
        load.stop()
        answers.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))

    view = scene.rollouts.get(rollout)
    assert view.phase == "done", view
    assert scene.versions() == {"2"}
    assert verdict.right, str(verdict)
    looked = [each.reason for each in view.history]
    record_property("ab_won", f"{view.outcome}; {looked}; {verdict}")
    assert [each.finish() for each in workers] == [0, 0]


def test_a_blue_green_rollout_switches_bakes_and_goes_back_when_somebody_says_so(
    scene: Scene, kafka: KafkaServer, record_property: pytest.RecordProperty
) -> None:
    """Taken back in its bake without a barrier, for the old version is warm; then once more, to its end."""
    client = kafka.client_config()
    workers = scene.workers("w-1", "w-2")
    scene.coordinator("c-1")
    with (
        Reader(client, scene.fleet.results("sums")) as answers,
        OpenLoop(client, scene.fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        policy = scene.policy(SWITCH.format(bake=600))
        first = scene.json("rollout", "start", "sums", "--to", "2", "--policy", policy)["id"]
        wait_until(
            lambda: any(each.served["version"] == "2" for each in _so_far(answers)), PATIENCE_S, "it answers"
        )
        scene.run("rollout", "abort", first, "--reason", "not today")
        assert scene.reached(first, "aborted").outcome.endswith("not today")
        assert scene.versions() == {"1"}

        policy = scene.policy(SWITCH.format(bake=2))
        second = scene.json("rollout", "start", "sums", "--to", "2", "--policy", policy)["id"]
        assert scene.reached(second, "done", "aborted", "inconclusive").phase == "done"
        load.stop()
        answers.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))
        assert verdict.right, str(verdict)

    assert scene.versions() == {"2"}
    record_property("blue_green_rollout", f"aborted in its bake, then done; {verdict}")
    assert [each.finish() for each in workers] == [0, 0]


def _so_far(answers: Reader) -> list[Outcome]:
    answers.pull()
    return list(answers.outcomes)
