"""Rollouts judged by labels, in virtual time.

The winner of an A/B test answers all and a draw changes nothing; a canary that answers wrongly is taken back
although nothing fails, and a better one is promoted.
"""

from __future__ import annotations

from typing import Any

import pytest

from inferfleet.cli.rollout_views import rollout_lines
from inferfleet.coordinator.evidence import Gathering, arm_of_label
from inferfleet.feedback import Answered, Label, Measured
from tests.support.rollout_fleet import FAST, RolloutFleet, Version

AB: dict[str, Any] = {
    "ab": {"feedback": "kafka:digits.labels", "keys": 1_000, "looks": 4, "horizon_s": 600},
    "metric": [{"name": "accuracy", "baseline": 0.5, "minimum_effect": 0.1}],
    "bake_s": 10,
}
CANARY: dict[str, Any] = {
    **FAST,
    "feedback": "kafka:digits.labels",
    "shadow": {"enabled": False},
    "metric": [{"name": "accuracy", "margin": 0.05}],
}


def test_the_better_version_wins_and_answers_all() -> None:
    """It is told by the labels alone, before the last look if it is clear."""
    fleet = RolloutFleet({"1": Version(accuracy=0.5), "2": Version(accuracy=0.8)})
    rollout = fleet.start(kind="ab", policy=AB)

    assert fleet.run(200, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "done", found.history
    assert found.outcome.startswith("promoted")
    assert {each.version for each in fleet.standing().variants} == {"2"}
    (sought,) = fleet.sought
    assert str(sought.source) == "kafka:digits.labels"
    assert str(sought.answers) == "kafka:digits.results"
    assert sought.since_revision == found.first_revision
    assert sought.versions == {"1", "2"}
    assert sought.output == "*"


def test_the_worse_version_goes() -> None:
    """The old one stays, and that is an answer too."""
    fleet = RolloutFleet({"1": Version(accuracy=0.8), "2": Version(accuracy=0.5)})
    rollout = fleet.start(kind="ab", policy=AB)

    assert fleet.run(200, fleet.ended(rollout))

    assert fleet.rollout(rollout).phase == "done"
    assert "version 1 stays" in fleet.rollout(rollout).outcome
    assert fleet.standing() == fleet.rollout(rollout).before


def test_without_a_difference_nothing_is_promoted() -> None:
    """After the last look it ends inconclusive."""
    fleet = RolloutFleet({"1": Version(accuracy=0.7), "2": Version(accuracy=0.7)})
    rollout = fleet.start(kind="ab", policy=AB)

    assert fleet.run(300, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "inconclusive", found.history
    assert len(found.looks) == 4


def test_a_leader_that_takes_over_counts_each_label_once() -> None:
    """It reads them again from the start: as many as there are, not those before and those again."""
    fleet = RolloutFleet({"1": Version(accuracy=0.7), "2": Version(accuracy=0.7)})
    rollout = fleet.start(kind="ab", policy=AB)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    fleet.run(5)

    fleet.leader, fleet.holder = None, 1
    fleet.run(4)

    shown = fleet.view(rollout).evidence["labels"]
    given = [each for each, _ in fleet.labels]
    for arm, variant in (("canary", "canary"), ("control", "control")):
        known = sum(each.variant == variant for each in given)
        assert 0.5 * known < shown[arm]["accuracy"]["count"] <= known
    assert len(fleet.sought) == 2
    assert fleet.run(300, fleet.ended(rollout))


# Canaries and switches


def test_a_canary_that_answers_wrongly_is_taken_back_although_nothing_fails() -> None:
    """Its labels say so, and the route is as it was from the rollout's first revision on."""
    fleet = RolloutFleet({"1": Version(accuracy=0.9), "2": Version(accuracy=0.4)}, rate=400)
    rollout = fleet.start(policy=CANARY)

    assert fleet.run(200, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "aborted", found.history
    assert found.outcome.startswith("metric accuracy: "), found.outcome
    assert "errors" not in found.outcome
    assert fleet.standing() == found.before
    assert fleet.plane.history("digits")[0].effective_from_ms == found.first_ms
    (sought,) = fleet.sought
    assert str(sought.source) == "kafka:digits.labels"


@pytest.mark.parametrize("accuracy", [0.97, 0.9])
def test_a_canary_that_is_as_good_or_better_is_promoted(accuracy: float) -> None:
    """Labels do not hold it up."""
    fleet = RolloutFleet({"1": Version(accuracy=0.9), "2": Version(accuracy=accuracy)})
    rollout = fleet.start(policy=CANARY)

    assert fleet.run(300, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "done", found.history
    assert {each.version for each in fleet.standing().variants} == {"2"}


def test_a_step_waits_for_its_labels() -> None:
    """Where a minimum is asked for, it is a hold that says what is missing."""
    policy = {**CANARY, "metric": [{"name": "accuracy", "minimum_labels": 1_000_000}]}
    fleet = RolloutFleet()
    rollout = fleet.start(policy=policy)

    def held() -> list[str]:
        return [each.reason for each in fleet.rollout(rollout).holds if each.kind == "too few"]

    assert fleet.run(100, lambda: bool(held()))

    assert "independent labels of accuracy" in held()[0]
    fleet.run(30)
    assert fleet.rollout(rollout).step == 0


def test_while_labels_cannot_be_read_nothing_goes_on_and_the_limit_counts() -> None:
    """It is a hold that says why; no decision is made without what was to be judged by."""
    fleet = RolloutFleet()
    fleet.broken_feeds = "topic digits.labels does not exist"
    rollout = fleet.start(policy={**CANARY, "step_limit_s": 60})

    assert fleet.run(30, lambda: any(each.kind == "labels" for each in fleet.rollout(rollout).holds))
    assert fleet.run(200, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "inconclusive", found.history
    assert "topic digits.labels does not exist" in found.outcome


def test_a_switch_is_taken_back_by_the_labels_of_its_bake() -> None:
    """They are compared with those of the version before, seen while the new one was a shadow."""
    policy = {
        "kind": "blue-green",
        "feedback": "kafka:digits.labels",
        "shadow": FAST["shadow"],
        "bake_s": 60,
        "metric": [{"name": "accuracy", "margin": 0.05}],
    }
    fleet = RolloutFleet({"1": Version(accuracy=0.9), "2": Version(accuracy=0.4)})
    rollout = fleet.start(policy=policy)

    assert fleet.run(200, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "aborted", found.history
    assert found.outcome.startswith("metric accuracy: "), found.outcome


def test_a_switch_without_labels_from_before_goes_on_and_says_so() -> None:
    """Nothing was answered in the rollout before the switch, so there is nothing to compare with."""
    policy = {
        "kind": "blue-green",
        "feedback": "kafka:digits.labels",
        "shadow": {"enabled": False},
        "bake_s": 20,
        "metric": [{"name": "accuracy"}],
    }
    fleet = RolloutFleet({"1": Version(accuracy=0.9), "2": Version(accuracy=0.4)})
    rollout = fleet.start(policy=policy)
    assert fleet.run(60, lambda: fleet.rollout(rollout).promoted_revision > 0)
    fleet.run(8)

    said = [each["text"] for each in fleet.view(rollout).evidence["findings"]]
    assert any("nothing to compare with" in each for each in said), said
    assert fleet.run(60, fleet.ended(rollout))
    assert fleet.rollout(rollout).phase == "done"


def test_the_status_shows_each_metric_with_its_bound_and_margin() -> None:
    """By arm as it was counted, and compared as it is judged."""
    fleet = RolloutFleet(rate=400)
    rollout = fleet.start(policy=CANARY)
    assert fleet.run(60, lambda: fleet.rollout(rollout).step == 1)
    fleet.run(8)

    view = fleet.view(rollout)
    (metric,) = view.evidence["metrics"]
    shown = "\n".join(rollout_lines(view, fleet.clock.utc_ms()))

    assert set(view.evidence["labels"]) == {"canary", "control", "stable"}
    assert (metric["name"], metric["margin"], metric["against"]) == ("accuracy", 0.05, "control")
    assert metric["at_least"] < metric["worse_by"] < 0.05
    assert not metric["passed"]
    assert "canary against control" in shown
    assert f"{metric['worse_by']:+.3g}" in shown


def test_labels_belong_to_the_arm_of_the_variant_that_answered() -> None:
    """What the new version answers alone is no canary's, for nothing is answered beside it."""
    fleet = RolloutFleet()
    canary = fleet.rollout(fleet.start(policy=CANARY))

    def arm(version: str, variant: str) -> str:
        return arm_of_label(canary, Measured(version, variant, "accuracy", b"k", 1.0))

    assert [arm("2", "canary"), arm("2", "stable"), arm("1", "control"), arm("1", "stable")] == [
        "canary",
        "baked",
        "control",
        "stable",
    ]


def test_a_test_without_its_labels_waits_and_says_why() -> None:
    """Once they can be read it goes on by itself."""
    fleet = RolloutFleet({"1": Version(accuracy=0.5), "2": Version(accuracy=0.9)})
    fleet.labels_stale = "topic digits.labels does not exist or may not be read"
    rollout = fleet.start(kind="ab", policy=AB)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)

    fleet.run(60)
    assert any("digits.labels does not exist" in each for each in fleet.view(rollout).waits_for)

    fleet.labels_stale = ""
    assert fleet.run(200, fleet.ended(rollout))
    assert fleet.rollout(rollout).outcome.startswith("promoted")


def test_a_topic_counts_for_what_the_policy_asks_and_no_more() -> None:
    """Other names are no metrics, however many there are; a share above 1 outweighs nobody."""
    fleet = RolloutFleet()
    policy = {**CANARY, "metric": [{"name": "bought", "margin": 0.05}, {"name": "paid", "kind": "mean"}]}
    rollout = fleet.start(policy=policy)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_ms is not None)
    state = fleet.rollout(rollout)
    now = (state.first_ms or 0) + 1_000
    said = [{"bought": 1.0}, {"bought": 0.0}, {"bought": 1e90}, {"bought": -1.0}, {"paid": 40.0}]
    said += [{f"name-{i}": 1.0} for i in range(1_000)]
    fleet.labels = [
        (Answered(f"r-{i}", "2", "canary", b"k", now), Label(f"r-{i}", now, each))
        for i, each in enumerate(said)
    ]

    evidence = Gathering(state, fleet.plane, None, fleet.feeds).gather(state, fleet.plane.workers(), now)

    counts = {name: (each.count, each.total) for name, each in evidence.labels["canary"].items()}
    assert counts == {"bought": (2, 1.0), "paid": (1, 40.0)}
