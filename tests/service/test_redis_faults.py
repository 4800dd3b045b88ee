"""Redis dies, freezes, fills up, forgets scripts or turns read-only: nothing is lost, nobody refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inferfleet.ports import Refusal
from inferfleet.records import Results
from inferfleet.redis_access import Place, connect, connect_cluster
from inferfleet.results.redis import OutletOptions, RedisResults
from inferfleet.wire.stored import payload_hash, reply_key, result_key
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
FLEET = "faults"
OPTIONS = OutletOptions(rows_per_step=20, backoff_first_s=0.02, backoff_max_s=0.2)


class Receipts:
    """Counts confirmations; a refusal fails the test, because no request here is at fault."""

    def __init__(self) -> None:
        self.confirmed_rows = 0

    def confirmed(self, count: int) -> None:
        self.confirmed_rows += count

    def refused(self, index: int, refusal: Refusal) -> None:
        raise AssertionError(f"row {index} was refused: {refusal}")


class Writer:
    """Publishes numbered results and knows how many were confirmed."""

    def __init__(self, server: RedisServer, *, timeout_s: float = 1.0) -> None:
        place = Place(server.url, timeout_s=timeout_s)
        self.outlet = RedisResults(lambda: connect(place), FLEET, wake=lambda: None, options=OPTIONS)
        self.receipts = Receipts()
        self.published = 0

    def publish(self, count: int, *, body_bytes: int = 0, reply: str | None = None) -> None:
        numbers = range(self.published, self.published + count)
        bodies = [json.dumps({"model_name": "m", "n": n, "pad": "x" * body_bytes}).encode() for n in numbers]
        ids = [f"r-{n}" for n in numbers]
        hashes = [payload_hash(id_.encode()) for id_ in ids]
        replies = None if reply is None else [reply] * count
        self.outlet.publish(
            Results("digits", ids, bodies, [True] * count, hashes, replies, 600), self.receipts
        )
        self.published += count

    @property
    def done(self) -> bool:
        self.outlet.poll()
        return self.receipts.confirmed_rows == self.published

    def wait_done(self, what: str, timeout_s: float = 20.0) -> None:
        wait_until(lambda: self.done, timeout_s, what)

    def wait_away(self) -> None:
        wait_until(lambda: self.outlet.away_since is not None, 10, "the outlet says that Redis is away")


def lost(server: RedisServer, count: int) -> list[int]:
    """The numbers whose result does not stand with its own value."""
    with server.client() as client:
        bodies = client.mget([result_key(FLEET, "digits", f"r-{n}") for n in range(count)])
    return [n for n, body in enumerate(bodies) if body is None or json.loads(body)["n"] != n]


@pytest.fixture
def server(data_folder: Path) -> Iterator[RedisServer]:
    with RedisServer(data_folder) as started:
        yield started


@pytest.fixture
def writer(server: RedisServer) -> Iterator[Writer]:
    made = Writer(server)
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
        assert {fields[b"id"] for _, fields in client.xrange(reply_key(FLEET, "c"))} == {
            b"r-%d" % n for n in range(100, 600)
        }


def test_a_redis_killed_in_the_middle_loses_nothing(server: RedisServer, writer: Writer) -> None:
    """A step whose answer never came is written again; the values that stood are kept."""
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


def test_forgotten_scripts_are_loaded_again(server: RedisServer, writer: Writer) -> None:
    """SCRIPT FLUSH costs one more round trip and is no outage."""
    writer.publish(50, reply="c")
    writer.wait_done("the first rows are confirmed")
    with server.client() as client:
        client.script_flush()
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
        wait_until(lambda: writer.outlet._tries >= 2, 10, "the outlet tried more than once")
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
        wait_until(lambda: writer.outlet._tries >= 3, 10, "the outlet tried more than once")
        assert not writer.done
        client.config_set("maxmemory", 0)
        writer.wait_done("every row is confirmed once there is room")
    assert lost(server, 1000) == []
    away = [entry for entry in logs if entry["event"] == "results_away"]
    assert [entry["reason"] for entry in away] == ["full"]


def test_a_read_only_replica_is_left_when_it_is_promoted(
    server: RedisServer, writer: Writer, tmp_path: Path
) -> None:
    """READONLY means that the master is elsewhere: connect again until writes pass."""
    with RedisServer(tmp_path / "master") as master, server.client() as client:
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


def test_a_cluster_takes_one_row_a_step(data_folder: Path) -> None:
    """On a cluster every key goes to its own slot; the rules are the same."""
    config = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
    with RedisServer(data_folder, config=config) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("info")["cluster_state"] == "ok", 20, "the cluster is up")
        place = Place(server.url, mode="cluster")
        options = OutletOptions(rows_per_step=1)
        outlet = RedisResults(lambda: connect_cluster(place), FLEET, wake=lambda: None, options=options)
        receipts = Receipts()
        bodies = [b'{"n": %d}' % n for n in range(50)]
        ids = [f"r-{n}" for n in range(50)]
        group = Results("digits", ids, bodies, [True] * 50, ["f" * 32] * 50, ["c"] * 50, 60)
        outlet.publish(group, receipts)
        outlet.publish(group, receipts)
        assert outlet.close(20) == 0
        assert receipts.confirmed_rows == 100
        with connect_cluster(place) as cluster:
            assert all(json.loads(cluster.get(result_key(FLEET, "digits", id_)))["n"] >= 0 for id_ in ids)
            assert cluster.xlen(reply_key(FLEET, "c")) == 100
