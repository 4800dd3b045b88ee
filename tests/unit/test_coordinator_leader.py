"""Who leads: the lease taken, renewed, lost and left to others, in virtual time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inferfleet.control.memory import MemoryControlStore
from inferfleet.coordinator.leader import LEASE_S, STEP_BACK_S, Leadership
from inferfleet.coordinator.process import health_of
from inferfleet.plane import AuditEntry, Change, Lease
from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.testing.clock import FakeClock

CHANGE = Change(actor="c", audit=(AuditEntry(actor="c", action="step", subject="rollout r"),))


class Steps:
    """Commits one entry in each tick, and may be told to do something else before."""

    def __init__(self, store: MemoryControlStore) -> None:
        self.store = store
        self.leases: list[Lease] = []
        self.before: Callable[[], None] = lambda: None

    def tick(self, lease: Lease, now_ms: int) -> None:
        """Take one step under the lease."""
        self.leases.append(lease)
        self.before()
        self.store.commit(
            Change(actor=CHANGE.actor, audit=CHANGE.audit, lease=lease),
        )


class Replica:
    """One replica's leadership, its steps and its metrics."""

    def __init__(self, store: MemoryControlStore, clock: FakeClock, name: str) -> None:
        self.steps = Steps(store)
        self.metrics = CoordinatorMetrics()
        self.leadership = Leadership(store, name, clock, self.metrics, self.steps)

    @property
    def leads(self) -> bool:
        return self.leadership.standing.lease is not None

    def ticks(self, outcome: str) -> float:
        found = self.metrics.registry.get_sample_value(
            "inferfleet_coordinator_ticks_total", {"outcome": outcome}
        )
        return found or 0.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryControlStore:
    return MemoryControlStore(clock)


def test_one_of_two_leads_and_keeps_leading(store: MemoryControlStore, clock: FakeClock) -> None:
    """Through many leases' time, and the other takes no step."""
    a, b = Replica(store, clock, "a"), Replica(store, clock, "b")
    for _ in range(100):
        a.leadership.turn()
        b.leadership.turn()
        clock.advance(0.5)

    assert (a.leads, b.leads) == (True, False)
    assert len(a.steps.leases) == 100
    assert set(a.steps.leases) == {Lease("a", 1)}
    assert b.steps.leases == []


def test_another_takes_over_from_one_that_stands_still(store: MemoryControlStore, clock: FakeClock) -> None:
    """Within a lease and a look; when the first goes on it knows by its own clock, and takes no step."""
    a, b = Replica(store, clock, "a"), Replica(store, clock, "b")
    a.leadership.turn()
    b.leadership.turn()
    for _ in range(20):
        clock.advance(0.5)
        b.leadership.turn()
    taken = len(a.steps.leases)
    a.leadership.turn()

    assert (a.leads, b.leads) == (False, True)
    assert len(a.steps.leases) == taken
    assert b.steps.leases[0].token == 2


def test_one_that_stood_still_in_the_middle_of_a_step_is_fenced_and_steps_back(
    store: MemoryControlStore, clock: FakeClock
) -> None:
    """Its step is refused as a whole; it gives up for a while although the other has gone too."""
    a, b = Replica(store, clock, "a"), Replica(store, clock, "b")

    def stand_still() -> None:
        clock.advance(LEASE_S + 1)
        b.leadership.turn()

    a.steps.before = stand_still
    a.leadership.turn()

    assert (a.leads, b.leads) == (False, True)
    assert (a.ticks("fenced"), b.ticks("done")) == (1, 1)
    assert len(store.audit()) == 1
    b.leadership.stop()
    b.leadership.run()
    a.steps.before = lambda: None
    a.leadership.turn()
    assert not a.leads
    clock.advance(STEP_BACK_S)
    a.leadership.turn()
    assert a.leads


def test_a_store_that_is_away_is_told_and_ends_the_leading_with_the_lease(
    store: MemoryControlStore, clock: FakeClock
) -> None:
    """Until then it may be sure; steps that meet it are counted and change nothing."""
    a = Replica(store, clock, "a")
    assert not health_of(a.leadership).ready
    a.leadership.turn()
    assert health_of(a.leadership).ready
    store.away = True
    for _ in range(30):
        clock.advance(0.5)
        a.leadership.turn()

    assert not a.leads
    assert health_of(a.leadership) == (True, False, ("the control plane's memory does not answer",))
    assert a.ticks("away") > 0
    assert a.metrics.registry.get_sample_value("inferfleet_coordinator_store_up") == 0
    store.away = False
    clock.advance(2)
    a.leadership.turn()
    assert a.leads
    assert health_of(a.leadership).ready


def test_a_step_that_fails_does_not_end_the_leading(store: MemoryControlStore, clock: FakeClock) -> None:
    """The next turn steps again."""
    a = Replica(store, clock, "a")

    def fail() -> None:
        raise LookupError("a bug")

    a.steps.before = fail
    a.leadership.turn()
    a.steps.before = lambda: None
    a.leadership.turn()

    assert a.leads
    assert (a.ticks("failed"), a.ticks("done")) == (1, 1)


def test_one_that_stops_gives_the_lease_back_at_once(store: MemoryControlStore, clock: FakeClock) -> None:
    """No second passes in which nobody may lead, and a store that is away then is no failure."""
    a, b = Replica(store, clock, "a"), Replica(store, clock, "b")
    a.leadership.turn()
    a.leadership.stop()
    a.leadership.run()
    b.leadership.turn()
    assert (a.leads, b.leads) == (False, True)
    assert health_of(a.leadership) == (True, False, ("this replica stops",))
    store.away = True
    b.leadership.stop()
    b.leadership.run()
    assert not b.leads


def test_a_replica_without_a_leader_holds_the_lease_all_the_same(
    store: MemoryControlStore, clock: FakeClock
) -> None:
    """There is nothing to step; the lease says who would."""
    alone = Leadership(store, "a", clock, CoordinatorMetrics())
    alone.turn()
    assert alone.standing.lease == Lease("a", 1)


def test_the_thread_body_turns_until_it_is_stopped(store: MemoryControlStore, clock: FakeClock) -> None:
    """It waits between its turns, and resigns at the end."""
    turns: list[float] = []

    def wait(seconds: float) -> bool:
        turns.append(seconds)
        clock.advance(seconds)
        if len(turns) == 5:
            leadership.stop()
        return False

    steps = Steps(store)
    leadership = Leadership(store, "a", clock, CoordinatorMetrics(), steps, wait=wait)
    leadership.run()

    assert len(steps.leases) == len(turns) == 5
    assert store.lead("b", 1000) == Lease("b", 2)
