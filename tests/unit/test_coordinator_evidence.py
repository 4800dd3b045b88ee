"""Sums of a rollout: stored with their place in the stream, bounded, and read in turns that end."""

from __future__ import annotations

import pytest

from inferfleet.coordinator.evidence import Gathering, evidence_name
from inferfleet.coordinator.leading import Leader, Pace
from inferfleet.coordinator.messages import RolloutRequest
from inferfleet.errors import ConfigError
from inferfleet.evidence import KEPT_LABELS, Evidence
from inferfleet.plane import AuditEntry, Change, Draft
from inferfleet.summaries import Comparison, Window
from tests.support.rollout_fleet import FAST, ROUTE, RolloutFleet

NO_SHADOW = {**FAST, "shadow": {"enabled": False}}


def stepping(fleet: RolloutFleet) -> str:
    """Return a rollout whose first step is in force and has been counted for a while."""
    rollout = fleet.start(policy={**NO_SHADOW, "step": [{"percent": 5, "dwell_s": 600, "minimum": 50}]})
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    fleet.run(30)
    return rollout


def test_sums_outlive_the_stream_that_they_came_from() -> None:
    """A stream keeps an hour or so; what was counted before stands beside the rollout."""
    fleet = RolloutFleet()
    rollout = stepping(fleet)
    whole = Gathering(fleet.rollout(rollout), fleet.plane)
    expected = whole.gather(fleet.rollout(rollout), fleet.plane.workers(), fleet.clock.utc_ms())
    requests = expected.arm("canary").requests

    stored = fleet.plane.documents()[evidence_name(rollout)].body
    kept = Gathering(fleet.rollout(rollout), fleet.plane, stored)
    found = kept.gather(fleet.rollout(rollout), fleet.plane.workers(), fleet.clock.utc_ms())

    assert found.arm("canary").requests == requests > 50
    assert found.arm("canary").compute == expected.arm("canary").compute

    fleet.plane._windows.clear()
    left = Gathering(fleet.rollout(rollout), fleet.plane, stored)
    found = left.gather(fleet.rollout(rollout), fleet.plane.workers(), fleet.clock.utc_ms())
    assert requests * 0.7 < found.arm("canary").requests <= requests


@pytest.mark.parametrize("body", [b"", b"nonsense", b"\xc0"])
def test_sums_that_cannot_be_read_are_gathered_again(body: bytes) -> None:
    """A release with another form loses what the stream keeps no longer, and nothing else."""
    fleet = RolloutFleet()
    rollout = stepping(fleet)

    found = Gathering(fleet.rollout(rollout), fleet.plane, body)
    evidence = found.gather(fleet.rollout(rollout), fleet.plane.workers(), fleet.clock.utc_ms())

    assert evidence.arm("canary").requests > 50


def test_a_long_stream_is_read_in_turns_that_end() -> None:
    """Meanwhile it says that it is behind, so that nothing is decided on a part."""
    fleet = RolloutFleet()
    rollout = stepping(fleet)
    fleet.plane.add([Window(worker="w", route=ROUTE, model="digits", version="1", variant="x")] * 1_000)
    times = iter(range(1_000))

    gathering = Gathering(fleet.rollout(rollout), fleet.plane, clock=lambda: float(next(times)))
    turns = 0
    while gathering.behind:
        gathering.gather(fleet.rollout(rollout), [], fleet.clock.utc_ms())
        turns += 1

    assert turns > 3


def test_labels_without_end_are_counted_in_a_bounded_space() -> None:
    """A model whose every answer is a label of its own does not fill Redis; the sums stay right."""
    fleet = RolloutFleet()
    rollout = fleet.start()
    assert fleet.run(20, lambda: fleet.rollout(rollout).first_revision > 0)
    found = fleet.rollout(rollout)
    evidence = Evidence()
    for number in range(100):
        flips = {f"{number}-{i}>x": 1 for i in range(50)} | {"a>b": 7}
        window = Window(
            worker="w",
            route=ROUTE,
            model="digits",
            version="2",
            variant="candidate",
            role="shadow",
            revision=found.first_revision,
            comparison=Comparison(kind="labels", pairs=57, different=57, flips=flips),
        )
        assert evidence.add(window, found)

    assert evidence.comparison is not None
    assert len(evidence.comparison.flips) <= KEPT_LABELS
    assert sum(evidence.comparison.flips.values()) == evidence.comparison.pairs == 5_700
    assert evidence.comparison.flips["a>b"] == 700


def test_a_turn_ends_and_the_next_goes_on_with_the_rollouts_that_were_left() -> None:
    """However many there are, the lease is renewed between; each is looked at in its turn."""
    fleet = RolloutFleet()
    names = [f"other-{i}" for i in range(4)]
    for name in names:
        made = RolloutFleet.route(f"kafka:{name}.results")
        values = {key: getattr(made, key) for key in made.__struct_fields__} | {"name": name}
        fleet.plane.commit(
            Change(
                actor="test",
                audit=(AuditEntry(actor="test", action="apply", subject=name),),
                drafts=(Draft(name, type(made)(**values), fleet.clock.utc_ms(), "apply"),),
            )
        )
    for name in names:
        request = RolloutRequest(route=name, version="2", policy=dict(NO_SHADOW))
        fleet.control.start(request, author="ann")
    fleet.pace = Pace(turn_s=0.0, settle_s=0.0)

    looked: list[str] = []
    leader = fleet.leader = Leader(fleet.plane, fleet.clock, fleet.timing, fleet.feeds, fleet.pace)
    for _ in range(4):
        fleet.tick()
        looked.append(leader._last)

    assert sorted(looked) == sorted(each.id for each in fleet.control.list())


def test_a_rollout_of_a_newer_release_is_left_alone() -> None:
    """It is not listed, and this release does not step it."""
    fleet = RolloutFleet()
    body = b'{"format": 2}'
    fleet.plane.commit(Change(actor="x", audit=(), documents={"digits-9": (0, body)}))

    fleet.run(3)

    assert fleet.plane.documents()["digits-9"].body == body
    assert fleet.control.list() == []
    with pytest.raises(ConfigError):
        fleet.view("digits-9")
