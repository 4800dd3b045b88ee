"""Rollouts from start to end in virtual time: a leader, a store in memory, and workers that report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from inferfleet.control_ports import ControlStore
from inferfleet.core.revisions import in_force
from inferfleet.errors import FencedError
from inferfleet.plane import AuditEntry, Change, Draft
from tests.support.rollout_fleet import FAST, ROUTE, RolloutFleet, Version

NO_SHADOW = {**FAST, "shadow": {"enabled": False}}
BROKEN = {"2": Version(failed=0.5)}


def test_a_version_that_is_as_good_is_promoted() -> None:
    """Shadow, two steps, bake, done; each share is in force only behind the barrier."""
    fleet = RolloutFleet()
    rollout = fleet.start()

    assert fleet.run(300, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "done", found.history
    assert {each.version for each in fleet.standing().variants} == {"2"}
    assert fleet.standing().warm == ()
    phases = [each.phase for each in found.history if each.action != "hold"]
    assert phases == ["shadow", "step", "step", "bake", "done"]
    assert fleet.actions() == [
        "apply",
        *["rollout shadow", "activate"],
        *["rollout step", "activate"] * 2,
        *["rollout bake", "activate"],
        "rollout done",
    ]


def test_a_version_that_fails_is_aborted_for_what_waits_too() -> None:
    """The route is as it was from the first revision on: no record that waits meets the version."""
    fleet = RolloutFleet(BROKEN)
    rollout = fleet.start(policy=NO_SHADOW)

    assert fleet.run(300, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    log = fleet.plane.load()
    assert found.phase == "aborted"
    assert "errors" in found.outcome
    assert found.first_ms is not None
    for at_ms in (found.first_ms, found.first_ms + 1, fleet.clock.utc_ms()):
        revision = in_force(log.kept[ROUTE], at_ms)
        assert revision is not None
        assert revision.route == found.before
    assert f"{rollout}:evidence" not in fleet.plane.documents()


def test_what_differs_in_the_shadow_answers_nobody() -> None:
    """A version whose answers differ from the primary's never gets a share."""
    fleet = RolloutFleet({"3": Version(different=0.4)})
    rollout = fleet.start("3")

    assert fleet.run(300, fleet.ended(rollout))

    assert fleet.rollout(rollout).phase == "aborted"
    assert "3" not in fleet.answered


def test_a_version_that_no_worker_can_load_ends_at_once() -> None:
    """The old version serves on, and the reason is the worker's own."""
    fleet = RolloutFleet({"4": Version(loads="bad operator in model.onnx")})
    rollout = fleet.start("4")

    assert fleet.run(30, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "aborted"
    assert "bad operator" in found.outcome
    assert fleet.standing() == found.before


def test_workers_that_are_silent_hold_it_and_nothing_is_promoted() -> None:
    """Time that nobody has watched is no time."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy={**NO_SHADOW, "holds": {"stale_s": 5}})
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    step = fleet.rollout(rollout).step

    for _ in range(120):
        fleet.clock.advance(1.0)
        fleet.tick()

    found = fleet.rollout(rollout)
    assert found.step == step
    assert [each.kind for each in found.holds] == ["stale"]
    assert any("stale" in each for each in fleet.view(rollout).waits_for)


def test_a_quiet_topic_ends_inconclusive_and_is_never_promoted() -> None:
    """Without enough messages within the limit the route is as it was."""
    fleet = RolloutFleet(rate=2)
    rollout = fleet.start(policy={**NO_SHADOW, "step_limit_s": 120})

    assert fleet.run(400, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "inconclusive"
    assert fleet.standing() == found.before


def test_a_gate_waits_for_two_people_who_did_not_start_it() -> None:
    """Approvals are bound to the bytes and the policy; the starter's own does not count."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy={**NO_SHADOW, "gate_before": [100], "approvals": 2})
    assert fleet.run(200, lambda: fleet.rollout(rollout).phase == "gate")
    fleet.run(30)
    assert fleet.rollout(rollout).phase == "gate"
    assert "gate: 0 of 2 approvals of 100 %" in fleet.view(rollout).waits_for

    with pytest.raises(Exception, match="two others do"):
        fleet.control.act(rollout, "approve", author="ann", reason="")
    fleet.control.act(rollout, "approve", author="bob", reason="looks right")
    with pytest.raises(Exception, match="already"):
        fleet.control.act(rollout, "approve", author="bob", reason="")
    fleet.run(5)
    assert fleet.rollout(rollout).phase == "gate"
    fleet.control.act(rollout, "approve", author="cem", reason="")
    assert fleet.run(100, fleet.ended(rollout))

    found = fleet.rollout(rollout)
    assert found.phase == "done"
    assert {each.digest for each in found.approvals} == {found.digest}
    audit = [entry for entry, _ in fleet.plane.audit() if entry.action == "rollout approve"]
    assert [each.actor for each in audit] == ["bob", "cem"]


def test_a_pause_holds_until_it_is_resumed_and_every_change_is_in_the_audit() -> None:
    """Who did what and why stands in the audit log, beside what the machine did."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW, reason="new training")
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    fleet.control.act(rollout, "pause", author="bob", reason="lunch")
    fleet.run(100)
    assert fleet.rollout(rollout).step == 0

    fleet.control.act(rollout, "resume", author="bob", reason="back")
    assert fleet.run(200, fleet.ended(rollout))

    entries = [entry for entry, _ in fleet.plane.audit() if entry.subject == f"rollout {rollout}"]
    said = [(each.actor, each.action, each.reason) for each in entries]
    assert said[0] == ("ann", "rollout step", "new training")
    assert ("bob", "rollout pause", "lunch") in said
    assert ("bob", "rollout resume", "back") in said
    assert said[-1][:2] == ("coordinator", "rollout done")


def test_an_abort_by_hand_just_after_the_activation_is_retroactive_too() -> None:
    """What the log says counts, even before the leader has noticed that the revision is in force."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(60, lambda: fleet.actions()[-1] == "activate")
    activated = fleet.plane.history(ROUTE)[0].effective_from_ms
    assert fleet.rollout(rollout).first_ms is None

    fleet.control.act(rollout, "abort", author="bob", reason="wrong model")

    assert fleet.plane.history(ROUTE)[0].effective_from_ms == activated
    fleet.run(10)
    assert "2" not in fleet.answered


def test_somebody_elses_change_of_the_route_stands() -> None:
    """A rollout gives way: it ends and leaves the route as that person wants it."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    wanted = msgspec.structs.replace(fleet.rollout(rollout).before, goal_p99_ms=50.0)
    fleet.plane.commit(
        Change(
            actor="dora",
            reason="a goal",
            audit=(AuditEntry(actor="dora", action="apply", subject="route digits"),),
            drafts=(Draft(ROUTE, wanted, fleet.clock.utc_ms(), "apply"),),
        )
    )

    assert fleet.run(5, fleet.ended(rollout))

    assert "dora changed the route" in fleet.rollout(rollout).outcome
    assert fleet.standing() == wanted


def test_announcements_that_no_rollout_made_get_their_time() -> None:
    """Whoever applied a route and went away finds it in force."""
    fleet = RolloutFleet()
    wanted = msgspec.structs.replace(fleet.standing(), goal_p99_ms=50.0)
    fleet.plane.commit(
        Change(
            actor="dora",
            audit=(AuditEntry(actor="dora", action="apply", subject="route digits"),),
            drafts=(Draft(ROUTE, wanted, None, "apply"),),
        )
    )

    assert fleet.run(10, lambda: fleet.standing() == wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fleet: fleet.start("1"), "answered by version 1 already"),
        (lambda fleet: fleet.start("12"), "no version 12"),
        (lambda fleet: (fleet.start(), fleet.start("3")), "goes on; abort it"),
        (lambda fleet: fleet.start(policy={"kind": "canary", "stps": 1}), "stps"),
        (lambda fleet: fleet.start(kind="ab", policy={"kind": "blue-green"}), "of kind"),
        (lambda fleet: fleet.start(kind="ab", policy=AB | {"ab": {"feedback": "rabbitmq:q"}}), "kafka:TOPIC"),
        (lambda fleet: fleet.control.act("digits-99", "pause", author="x", reason=""), "no rollout"),
        (lambda fleet: fleet.control.act(fleet.start(), "stop", author="x", reason=""), "cannot be asked"),
        (lambda fleet: fleet.control.act(fleet.start(), "resume", author="x", reason=""), "not paused"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: Callable[[RolloutFleet], Any], said: str) -> None:
    """And nothing is changed by it."""
    fleet = RolloutFleet()

    with pytest.raises((Exception, LookupError), match=said) as raised:
        change(fleet)

    assert "\n" not in str(raised.value)


AB: dict[str, Any] = {
    "ab": {"feedback": "kafka:digits.labels", "keys": 400, "horizon_s": 600, "looks": 2},
    "metric": [{"name": "accuracy", "baseline": 0.5, "minimum_effect": 0.2}],
    "bake_s": 10,
}


def test_labels_need_a_topic_that_says_who_answered() -> None:
    """A route with results in Redis alone is refused in a line that says the mend."""
    fleet = RolloutFleet(results="redis")

    with pytest.raises(Exception, match="answers to no Kafka topic"):
        fleet.start(kind="ab", policy=AB)


def test_one_broken_rollout_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """A document that cannot be read is left for the release that wrote it."""
    fleet = RolloutFleet()
    fleet.plane.commit(Change(actor="x", audit=(), documents={"another-1": (0, b"nonsense")}))
    rollout = fleet.start()

    assert fleet.run(300, fleet.ended(rollout))

    assert fleet.rollout(rollout).phase == "done"
    assert [each.id for each in fleet.control.list()] == [rollout]


# Two leaders


def test_a_leader_that_was_stopped_in_the_middle_changes_nothing_when_it_goes_on() -> None:
    """Its lease is another's by then: the store refuses the step, and there is one set of steps (I9)."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(60, lambda: fleet.rollout(rollout).phase == "step")
    first, lease = fleet.leader, fleet.lease()
    assert first is not None

    # It stands still before it commits; meanwhile another takes the lease and goes on to the end.
    frozen = _Frozen(fleet)
    first._store = frozen
    frozen.thaw_at = "bake"

    def go_on() -> None:
        while True:
            fleet.second()
            fleet.plane.lead("c-0", 6_000)
            first.tick(lease, fleet.clock.utc_ms())

    with pytest.raises(FencedError):
        go_on()

    assert fleet.run(200, fleet.ended(rollout))
    steps = [each.action for each in reversed(fleet.plane.history(ROUTE))]
    assert steps == _undisturbed(NO_SHADOW)
    assert fleet.rollout(rollout).phase == "done"


class _Frozen:
    """A store before whose next commit to a phase everything stands still, and another coordinator leads."""

    def __init__(self, fleet: RolloutFleet) -> None:
        self._fleet = fleet
        self.thaw_at = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet.plane, name)

    def commit(self, change: Change) -> Any:
        if any(each.action == f"rollout {self.thaw_at}" for each in change.drafts):
            self._fleet.holder, self._fleet.leader = 1, None
            for _ in range(20):
                self._fleet.second()
                self._fleet.tick()
        return self._fleet.plane.commit(change)


def _undisturbed(policy: dict[str, Any]) -> list[str]:
    fleet = RolloutFleet()
    rollout = fleet.start(policy=policy)
    assert fleet.run(300, fleet.ended(rollout))
    return fleet.actions()


# Crashes


class KilledError(BaseException):
    """The process ends here, whatever would have caught an error."""


class Deadly:
    """A store that ends the process at its ``at``-th call: before it has happened, or after."""

    def __init__(self, inner: ControlStore, at: int, *, after: bool) -> None:
        self._inner = inner
        self._at = at
        self._after = after
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)

        def call(*args: Any, **keys: Any) -> Any:
            self.calls.append(name)
            deadly = len(self.calls) == self._at
            if deadly and not self._after:
                raise KilledError(name)
            done = found(*args, **keys)
            if deadly:
                raise KilledError(name)
            return done

        return call


def _journey(policy: dict[str, Any], behaviour: dict[str, Version], at: int, *, after: bool) -> RolloutFleet:
    """Return a fleet whose leader was killed at one call, and whose next leader has ended the rollout."""
    fleet = RolloutFleet(behaviour, rate=40)
    rollout = fleet.start(policy=policy)
    deadly = Deadly(fleet.plane, at, after=after)
    fleet.store = deadly
    for _ in range(400):
        fleet.second()
        try:
            fleet.tick()
        except KilledError:
            whole(fleet, rollout)
            fleet.store, fleet.leader = fleet.plane, None
            fleet.holder += 1
        if fleet.rollout(rollout).ended:
            break
    whole(fleet, rollout)
    return fleet


def whole(fleet: RolloutFleet, name: str) -> None:
    """Check that state and log belong together, and that numbers rise (I8)."""
    rollout, log = fleet.rollout(name), fleet.plane.load()
    history = list(reversed(fleet.plane.history(ROUTE)))
    assert [each.number for each in history] == list(range(1, len(history) + 1))
    newest, announced = log.newest(ROUTE), log.announced(ROUTE)
    assert newest is not None
    if rollout.effect == "barrier":
        last = announced or newest
        assert last.rollout == name
        assert last.route == rollout.current
    else:
        assert announced is None
        assert newest.route == rollout.current


QUICK = {
    **NO_SHADOW,
    "bake_s": 4,
    "step": [{"percent": 50, "dwell_s": 3, "minimum": 10}],
}


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("kind", ["promoted", "aborted"])
def test_a_leader_killed_at_any_point_leaves_nothing_half_done(kind: str, after: bool) -> None:
    """Whoever leads next comes to the same end by the same steps (F23): every call of a rollout in turn."""
    behaviour = {} if kind == "promoted" else {"2": Version(invalid=0.3)}
    undisturbed = _journey(QUICK, behaviour, 10_000_000, after=after)
    store = undisturbed.store
    assert isinstance(store, Deadly)
    commits = [i for i, name in enumerate(store.calls, 1) if name == "commit"]
    # All commits, and what is read around them; the turns between look alike.
    points = sorted({i + near for i in commits for near in (-3, -2, -1, 0, 1, 2)} - {-2, -1, 0})
    assert len(commits) >= 4

    for at in points:
        fleet = _journey(QUICK, behaviour, at, after=after)
        (rollout,) = (each.id for each in fleet.control.list())
        assert fleet.actions() == undisturbed.actions(), at
        assert fleet.standing() == undisturbed.standing(), at
        assert fleet.rollout(rollout).phase == undisturbed.rollout(rollout).phase, at


def test_a_new_leader_looks_around_before_it_promotes() -> None:
    """It says so in the rollout; the sums are those of its predecessor, not counted twice."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    assert fleet.run(60, lambda: fleet.rollout(rollout).first_revision > 0)
    fleet.run(6)
    before = fleet.view(rollout).evidence["arms"]["canary"]["requests"]

    fleet.leader, fleet.holder = None, 1
    fleet.tick()

    assert [each.kind for each in fleet.rollout(rollout).holds] == ["restarted"]
    after = fleet.view(rollout).evidence["arms"]["canary"]["requests"]
    assert 0 < before <= after < before * 2.5
    assert fleet.run(300, fleet.ended(rollout))
    assert fleet.rollout(rollout).phase == "done"
