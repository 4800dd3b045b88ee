"""One suite for the control plane's store in memory, in one Redis and in a cluster."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from inferfleet.control.memory import MemoryControlStore, MemoryReporter
from inferfleet.control.pauses import Pause, encode_pause
from inferfleet.control.reporter import RedisReporter
from inferfleet.control.store import RedisControlStore
from inferfleet.control_ports import ControlStore, Reporter
from inferfleet.core.revisions import chain_fault
from inferfleet.errors import ConfigError, ConflictError, ControlError, FencedError, LogLostError
from inferfleet.plane import Lease, WorkerReport
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import EMPTY_LOG, NO_HASH, Head
from inferfleet.testing.clock import FakeClock
from tests.support.control import change, draft, entry, window
from tests.support.process import free_ports
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

PATIENCE_S = 10.0


class Bench:
    """One fleet's store, more views of the same, reporters, and the passing of time."""

    def __init__(self, kind: str, where: Place | None) -> None:
        self.kind = kind
        self.fleet = f"test-{secrets.token_hex(4)}"
        self.clock = FakeClock()
        self._where = where
        self._memory = MemoryControlStore(self.clock)
        self._made: list[Any] = []

    @property
    def connect(self) -> Callable[[], Any]:
        where = self._where
        assert where is not None
        return lambda: open_redis(where)

    def store(self) -> ControlStore:
        """Return one more coordinator's view."""
        if self._where is None:
            return self._memory
        made = RedisControlStore(
            self.connect, self.fleet, address=self._where.shown, utc_ms=self.clock.utc_ms
        )
        self._made.append(made)
        return made

    def reporter(self, worker: str = "w-1", pool: str = "default") -> Reporter:
        """Return a worker's reporter."""
        if self._where is None:
            return MemoryReporter(self._memory)
        made = RedisReporter(self.connect, self.fleet, pool, worker)
        self._made.append(made)
        return made

    def redis(self) -> Any:
        """Return a client that answers in bytes."""
        made = self.connect()
        self._made.append(made)
        return made

    def lapse(self, ms: int) -> None:
        """Let the lease and registrations of so many milliseconds expire."""
        if self._where is None:
            self.clock.advance(ms / 1000)
            return
        client = self.redis()
        client.pexpire(f"{{{self.fleet}}}:lease", 1)
        for key in client.zrange(f"{{{self.fleet}}}:workers:index", 0, -1):
            client.pexpire(f"{{{self.fleet}}}:workers:{key.decode()}", 1)
        wait_until(lambda: not client.exists(f"{{{self.fleet}}}:lease"), PATIENCE_S, "the lease is gone")

    def close(self) -> None:
        for each in self._made:
            each.close()


KINDS = [
    "memory",
    pytest.param("redis", marks=pytest.mark.service),
    pytest.param("cluster", marks=pytest.mark.service),
]


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Each kind of store in turn, for a fleet that no other test has."""
    where = None
    if request.param == "redis":
        where = Place(request.getfixturevalue("redis_server").url)
    elif request.param == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        where = Place(mode="cluster", nodes=cluster.addresses)
    made = Bench(request.param, where)
    yield made
    made.close()


@pytest.fixture
def store(bench: Bench) -> ControlStore:
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


def test_a_change_is_seen_by_all(bench: Bench, store: ControlStore) -> None:
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


def test_a_change_is_seen_by_whoever_loaded_before(bench: Bench, store: ControlStore) -> None:
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


def test_routes_that_a_change_does_not_name_may_move(bench: Bench, store: ControlStore) -> None:
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


def test_writers_at_once_make_one_chain(bench: Bench) -> None:
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


def test_a_reset_starts_a_new_epoch_above_everything(bench: Bench, store: ControlStore) -> None:
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


def assert_chained(store: ControlStore) -> None:
    """Every entry names the hash of the one before, from the first one on."""
    found = store.audit(limit=10_000)
    assert [each.number for each, _ in found] == list(range(1, len(found) + 1))
    assert found[0][0].previous == NO_HASH
    for (_, body), (after, _) in pairwise(found):
        assert after.previous == hashlib.sha256(body).hexdigest()


def test_the_audit_log_is_a_chain(bench: Bench, store: ControlStore) -> None:
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


def test_documents_are_compared_by_version(bench: Bench, store: ControlStore) -> None:
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


def test_one_leads_and_holds_on(bench: Bench, store: ControlStore) -> None:
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


def test_a_leader_that_was_away_is_fenced(bench: Bench, store: ControlStore) -> None:
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


def test_changes_without_a_lease_need_none(bench: Bench, store: ControlStore) -> None:
    """People apply routes through any replica, whoever leads."""
    bench.store().lead("c-1", 60_000)
    store.commit(change(draft()))
    assert store.head().number == 1


# Workers and their summaries


def test_workers_are_listed_until_they_are_silent(bench: Bench, store: ControlStore) -> None:
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


def test_a_worker_that_leaves_is_gone(bench: Bench, store: ControlStore) -> None:
    """Closing sends what waits and takes the registration away."""
    reporter = bench.reporter()
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
    wait_until(store.workers, PATIENCE_S, "it is listed")
    reporter.append([window(requests=7)])
    reporter.close()
    assert store.workers() == []
    assert [each.requests for each in store.windows("digits")[0]] == [7]


def test_a_worker_that_falls_silent_expires(bench: Bench, store: ControlStore) -> None:
    """Nobody has to take it away."""
    bench.store().lead("c-1", 6_000)
    bench.reporter().heartbeat(WorkerReport(worker="w-1", pool="default"))
    wait_until(store.workers, PATIENCE_S, "it is listed")
    bench.lapse(6_000)
    wait_until(lambda: not store.workers(), PATIENCE_S, "it is listed no longer")


def test_summaries_come_in_order_and_after_a_place(bench: Bench, store: ControlStore) -> None:
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


# Redis alone


@pytest.fixture
def redis_bench(redis_server: RedisServer) -> Iterator[Bench]:
    """A store in one Redis."""
    made = Bench("redis", Place(redis_server.url))
    yield made
    made.close()


@pytest.mark.service
def test_a_pause_that_comes_while_another_is_lifted_stays(
    redis_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody resumes and pauses again between the look and the deletion: that pause is not ours to lift."""
    store, client = redis_bench.store(), redis_bench.redis()
    assert isinstance(store, RedisControlStore)
    key = f"{{{redis_bench.fleet}}}:paused:digits"
    look = store._calls.run

    def looked(*words: object) -> object:
        found = look(*words)
        if words[0] == "GET":
            client.set(key, encode_pause(Pause("by hand")))
        return found

    client.set(key, encode_pause(Pause("version 2: 20 in a row")))
    monkeypatch.setattr(store._calls, "run", looked)
    store.resume("digits", "version 2: 20 in a row")
    monkeypatch.undo()

    assert store.paused("digits") == "by hand"
    store.resume("digits", "another reason")
    assert store.paused("digits") == "by hand"
    store.resume("digits", "by hand")
    assert store.paused("digits") == ""


@pytest.mark.service
def test_the_keys_are_those_of_the_contract(redis_bench: Bench) -> None:
    """All are in one slot by the fleet's name in braces; the stream's ids are the revisions' numbers."""
    store = redis_bench.store()
    store.commit(change(draft(), documents={"r": (0, b"{}")}, lease=store.lead("c", 60_000)))
    reporter = redis_bench.reporter()
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
    reporter.append([window()])
    wait_until(lambda: store.windows("digits")[0], PATIENCE_S, "it has arrived")
    client, fleet = redis_bench.redis(), redis_bench.fleet
    found = {name.decode() for name in client.scan_iter(f"*{fleet}*")}
    assert found == {
        f"{{{fleet}}}:{name}"
        for name in (
            *("head", "routes", "revisions", "audit", "rollouts", "lease", "lease:token"),
            *("workers:index", "workers:default:w-1", "workers:default:w-1:sent", "reports:digits"),
        )
    }
    ((place, fields),) = client.xrange(f"{{{fleet}}}:revisions")
    assert place == b"1-0"
    assert hashlib.sha256(fields[b"body"]).hexdigest().encode() == fields[b"hash"]
    assert client.hgetall(f"{{{fleet}}}:routes") == {b"digits": fields[b"body"]}
    assert 0 < client.pttl(f"{{{fleet}}}:workers:default:w-1") <= 6_000
    assert 0 < client.pttl(f"{{{fleet}}}:reports:digits") <= 3_600_000


@pytest.mark.service
def test_a_lost_head_is_found_again_at_the_end_of_the_log(redis_bench: Bench) -> None:
    """Only that key is gone: numbers and both chains go on where they were."""
    store = redis_bench.store()
    before = store.commit(change(draft()))
    redis_bench.redis().delete(f"{{{redis_bench.fleet}}}:head")
    assert redis_bench.store().head() == before[0].head
    assert redis_bench.store().load().kept == {"digits": before}
    (after,) = store.commit(change(draft(version="2"), expected={"digits": 1}))
    assert (after.number, after.previous) == (2, before[0].hash)
    assert_chained(store)


@pytest.mark.service
def test_routes_that_are_gone_are_no_empty_log(redis_bench: Bench) -> None:
    """An evicted key must not look like a fleet without routes; a reset mends it."""
    store = redis_bench.store()
    store.commit(change(draft()))
    redis_bench.redis().delete(f"{{{redis_bench.fleet}}}:routes")
    with pytest.raises(ControlError, match=r"the routes end at revision 0 and the log at 1; .*--reset"):
        redis_bench.store().load()
    store.commit(change(draft(), reset=True))
    assert redis_bench.store().load().head[:2] == (1, 2)


@pytest.mark.service
def test_a_head_that_lies_behind_the_log_takes_a_reset(redis_bench: Bench) -> None:
    """Half a restore cannot be written over by the next apply; a person's reset goes above it."""
    store = redis_bench.store()
    store.commit(change(draft()))
    client, head = redis_bench.redis(), f"{{{redis_bench.fleet}}}:head"
    older = client.get(head)
    for version in ("2", "3"):
        store.commit(change(draft(version=version)))
    client.set(head, older)
    with pytest.raises(LogLostError, match="--reset"):
        store.commit(change(draft(version="4")))
    (done,) = store.commit(change(draft(version="4"), reset=True))
    assert done.head[:2] == (1, 4)
    assert_chained(store)


@pytest.mark.service
def test_the_stream_of_revisions_is_bounded(redis_server: RedisServer) -> None:
    """Old ones leave the history; the kept ones and the audit log stay."""
    fleet = f"test-{secrets.token_hex(4)}"
    store = RedisControlStore(
        lambda: open_redis(Place(redis_server.url)),
        fleet,
        address="here",
        utc_ms=lambda: 1,
        max_revisions=10,
    )
    for number in range(250):
        store.commit(change(draft(version=f"{number + 1}")))
    assert len(store.history(limit=1_000)) < 250
    assert store.load().head.number == 250
    assert len(store.audit()) == 250
    store.close()


@pytest.mark.service
def test_a_restart_forgets_the_scripts_and_nothing_else(data_folder: Any) -> None:
    """The server is taught again; the lease, the log and the documents are as they were."""
    with RedisServer(data_folder) as server:
        bench = Bench("redis", Place(server.url, timeout_s=1.0))
        store = bench.store()
        lease = store.lead("c-1", 60_000)
        store.commit(change(draft(), documents={"r": (0, b"{}")}, lease=lease))
        server.kill()
        with pytest.raises(ControlError, match=f"redis at redis://127.0.0.1:{server.port}/0"):
            store.load()
        server.start()
        assert store.load().head.number == 1
        store.commit(change(draft(version="2"), documents={"r": (1, b"[]")}, lease=lease))
        assert store.documents() == {"r": (2, b"[]")}
        bench.close()


def test_a_redis_that_nobody_serves_is_named() -> None:
    """Every call ends within the client's own bound, in one line."""
    (port,) = free_ports(1)
    where = Place(f"redis://u:secret@127.0.0.1:{port}/0")
    store = RedisControlStore(lambda: open_redis(where), "f", address=where.shown, utc_ms=lambda: 1)
    calls: list[Callable[[], object]] = [
        store.load,
        store.head,
        store.history,
        store.documents,
        store.workers,
        store.audit,
        lambda: store.windows("digits"),
        lambda: store.commit(change(draft())),
        lambda: store.lead("c", 1_000),
        lambda: store.resign(Lease("c", 1)),
    ]
    for call in calls:
        with pytest.raises(ControlError, match=f"redis at redis://127.0.0.1:{port}/0") as caught:
            call()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    store.close()


@pytest.mark.service
def test_a_full_redis_refuses_the_whole_change(data_folder: Any) -> None:
    """Nothing of it stands: neither revision, nor audit entry, nor document."""
    with RedisServer(data_folder, config=["--maxmemory-policy", "noeviction"]) as server:
        bench = Bench("redis", Place(server.url))
        store = bench.store()
        store.commit(change(draft()))
        before = (store.load(), store.audit())
        with server.client() as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(ControlError):
                store.commit(change(draft(version="2"), documents={"r": (0, b"{}")}))
            client.config_set("maxmemory", 0)
        assert (store.load(), store.audit()) == before
        assert store.documents() == {}
        bench.close()
