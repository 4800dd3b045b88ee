"""What happens beside a rollout: other routes change, stores lose what they had, workers cannot be heard."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from inferfleet.coordinator.routes import RouteControl
from inferfleet.errors import ConflictError, ControlError
from inferfleet.plane import Change, Draft, Lease
from inferfleet.routes import Route
from tests.support.rollout_fleet import FAST, ROUTE, RolloutFleet, Shelf, Version

NO_SHADOW = {**FAST, "shadow": {"enabled": False}}


def plain(name: str, version: str = "1", **keys: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": f"kafka:{name}.requests",
        "results": [f"kafka:{name}.results"],
        "model": "digits",
        "version": version,
        **keys,
    }


def routes_of(fleet: RolloutFleet) -> RouteControl:
    return RouteControl(fleet.plane, fleet.clock, Shelf(), "fleet", pause=lambda _: fleet.second())


def test_other_routes_change_while_a_rollout_goes_on() -> None:
    """The sums that lie beside the rollout's document are no rollout; its own route is left to it."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.run(20)
    assert f"{rollout}:evidence" in fleet.plane.documents()
    fleet.plane.commit(Change(actor="x", audit=(), documents={"other-1": (0, b"\x83nonsense")}))
    routes = routes_of(fleet)

    added = routes.plan({"route": [plain("letters", pool="idle")]}, "x").changes
    made = routes.announce([each for each in added if each.changes], author="eva", reason="")

    assert [each.name for each in made] == ["letters"]
    with pytest.raises(ConflictError, match=f"is in rollout {rollout}"):
        routes.plan({"route": [plain(ROUTE, "3")]}, "x")


# Workers that cannot be heard


def test_a_barrier_is_not_passed_because_nobody_is_there_to_be_asked() -> None:
    """Redis has forgotten the workers, or none is up: the rollout goes nowhere and says why."""
    fleet = RolloutFleet()
    fleet.pace = fleet.pace._replace(settle_s=0)
    rollout = fleet.start(policy=NO_SHADOW)

    fleet.tick()
    fleet.tick()

    assert fleet.actions() == ["apply", "rollout step"]
    assert any("no worker of pool default" in each for each in fleet.view(rollout).waits_for)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)


@pytest.mark.parametrize("made_by", ["a rollout", "a person"])
def test_a_leader_that_has_just_begun_or_lost_the_store_waits_for_workers_to_be_heard(made_by: str) -> None:
    """The one that reports first is not the whole pool."""
    fleet = RolloutFleet(workers=3)
    fleet.run(5)
    fleet.clock.advance(20)  # all registrations are gone
    if made_by == "a rollout":
        fleet.start(policy=NO_SHADOW)
    else:
        wanted = msgspec.structs.replace(fleet.standing(), goal_p99_ms=50.0)
        fleet.plane.commit(Change(actor="dora", audit=(), drafts=(Draft(ROUTE, wanted, None, "apply"),)))
    fleet.plane.away = True
    assert fleet.leader is not None
    with pytest.raises(ControlError):
        fleet.leader.tick(Lease("c-0", 1), fleet.clock.utc_ms())
    fleet.plane.away = False

    names, fleet.names = fleet.names, ["w-0"]
    fleet.second()
    fleet.tick()
    assert fleet.actions()[-1] != "activate"
    fleet.names = names
    assert fleet.run(10, lambda: fleet.actions()[-1] == "activate")


def test_what_is_paused_gets_no_larger_share() -> None:
    """A pause between an announcement and its barrier stops that step too; resumed, it goes on."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.control.act(rollout, "pause", author="bob", reason="wait")

    fleet.run(20)
    assert fleet.actions() == ["apply", "rollout step"]

    fleet.control.act(rollout, "resume", author="bob", reason="go")
    assert fleet.run(10, lambda: fleet.actions()[-1] == "activate")


# A store that has lost revisions


def test_nothing_is_stepped_on_a_log_that_workers_are_ahead_of() -> None:
    """The store was restored from an older copy: what workers say is of revisions that it does not have."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.second()
    log, documents = fleet.plane.copy(), dict(fleet.plane.documents())
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    reports = fleet.plane.workers()
    fleet.plane.restore(log)
    fleet.plane._documents = documents

    for _ in range(30):
        fleet.clock.advance(1)
        for each in reports:
            fleet.plane.report(each, 6_000)
        fleet.tick()

    assert fleet.plane.head() == log.head
    assert any("the store has lost revisions" in each for each in fleet.view(rollout).waits_for)
    fleet.run(300, fleet.ended(rollout))
    assert fleet.rollout(rollout).phase == "done", "it goes on when workers and store agree again"


# Somebody else's hand on the route


def change(fleet: RolloutFleet, **keys: Any) -> Route:
    """Let dora change the route past everything that would keep her from it; return what she wants."""
    wanted = msgspec.structs.replace(fleet.standing(), goal_p99_ms=50.0)
    draft = Draft(ROUTE, wanted, fleet.clock.utc_ms(), "apply")
    fleet.plane.commit(Change(actor="dora", audit=(), drafts=(draft,), **keys))
    return wanted


def test_a_person_cannot_steer_a_rollout_over_somebody_elses_change() -> None:
    """No leader has seen it yet: an abort ends the rollout and leaves that change, the rest is refused."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    wanted = change(fleet)

    with pytest.raises(ConflictError, match="dora changed the route"):
        fleet.control.act(rollout, "promote", author="bob", reason="")
    fleet.control.act(rollout, "abort", author="bob", reason="enough")

    assert fleet.rollout(rollout).phase == "aborted"
    assert fleet.standing() == wanted
    assert fleet.plane.history(ROUTE)[0].author == "dora"


def test_a_reset_that_leaves_the_route_out_ends_its_rollout() -> None:
    """The rollout brings no route back that a person has given up."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy={**NO_SHADOW, "step_limit_s": 60})
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    other = msgspec.structs.replace(fleet.rollout(rollout).before, name="letters")
    draft = Draft("letters", other, fleet.clock.utc_ms(), "reset")
    fleet.plane.commit(Change(actor="dora", audit=(), drafts=(draft,), reset=True))

    for _ in range(100):
        fleet.clock.advance(1)
        fleet.tick()

    assert ROUTE not in fleet.plane.load().kept
    assert fleet.rollout(rollout).phase == "aborted"
    assert "is no more" in fleet.rollout(rollout).outcome


# Clocks


@pytest.mark.parametrize("off_ms", [3_600_000, -3_600_000])
@pytest.mark.parametrize("made_by", ["a rollout", "a person"])
def test_a_leader_whose_clock_is_an_hour_off_gives_nothing_its_time(off_ms: int, made_by: str) -> None:
    """The switch would come an hour late, or for what was answered long ago; what is bad still ends."""
    fleet = RolloutFleet()
    fleet.run(5)
    if made_by == "a rollout":
        fleet.start(policy=NO_SHADOW)
    else:
        wanted = msgspec.structs.replace(fleet.standing(), goal_p99_ms=50.0)
        fleet.plane.commit(Change(actor="dora", audit=(), drafts=(Draft(ROUTE, wanted, None, "apply"),)))
    assert fleet.leader is not None

    for _ in range(20):
        fleet.second()
        fleet.leader.tick(fleet.lease(), fleet.clock.utc_ms() + off_ms)
    assert fleet.actions()[-1] != "activate"

    assert fleet.run(10, lambda: fleet.actions()[-1] == "activate")


@pytest.mark.parametrize("off_ms", [3_600_000, -3_600_000])
def test_a_clock_that_is_an_hour_off_ends_no_bake_and_does_not_keep_a_bad_version(off_ms: int) -> None:
    """Only an abort needs no clock: it goes back to a time that is written down."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(200, lambda: fleet.rollout(rollout).promoted_revision > 0)
    assert fleet.leader is not None

    for _ in range(60):
        fleet.second()
        fleet.leader.tick(fleet.lease(), fleet.clock.utc_ms() + off_ms)
    assert fleet.rollout(rollout).phase == "bake"

    fleet.behaviour["2"] = Version(failed=0.5)
    for _ in range(60):
        fleet.second()
        fleet.leader.tick(fleet.lease(), fleet.clock.utc_ms() + off_ms)
    found = fleet.rollout(rollout)
    assert found.phase == "aborted"
    assert fleet.plane.history(ROUTE)[0].effective_from_ms == found.first_ms
