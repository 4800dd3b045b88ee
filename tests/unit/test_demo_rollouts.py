"""The demo's second act: its policies are valid, and what it counts and claims is true."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from inferfleet import config
from inferfleet.demo import digits, live
from inferfleet.demo.kafka import KafkaBroker
from inferfleet.demo.live import Count
from inferfleet.demo.report import Findings, Killing, tables
from inferfleet.demo.rollouts import POLICIES, Ending, Rollouts
from inferfleet.demo.stage import FLEET, GROUP, Stage
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Answer
from inferfleet.policies import parse_policy
from inferfleet.routes import load_routes

BROKER = KafkaBroker("127.0.0.1:9093", GROUP, embedded=True)
ENDINGS = [
    Ending("2", "done", "promoted: no alarm", 9.0),
    Ending("3 shadow", "aborted", "comparison: block", 4.0),
    Ending("3 canary", "aborted", "metric correct", 4.0),
]


def answer(number: int, version: str = "1", error: str | None = None) -> Answer:
    """An outcome of a live request."""
    return Answer("live", f"live-{number}", version, "worker-1", {}, error)


def counted(sent: int = 2) -> Count:
    """Two requests that versions 1 and 3 answered, 1 rightly and 3 not."""
    count = Count(sent=sent)
    count.note(answer(0), True, "stable", 1.0)
    count.note(answer(1, "3"), False, "canary", 2.0)
    return count


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_the_policies_are_valid_and_short(kind: str) -> None:
    """The same keys as anybody's, with spans of seconds."""
    policy = parse_policy(POLICIES[kind].format(feedback=live.FEEDBACK), "demo.toml")

    assert policy.kind == kind
    assert sum(step.dwell_s for step in policy.steps) < 10
    if kind == "canary":
        assert policy.feedback_topic == "kafka:live.feedback"
        assert [metric.name for metric in policy.metrics] == ["correct"]


def test_the_broken_version_loads_and_answers_wrongly() -> None:
    """Its weights are the better version's, its classes another's."""
    layers = [digits.Layer(np.eye(10, dtype=np.float32), np.zeros(10, dtype=np.float32))]

    answers = np.argmax(digits.broken(layers)[-1].weights, axis=1)

    assert sorted(answers) == list(range(10))
    assert 4 <= sum(answers != np.arange(10)) < 10


def test_only_the_first_outcome_of_a_live_request_counts() -> None:
    """What comes twice is one answer; an error is none, and is counted."""
    count = counted(sent=3)
    count.note(answer(1, "3"), False, "canary", 5.0)
    count.note(answer(2, error="E_MODEL: no"), False, "stable", 6.0)

    assert (count.versions["3"].answered, count.versions["3"].last_at) == (1, 2.0)
    assert (count.versions["1"].accuracy, count.versions["3"].accuracy) == (1.0, 0.0)
    assert (len(count.answered), count.errors) == (3, 1)
    assert count.variants == {("stable", "1"): 1, ("canary", "3"): 1}


def test_it_passes_only_if_every_rollout_ends_as_it_should_and_nothing_is_lost() -> None:
    """One that ends otherwise, one request without an outcome or one error is a failure."""
    good = Rollouts(ENDINGS, counted(), 1.0)
    promoted = [*ENDINGS[:2], replace(ENDINGS[2], phase="done")]
    failed = counted(sent=3)
    failed.note(answer(2, error="E_MODEL: no"), False, "stable", 6.0)

    assert good.passed
    assert not replace(good, endings=promoted).passed
    assert not replace(good, endings=ENDINGS[:2]).passed
    assert not replace(good, count=counted(sent=3)).passed
    assert not replace(good, count=failed).passed


def test_the_tables_say_how_each_rollout_ended_and_why() -> None:
    """And how much each version answered, and how well."""
    rollouts = Rollouts(ENDINGS, counted(), 1.0)
    found = Findings(Tally({}), {}, Killing("worker-1", "worker-3", 1, 1), 1, 1.0, 0, rollouts=rollouts)
    console = Console(width=120, record=True, file=io.StringIO())

    for table in tables(found, BROKER):
        console.print(table)
    shown = console.export_text()

    assert "comparison: block" in shown
    assert "2 sent, 0 lost, 0 errors" in shown
    assert "1 answered, 100.0% right" in shown


def test_the_settings_are_those_of_a_control_plane(tmp_path: Path) -> None:
    """Routes come from the fleet, the coordinator has its address, and no earlier demo is known."""
    stage = Stage(tmp_path, ("digits",), rollouts=True, api="127.0.0.1:8499")
    stage.write_settings(BROKER, 6380)

    settings = config.load(stage.fleet_toml, {})
    routes = load_routes(tmp_path / "routes.toml", FLEET).routes

    assert settings.routes.source == "fleet"
    assert settings.coordinator.address == "127.0.0.1:8499"
    assert (settings.base / settings.worker.state).is_relative_to(stage.data)
    assert [(route.name, route.versions) for route in routes][1:] == [("live", {"1"})]

    stage.promoted("2")
    routes = load_routes(tmp_path / "routes.toml", FLEET).routes
    assert [(route.name, route.versions) for route in routes][1:] == [("live", {"2"})]
