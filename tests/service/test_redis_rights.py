"""The rights that the security page grants in Redis: enough for every part, and nothing beside."""

from __future__ import annotations

import json
import re
import secrets
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from inferfleet import Client
from inferfleet.control.feed import FeedOptions, RedisRouteFeed
from inferfleet.control.keys import COMMIT, REPORT
from inferfleet.control.marks import RedisMarks
from inferfleet.control.pauses import RedisPauses
from inferfleet.control.reporter import RedisReporter
from inferfleet.control.store import RedisControlStore
from inferfleet.plane import WorkerReport
from inferfleet.records import Results
from inferfleet.redis_access import Place, open_redis
from inferfleet.results.redis import RedisResults
from tests.contract.answering import Answerer, TopicSource
from tests.support.control import change, draft, window
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_server import RedisServer
from tests.support.redis_writer import Receipts, Writer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "security.md"
FLEET = "inferfleet"
ON_A_CLUSTER = ["+cluster|slots", "+command", "+asking"]


def documented(user: str) -> list[str]:
    """The words behind ``ACL SETUSER`` in the page's line for a user."""
    text = PAGE.read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^redis-cli (ACL SETUSER {user} .*)$", text, re.MULTILINE)
    return shlex.split(line)


def commands(words: list[str]) -> set[str]:
    """The commands that a line grants, in its selectors too."""
    return set(re.findall(r"\+([\w|]+)", " ".join(words)))


def place(server: RedisServer, user: str) -> Place:
    return Place(server.url, credentials=lambda: (user, "secret"))


@pytest.fixture
def server(data_folder: Path) -> Iterator[RedisServer]:
    """A server that knows the page's users and has counted nothing yet."""
    with RedisServer(data_folder) as started:
        with started.client() as admin:
            for user in ("fleet", "shop", "ops", "coordinator"):
                admin.execute_command(*documented(user))
            write_routes(Place(started.url))
            admin.config_resetstat()
        yield started


def write_routes(where: Place) -> None:
    """Write a log of routes, with all rights."""
    store = RedisControlStore(lambda: open_redis(where), FLEET, address=where.shown, utc_ms=lambda: 1_000)
    store.commit(change(draft(), reset=True))
    store.close()


BY_THE_ADMINISTRATOR = {"hello", "auth", "client|setinfo", "config|resetstat", "info", "acl|log"}


def used(server: RedisServer) -> set[str]:
    """The commands that the users called; none of them was denied one."""
    with server.client() as admin:
        stats = admin.info("commandstats")
        assert admin.acl_log() == []
    return {name.removeprefix("cmdstat_") for name in stats} - BY_THE_ADMINISTRATOR


def write_everything(where: Place) -> None:
    """Do with the worker's user all that a worker does in Redis."""
    client = open_redis(where)
    client.ping()
    client.close()
    receipts = Receipts()
    outlet = RedisResults(lambda: open_redis(where), FLEET, wake=lambda: None)
    names = [f"r-{secrets.token_hex(4)}" for _ in range(20)]
    bodies = [b'{"model_name":"m"}'] * 20
    group = Results("digits", names, bodies, [True] * 20, ["f" * 32] * 20, ["c"] * 20, 60)

    def told() -> int:
        outlet.poll()
        return receipts.confirmed_rows

    for goal in (20, 40, 60):
        outlet.publish(group, receipts)
        wait_until(lambda goal=goal: told() == goal, 10, "results are confirmed")
        assert outlet._servers is not None
        outlet._servers.disconnect()  # and looks back over the next connection
    assert outlet.close(5) == 0
    marks = RedisMarks(lambda: open_redis(where), FLEET, "default", "w-1")
    marks.running()
    marks.save({"r-1": 1})
    assert marks.load() == {"r-1": 1}
    marks.ended()
    pauses = RedisPauses(lambda: open_redis(where), FLEET, "w-1")
    pauses.watch(["digits"])
    pauses.pause("digits", "tried")
    wait_until(lambda: not pauses._unsaid, 10, "the pause is written")
    pauses.resume("digits")
    wait_until(lambda: not pauses._unsaid, 10, "the pause is taken away")
    pauses.close()
    follow_and_report(where)


class Told:
    """A client that remembers what was answered."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.answered: list[str] = []

    def execute_command(self, *words: Any) -> Any:
        answer = self.client.execute_command(*words)
        self.answered.append(words[0])
        return answer

    def close(self) -> None:
        """The test closes it."""


def follow_and_report(where: Place) -> None:
    """Do with the worker's user all that a worker does in the control plane."""
    told = Told(open_redis(where))
    feed = RedisRouteFeed(
        lambda: told,
        FLEET,
        address=where.shown,
        copy=None,
        options=FeedOptions(block_s=0.05),
    )
    feed.start()
    assert feed.log().head.number >= 1
    wait_until(lambda: told.answered.count("GET") > 3, 10, "it has read news, and looked at the head again")
    assert not feed.stale
    feed.close()
    told.client.close()
    reporter = RedisReporter(lambda: open_redis(where), FLEET, "default", "w-1")
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
    reporter.append([window()])
    reporter.close()
    assert reporter.dropped == 0


def lead_everything(where: Place) -> None:
    """Do with the coordinator's user all that it does, but for reading what workers say."""
    store = RedisControlStore(lambda: open_redis(where), FLEET, address=where.shown, utc_ms=lambda: 1_000)
    lease = store.lead("c-1", 60_000)
    assert store.lead("c-1", 60_000) == lease
    assert lease is not None
    store.commit(change(draft(), documents={"r": (0, b"{}")}, lease=lease, reset=True))
    store.commit(change(documents={"r": (1, None)}, lease=lease))
    store.load()
    store.history()
    store.audit()
    store.documents()
    store.resign(lease)
    store.workers()
    store.windows("digits")
    store.close()


def test_a_coordinator_uses_exactly_the_rights_of_its_line(server: RedisServer) -> None:
    """All that it does passes, and nothing is granted that it does not use."""
    where = place(server, "coordinator")
    with open_redis(where) as client:
        client.ping()
    lead_everything(where)
    follow_and_report(place(server, "fleet"))
    worker = commands(documented("fleet"))
    with server.client() as admin:
        admin.zadd(f"{{{FLEET}}}:workers:index", {"default:w-2": 1})
        admin.set(f"{{{FLEET}}}:paused:digits", b"a brake")
    store = RedisControlStore(lambda: open_redis(where), FLEET, address=where.shown, utc_ms=lambda: 1_000)
    store.resume("digits", store.paused("digits"))
    assert store.paused("digits") == ""
    assert store.workers() == []
    assert len(store.windows("digits")[0]) == 1
    store.close()
    granted = commands(documented("coordinator"))
    assert granted <= used(server) <= granted | worker


def test_a_worker_uses_exactly_the_rights_of_its_line(server: RedisServer) -> None:
    """All that it does passes, no command is denied on the way, and none is granted that it does not use."""
    write_everything(place(server, "fleet"))
    assert used(server) == commands(documented("fleet"))


DENIED_TO_A_WORKER = [
    ("EVAL", "return 1", 0),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "FLUSH"),
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("CONFIG", "GET", "*"),
    ("CLIENT", "LIST"),
    ("ACL", "LIST"),
    ("DEL", "inferfleet:result:digits:a"),
    ("EXPIRE", "inferfleet:result:digits:a", 1),
    ("XREAD", "STREAMS", "inferfleet:reply:c", "0"),
    ("GET", "other:result:digits:a"),
    ("SET", "other:result:digits:a", "x"),
    ("SET", "inferfleet:else", "x"),
    ("SET", "{inferfleet}:routes", "x"),
    ("HSET", "{inferfleet}:routes", "digits", "x"),
    ("SET", "{inferfleet}:head", "x"),
    ("DEL", "{inferfleet}:head"),
    ("XADD", "{inferfleet}:revisions", "*", "a", "b"),
    ("XADD", "{inferfleet}:audit", "*", "a", "b"),
    ("XRANGE", "{inferfleet}:audit", "-", "+"),
    ("HSET", "{inferfleet}:rollouts", "r", "x"),
    ("HGETALL", "{inferfleet}:rollouts"),
    ("SET", "{inferfleet}:lease", "x"),
    ("INCR", "{inferfleet}:lease:token"),
    ("EVALSHA", COMMIT.sha, 1, "{inferfleet}:head"),
    ("EVALSHA", REPORT.sha, 1, "{inferfleet}:routes"),
    ("XRANGE", "{inferfleet}:reports:digits", "-", "+"),
    ("HGET", "{inferfleet:result:digits:a}:again", "same"),
    ("XADD", "other:reply:c", "*", "a", "b"),
]
DENIED_TO_A_CALLER = [
    ("SET", "inferfleet:result:digits:a", "x"),
    ("DEL", "inferfleet:result:digits:a"),
    ("XADD", "inferfleet:result:digits:a", "*", "a", "b"),
    ("GET", "other:result:digits:a"),
    ("EVALSHA", "0" * 40, 0),
    ("HINCRBY", "{inferfleet:result:digits:a}:again", "same", 1),
    ("DEL", "{inferfleet}:paused:digits"),
    ("KEYS", "*"),
]
DENIED_TO_A_COORDINATOR = [
    ("GET", "inferfleet:result:digits:a"),
    ("SET", "{inferfleet}:paused:digits", "x"),
    ("SET", "{inferfleet}:workers:default:w-1", "x"),
    ("XADD", "{inferfleet}:reports:digits", "*", "a", "b"),
    ("SET", "{other}:head", "x"),
    ("EVAL", "return 1", 0),
    ("FLUSHALL",),
]
DENIED_TO_AN_OPERATOR = [
    ("GET", "inferfleet:result:digits:a"),
    ("SET", "inferfleet:result:digits:a", "x"),
    ("SET", "{inferfleet}:crash:default", "x"),
    ("DEL", "inferfleet:reply:c"),
]


@pytest.mark.parametrize(
    ("user", "forbidden"),
    [
        ("fleet", DENIED_TO_A_WORKER),
        ("shop", DENIED_TO_A_CALLER),
        ("ops", DENIED_TO_AN_OPERATOR),
        ("coordinator", DENIED_TO_A_COORDINATOR),
    ],
)
def test_everything_else_is_denied(server: RedisServer, user: str, forbidden: list[tuple[Any, ...]]) -> None:
    """Other keys, other commands, and granted commands on keys that they are not meant for."""
    with open_redis(place(server, user)) as client:
        for words in forbidden:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)


def test_a_script_reaches_no_key_of_another_fleet(server: RedisServer) -> None:
    """The script is checked key by key: neither its result nor its counter may be another fleet's."""
    where = place(server, "fleet")
    write_everything(where)
    other = Writer(where)  # whose fleet has another name
    other.publish(1)
    other.wait_away()
    assert other.outlet._trouble is not None
    assert other.outlet._trouble.reason == "denied"
    assert other.outlet.close(0.1) == 1


def test_an_operator_uses_exactly_the_rights_of_its_line(server: RedisServer) -> None:
    """Pausing, showing and resuming a route passes and needs all of them."""
    pauses = RedisPauses(lambda: open_redis(place(server, "ops")), FLEET, "ops")
    with open_redis(place(server, "ops")) as client:
        client.ping()
    pauses.watch(["digits"])
    pauses.pause("digits", "tried")
    wait_until(lambda: not pauses._unsaid, 10, "the pause is written")
    pauses.resume("digits")
    wait_until(lambda: not pauses._unsaid, 10, "the pause is taken away")
    pauses.close()
    assert used(server) == commands(documented("ops"))


def config_of(folder: Path, kafka: Any, fleet: str, said: str, source: str) -> Path:
    config = folder / "fleet.toml"
    broker = f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
    users = 'username = "shop"\npassword = "secret"\n'
    config.write_text(f'[fleet]\nname = "{fleet}"\n{broker}[redis]\n{said}{users}')
    (folder / "routes.toml").write_text(
        f'[[route]]\nname = "sums"\nsource = "kafka:{source}"\nresults = ["redis"]\n'
        'model = "sum"\nversion = "1"\n'
    )
    return config


def ask_everything(config: Path) -> None:
    """Do with the caller's user all that a client does in Redis."""
    with Client(str(config)) as client:
        name = client.submit("sums", {"x": [[1.0, 2.0]]})
        assert client.result(name, 30).outputs["sum"].item() == 3
    with Client(str(config), reply=False) as client:
        assert list(client.peek("sums", [name])) == [name]


def test_a_caller_uses_exactly_the_rights_of_its_line(
    server: RedisServer, kafka: Any, topic: Callable[..., str], tmp_path: Path
) -> None:
    """Submitting, waiting, reading and closing pass; what is granted beside is the check of an operator."""
    source = topic("requests")
    taking = TopicSource(kafka.bootstrap_servers, source, f"rights.{source}")
    config = config_of(tmp_path, kafka, FLEET, f'url = "{server.url}"\n', source)
    with Answerer(taking, place(server, "fleet"), FLEET, "sums"):
        ask_everything(config)
    granted = commands(documented("shop"))
    worker = commands(documented("fleet"))
    with open_redis(place(server, "shop")) as client:
        client.ping()
    assert granted <= used(server) <= granted | worker


def test_the_same_rights_are_enough_on_a_cluster(
    redis_cluster: RedisCluster, kafka: Any, topic: Callable[..., str], tmp_path: Path
) -> None:
    """With the three rights more that the page names, on every node."""
    assert f"`{shlex.join(ON_A_CLUSTER)}`" in PAGE.read_text()
    for user in ("fleet", "shop"):
        redis_cluster.on_all(*documented(user), *ON_A_CLUSTER)
    redis_cluster.on_all("ACL", "LOG", "RESET")
    write_routes(Place(mode="cluster", nodes=redis_cluster.addresses))
    source = topic("requests")
    taking = TopicSource(kafka.bootstrap_servers, source, f"rights.{source}")
    nodes = redis_cluster.addresses
    said = f'mode = "cluster"\nnodes = {json.dumps(nodes)}\n'
    config = config_of(tmp_path, kafka, FLEET, said, source)
    worker = Place(mode="cluster", nodes=nodes, credentials=lambda: ("fleet", "secret"))
    with Answerer(taking, worker, FLEET, "sums"):
        ask_everything(config)
        write_everything(worker)
    assert redis_cluster.on_all("ACL", "LOG") == [[], [], []]
