"""A/B tests judged by labels, in virtual time: the winner answers all, and a draw changes nothing."""

from __future__ import annotations

from typing import Any

from tests.support.rollout_fleet import RolloutFleet, Version

AB: dict[str, Any] = {
    "ab": {"feedback": "kafka:digits.labels", "keys": 1_000, "looks": 4, "horizon_s": 600},
    "metric": [{"name": "accuracy", "baseline": 0.5, "minimum_effect": 0.1}],
    "bake_s": 10,
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
