"""The operator's verbs against real Kafka and Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Consumer, Producer, TopicPartition

from inferfleet.cli import cli
from inferfleet.control.pauses import RedisPauses
from tests.conftest import TopicFactory
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


class Fleet:
    """A folder with settings and one route, and the command line run on it."""

    def __init__(
        self, folder: Path, client: Mapping[str, str], route: str, source: str, **redis: str
    ) -> None:
        self.folder = folder
        self.source = source
        self.results = f"{source}.results"
        self.retries = [f"{source}.ops.default.retry.{delay}" for delay in (5000, 30000, 300000)]
        properties = {key: value for key, value in client.items() if key != "bootstrap.servers"}
        self.write(client["bootstrap.servers"], properties, **redis)
        (folder / "routes.toml").write_text(
            f'[[route]]\nname = "{route}"\nsource = "kafka:{source}"\n'
            f'results = ["kafka:{self.results}"]\nmodel = "m"\nversion = "1"\n'
        )

    def write(self, bootstrap: str, properties: Mapping[str, str], **redis: str) -> None:
        lines = ['[fleet]\nname = "ops"', f'[kafka]\nbootstrap_servers = "{bootstrap}"', "[kafka.client]"]
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in properties.items()]
        lines += ["[redis]", *(f"{key} = {json.dumps(value)}" for key, value in redis.items())]
        lines += ['[worker]\nadmin_address = "127.0.0.1:0"']
        (self.folder / "fleet.toml").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, ["--config", str(self.folder / "fleet.toml"), *arguments])
        assert result.exit_code == code, result.output
        return result

    def findings(self, code: int = 1) -> dict[str, tuple[str, str]]:
        output = self.run("doctor", "--no-load", "--json", code=code).stdout
        return {each["name"]: (each["verdict"], each["text"]) for each in json.loads(output)}


@pytest.fixture
def fleet(kafka: KafkaServer, topic: TopicFactory, tmp_path: Path) -> Fleet:
    """A fleet whose source has three partitions and whose other topics are missing."""
    return Fleet(tmp_path, kafka.client_config(), "r", topic("requests", partitions=3))


def test_apply_creates_what_is_missing_and_twice_changes_nothing(fleet: Fleet) -> None:
    """--apply creates missing topics with the counts asked for and leaves standing ones alone."""
    first = json.loads(fleet.run("topics", "plan", "--apply", "--json", "--partitions", "4").stdout)
    second = json.loads(fleet.run("topics", "plan", "--apply", "--json").stdout)

    assert [each["outcome"] for each in first] == ["stood", *["created"] * 5]
    assert [(each["outcome"], each["partitions"]) for each in second] == [
        ("stood", 3),
        ("stood", 4),
        *[("stood", 1)] * 4,
    ]


def test_doctor_names_missing_topics_and_then_the_count_that_differs(fleet: Fleet) -> None:
    """Each missing topic is a FAIL of its own; a results topic of another width is a warning."""
    before = fleet.findings()
    fleet.run("topics", "plan", "--apply", "--partitions", "4")
    after = fleet.findings()

    assert before[f"topic {fleet.source}"][0] == "ok"
    assert before[f"topic {fleet.results}"][0] == "FAIL"
    assert "does not exist" in before[f"topic {fleet.results}"][1]
    assert after[f"topic {fleet.results}"][0] == "warn"
    assert "4 partitions, its source has 3" in after[f"topic {fleet.results}"][1]
    assert {after[f"topic {name}"][0] for name in fleet.retries} == {"ok"}
    assert after["group ops.default"][0] == after["group ops.default.retry"][0] == "ok"


def test_doctor_takes_the_expected_partition_count(fleet: Fleet) -> None:
    """--partitions fails a source of another width."""
    output = fleet.run("doctor", "--no-load", "--partitions", "6", code=1).stdout

    assert "3 partitions, expected 6" in output


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_status_shows_members_and_lag(fleet: Fleet, kafka: KafkaServer, protocol: str) -> None:
    """A member appears with its partitions; lag is counted from the start where nothing was committed."""
    producer = Producer(kafka.client_config())
    for number in range(10):
        producer.produce(fleet.source, b"x", partition=number % 2)
    assert producer.flush(10) == 0
    group = f"ops-{protocol}"
    text = (fleet.folder / "fleet.toml").read_text().replace("[kafka]", f'[kafka]\ngroup = "{group}"')
    (fleet.folder / "fleet.toml").write_text(text)
    consumer = Consumer(
        kafka.client_config()
        | {"group.id": group, "group.protocol": protocol, "client.id": "w-1", "auto.offset.reset": "earliest"}
        | {"enable.auto.commit": False}
    )
    try:
        consumer.subscribe([fleet.source])
        taken = []
        wait_until(lambda: taken.extend(consumer.consume(10, 0.2)) or len(taken) == 10, 20, "ten records")
        last = next(each for each in taken if each.partition() == 0 and each.offset() == 2)
        consumer.commit(message=last, asynchronous=False)
        fleet.run("topics", "plan", "--apply")
        producer.produce(f"{fleet.source}.{group}.retry.5000", b"again")
        assert producer.flush(10) == 0
        pools = json.loads(fleet.run("status", "--json").stdout)["pools"]
        shown = fleet.run("status").stdout
    finally:
        consumer.close()

    assert pools[0]["note"] == ""
    assert [(m["client"], m["partitions"]) for m in pools[0]["members"]] == [("w-1", 3)]
    assert [(p["committed"], p["end"], p["lag"], p["holder"]) for p in pools[0]["partitions"]] == [
        (3, 5, 2, "w-1"),
        (None, 5, 5, "w-1"),
        (None, 0, 0, "w-1"),
    ]
    assert "1 member  lag 7  1 wait for a further attempt" in shown
    assert [(each["topic"], each["lag"]) for each in pools[0]["retries"]] == [
        (f"{fleet.source}.{group}.retry.{delay}", lag) for delay, lag in ((5000, 1), (30000, 0), (300000, 0))
    ]


def test_ends_of_transactions_are_no_lag(fleet: Fleet, kafka: KafkaServer) -> None:
    """What a redrive wrote and a worker answered waits no longer; a record behind such an end still does."""
    fleet.run("topics", "plan", "--apply")
    retries, group = fleet.retries[0], "ops.default.retry"
    producer = Producer(kafka.client_config() | {"transactional.id": f"{retries}.redrive"})
    producer.init_transactions(20)
    for topic, partition in ((retries, 0), (fleet.source, 0), (fleet.source, 1)):
        producer.begin_transaction()
        producer.produce(topic, b"x", partition=partition)
        producer.commit_transaction(20)
    producer.begin_transaction()
    producer.produce(fleet.source, b"given up", partition=0)
    assert producer.flush(20) == 0
    producer.abort_transaction(20)
    for name, places in ((group, [(retries, 0)]), ("ops.default", [(fleet.source, 0)])):
        consumer = Consumer(kafka.client_config() | {"group.id": name})
        try:
            consumer.commit(offsets=[TopicPartition(*place, 1) for place in places], asynchronous=False)
        finally:
            consumer.close()

    (pool,) = json.loads(fleet.run("status", "--json").stdout)["pools"]

    assert [(each["committed"], each["end"], each["lag"]) for each in pool["partitions"]] == [
        (1, 4, 0),
        (None, 2, 1),
        (None, 0, 0),
    ]
    (again, *_) = pool["retries"]
    assert (again["committed"], again["end"], again["lag"]) == (1, 2, 0)
    assert pool["retrying"] == 0
    assert "wait for a further attempt" not in fleet.run("status").stdout


def _bury(kafka: KafkaServer, topic: str, count: int) -> None:
    producer = Producer(kafka.client_config())
    for number in range(count):
        headers = [
            ("inferfleet-id", b"r-%d" % number),
            ("inferfleet-origin-topic", b"t"),
            ("inferfleet-origin-partition", b"0"),
            ("inferfleet-origin-offset", b"%d" % number),
            ("inferfleet-code", b"E_SHAPE" if number % 2 else b"E_DECODE"),
            ("inferfleet-error", b"bad \x1b[31mrow"),
            ("inferfleet-failed-at", b"1790000000000"),
        ]
        producer.produce(topic, bytes([number, 255]), key=b"k", headers=headers)
    assert producer.flush(10) == 0


def test_dead_letters_are_listed_and_shown_untouched(fleet: Fleet, kafka: KafkaServer) -> None:
    """list gives the newest, filtered by code; show --raw gives the original bytes; nothing is committed."""
    fleet.run("topics", "plan", "--apply")
    assert "no dead letters" in fleet.run("dlt", "list", "r").stdout
    _bury(kafka, f"{fleet.source}.ops.default.dlt", 30)

    newest = json.loads(fleet.run("dlt", "list", "r", "--limit", "3", "--json").stdout)
    shaped = json.loads(fleet.run("dlt", "list", "r", "--code", "E_SHAPE", "--limit", "2", "--json").stdout)
    text = fleet.run("dlt", "list", "r").stdout
    raw = fleet.run("dlt", "show", "r", "0:7", "--raw").stdout_bytes

    assert [each["offset"] for each in newest] == [27, 28, 29]
    assert [each["offset"] for each in shaped] == [27, 29]
    assert "\x1b" not in text
    assert "t[0]@29" in text
    assert raw == bytes([7, 255])
    assert "holds the offsets 0 to 29, not 30" in fleet.run("dlt", "show", "r", "0:30", code=1).stderr


def test_dead_letters_of_a_missing_topic_are_one_line(fleet: Fleet) -> None:
    """A dead-letter topic that does not exist is named with the mend."""
    said = fleet.run("dlt", "list", "r", code=1).stderr

    assert said.count("\n") == 1
    assert f"topic {fleet.source}.ops.default.dlt does not exist" in said


def test_exactly_the_printed_rights_are_enough_for_doctor(secure_kafka: KafkaServer, tmp_path: Path) -> None:
    """A worker without rights is told which; with the printed rules doctor finds nothing, nor does status."""
    source = "secured.requests"
    fleet = Fleet(tmp_path, secure_kafka.client_config("worker"), "r", source)
    one = dict.fromkeys([f"{source}.ops.default.dlt", *fleet.retries], 1)
    secure_kafka.create_topics({source: 2, f"{source}.results": 2, **one})

    before = fleet.findings()
    rules = fleet.run(
        "topics", "plan", "--format", "acls",
        "--principal", "User:worker", "--client-principal", "User:alice", "--operator-principal", "User:bob",
    ).stdout  # fmt: skip
    secure_kafka.apply_acls(rules)
    wait_until(lambda: fleet.findings()[f"topic {source}"][0] == "ok", 10, "the rules to hold")
    after = fleet.findings()
    operator = Fleet(tmp_path, secure_kafka.client_config("bob"), "r", source)
    pools = json.loads(operator.run("status", "--json").stdout)["pools"]

    assert before[f"topic {source}"] == (
        "FAIL",
        "source of route r: this user has no right on it, or it does not exist; "
        "`inferfleet topics plan --format acls` prints the rights",
    )
    assert before["group ops.default"][0] == "FAIL"
    kafka_lines = {
        name: verdict for name, (verdict, _) in after.items() if name.startswith(("kafka", "topic", "group"))
    }
    assert set(kafka_lines.values()) == {"ok"}
    assert pools[0]["note"] == ""
    assert "no dead letters" in operator.run("dlt", "list", "r").stdout
    # The operator is no worker: it has no right to take or to answer.
    assert "no READ right" in operator.findings()[f"topic {source}"][1]


def test_a_wrong_password_is_named_at_once(secure_kafka: KafkaServer, tmp_path: Path) -> None:
    """A refused login is told apart from an absent broker, without the password."""
    client = secure_kafka.client_config("worker") | {"sasl.password": "canary-secret"}
    output = Fleet(tmp_path, client, "r", "x").run("doctor", "--no-load", code=1).output

    assert "refused the login" in output
    assert "check sasl.username, sasl.password" in output
    assert "canary-secret" not in output


def test_a_plain_client_at_a_tls_port_is_told_about_the_protocol(
    secure_kafka: KafkaServer, tmp_path: Path
) -> None:
    """Speaking without TLS to a TLS port names security.protocol."""
    client = {"bootstrap.servers": secure_kafka.bootstrap_servers}
    output = Fleet(tmp_path, client, "r", "x").run("doctor", "--no-load", code=1).output

    assert "security.protocol" in output


def test_redis_is_looked_at_where_a_route_needs_it(
    fleet: Fleet, redis_server: RedisServer, kafka: KafkaServer
) -> None:
    """A Redis that answers is ok, one that is away is a FAIL; without a redis result it is not asked."""
    assert "redis" not in fleet.findings()
    routes = fleet.folder / "routes.toml"
    routes.write_text(routes.read_text().replace("results = [", 'results = ["redis", '))
    fleet.write(kafka.bootstrap_servers, {}, url=redis_server.url)
    there = fleet.findings()["redis"]
    fleet.write(kafka.bootstrap_servers, {}, url="redis://127.0.0.1:1/0")
    away = fleet.findings()["redis"]

    assert there[0] == "ok"
    assert away[0] == "FAIL"
    assert "check [redis] url" in away[1]


def test_a_pause_is_shared_by_the_whole_pool(
    fleet: Fleet, kafka: KafkaServer, redis_server: RedisServer
) -> None:
    """What a person pauses every worker sees, what a brake pauses a person resumes; status shows both."""
    routes = fleet.folder / "routes.toml"
    routes.write_text(routes.read_text().replace("results = [", 'results = ["redis", '))
    fleet.write(kafka.bootstrap_servers, {}, url=redis_server.url)
    assert "was not paused" in fleet.run("route", "resume", "r").stdout
    paused = fleet.run("route", "pause", "r", "--reason", "model 7", "--actor", "eva").stdout
    again = fleet.run("route", "pause", "r", "--reason", "other").stdout
    board = RedisPauses(redis_server.client, "ops", "w-1")
    try:
        board.watch(["r"])
        wait_until(lambda: board.current() == {"r": "model 7 (by eva)"}, 10, "the worker sees the pause")
        shown = fleet.run("status").stdout
        resumed = fleet.run("route", "resume", "r").stdout
        wait_until(lambda: not board.current(), 10, "the worker sees its end")
        board.pause("r", "20 failures in a row")
        wait_until(lambda: "20 failures" in fleet.run("status").stdout, 10, "status shows the brake")
        ended = fleet.run("route", "resume", "r").stdout
    finally:
        board.close()

    assert "route r is paused for pool default: model 7 (by eva)" in paused
    assert "route r was paused already: model 7 (by eva)\n" in again
    assert "route r is paused: model 7 (by eva); `inferfleet route resume r` ends it" in shown
    assert "it was paused: model 7 (by eva)" in resumed
    assert "it was paused: 20 failures in a row" in ended


def test_the_status_of_a_running_worker_is_shown(fleet: Fleet) -> None:
    """What the admin address says of paused routes is shown with the reason."""
    from prometheus_client import CollectorRegistry

    from inferfleet.telemetry.admin import AdminServer, Health, WorkerStatus

    told = WorkerStatus(worker="w-1", group="ops.default", ready=True, paused={"r": "redis is away"})
    with AdminServer("127.0.0.1:0", CollectorRegistry(), lambda: Health(True, True), lambda: told) as admin:
        shown = fleet.run("status", "--admin", admin.address).stdout
        plain = json.loads(fleet.run("status", "--admin", admin.address, "--json").stdout)

    assert "route r is paused: redis is away" in shown
    assert msgspec.convert(plain["workers"][0]["status"], WorkerStatus) == told
