"""One suite for what workers follow, in memory and in Redis; then what only Redis can do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from inferfleet.control_ports import RouteFeed
from inferfleet.errors import ConfigError, ControlError
from inferfleet.redis_access import Place
from inferfleet.revisions import EMPTY_LOG
from tests.contract.control_bench import KINDS, PATIENCE_S, QUICK, FeedBench, place_of
from tests.support.control import change, draft
from tests.support.process import free_ports
from tests.support.redis_cluster import RedisSentinel
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


def number(feed: RouteFeed) -> int:
    return feed.log().head.number


def follows(feed: RouteFeed, wanted: int) -> None:
    wait_until(lambda: number(feed) == wanted, PATIENCE_S, f"revision {wanted} is followed")


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeedBench]:
    """Each kind of feed in turn."""
    where = place_of(request.param, request)
    made = FeedBench(where, tmp_path)
    yield made
    made.close()


def test_a_fleet_without_routes_is_an_empty_log(bench: FeedBench) -> None:
    """A worker may start before the first apply; it hears of it."""
    feed = bench.feed()
    assert feed.log() == EMPTY_LOG
    assert feed.stale == ""
    bench.store.commit(change(draft()))
    follows(feed, 1)


def test_a_feed_holds_what_the_store_holds(bench: FeedBench) -> None:
    """Appended one by one or read as a whole, the log is the same, announcements and removals too."""
    bench.store.commit(change(draft("a"), draft("b")))
    early = bench.feed()
    now = bench.clock.utc_ms()
    for drafts in (
        (draft("a", "2", effective_from_ms=None),),
        (draft("a", "2", effective_from_ms=now + 2_000), draft("c", "1", effective_from_ms=now)),
        (draft("b", None, effective_from_ms=now),),
        (draft("a", "1", effective_from_ms=now - 5_000),),
    ):
        bench.store.commit(change(*drafts))
    follows(early, 7)
    late = bench.feed()
    assert early.log() == late.log() == bench.store.load()


def test_an_older_log_is_not_adopted(bench: FeedBench) -> None:
    """A store that was restored from a copy: the newer log stays, and it is said; a reset is followed."""
    bench.store.commit(change(draft(version="1")))
    restore = bench.backup()
    bench.store.commit(change(draft(version="2")))
    feed = bench.feed()
    held = feed.log()
    assert held.head.number == 2
    restore()
    wanted = "the store offers the older revision 1 while revision 2 is held; only a reset goes back"
    wait_until(lambda: (feed.log(), feed.stale)[1] == wanted, PATIENCE_S, "the feed says so")
    assert feed.log() == held
    (done,) = bench.store.commit(change(draft(version="3"), reset=True, above=2))
    follows(feed, 3)
    assert feed.log().kept == {"digits": (done,)}
    assert feed.stale == ""


def test_a_forked_log_is_not_adopted(bench: FeedBench) -> None:
    """The restored store went on with other revisions: equal and higher numbers, and not our log."""
    bench.store.commit(change(draft(version="1")))
    restore = bench.backup()
    bench.store.commit(change(draft(version="2")))
    feed = bench.feed()
    held = feed.log()
    restore()
    bench.store.commit(change(draft(version="3")))
    wait_until(lambda: (feed.log(), feed.stale)[1], PATIENCE_S, "the feed says so")
    bench.store.commit(change(draft(version="4")))
    wanted = "the store's revision 3 does not continue revision 2 that is held"
    wait_until(lambda: wanted in (feed.log(), feed.stale)[1], PATIENCE_S, "the feed says so")
    assert feed.log() == held


def test_a_flushed_store_is_an_older_one(bench: FeedBench) -> None:
    """All is gone: the worker keeps its routes and goes on."""
    restore = bench.backup()
    bench.store.commit(change(draft()))
    feed = bench.feed()
    follows(feed, 1)
    restore()
    wait_until(lambda: "older revision 0" in (feed.log(), feed.stale)[1], PATIENCE_S, "the feed says so")
    assert number(feed) == 1


# Redis alone


@pytest.fixture
def redis_bench(redis_server: RedisServer, tmp_path: Path) -> Iterator[FeedBench]:
    """A fleet in one Redis."""
    made = FeedBench(Place(redis_server.url), tmp_path)
    yield made
    made.close()


@pytest.mark.service
def test_the_loop_is_woken_by_news_and_by_nothing_else(redis_bench: FeedBench) -> None:
    """A revision is there when it wakes; a quiet log wakes nobody."""
    feed = redis_bench.feed()
    redis_bench.woken.clear()
    redis_bench.store.commit(change(draft()))
    assert redis_bench.woken.wait(PATIENCE_S)
    assert number(feed) == 1
    redis_bench.woken.clear()
    assert not redis_bench.woken.wait(0.3)


@pytest.mark.service
def test_a_log_that_was_trimmed_is_read_anew(redis_server: RedisServer, redis_bench: FeedBench) -> None:
    """The entries between are gone, so the whole is taken; nothing is missing in it."""
    redis_bench.store.commit(change(draft("a")))
    feed = redis_bench.feed()
    with redis_server.client() as client, client.pipeline() as at_once:
        at_once.execute_command("CLIENT", "PAUSE", 300, "ALL")
        at_once.execute()
    for version in ("2", "3", "4"):
        redis_bench.store.commit(change(draft("b", version)))
    with redis_server.client() as client:
        client.xtrim(f"{{{redis_bench.fleet}}}:revisions", maxlen=1, approximate=False)
    redis_bench.store.commit(change(draft("c")))
    follows(feed, 5)
    assert feed.log() == redis_bench.store.load()


@pytest.mark.service
def test_a_revision_that_cannot_be_understood_is_told_once_and_holds_up_no_other_route(
    redis_server: RedisServer, redis_bench: FeedBench
) -> None:
    """A newer release wrote a route that this one does not know: it stays as it was, the others go on."""
    store, fleet = redis_bench.store, redis_bench.fleet
    store.commit(change(draft("a"), draft("b")))
    feed = redis_bench.feed()
    was = feed.log().kept["a"]
    with redis_server.client() as client:
        unknown = _from_a_newer_release(client, fleet)
    assert unknown == 3
    with pytest.raises(ConfigError, match='route a: revision 3: route "a" has no key "fancy"'):
        wait_until(lambda: number(feed) == 3, PATIENCE_S, "it is told")
    follows(feed, 3)
    assert feed.log().kept["a"] == was
    assert "route a" in feed.stale
    store.commit(change(draft("b", "2")))
    follows(feed, 4)
    assert feed.log().kept["b"][-1].number == 4
    store.commit(change(draft("a", "4"), audited=False, reset=True))
    follows(feed, 5)
    assert feed.stale == ""


def _from_a_newer_release(client: Any, fleet: str) -> int:
    """Append a revision of route a with a key that nobody knows yet, as its script would."""
    import hashlib

    import msgspec

    keys = {name: f"{{{fleet}}}:{name}" for name in ("head", "routes", "revisions")}
    head = msgspec.json.decode(client.get(keys["head"]))
    document = msgspec.json.decode(client.hget(keys["routes"], "a"))
    document |= {"number": head["number"] + 1, "previous": head["hash"]}
    document["route"]["fancy"] = True
    body = msgspec.json.encode(document, order="sorted")
    digest = hashlib.sha256(body).hexdigest()
    head |= {"number": document["number"], "hash": digest, "changes": head["changes"] + 1}
    with client.pipeline() as at_once:
        at_once.xadd(keys["revisions"], {"hash": digest, "body": body}, id=f"{document['number']}-0")
        at_once.hset(keys["routes"], "a", body)
        at_once.set(keys["head"], msgspec.json.encode(head))
        at_once.execute()
    return int(document["number"])


@pytest.mark.service
def test_while_redis_is_away_the_log_holds_and_the_feed_says_since_when(
    data_folder: Path, tmp_path: Path
) -> None:
    """It comes back by itself, and hears of what happened meanwhile; one log line for each end."""
    with RedisServer(data_folder) as server, capture_logs() as logs:
        bench = FeedBench(Place(server.url, timeout_s=0.5), tmp_path)
        bench.store.commit(change(draft()))
        feed = bench.feed()
        server.kill()
        said = f"redis at redis://127.0.0.1:{server.port}/0 does not answer since 20"
        wait_until(lambda: feed.stale.startswith(said), PATIENCE_S, "it is noticed")
        assert "\n" not in feed.stale
        assert number(feed) == 1
        server.start()
        bench.store.commit(change(draft(version="2")))
        follows(feed, 2)
        wait_until(lambda: feed.stale == "", PATIENCE_S, "all is well")
        bench.close()
    assert [line["event"] for line in logs] == ["routes_away", "routes_back"]


@pytest.mark.service
def test_a_worker_that_starts_while_redis_is_away_goes_on_with_its_copy(
    data_folder: Path, tmp_path: Path
) -> None:
    """Announcements and kept revisions are in the copy too; the store must continue it when it is back."""
    with RedisServer(data_folder) as server:
        bench = FeedBench(Place(server.url, timeout_s=0.5), tmp_path)
        bench.store.commit(change(draft("a"), draft("b")))
        bench.store.commit(change(draft("a", "2", effective_from_ms=None)))
        first = bench.feed(copy=True)
        wait_until(bench.copy.exists, PATIENCE_S, "the copy is written")
        held = first.log()
        first.close()
        server.kill()
        second = bench.feed(copy=True)
        assert second.log() == held
        assert "does not answer since" in second.stale
        server.start()
        wait_until(lambda: second.stale == "", PATIENCE_S, "all is well")
        bench.store.commit(change(draft("a", "2", effective_from_ms=5)))
        follows(second, 4)
        wait_until(lambda: b'"number":4,' in bench.copy.read_bytes(), PATIENCE_S, "the copy follows")
        assert list(bench.copy.parent.iterdir()) == [bench.copy]
        bench.close()


@pytest.mark.service
def test_a_worker_that_restarts_refuses_a_store_that_lost_what_it_knew(
    redis_bench: FeedBench, redis_server: RedisServer
) -> None:
    """The copy is as good as one's own log: a restart is no way around the refusal."""
    redis_bench.store.commit(change(draft()))
    restore = redis_bench.backup()
    redis_bench.store.commit(change(draft(version="2")))
    redis_bench.feed(copy=True).close()
    restore()
    feed = redis_bench.feed(copy=True)
    wait_until(lambda: "older revision 1 while revision 2" in feed.stale, PATIENCE_S, "it is said")
    assert number(feed) == 2


@pytest.mark.service
def test_a_redis_that_was_restored_from_older_files_is_refused(data_folder: Path, tmp_path: Path) -> None:
    """The files of the day before, put back by hand: the feed says so, and a reset goes on above all."""
    with RedisServer(data_folder) as server:
        bench = FeedBench(Place(server.url, timeout_s=0.5), tmp_path)
        bench.store.commit(change(draft(version="1")))
        server.stop()
        shutil.copytree(data_folder, tmp_path / "backup")
        server.start()
        bench.store.commit(change(draft(version="2")))
        feed = bench.feed()
        assert number(feed) == 2
        server.stop()
        shutil.rmtree(data_folder)
        shutil.copytree(tmp_path / "backup", data_folder)
        server.start()
        wait_until(lambda: "older revision 1 while revision 2" in feed.stale, PATIENCE_S, "it is said")
        assert number(feed) == 2
        (done,) = bench.store.commit(change(draft(version="3"), reset=True, above=2))
        follows(feed, 3)
        assert feed.log().kept == {"digits": (done,)}
        bench.close()


@pytest.mark.service
@pytest.mark.slow
def test_a_failover_that_loses_a_revision_is_refused(tmp_path: Path) -> None:
    """The promoted replica had not heard of it: sentinels are followed, its log is not."""
    with RedisSentinel(tmp_path / "sentinel") as servers:
        where = Place(
            mode="sentinel", nodes=servers.addresses, sentinel_master=RedisSentinel.NAME, timeout_s=1.0
        )
        bench = FeedBench(where, tmp_path)
        bench.store.commit(change(draft(version="1")))
        with servers.replica.client() as client:
            name = f"{{{bench.fleet}}}:head"
            wait_until(lambda: client.exists(name), PATIENCE_S, "the replica has the first revision")
        feed = bench.feed()
        servers.replica.pause()
        with servers.master.client() as client:
            # Else the frozen replica would find in its socket what was sent to it meanwhile.
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        bench.store.commit(change(draft(version="2")))
        follows(feed, 2)
        servers.master.kill()
        servers.replica.resume()
        servers.wait_promoted()
        wait_until(lambda: "older revision 1 while revision 2" in feed.stale, 30, "it is said")
        assert number(feed) == 2
        wait_until(lambda: bench.store.head().number == 1, 30, "the store follows the sentinels too")
        bench.store.commit(change(draft(version="3"), reset=True, above=2))
        follows(feed, 3)
        bench.close()


def test_without_redis_and_without_a_copy_the_address_is_named(tmp_path: Path) -> None:
    """The start waits within its bound and then says in one line what is away."""
    (port,) = free_ports(1)
    bench = FeedBench(Place(f"redis://127.0.0.1:{port}/0"), tmp_path)
    with pytest.raises(ControlError, match=f"redis at redis://127.0.0.1:{port}/0 .* no copy") as caught:
        bench.feed(replace(QUICK, start_s=0.3), copy=True)
    assert "\n" not in str(caught.value)
    bench.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"epoch":0,"number":7,"hash":"00","kept":{}}',
        b'{"epoch":0,"number":1,"hash":"00","kept":{"a":["{}"]}}',
        b"\xff",
    ],
)
@pytest.mark.service
def test_a_copy_that_cannot_be_read_is_none(redis_bench: FeedBench, text: bytes) -> None:
    """Half a file, or somebody else's: the worker asks Redis as if there were none, and replaces it."""
    redis_bench.copy.parent.mkdir()
    redis_bench.copy.write_bytes(text)
    redis_bench.store.commit(change(draft()))
    with capture_logs() as logs:
        feed = redis_bench.feed(copy=True)
        assert number(feed) == 1
    assert [line["event"] for line in logs] == ["routes_copy_unreadable"]
    wait_until(lambda: redis_bench.copy.read_bytes() != text, PATIENCE_S, "it is replaced")


@pytest.mark.service
def test_a_copy_that_cannot_be_written_stops_nothing(redis_bench: FeedBench) -> None:
    """The feed follows without one."""
    redis_bench.copy.parent.write_text("in the way")
    redis_bench.store.commit(change(draft()))
    feed = redis_bench.feed(copy=True)
    redis_bench.store.commit(change(draft(version="2")))
    follows(feed, 2)


@pytest.mark.service
def test_a_frozen_redis_holds_up_neither_the_log_nor_the_end(data_folder: Path, tmp_path: Path) -> None:
    """Whoever asks, and whoever closes, is answered at once while a read hangs."""
    with RedisServer(data_folder) as server:
        bench = FeedBench(Place(server.url, timeout_s=60.0), tmp_path)
        bench.store.commit(change(draft()))
        feed = bench.feed(replace(QUICK, block_s=30.0))
        server.pause()
        assert number(feed) == 1
        feed.close()
        server.resume()
        bench.close()
