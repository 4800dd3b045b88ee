"""Redis dies, freezes, fills up, forgets, turns read-only: nothing is lost unsaid, nobody is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Results
from inferfleet.redis_access import Place, open_redis
from inferfleet.results.redis import RedisResults
from inferfleet.wire.stored import result_key
from tests.support.redis_server import RedisServer
from tests.support.redis_writer import FLEET, ROUTE, Writer, missing, repeats, replied
from tests.support.scale import pick
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]
FROZEN_S = pick(3.0, 30.0)


def lost(server: RedisServer, count: int) -> list[int]:
    """The numbers whose result does not stand with its own value."""
    with server.client() as client:
        return missing(client, count)


@pytest.fixture
def server(data_folder: Path) -> Iterator[RedisServer]:
    with RedisServer(data_folder) as started:
        yield started


@pytest.fixture
def writer(server: RedisServer) -> Iterator[Writer]:
    made = Writer(Place(server.url, timeout_s=1.0))
    yield made
    made.outlet.close(0.5)


def test_a_killed_redis_is_waited_for(server: RedisServer, writer: Writer) -> None:
    """Results published before, during and after the outage all stand; away is said and taken back."""
    with capture_logs() as logs:
        writer.publish(100)
        writer.wait_done("the first rows are confirmed")
        server.kill()
        writer.publish(500, reply="c")
        writer.wait_away()
        assert writer.outlet.pending() == 500
        server.start()
        writer.publish(100)
        writer.wait_done("every row is confirmed after the restart")
    assert writer.outlet.away_since is None
    assert lost(server, 700) == []
    assert [entry["event"] for entry in logs].count("results_away") <= 3
    assert [entry["event"] for entry in logs][-1] == "results_back"
    with server.client() as client:
        assert replied(client, "c") == {f"r-{n}" for n in range(100, 600)}
    assert writer.lost == {}


def test_a_redis_killed_in_the_middle_loses_nothing(server: RedisServer, writer: Writer) -> None:
    """A step whose answer never came is written again; the values that stood are kept, and count as equal."""
    for _ in range(5):
        writer.publish(2000)
        wait_until(
            lambda: writer.outlet.poll() or writer.receipts.confirmed_rows > writer.published - 2000,
            20,
            "the new rows begin to be confirmed",
        )
        server.kill()
        server.start()
    writer.wait_done("every row is confirmed")
    assert lost(server, 10_000) == []
    with server.client() as client:
        assert set(repeats(client, 10_000)) <= {"same"}
    assert writer.lost == {}


def test_forgotten_scripts_are_loaded_again(server: RedisServer, writer: Writer) -> None:
    """SCRIPT FLUSH costs one more round trip and is no outage; FUNCTION FLUSH finds nothing of ours."""
    writer.publish(50, reply="c")
    writer.wait_done("the first rows are confirmed")
    with server.client() as client:
        client.script_flush()
        client.function_flush()
    writer.publish(50, reply="c")
    writer.wait_done("rows after the flush are confirmed")
    assert writer.outlet.away_since is None
    assert lost(server, 100) == []


def test_a_frozen_redis_is_waited_for(server: RedisServer, writer: Writer) -> None:
    """A server that accepts connections and does not answer is away, until it answers."""
    writer.publish(50)
    writer.wait_done("the first rows are confirmed")
    server.pause()
    try:
        writer.publish(500)
        writer.wait_away()
        since = writer.outlet.away_since
        frozen_at = time.monotonic()
        wait_until(
            lambda: writer.outlet._tries >= 2 and time.monotonic() - frozen_at >= FROZEN_S,
            FROZEN_S + 10,
            "the outlet tried more than once, for as long as the server is frozen",
        )
        assert writer.outlet.away_since == since
        assert not writer.done
    finally:
        server.resume()
    writer.wait_done("every row is confirmed after the thaw")
    assert lost(server, 550) == []


def test_a_full_redis_is_waited_for(server: RedisServer, writer: Writer) -> None:
    """OOM is back-pressure: logged once, no row refused, and writing goes on when there is room."""
    with server.client() as client, capture_logs() as logs:
        client.config_set("maxmemory-policy", "noeviction")
        client.set("filler", b"x" * 2_000_000)
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 200_000)
        writer.publish(1000, body_bytes=1000)
        writer.wait_away()
        wait_until(lambda: writer.outlet._tries >= 3, 40, "the outlet tried more than once")
        assert not writer.done
        client.config_set("maxmemory", 0)
        writer.wait_done("every row is confirmed once there is room")
    assert lost(server, 1000) == []
    away = [entry for entry in logs if entry["event"] == "results_away"]
    assert [entry["reason"] for entry in away] == ["full"]


def test_a_redis_that_cannot_save_is_waited_for(server: RedisServer, writer: Writer) -> None:
    """MISCONF is back-pressure as well: the disk is somebody's to mend, and then writing goes on."""
    blocked = server.folder / "dump.rdb"
    blocked.mkdir()
    with server.client() as client, capture_logs() as logs:
        client.config_set("save", "3600 1000000")

        def save(status: str) -> None:
            client.bgsave()
            wait_until(
                lambda: (
                    not (found := client.info("persistence"))["rdb_bgsave_in_progress"]
                    and found["rdb_last_bgsave_status"] == status
                ),
                20,
                f"saving ends as {status}",
            )

        save("err")
        writer.publish(100)
        writer.wait_away()
        wait_until(lambda: writer.outlet._tries >= 3, 10, "the outlet tried more than once")
        assert not writer.done
        blocked.rmdir()
        save("ok")
        writer.wait_done("every row is confirmed once saving works")
    assert lost(server, 100) == []
    assert {entry["reason"] for entry in logs if entry["event"] == "results_away"} == {"full"}


def test_what_redis_confirmed_and_lost_is_counted(server: RedisServer, writer: Writer) -> None:
    """A Redis that keeps nothing on disk comes back empty: as many as it lost are told, by route."""
    with server.client() as client:
        client.config_set("appendonly", "no")
    writer.publish(300)
    writer.wait_done("the first rows are confirmed")
    with capture_logs() as logs:
        server.kill()
        for file in (server.folder / "appendonlydir").iterdir():
            file.unlink()
        server.start()
        # Nothing was under way, so the outlet hears of no error: a new connection is enough to look back.
        writer.publish(10)
        writer.wait_done("rows after the loss are confirmed")
    (told,) = [entry for entry in logs if entry["event"] == "results_lost"]
    assert (told["lost"], told["checked"], told["lost_by_route"]) == (300, 300, ["digits=300"])
    assert told["ids"] == [f"r-{n}" for n in range(10)]
    assert writer.lost == {"digits": 300}
    assert lost(server, 310) == list(range(300))
    server.restart()
    writer.publish(10)
    writer.wait_done("rows after another restart are confirmed")
    assert writer.lost == {"digits": 300}


def test_a_read_only_replica_is_left_when_it_is_promoted(
    server: RedisServer, writer: Writer, tmp_path: Path
) -> None:
    """READONLY means that the master is elsewhere: connect again until writes pass."""
    at_once = ("--repl-diskless-sync-delay", "0")
    with RedisServer(tmp_path / "master", config=at_once) as master, server.client() as client:
        client.replicaof("127.0.0.1", master.port)
        wait_until(
            lambda: client.info("replication")["master_link_status"] == "up", 20, "the replica follows"
        )
        with capture_logs() as logs:
            writer.publish(100)
            writer.wait_away()
            assert not writer.done
            client.replicaof("NO", "ONE")
            writer.wait_done("every row is confirmed by the promoted server")
    assert lost(server, 100) == []
    assert {entry["reason"] for entry in logs if entry["event"] == "results_away"} == {"moving"}


def _forbid(server: RedisServer, rights: str) -> Callable[[], object]:
    """Take rights from the default user; returns how to give them back."""
    admin = server.client()
    admin.execute_command("ACL", "SETUSER", "boss", "on", ">boss", "~*", "&*", "+@all")
    admin.execute_command("AUTH", "boss", "boss")
    admin.execute_command("ACL", "SETUSER", "default", rights)

    def allow() -> None:
        admin.execute_command("ACL", "SETUSER", "default", "+@all", "~*")
        admin.close()

    return allow


def test_a_missing_right_is_named_and_waited_for(server: RedisServer, writer: Writer) -> None:
    """NOPERM is nobody's bad request: the reason is ``denied``, and it passes when the right is given."""
    writer.publish(10)
    writer.wait_done("the first rows are confirmed")
    allow = _forbid(server, "-set")
    with capture_logs() as logs:
        writer.publish(100)
        writer.wait_away()
        allow()
        writer.wait_done("every row is confirmed with the right")
    assert lost(server, 110) == []
    assert {entry["reason"] for entry in logs if entry["event"] == "results_away"} == {"denied"}


def test_close_ends_in_time_while_redis_is_away(server: RedisServer, writer: Writer) -> None:
    """Close says how many rows stay unconfirmed and its thread ends, also in the middle of a read."""
    writer.publish(10)
    writer.wait_done("the first rows are confirmed")
    server.pause()
    try:
        writer.publish(100)
        assert writer.outlet.close(0.2) == 100
        wait_until(lambda: not writer.outlet._thread.is_alive(), 5, "the outlet's thread has ended")
    finally:
        server.resume()


def test_a_key_of_another_kind_stops_nobody(server: RedisServer) -> None:
    """Somebody's list under a result's name is no answer: that row is refused, its neighbours are written."""
    refused: dict[int, Refusal] = {}

    class Hears:
        confirmed_rows = 0

        def confirmed(self, count: int) -> None:
            self.confirmed_rows += count

        def refused(self, index: int, refusal: Refusal) -> None:
            refused[index] = refusal

    with server.client() as client:
        client.rpush(result_key(FLEET, ROUTE, "r-1"), "not an answer")
    place, hears = Place(server.url, timeout_s=1.0), Hears()
    outlet = RedisResults(lambda: open_redis(place), FLEET, wake=lambda: None)
    ids = ["r-0", "r-1", "r-2"]
    outlet.publish(Results(ROUTE, ids, [b'{"n":1}'] * 3, [True] * 3, ["h"] * 3, None, 60), hears)

    def told() -> bool:
        outlet.poll()
        return hears.confirmed_rows + len(refused) == 3

    wait_until(told, 10, "every row is told")
    assert {index: each.kind for index, each in refused.items()} == {1: RefusalKind.DUPLICATE_ID}
    assert outlet.close(1) == 0
