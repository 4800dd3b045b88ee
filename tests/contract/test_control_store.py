"""One suite for the control plane's store in memory, in one Redis and in a cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from inferfleet.control_ports import ControlStore
from inferfleet.core.revisions import chain_fault
from inferfleet.errors import ConfigError, ConflictError, FencedError
from inferfleet.plane import Lease, WorkerReport
from inferfleet.revisions import EMPTY_LOG, NO_HASH, Head
from tests.contract.control_bench import KINDS, PATIENCE_S, StoreBench, assert_chained, place_of
from tests.support.control import change, draft, entry, window
from tests.support.waiting import wait_until


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[StoreBench]:
    """Each kind of store in turn, for a fleet that no other test has."""
    where = place_of(request.param, request)
    made = StoreBench(request.param, where)
    yield made
    made.close()


@pytest.fixture
def store(bench: StoreBench) -> ControlStore:
    """A coordinator's view of an empty store."""
    return bench.store()


# The log


def test_an_empty_store_has_an_empty_log(store: ControlStore) -> None:
    """Nothing was applied yet: no revision, no entry, no rollout, and no error."""
    assert store.load() == EMPTY_LOG
    assert store.head() == Head(0, 0, NO_HASH)
    assert store.history() == []
    assert store.audit() == []
    assert store.documents() == {}
    assert store.workers() == []
    assert store.windows("digits") == ([], "")


def test_a_change_is_seen_by_all(bench: StoreBench, store: ControlStore) -> None:
    """What one commits, another one's next load holds, with number, time, author and place in the chain."""
    done = store.commit(change(draft("a"), draft("b", "2"), reason="first", expected={"a": 0, "b": 0}))
    assert [(each.number, each.name, each.author, each.reason) for each in done] == [
        (1, "a", "ada", "first"),
        (2, "b", "ada", "first"),
    ]
    assert {each.at_ms for each in done} == {bench.clock.utc_ms()}
    found = bench.store().load()
    assert found.head == done[-1].head == bench.store().head()
    assert found.kept == {"a": (done[0],), "b": (done[1],)}
    assert [route.name for route in found.table().routes] == ["a", "b"]
    assert found.label == "2"


def test_a_change_is_seen_by_whoever_loaded_before(bench: StoreBench, store: ControlStore) -> None:
    """A view keeps what it read only until something is changed."""
    other = bench.store()
    store.commit(change(draft(version="1")))
    assert other.load().head.number == 1
    store.commit(change(draft(version="2", effective_from_ms=2_000)))
    assert other.load().latest("digits") == 2


def test_announcements_and_removals_are_kept_as_they_come(store: ControlStore) -> None:
    """An announcement waits at the end until the same route is appended with a time."""
    store.commit(change(draft(version="1")))
    store.commit(change(draft(version="2", effective_from_ms=None)))
    announced = store.load().announced("digits")
    assert announced is not None
    assert announced.number == 2
    store.commit(change(draft(version=None, effective_from_ms=5_000)))
    assert store.load().announced("digits") is None
    newest = store.load().newest("digits")
    assert newest is not None
    assert newest.route is None


def test_a_stale_expectation_is_refused_and_changes_nothing(store: ControlStore) -> None:
    """Whoever decided on an older revision reads again; nothing of its change stands."""
    store.commit(change(draft(version="1")))
    before, audited = store.load(), store.audit()
    stale = change(draft("other"), draft(version="2"), expected={"digits": 0}, documents={"r": (0, b"{}")})
    with pytest.raises(ConflictError, match="route digits: its last revision is 1, not 0"):
        store.commit(stale)
    assert store.load() == before
    assert store.audit() == audited
    assert store.documents() == {}
    store.commit(change(draft(version="2"), expected={"digits": 1}))


def test_routes_that_a_change_does_not_name_may_move(bench: StoreBench, store: ControlStore) -> None:
    """Only what was decided on is compared: two people change two routes at once."""
    other = bench.store()
    store.commit(change(draft("a"), expected={"a": 0}))
    done = other.commit(change(draft("b"), expected={"b": 0}))
    assert done[0].number == 2


def test_history_goes_back_page_by_page(store: ControlStore) -> None:
    """Newest first, of one route or of all; each page ends where the next begins."""
    for number in range(1, 8):
        name = "a" if number % 2 else "b"
        store.commit(change(draft(name, f"{number}", effective_from_ms=number)))
    assert [each.number for each in store.history()] == [7, 6, 5, 4, 3, 2, 1]
    assert [each.number for each in store.history("a", limit=2)] == [7, 5]
    assert [each.number for each in store.history("a", before=5, limit=2)] == [3, 1]
    assert [each.number for each in store.history("b", before=2)] == []
    assert store.history("none") == []
    assert chain_fault(store.history()[::-1]) is None


def test_writers_at_once_make_one_chain(bench: StoreBench) -> None:
    """Each change is done once; those who expect the same number of a route conflict but for one."""
    writers, rounds = 4, 10
    won: list[int] = []
    lost: list[int] = []

    def write(number: int) -> None:
        mine = bench.store()
        for turn in range(rounds):
            mine.commit(
                change(draft(f"own-{number}", f"{turn + 1}"), documents={f"r-{number}": (turn, b"{}")})
            )
            try:
                last = mine.load().latest("shared")
                mine.commit(change(draft("shared"), expected={"shared": last}))
                won.append(last)
            except ConflictError:
                lost.append(turn)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store = bench.store()
    history = store.history(limit=1_000)[::-1]
    assert chain_fault(history) is None
    assert [each.number for each in history] == list(range(1, len(history) + 1))
    assert len(history) == writers * rounds + len(won)
    assert len(won) + len(lost) == writers * rounds
    assert len(set(won)) == len(won)
    assert {each.version for each in store.documents().values()} == {rounds}
    assert store.head() == history[-1].head
    assert_chained(store)


# A reset


def test_a_reset_starts_a_new_epoch_above_everything(bench: StoreBench, store: ControlStore) -> None:
    """Numbers rise on, above what a person names and above what any live worker holds."""
    first = store.commit(change(draft("a"), draft("b")))
    done = store.commit(change(draft("a", "2"), reset=True, above=40))
    assert (done[0].epoch, done[0].number, done[0].previous) == (1, 41, first[-1].hash)
    assert store.load().kept == {"a": (done[0],)}
    assert [each.number for each in store.history()] == [41, 2, 1]
    reporter = bench.reporter()
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default", head=Head(7, 90, "0" * 64)))
    wait_until(store.workers, PATIENCE_S, "the worker is known")
    (again,) = store.commit(change(draft("a"), reset=True))
    assert (again.epoch, again.number) == (8, 91)
    assert_chained(store)


def test_a_reset_to_nothing_is_refused(store: ControlStore) -> None:
    """A new log starts with a revision, or nobody could tell it from the old one."""
    store.commit(change(draft()))
    with pytest.raises(ConfigError, match="at least one route"):
        store.commit(change(reset=True))


# Audit


def test_the_audit_log_is_a_chain(bench: StoreBench, store: ControlStore) -> None:
    """Entries are numbered, dated and chained by the store; they come page by page."""
    store.commit(change(draft()))
    store.commit(change(audit=(entry(action="pause", before={"x": [1, None]}), entry(action="resume"))))
    assert_chained(store)
    first, second, third = [found for found, _ in store.audit()]
    assert (second.actor, second.action, second.before) == ("ada", "pause", {"x": [1, None]})
    assert first.at_ms == bench.clock.utc_ms()
    assert [each.number for each, _ in store.audit(after=1, limit=1)] == [2]
    assert [each for each, _ in store.audit(after=2)] == [third]
    assert store.audit(after=3) == []


# Documents


def test_documents_are_compared_by_version(bench: StoreBench, store: ControlStore) -> None:
    """Each change raises it by one; with another version nothing happens; ``None`` takes it away."""
    store.commit(change(documents={"r-1": (0, b'{"a": 1}'), "r-2": (0, b"x y\nz")}))
    assert store.documents() == {"r-1": (1, b'{"a": 1}'), "r-2": (1, b"x y\nz")}
    other = bench.store()
    other.commit(change(documents={"r-1": (1, b"2")}))
    with pytest.raises(ConflictError, match="rollout r-1: its version is 2, not 1"):
        store.commit(change(draft(), documents={"r-1": (1, b"3"), "r-2": (1, b"3")}))
    assert store.documents() == {"r-1": (2, b"2"), "r-2": (1, b"x y\nz")}
    assert store.load() == EMPTY_LOG
    store.commit(change(documents={"r-1": (2, None)}))
    assert list(store.documents()) == ["r-2"]
    with pytest.raises(ConflictError):
        store.commit(change(documents={"r-1": (3, b"late")}))


# The lease


def test_one_leads_and_holds_on(bench: StoreBench, store: ControlStore) -> None:
    """Another one waits until the lease is given back or has run out; its token rises then."""
    other = bench.store()
    assert other.leader() is None
    mine = store.lead("c-1", 60_000)
    assert mine is not None
    assert other.leader() == mine
    assert store.lead("c-1", 60_000) == mine
    assert other.lead("c-2", 60_000) is None
    store.resign(mine)
    theirs = other.lead("c-2", 60_000)
    assert theirs is not None
    assert theirs.token > mine.token
    store.resign(mine)
    assert store.lead("c-1", 60_000) is None
    bench.lapse(60_000)
    again = store.lead("c-1", 60_000)
    assert again is not None
    assert again.token > theirs.token


def test_a_leader_that_was_away_is_fenced(bench: StoreBench, store: ControlStore) -> None:
    """Its steps are refused from the moment that another leads, and after its own time has run out."""
    mine = store.lead("c-1", 60_000)
    assert mine is not None
    store.commit(change(draft(), lease=mine))
    bench.lapse(60_000)
    with pytest.raises(FencedError, match="lease of c-1 is gone"):
        store.commit(change(draft(version="2"), lease=mine))
    theirs = bench.store().lead("c-2", 60_000)
    with pytest.raises(FencedError):
        store.commit(change(draft(version="2"), lease=mine, documents={"r": (0, b"{}")}))
    assert store.load().head.number == 1
    assert store.documents() == {}
    bench.store().commit(change(draft(version="3"), lease=theirs))
    bench.lapse(60_000)
    again = store.lead("c-1", 60_000)
    assert again is not None
    with pytest.raises(FencedError):
        store.commit(change(draft(), lease=mine))
    with pytest.raises(FencedError):
        store.commit(change(draft(), lease=Lease("c-2", again.token)))
    store.commit(change(draft(version="4"), lease=again))


def test_changes_without_a_lease_need_none(bench: StoreBench, store: ControlStore) -> None:
    """People apply routes through any replica, whoever leads."""
    bench.store().lead("c-1", 60_000)
    store.commit(change(draft()))
    assert store.head().number == 1


# Workers and their summaries


def test_workers_are_listed_until_they_are_silent(bench: StoreBench, store: ControlStore) -> None:
    """The last word of each counts; who leaves is gone at once, who is silent after a while."""
    reporters = {
        name: bench.reporter(name, pool) for pool, name in (("b", "w-1"), ("a", "w-2"), ("a", "w-1"))
    }
    for (name, reporter), pool in zip(reporters.items(), ("b", "a"), strict=False):
        reporter.heartbeat(WorkerReport(worker=name, pool=pool, ready=["digits:1"]))
        reporter.heartbeat(WorkerReport(worker=name, pool=pool, adopted={"digits": 3}))
    wait_until(lambda: len(store.workers()) == 2, PATIENCE_S, "both are listed")

    def said() -> list[tuple[str, str, dict[str, int]]]:
        return [(each.pool, each.worker, each.adopted) for each in store.workers()]

    wait_until(
        lambda: said() == [("a", "w-2", {"digits": 3}), ("b", "w-1", {"digits": 3})], PATIENCE_S, "last words"
    )


def test_a_worker_that_leaves_is_gone(bench: StoreBench, store: ControlStore) -> None:
    """Closing sends what waits and takes the registration away."""
    reporter = bench.reporter()
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
    wait_until(store.workers, PATIENCE_S, "it is listed")
    reporter.append([window(requests=7)])
    reporter.close()
    assert store.workers() == []
    assert [each.requests for each in store.windows("digits")[0]] == [7]


def test_a_worker_that_falls_silent_expires(bench: StoreBench, store: ControlStore) -> None:
    """Nobody has to take it away."""
    bench.store().lead("c-1", 6_000)
    bench.reporter().heartbeat(WorkerReport(worker="w-1", pool="default"))
    wait_until(store.workers, PATIENCE_S, "it is listed")
    bench.lapse(6_000)
    wait_until(lambda: not store.workers(), PATIENCE_S, "it is listed no longer")


def test_summaries_come_in_order_and_after_a_place(bench: StoreBench, store: ControlStore) -> None:
    """A reader goes on where it stopped; each route has its own."""
    reporter = bench.reporter()
    for number in range(1, 6):
        reporter.append([window(requests=number), window(name="other", requests=100 + number)])
        wait_until(lambda n=number: len(store.windows("other")[0]) == n, PATIENCE_S, "it has arrived")
    found, place = store.windows("digits", limit=2)
    assert [each.requests for each in found] == [1, 2]
    found, place = store.windows("digits", place)
    assert [each.requests for each in found] == [3, 4, 5]
    assert store.windows("digits", place) == ([], place)
    reporter.append([window(requests=6)])
    wait_until(lambda: store.windows("digits", place)[0], PATIENCE_S, "the sixth has arrived")
    assert [each.requests for each in store.windows("digits", place)[0]] == [6]
