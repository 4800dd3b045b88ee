"""What only Redis can do to the control plane's store: keys, scripts, lost documents, a full server."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inferfleet.control.pauses import Pause, encode_pause
from inferfleet.control.store import RedisControlStore
from inferfleet.errors import ControlError, LogLostError
from inferfleet.plane import Lease, WorkerReport
from inferfleet.redis_access import Place, open_redis
from tests.contract.control_bench import PATIENCE_S, StoreBench, assert_chained
from tests.support.control import change, draft, window
from tests.support.process import free_ports
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@pytest.fixture
def redis_bench(redis_server: RedisServer) -> Iterator[StoreBench]:
    """A store in one Redis."""
    made = StoreBench("redis", Place(redis_server.url))
    yield made
    made.close()


@pytest.mark.service
def test_a_pause_that_comes_while_another_is_lifted_stays(
    redis_bench: StoreBench, monkeypatch: pytest.MonkeyPatch
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
    client.set(key, encode_pause(Pause("by hand", actor="eva")))
    assert store.paused("digits") == "by hand (by eva)"


@pytest.mark.service
def test_the_keys_are_those_of_the_contract(redis_bench: StoreBench) -> None:
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
def test_a_lost_head_is_found_again_at_the_end_of_the_log(redis_bench: StoreBench) -> None:
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
def test_routes_that_are_gone_are_no_empty_log(redis_bench: StoreBench) -> None:
    """An evicted key must not look like a fleet without routes; a reset mends it."""
    store = redis_bench.store()
    store.commit(change(draft()))
    redis_bench.redis().delete(f"{{{redis_bench.fleet}}}:routes")
    with pytest.raises(ControlError, match=r"the routes end at revision 0 and the log at 1; .*--reset"):
        redis_bench.store().load()
    store.commit(change(draft(), reset=True))
    assert redis_bench.store().load().head[:2] == (1, 2)


@pytest.mark.service
def test_a_head_that_lies_behind_the_log_takes_a_reset(redis_bench: StoreBench) -> None:
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
        bench = StoreBench("redis", Place(server.url, timeout_s=1.0))
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
        bench = StoreBench("redis", Place(server.url))
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
