"""What the leader's metrics say of rollouts, in virtual time: phases, holds, pauses, ends; nothing stale."""

from __future__ import annotations

from inferfleet.telemetry.metrics import PREFIX
from tests.support.rollout_fleet import FAST, ROUTE, RolloutFleet, Version

NO_SHADOW = {**FAST, "shadow": {"enabled": False}}


def value(fleet: RolloutFleet, name: str, **labels: str) -> float | None:
    return fleet.metrics.registry.get_sample_value(PREFIX + name, {"route": ROUTE, **labels})


def phases(fleet: RolloutFleet) -> dict[str, float]:
    """Return every phase that is exposed for the route."""
    return {
        sample.labels["phase"]: sample.value
        for family in fleet.metrics.registry.collect()
        for sample in family.samples
        if sample.name == PREFIX + "rollout_phase"
    }


def test_a_rollout_is_shown_while_it_goes_on_and_counted_when_it_is_done() -> None:
    """One phase at a time, with its share; the counts stand at 0 before anything has ended."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.tick()

    assert fleet.run(60, lambda: fleet.rollout(rollout).step == 0)
    assert phases(fleet) == {"step": 1}
    assert value(fleet, "rollout_percent") == fleet.rollout(rollout).percent == 5
    assert value(fleet, "rollout_paused") == 0
    assert value(fleet, "rollouts_ended_total", outcome="aborted") == 0
    assert fleet.metrics.registry.get_sample_value(PREFIX + "coordinator_workers", {"pool": "default"}) == 2

    assert fleet.run(300, fleet.ended(rollout))
    fleet.run(2)
    assert phases(fleet) == {}
    assert value(fleet, "rollout_percent") is None
    assert value(fleet, "rollouts_ended_total", outcome="done") == 1
    ended = value(fleet, "rollout_ended_timestamp_seconds", outcome="done")
    assert ended == fleet.rollout(rollout).since_ms / 1000


def test_a_version_that_is_taken_back_counts_as_aborted_once() -> None:
    """However often the leader looks at what has ended, and not again for who leads next."""
    fleet = RolloutFleet({"2": Version(failed=0.5)})
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(300, fleet.ended(rollout))
    fleet.run(5)

    assert value(fleet, "rollouts_ended_total", outcome="aborted") == 1
    fleet.holder, fleet.leader = 1, None
    fleet.run(5)
    assert value(fleet, "rollouts_ended_total", outcome="aborted") == 1
    assert value(fleet, "rollout_ended_timestamp_seconds", outcome="aborted") is not None


def test_an_abort_through_another_replica_is_found() -> None:
    """The leader is not asked; it reads what stands in the store."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.run(10)
    fleet.control.act(rollout, "abort", author="bob", reason="no")
    fleet.run(2)

    assert value(fleet, "rollouts_ended_total", outcome="aborted") == 1
    assert phases(fleet) == {}


def test_what_holds_a_rollout_is_shown_with_its_age_and_a_pause_too() -> None:
    """The oldest hold counts; when it ends, so does its series."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy={**NO_SHADOW, "holds": {"stale_s": 5}})
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    for _ in range(30):
        fleet.clock.advance(1.0)
        fleet.tick()

    assert value(fleet, "rollout_hold", kind="stale") == 1
    held_s = value(fleet, "rollout_held_seconds")
    assert held_s is not None
    assert held_s > 10
    fleet.control.act(rollout, "pause", author="bob", reason="wait")
    fleet.run(20)
    assert value(fleet, "rollout_paused") == 1
    assert value(fleet, "rollout_hold", kind="stale") is None


def test_who_does_not_lead_shows_nothing() -> None:
    """Else two replicas would tell of the same rollout, one of them what it saw last."""
    fleet = RolloutFleet()
    fleet.start(policy=NO_SHADOW)
    fleet.run(10)
    assert phases(fleet)

    fleet.metrics.leading(False)

    assert phases(fleet) == {}
    assert value(fleet, "rollout_held_seconds") is None
