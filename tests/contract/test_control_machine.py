"""Any sequence of changes does the same in Redis as in memory, and both do as a small model says."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from inferfleet.control.memory import MemoryControlStore
from inferfleet.control.store import RedisControlStore
from inferfleet.control_ports import ControlStore
from inferfleet.core.revisions import chain_fault, in_force
from inferfleet.errors import ConflictError, FencedError, InferfleetError
from inferfleet.plane import Change, Lease
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import Revision
from inferfleet.testing.clock import FakeClock
from tests.support.control import change, draft
from tests.support.redis_server import RedisServer

ROUTES = ("a", "b", "c")
HOLDERS = ("c-1", "c-2")
HORIZON_MS = 60_000


class Commits(RuleBasedStateMachine):
    """Commits, resets and changes of the lease; the model keeps last numbers, versions and the leader."""

    open_store: ClassVar[Callable[[FakeClock], ControlStore | None]]

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.memory = MemoryControlStore(self.clock, horizon_ms=HORIZON_MS)
        self.twin = type(self).open_store(self.clock)
        self.numbers: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.everything: list[Revision] = []
        self.epoch = self.number = 0
        self.leases: list[Lease] = []
        self.leader: Lease | None = None

    def teardown(self) -> None:
        if self.twin is not None:
            self.twin.close()

    def both(self, call: Callable[[ControlStore], Any]) -> Any:
        """Return what both stores return, or the kind of error that both raise."""
        found = [_outcome(call, store) for store in (self.memory, self.twin) if store is not None]
        assert found[1:] in ([], found[:1])
        return found[0]

    @rule(
        names=st.lists(st.sampled_from(ROUTES), max_size=3, unique=True),
        offset_s=st.sampled_from((None, -200, -30, 0, 2, 90)),
        version=st.sampled_from(("1", "2", None)),
        stale=st.integers(0, 5),
        document=st.sampled_from((None, "r-1", "r-2")),
        body=st.sampled_from((b"{}", b"[1]", None)),
        lease=st.integers(0, 3),
    )
    def commit(
        self,
        names: list[str],
        offset_s: int | None,
        version: str | None,
        stale: int,
        document: str | None,
        body: bytes | None,
        lease: int,
    ) -> None:
        """One in six expects a wrong number; a lease is none, or any that was ever held."""
        start = None if offset_s is None else self.clock.utc_ms() + 1_000 * offset_s
        expected = {name: self.numbers.get(name, 0) for name in names}
        if stale == 0 and names:
            expected[names[0]] += 1
        documents = {} if document is None else {document: (self.versions.get(document, 0), body)}
        held = self.leases[-lease] if 0 < lease <= len(self.leases) else None
        made = change(
            *(draft(name, version, start) for name in names),
            expected=expected,
            documents=documents,
            lease=held,
        )
        done = self.both(lambda store: store.commit(made))
        if held is not None and held != self.leader:
            assert done is FencedError
        elif stale == 0 and names:
            assert done is ConflictError
        else:
            self._apply(done, documents)

    @rule(name=st.sampled_from(ROUTES), above=st.integers(0, 40))
    def reset(self, name: str, above: int) -> None:
        """Start a new epoch with one route."""
        done = self.both(lambda store: store.commit(_reset(name, above)))
        self.epoch += 1
        self.number = max(self.number, above)
        self.numbers = {}
        self._apply(done, {})

    def _apply(self, done: tuple[Revision, ...], documents: dict[str, tuple[int, bytes | None]]) -> None:
        for revision in done:
            self.number += 1
            assert (revision.epoch, revision.number) == (self.epoch, self.number)
            self.numbers[revision.name] = revision.number
        self.everything += done
        for name, (version, body) in documents.items():
            if body is None:
                self.versions.pop(name, None)
            else:
                self.versions[name] = version + 1

    @rule(holder=st.sampled_from(HOLDERS))
    def lead(self, holder: str) -> None:
        """Only one leads; it keeps its token, another gets a higher one."""
        lease = self.both(lambda store: store.lead(holder, 3_600_000))
        if self.leader is not None and self.leader.holder != holder:
            assert lease is None
            return
        assert lease == self.leader or (self.leader is None and lease.token == len(self.leases) + 1)
        if self.leader is None:
            self.leases.append(lease)
        self.leader = lease

    @rule(which=st.integers(1, 3))
    def resign(self, which: int) -> None:
        """Only the lease that stands can be given back."""
        if which <= len(self.leases):
            lease = self.leases[-which]
            self.both(lambda store: store.resign(lease))
            self.leader = None if lease == self.leader else self.leader

    @rule(seconds=st.sampled_from((0.001, 1.0, 45.0)))
    def wait(self, seconds: float) -> None:
        """Time passes; what was in force before the horizon is forgotten with the next revision."""
        self.clock.advance(seconds)

    @invariant()
    def all_agree(self) -> None:
        """The log ends as the model does, and what is kept answers as everything would."""
        log = self.both(lambda store: store.load())
        assert log.head[:2] == (self.epoch, self.number)
        assert {name: log.latest(name) for name in log.kept} == self.numbers
        documents = self.both(lambda store: store.documents())
        assert {name: stored.version for name, stored in documents.items()} == self.versions
        for name, revisions in log.kept.items():
            every = [each for each in self.everything if (each.name, each.epoch) == (name, self.epoch)]
            since = revisions[-1].at_ms - HORIZON_MS
            for time_ms in (since, since + 15_000, revisions[-1].at_ms, revisions[-1].at_ms + 95_000):
                assert in_force(revisions, time_ms) == in_force(every, time_ms)
        history = self.both(lambda store: store.history(limit=1_000))
        assert history[::-1] == self.everything
        assert chain_fault(history[::-1]) is None
        self.both(lambda store: store.audit(limit=1_000))


def _reset(name: str, above: int) -> Change:
    return change(draft(name), reset=True, above=above)


def _outcome(call: Callable[[ControlStore], Any], store: ControlStore) -> Any:
    try:
        return call(store)
    except InferfleetError as error:
        return type(error)


def test_memory_does_as_the_model_says() -> None:
    """Numbers, chains, conflicts, leases and what is kept, over any sequence."""

    class InMemory(Commits):
        open_store = staticmethod(lambda _: None)

    limits = settings(max_examples=25, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(InMemory, settings=limits)  # type: ignore[no-untyped-call]


@pytest.fixture
def opened(redis_server: RedisServer) -> Callable[[FakeClock], ControlStore]:
    """Open a store for a fleet that nobody has used."""

    def open_store(clock: FakeClock) -> ControlStore:
        where = Place(redis_server.url)
        return RedisControlStore(
            lambda: open_redis(where),
            f"machine-{secrets.token_hex(4)}",
            address=where.shown,
            utc_ms=clock.utc_ms,
            horizon_ms=HORIZON_MS,
        )

    return open_store


@pytest.mark.service
def test_redis_does_as_memory_does(opened: Callable[[FakeClock], ControlStore]) -> None:
    """Bytes for bytes: revisions, hashes, audit entries, documents, and the kind of each refusal."""

    class InBoth(Commits):
        open_store = staticmethod(opened)

    limits = settings(
        max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(InBoth, settings=limits)  # type: ignore[no-untyped-call]
