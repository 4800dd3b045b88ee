"""Going back over a store in memory: the audit log, reverts, prunes, resets of a log that was lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from inferfleet.control.memory import MemoryControlStore
from inferfleet.coordinator.routes import RouteControl
from inferfleet.errors import ConfigError, ControlError, LogLostError
from inferfleet.plane import Change, Draft, seal
from tests.support.control_plane import FakeWorker, Plane
from tests.unit.routed import V1, V2, apply, tree, version_at


@pytest.fixture
def plane() -> Plane:
    """Two workers and route digits at version 1, in force."""
    made = Plane(["w-1", "w-2"])
    assert apply(made, V1) == []
    made.clock.advance(5)
    return made


def test_every_change_is_in_the_audit_log_with_before_after_and_bytes(plane: Plane) -> None:
    """Who, what, why, and the digests that will run; the chain holds."""
    apply(plane, V2)
    found = plane.store.audit()
    entries = [entry for entry, _ in found]

    assert [each.action for each in entries] == ["apply", "activate"] * 2
    last = entries[2]
    assert (last.actor, last.reason, last.subject) == ("eva@host", "why", "route digits")
    assert last.before["variants"][0]["version"] == "1"
    assert last.after["variants"][0]["version"] == "2"
    assert last.after["digests"] == {"digits:2": "digest-digits-2"}
    for (before, _), (after, _) in itertools.pairwise(found):
        assert after.previous == seal(before)[1]


def test_a_revert_is_a_new_revision_with_the_old_content(plane: Plane) -> None:
    """Without a number it is the last that was in force and differs; the buckets move least."""
    canary = [
        {"name": "stable", "version": "1", "weight": 95},
        {"name": "canary", "version": "2", "weight": 5},
    ]
    apply(plane, {**V1, "variants": canary})
    apply(plane, V2)
    back = plane.control.plan_revert("digits")
    (change,) = back.changes
    assert change.moved == 9_500
    plane.control.apply(back.changes, author="eva", action="revert")
    assert [each.version for each in plane.store.load().table().routes[0].variants] == ["1", "2"]

    first = plane.control.plan_revert("digits", 1)
    assert first.changes[0].moved == 500
    for to, said in ((99, "route digits has no revision 99; its last ones are"), (None, None)):
        if said is not None:
            with pytest.raises(ConfigError, match=said):
                plane.control.plan_revert("digits", to)
    with pytest.raises(ConfigError, match='did you mean "digits"'):
        plane.control.plan_revert("digts")


def test_a_revert_brings_each_key_back_where_that_moves_no_more(plane: Plane) -> None:
    """Half to a twentieth and back: the same half again, not another one of the same size."""

    def split(stable: int) -> dict[str, Any]:
        names = (("stable", "1", stable), ("canary", "2", 100 - stable))
        return {**V1, "variants": [{"name": n, "version": v, "weight": w} for n, v, w in names]}

    def ranges() -> list[Any]:
        return [each.ranges for each in plane.store.load().table().routes[0].variants]

    apply(plane, split(50))
    before = ranges()
    apply(plane, split(5))
    back = plane.control.plan_revert("digits")
    assert back.changes[0].moved == 4_500
    plane.control.apply(back.changes, author="eva", action="revert")
    assert ranges() == before


def test_a_revert_passes_over_what_an_abort_has_undone(plane: Plane) -> None:
    """What was hidden retroactively was never really in force."""
    apply(plane, V2)
    stands = plane.store.load().newest("digits")
    assert stands is not None
    bad = {**V1, "variants": [{"name": "stable", "version": "3", "weight": 1}]}
    apply(plane, bad)
    newest = plane.store.load().newest("digits")
    assert newest is not None
    plane.store.commit(
        Change(
            actor="rollout",
            audit=(),
            drafts=(Draft("digits", stands.route, newest.effective_from_ms, "abort"),),
        )
    )

    (change,) = plane.control.plan_revert("digits").changes
    assert change.after is not None
    assert change.after.variants[0].version == "1"


def test_a_route_is_deleted_only_by_prune(plane: Plane) -> None:
    """Named as left alone otherwise; a shadow keeps what it sees from being deleted."""
    shadow = {
        "name": "next",
        "source": "kafka:in",
        "shadow_of": "digits",
        "pool": "shadow",
        "model": "digits",
        "version": "2",
    }
    apply(plane, V1, shadow)
    left = plane.control.plan(tree(shadow), "x")
    assert [(each.name, each.kind) for each in left.changes] == [("next", "unchanged"), ("digits", "left")]
    with pytest.raises(ConfigError, match='shadow_of = "digits" names no route'):
        plane.control.plan(tree(shadow), "x", prune=True)

    assert apply(plane, V1, prune=True) == []
    assert [each.name for each in plane.store.load().table().routes] == ["digits"]


def test_a_store_that_lost_revisions_is_not_written_to(plane: Plane) -> None:
    """Workers hold more than it: only a reset goes on, above all that they hold, in a new epoch."""
    backup = plane.store.copy()
    apply(plane, V2)
    plane.store.restore(backup)
    for each in plane.workers:
        each.report()
    with pytest.raises(LogLostError, match=r"w-1 holds revision 4 of epoch 0.*route apply --reset FILE"):
        plane.control.plan(tree(V2), "x")

    plan = plane.control.plan_reset(tree(V2), "x")
    (done,) = plane.control.reset(plan.changes, author="eva", reason="restored")
    assert done.revision is not None
    assert (done.revision.epoch, done.revision.number) == (1, 5)
    plane.step()
    plane.control.plan(tree(V2), "x")


def test_a_store_that_went_on_differently_is_not_written_to() -> None:
    """Another revision of the same number: the workers' log is not a beginning of the store's."""
    plane = Plane(["w-1"])
    apply(plane, V1)
    other = MemoryControlStore(plane.clock)
    control = RouteControl(other, plane.clock, plane.catalogue, "f", pause=plane.pause)
    control.apply(control.plan(tree({**V1, "ttl_s": 3}), "x").changes, author="x")
    stray = FakeWorker(other, "w-2")
    stray.head = plane.store.load().head._replace(number=1)
    stray.report()

    with pytest.raises(LogLostError, match="w-2 holds another revision 1 than the store"):
        control.plan(tree(V1), "x")


def test_a_log_that_cannot_be_read_is_given_up_by_a_reset(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one starts above it all the same."""
    store = plane.store
    head = store.head()
    monkeypatch.setattr(store, "head", lambda: head)
    monkeypatch.setattr(store, "load", _damaged)
    plan = plane.control.plan_reset(tree(V2), "x")
    plane.control.reset(plan.changes, author="eva")
    monkeypatch.undo()

    assert (store.load().head.epoch, store.load().head.number) == (1, 3)
    assert version_at(plane, 10**13) == "2"


def _damaged() -> None:
    raise ControlError("the routes end at revision 1 and the log at 2")
