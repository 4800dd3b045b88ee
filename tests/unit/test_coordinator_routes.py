"""Changes of the routes over a store in memory: the diff, the barrier, withdrawals, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.errors import ConfigError, ConflictError, ModelRepositoryError
from inferfleet.plane import Change, Draft
from tests.support.control_plane import Plane
from tests.unit.routed import V1, V2, V3, apply, tree, version_at


@pytest.fixture
def plane() -> Plane:
    """Two workers and route digits at version 1, in force."""
    made = Plane(["w-1", "w-2"])
    assert apply(made, V1) == []
    made.clock.advance(5)
    return made


def test_a_change_takes_effect_when_all_are_ready_and_not_before(plane: Plane) -> None:
    """Announced, loaded, then given its time, ahead of now by the lead: one instant for all."""
    plane.workers[1].loads = False
    seen: list[str] = []

    def slowly() -> None:
        log = plane.store.load()
        waiting = log.announced("digits")
        assert waiting is not None
        assert version_at(plane, plane.clock.utc_ms() + 10**9) == "1"
        seen.append(waiting.action)
        if len(seen) == 20:
            plane.workers[1].loads = True
            plane.between = lambda: None

    plane.between = slowly
    assert apply(plane, V2) == []
    newest = plane.store.load().newest("digits")

    assert len(seen) == 20
    assert newest is not None
    assert newest.effective_from_ms == newest.at_ms + 2_000
    assert version_at(plane, newest.effective_from_ms - 1) == "1"
    assert version_at(plane, newest.effective_from_ms) == "2"
    assert (newest.author, newest.reason, newest.action) == ("eva@host", "why", "activate")
    assert [each.action for each in plane.control.history("digits")] == [
        "activate",
        "apply",
        "activate",
        "apply",
    ]


def test_progress_names_who_is_waited_for(plane: Plane) -> None:
    """Which worker lacks which version."""
    plane.workers[0].loads = False
    said: list[str] = []
    plan = plane.control.plan(tree(V2), "x")
    done = plane.control.apply(
        plan.changes,
        author="eva",
        timeout_s=3,
        progress=lambda found: said.extend(map(str, found)),
        acknowledge_s=0,
    )

    assert "w-1 has not loaded digits:2" in said
    assert done[0].revision is None
    assert done[0].problem.startswith("not ready within 3 s: w-1 has not loaded digits:2")


def test_a_version_that_a_worker_refuses_is_withdrawn_at_once(plane: Plane) -> None:
    """Its reason is said, nobody waits for the bound, and what stood stands since when it stood."""
    before = plane.store.load().newest("digits")
    plane.workers[1].refuses = {"digits:2": "self-check failed"}
    started = plane.clock.monotonic()
    problems = apply(plane, V2)
    log = plane.store.load()
    after = log.newest("digits")

    assert problems == ["w-2 refuses digits:2: self-check failed; what stood serves on"]
    assert plane.clock.monotonic() - started < 35
    assert before is not None
    assert after is not None
    assert (after.route, after.effective_from_ms) == (before.route, before.effective_from_ms)
    assert log.announced("digits") is None
    assert after.action == "withdraw"


def test_a_new_route_that_is_refused_is_gone(plane: Plane) -> None:
    """There is nothing that could serve on."""
    plane.workers[0].refuses = {"digits:2": "no"}
    other = {**V2, "name": "other", "source": "kafka:other"}

    assert len(apply(plane, other)) == 1
    assert [each.name for each in plane.store.load().table().routes] == ["digits"]


def test_one_routes_refusal_is_not_anothers(plane: Plane) -> None:
    """Of two changes in one file the sound one takes effect."""
    plane.workers[0].refuses = {"digits:3": "no"}
    other = {**V1, "name": "other", "source": "kafka:other"}
    other["variants"] = [{"name": "stable", "version": "3", "weight": 1}]

    assert len(apply(plane, V2, other)) == 1
    assert version_at(plane, 10**13) == "2"


def test_a_pool_without_workers_changes_at_once(plane: Plane) -> None:
    """There is nobody to wait for, and the plan says so."""
    route = {**V1, "name": "other", "source": "kafka:other", "pool": "gpu"}
    plan = plane.control.plan(tree(V1, route), "x")
    now = plane.clock.utc_ms()
    (done,) = plane.control.apply(plan.changes, author="eva")

    assert plan.idle == {"gpu"}
    assert done.revision is not None
    assert (done.revision.effective_from_ms, done.workers) == (now, 0)


@pytest.mark.parametrize("key", [{"source": "kafka:other"}, {"pool": "other"}])
def test_a_route_leaves_no_request_behind_at_its_old_source(plane: Plane, key: dict[str, str]) -> None:
    """Its workers would stop taking there, so it runs empty first; whoever deletes it was asked."""
    plane.workers[0].lag = {"digits": 3}
    plane.step()
    with pytest.raises(ConflictError, match=r"would leave kafka:in.*3 requests wait"):
        plane.control.plan(tree({**V1, **key}), "x", prune=False)
    assert plane.control.plan(tree(V2), "x", prune=False).changes[0].changes
    assert plane.control.plan(tree(), "x", prune=True).changes[0].after is None

    plane.workers[0].lag = {}
    plane.step()
    assert plane.control.plan(tree({**V1, **key}), "x", prune=False).changes[0].changes


def test_a_plan_is_bound_to_what_it_was_computed_on(plane: Plane) -> None:
    """Somebody else's change in between is a conflict, and nothing is written."""
    plan = plane.control.plan(tree(V2), "x")
    apply(plane, {**V1, "ttl_s": 7})
    head = plane.store.load().head
    with pytest.raises(ConflictError, match="route digits: its last revision is 4, not 2: somebody changed"):
        plane.control.apply(plan.changes, author="eva")

    assert plane.store.load().head == head


def test_of_several_who_finish_an_announcement_one_wins(plane: Plane) -> None:
    """The leader activates what an apply waits for: the apply sees that it is done."""
    finished: list[str] = []

    def lead() -> None:
        plane.step()
        finished.extend(plane.lead())

    plane.between = lead
    plane.workers[0].loads = False
    plan = plane.control.plan(tree(V2), "x")

    def load(_: object) -> None:
        plane.workers[0].loads = True

    (done,) = plane.control.apply(plan.changes, author="eva", progress=load)

    assert finished == ["activate digits"]
    assert done.problem == ""
    assert done.revision is not None
    assert done.revision.author == "coordinator"
    assert version_at(plane, 10**13) == "2"


def test_the_leader_finishes_what_was_only_announced(plane: Plane) -> None:
    """Ready: its time. Refused or over its bound: withdrawn. A rollout's own: left to it."""
    changes = plane.control.planned([V2])
    (announced,) = plane.control.announce(changes, author="eva", reason="by HTTP")
    assert announced.effective_from_ms is None
    assert plane.lead() == []
    plane.step()
    assert plane.lead() == ["activate digits"]
    newest = plane.store.load().newest("digits")
    assert newest is not None
    assert newest.reason == "by HTTP"
    assert plane.lead() == []

    plane.workers[0].loads = False
    plane.control.announce(plane.control.planned([V3]), author="eva", reason="")
    plane.pause(59)
    assert plane.lead() == []
    plane.pause(1)
    assert plane.lead() == ["withdraw digits: w-1 has not loaded digits:3"]
    assert plane.store.load().announced("digits") is None

    plane.workers[1].refuses = {"digits:4": "no"}
    v4 = {**V1, "variants": [{"name": "stable", "version": "4", "weight": 1}]}
    plane.control.announce(plane.control.planned([v4]), author="eva", reason="")
    plane.step()
    assert plane.lead() == ["withdraw digits: w-2 refuses digits:4: no"]


def test_an_announcement_of_a_rollout_is_the_rollouts_own(plane: Plane) -> None:
    """It steps when its evidence says so, not when the versions are there."""
    (change,) = plane.control.planned([V2])
    draft = Draft("digits", change.after, None, "step", "rollout-1")
    plane.store.commit(Change(actor="coordinator", audit=(), drafts=(draft,)))
    plane.step()

    assert plane.lead() == []


def test_a_route_in_a_rollout_is_left_to_it(plane: Plane) -> None:
    """Two hands would undo each other; when it has ended, or for another route, a change goes on."""

    def store(version: int, phase: str) -> None:
        body = json.dumps({"route": "digits", "phase": phase, "of": "a newer release"}).encode()
        plane.store.commit(Change(actor="c", audit=(), documents={"r-1": (version, body)}))

    store(0, "step")
    with pytest.raises(ConflictError, match=r"route digits is in rollout r-1 \(step\)"):
        plane.control.plan(tree(V2), "x")
    other = {**V1, "name": "other", "source": "kafka:other"}
    assert apply(plane, V1, other) == []
    store(1, "done")
    assert apply(plane, V2) == []


def test_an_apply_that_was_cut_off_goes_on(plane: Plane) -> None:
    """The same file again announces nothing twice."""
    plane.control.announce(plane.control.planned([V2]), author="eva", reason="")
    number = plane.store.load().head.number
    assert apply(plane, V2) == []

    assert plane.store.load().head.number == number + 1


def test_an_interrupt_takes_the_announcement_back(plane: Plane) -> None:
    """Control-C leaves nothing behind that would switch later."""
    plane.workers[0].loads = False

    def interrupted() -> None:
        raise KeyboardInterrupt

    plane.between = interrupted
    with pytest.raises(KeyboardInterrupt):
        apply(plane, V2)

    log = plane.store.load()
    assert log.announced("digits") is None
    assert version_at(plane, 10**13) == "1"


def test_a_silent_worker_expires_and_a_draining_one_is_not_waited_for(plane: Plane) -> None:
    """Live is who reports and goes on taking."""
    plane.workers[1].draining = True
    plane.workers[1].loads = False
    assert apply(plane, V2) == []

    silent = plane.workers.pop(0)
    plane.workers.clear()
    plane.clock.advance(10)
    assert silent.name not in {each.worker for each in plane.store.workers()}


def test_workers_that_the_store_forgot_while_it_was_away_are_waited_for(plane: Plane) -> None:
    """The first one that is heard again is not the whole pool."""
    everybody = plane.workers
    seen: list[str] = []

    def away_then_back() -> None:
        seen.append("look")
        plane.store.away = len(seen) < 40
        plane.workers = [] if plane.store.away else everybody[: 1 if len(seen) < 50 else 2]

    plane.workers[1].loads = False
    plane.between = away_then_back
    plan = plane.control.plan(tree(V2), "x")
    (done,) = plane.control.apply(plan.changes, author="eva", timeout_s=30, acknowledge_s=0)

    assert done.problem.startswith("not ready within 30 s: w-2 has not loaded digits:2")


def test_latest_is_resolved_once_and_written_as_a_number(plane: Plane) -> None:
    """In the short form, in variants and in shadows."""
    plane.catalogue.newest = "3"
    short = {key: value for key, value in V1.items() if key != "variants"}
    plan = plane.control.plan(tree({**short, "version": "latest"}), "x")
    assert plan.latest == {"digits": "3"}
    assert plan.changes[0].after is not None
    assert plan.changes[0].after.variants[0].version == "3"

    entry = {
        **V1,
        "variants": [{"name": "a", "version": "latest", "weight": 1}],
        "shadows": [{"name": "s", "version": "latest"}],
    }
    after = plane.control.plan(tree(entry), "x").changes[0].after
    assert after is not None
    assert after.versions == {"3"}


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ([{**V1, "name": "other"}], "share the source kafka:in in pool"),
        ([{**V1, "name": "s", "shadow_of": "digits", "results": []}], "share the source"),
        ([{**V1, "shadow_of": "none", "results": [], "pool": "s", "name": "s"}], "names no route"),
        (
            [{**V1, "shadow_of": "digits", "results": [], "pool": "s", "name": "s", "source": "kafka:o"}],
            "must be the same topic",
        ),
        (
            [{**V1, "shadow_of": "digits", "results": [], "pool": "s", "name": "s", "input": "columns"}],
            "has input",
        ),
        (
            [{**V1, "shadow_of": "digits", "results": [], "source": "kafka:o", "name": "s"}],
            'in the same pool "default"',
        ),
        ([{**V1, "order": "key"}], "does not exist yet"),
        ([{"name": "digits"}], "source"),
    ],
)
def test_what_workers_would_refuse_is_refused_before(
    plane: Plane, routes: list[dict[str, Any]], said: str
) -> None:
    """One line that names the route; nothing is announced."""
    head = plane.store.load().head
    with pytest.raises(ConfigError, match=said):
        plane.control.plan(tree(*routes), "x")
    assert plane.store.load().head == head


def test_a_rabbitmq_shadow_needs_a_queue_of_its_own(plane: Plane) -> None:
    """On one queue each would get a part of the requests."""
    primary = {**V1, "name": "p", "source": "rabbitmq:q", "results": ["reply"]}
    shadow = {**primary, "name": "s", "shadow_of": "p", "results": [], "pool": "shadow"}
    with pytest.raises(ConfigError, match="each would get a part of the requests"):
        plane.control.plan(tree(primary, shadow), "x")
    assert apply(plane, primary) == []
    with pytest.raises(ConfigError, match=r"each would get a part.*topics plan s"):
        plane.control.plan(tree(shadow), "x")

    plane.control.plan(tree(primary, {**shadow, "source": "rabbitmq:q.shadow"}), "x")


def test_versions_exist_and_take_the_same(plane: Plane) -> None:
    """A version that is not there, and variants with other inputs."""
    plane.catalogue.unknown = {"2"}
    with pytest.raises(ModelRepositoryError, match="has no version '2'"):
        plane.control.plan(tree(V2), "x")
    plane.catalogue.unknown, plane.catalogue.odd = set(), {"2"}
    both = [{"name": "a", "version": "1", "weight": 1}, {"name": "b", "version": "2", "weight": 1}]
    with pytest.raises(ConfigError, match="versions 1 and 2 of model digits differ in their inputs"):
        plane.control.plan(tree({**V1, "variants": both}), "x")


def test_a_clock_that_is_an_hour_off_changes_nothing(plane: Plane) -> None:
    """The switch would be an hour off too, for records of the workers' time."""
    plane.workers[0].at_ms = plane.clock.utc_ms() + 3_600_000
    plane.workers[0].report()
    with pytest.raises(ConfigError, match="the clock here is 3,600 s behind that of worker w-1"):
        plane.control.plan(tree(V2), "x")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("latest"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["route", "name", "model", "version", "variants", "shadows", "source"]), inner
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["route", "routes"]), plain))
def test_any_document_is_planned_or_refused_in_one_line(document: dict[str, Any]) -> None:
    """Whatever somebody sends, "latest" is looked for only where it means something."""
    plane = Plane()
    try:
        plane.control.plan(document, "x")
    except (ConfigError, ModelRepositoryError) as error:
        said = str(error)
    else:
        said = ""

    assert "\n" not in said
