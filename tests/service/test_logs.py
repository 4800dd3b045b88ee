"""What real processes log: little in a flood, documents that a shipper takes, nothing of what they saw."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from inferfleet.telemetry.vocabulary import KEYS
from tests.support import programs
from tests.support.elasticsearch import Bulk
from tests.support.fleet import COMMAND, Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Sender, row_of, v2_body
from tests.support.process import ServerProcess, logged_events
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
CONF = Path(__file__).resolve().parents[2] / "deploy" / "logs" / "rsyslog.conf"

HANDLER = """
import numpy as np
from inferfleet.errors import Code, RequestError

class Model:
    def predict(self, tensors):
        x = tensors["x"]
        if (x[:, 0] == -1).any():
            raise RequestError(Code.SCHEMA, f"canary-words about {x.tolist()}")
        if (x[:, 0] == -2).any():
            raise ValueError(f"canary-words about {x.tolist()}")
        if (x[:, 0] == -3).any():
            return {"check": x}
        return {"check": np.zeros((len(x), 2), np.int64)}
"""
UNREAD, WRONG, FAILED = 3000, 500, 500
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def row(first: float) -> tuple[float, ...]:
    """A row whose second number is a mark, too."""
    return (first, 31337.25, 0.0, 0.0)


class Flooded(NamedTuple):
    """A worker that has seen a flood, and the lines that it left."""

    worker: WorkerProcess
    documents: list[dict[str, Any]]

    def of(self, action: str) -> list[dict[str, Any]]:
        return [each for each in self.documents if each["message"] == action]


@pytest.fixture(scope="module")
def flooded(kafka: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    """Thousands of bad rows, of three kinds, taken by a worker that logs for Elastic and ends when idle."""
    settings = {"log": {"format": "ecs"}}
    with Fleet(tmp_path_factory.mktemp("flood"), kafka, settings=settings) as fleet:
        fleet.handler(HANDLER, "picky")
        route = fleet.route("flood", model="picky", partitions=1)
        fleet.prepare()
        sender = Sender(kafka.client_config())
        trace = [("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode())]
        for n in range(UNREAD):
            sender.send(fleet.source(route), b"canary-body", id=f"u-{n}", headers=trace)
        for n in range(WRONG):
            sender.send(fleet.source(route), v2_body([(1.0, 2.0, 3.0)]), id=f"w-{n}")
        for n in range(FAILED):
            sender.send(fleet.source(route), v2_body([row(-1)]), id=f"f-{n}")
            sender.send(fleet.source(route), v2_body([row_of(n)]), id=f"g-{n}")
        sender.flush()
        worker = fleet.launch("w-flood", "--until-idle", "2")
        assert worker.wait(120) == 0, worker.log_tail()
        lines = worker.log.read_text().splitlines()
        yield Flooded(worker, [json.loads(line) for line in lines])


def test_a_flood_of_bad_rows_leaves_a_few_lines_and_the_right_counts(flooded: Flooded) -> None:
    """Every failed request is in a line or in a count of lines that were held back."""
    failed = flooded.of("requests_failed")
    held = [each for each in flooded.of("lines_suppressed") if each["inferfleet"]["of"] == "requests_failed"]
    told: Counter[str] = Counter()
    for each in failed:
        told[each["error"]["code"]] += each["inferfleet"]["requests"]
        told[each["error"]["code"]] += each["inferfleet"].get("suppressed_requests", 0)
    for each in held:
        assert each["inferfleet"]["route"] == "flood"
        told[each["error"]["code"]] += each["inferfleet"]["suppressed_requests"]

    assert told == {"E_DECODE": UNREAD, "E_SHAPE": WRONG, "E_SCHEMA": FAILED}
    assert len(failed) <= 3 * 5 * 3, "five lines of each kind in a minute, and the flood takes no three"
    assert sum(each["inferfleet"].get("suppressed", 0) for each in (*failed, *held)) > 100
    assert failed[0]["trace"] == {"id": TRACE}
    by_batch = [each for each in failed if each["error"]["code"] == "E_SCHEMA"]
    assert all(each["inferfleet"]["batch"] > 0 for each in by_batch)
    assert {(each["inferfleet"]["model"], each["inferfleet"]["version"]) for each in by_batch} == {
        ("picky", "1")
    }


def test_each_line_is_a_document_and_says_who(flooded: Flooded) -> None:
    """Of the schema's version, by this worker, with keys that the vocabulary has, and no canary in it."""
    ours = {key.name(name) for name, key in KEYS.items()}
    for each in flooded.documents:
        assert list(each)[:4] == ["@timestamp", "log.level", "message", "ecs.version"]
        assert each["service"]["name"] == "inferfleet-worker"
        assert each["service"]["node"] == {"name": "w-flood"}
        assert {f"inferfleet.{key}" for key in each["inferfleet"]} <= ours
        assert "labels" not in each
    text = flooded.worker.log.read_text()
    assert "canary" not in text
    assert "31337" not in text


def test_the_shipper_of_the_page_brings_every_line(flooded: Flooded, tmp_path: Path) -> None:
    """rsyslog, with the file that stands in ``deploy/logs``, on these lines and one that is no JSON."""
    (tmp_path / "state").mkdir()
    text = flooded.worker.log.read_text()
    (tmp_path / "w.log").write_text(f'{text}printed by "a library"\n')
    with Bulk() as bulk:
        env = {
            **os.environ,
            "INFERFLEET_LOGS": str(tmp_path / "*.log"),
            "ELASTICSEARCH": bulk.url,
            "RSYSLOG_STATE": str(tmp_path / "state"),
        }
        shipper = ServerProcess("rsyslogd", tmp_path / "rsyslogd.out")
        pid = str(tmp_path / "pid")
        shipper.start([programs.rsyslogd(), "-n", "-f", str(CONF), "-i", pid], cwd=tmp_path, env=env)
        try:
            wanted = len(flooded.documents) + 1
            wait_until(lambda: len(bulk.documents) >= wanted, 60, "every line has arrived")
        finally:
            shipper.stop()

    shipped = [each for each in bulk.documents if "service" in each]
    (other,) = [each for each in bulk.documents if "service" not in each]
    assert shipped == flooded.documents
    assert other["message"] == 'printed by "a library"'
    assert {tuple(each) for each in bulk.actions} == {("create",)}
    assert {each["create"]["_index"] for each in bulk.actions} == {"logs-inferfleet-default"}


REDIS_PASSWORD, NEW_PASSWORD, WRONG_PASSWORD = "canary-redis", "canary-redis-two", "canary-redis-wrong"


class Scene(NamedTuple):
    """A fleet whose every secret, and every payload, is a canary."""

    fleet: Fleet
    server: RedisServer
    secrets: list[str]

    def standing(self) -> str:
        """Return the password that Redis has now."""
        for password in (REDIS_PASSWORD, NEW_PASSWORD):
            with contextlib.suppress(redis.AuthenticationError), self.client(password) as client:
                client.ping()
                return password
        raise AssertionError("none of the passwords is Redis's")

    def client(self, password: str = "") -> redis.Redis:
        """Return a client that may do everything; the servers' default user has no other rights."""
        return redis.Redis(port=self.server.port, password=password or self.standing())

    def seen(self, *texts: str) -> list[str]:
        """Return what of the canaries is in these texts."""
        return [mark for mark in ("canary", "31337", *self.secrets) for text in texts if mark in text]


@pytest.fixture(scope="module")
def scene(secure_kafka: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("marks")
    server = RedisServer(folder / "redis", config=["--requirepass", REDIS_PASSWORD])
    settings = {
        "redis": {"url": server.url, "password_file": "redis-password"},
        "routes": {"source": "file:routes.toml"},
        "coordinator": {"address": "127.0.0.1:0", "admin_address": "127.0.0.1:0", "token_file": "tokens"},
        "log": {"level": "debug"},
        "limits": {"max_request_bytes": 100_000},
    }
    with server, Fleet(folder / "fleet", secure_kafka, user="worker", settings=settings) as fleet:
        (fleet.folder / "redis-password").write_text(REDIS_PASSWORD)
        fleet.handler(HANDLER, "picky")
        fleet.route("digits", model="picky", partitions=1, redis=True)
        fleet.prepare()
        users = ["--principal", "User:worker", "--client-principal", "User:alice"]
        secure_kafka.apply_acls(fleet.run("topics", "plan", "--format", "acls", *users).stdout)
        yield Scene(fleet, server, [*secure_kafka.users.values(), REDIS_PASSWORD])


def bad_requests(fleet: Fleet, sender: Sender) -> list[str]:
    """Send requests that are wrong in every way, with marks in body, key and headers; return their ids."""
    topic, ids = fleet.source("digits"), []
    good = v2_body([row(1)], parameters={"note": "canary-parameter"})

    def send(value: bytes | None, *headers: tuple[str, bytes]) -> None:
        ids.append(f"id-{len(ids)}")
        marks = [("x-canary", b"canary-header"), ("authorization", b"Bearer canary-header")]
        sender.send(topic, value, id=ids[-1], key=b"canary-key", headers=[*marks, *headers])

    for body in (
        b"canary-body", b"", None, b'{"canary-member": 31337}', b'["canary-body"]',
        good.replace(b"FP32", b"canary"), good.replace(b"31337.25", b'"canary-value"'),
        good.replace(b"31337.25", b"NaN"), v2_body([(31337.0, 31337.0)]), b"canary" * 50_000,
        v2_body([row(-1)]), v2_body([row(-2)]), v2_body([row(-3)]), good,
    ):  # fmt: skip
        send(body)
    for header in (
        ("inferfleet-deadline-ms", b"canary-deadline"), ("content-type", b"canary/type"),
        ("traceparent", b"canary-trace"), ("inferfleet-reply", b"canary-reply\n"),
        ("inference-header-content-length", b"canary"), ("inferfleet-priority", b"canary"),
        ("inferfleet-deadline-ms", b"1"),
    ):  # fmt: skip
        send(good, header)
    sender.flush()
    return ids


def test_a_worker_logs_nothing_of_what_it_was_sent_or_told(scene: Scene, secure_kafka: KafkaServer) -> None:
    """Bad requests, a full Redis, a changed password, a wrong one: each failure is told, no mark is."""
    fleet = scene.fleet
    worker = fleet.launch("w-marks").wait_ready()
    sender = Sender(secure_kafka.client_config("alice"))
    ids = bad_requests(fleet, sender)
    with Reader(secure_kafka.client_config("admin"), fleet.results("digits")) as reader:
        reader.wait_ids(ids, 60)
        codes = {outcome.code for outcomes in reader.by_id.values() for outcome in outcomes}
        assert {"", "E_DECODE", "E_SCHEMA", "E_MODEL", "E_DEADLINE"} <= codes, codes

        with scene.client() as admin:
            admin.config_set("maxmemory", "1")
            sender.send(fleet.source("digits"), v2_body([row(1)]), id="full", key=b"canary-key")
            worker.wait_event("results_away", reason="full")
            admin.config_set("maxmemory", "0")
            reader.wait_ids(["full"], 60)
            worker.wait_event("results_back")
            (fleet.folder / "redis-password").write_text(WRONG_PASSWORD)
            admin.config_set("requirepass", NEW_PASSWORD)
            admin.client_kill_filter(_type="normal", skipme=True)
        sender.send(fleet.source("digits"), v2_body([row(1)]), id="denied", key=b"canary-key")
        worker.wait_event("results_away", reason="denied")
        (fleet.folder / "redis-password").write_text(NEW_PASSWORD)
        reader.wait_ids(["denied"], 60)
    assert worker.finish() == 0
    said = worker.log.read_text()
    events = Counter(event["event"] for event in worker.events())

    assert events["requests_failed"] >= 5
    assert scene.seen(said) == []


@pytest.mark.parametrize(
    "env",
    [
        {"INFERFLEET__KAFKA__CLIENT__SASL_PASSWORD": "canary-sasl"},
        {"INFERFLEET__REDIS__URL": "redis://u:canary%2Furl@127.0.0.1:1/0"},
        {"INFERFLEET__REDIS__URL": "http://u:canary-url@host/0"},
        {"INFERFLEET__RABBITMQ__URL": "http://u:canary-url@host/0"},
    ],
    ids=["sasl", "redis", "redis-scheme", "rabbitmq-scheme"],
)
def test_commands_say_what_is_wrong_without_the_password(scene: Scene, env: dict[str, str]) -> None:
    """Neither the one line, nor the traceback that --debug shows, nor a printed setting holds it."""
    for verb in (["doctor", "--no-load"], ["--debug", "dlt", "list", "digits"]):
        done = subprocess.run(
            [*COMMAND, "--config", str(scene.fleet.config), *verb],
            cwd=scene.fleet.folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert scene.seen(done.stdout, done.stderr) == [], (verb, done.stdout, done.stderr)


@pytest.mark.parametrize("words", [["worker"], ["--debug", "worker"]], ids=["worker", "debug"])
def test_a_worker_that_may_not_come_in_says_so_without_its_password(scene: Scene, words: list[str]) -> None:
    """The login that Kafka refused is named, in one line or with a traceback."""
    env = {"INFERFLEET__KAFKA__CLIENT__SASL_PASSWORD": "canary-sasl"}
    done = scene.fleet.run(*words, code=1, env=env)

    assert "authentication" in done.stderr.lower()
    assert ("Traceback" in done.stderr) == (len(words) == 2)
    assert scene.seen(done.stdout, done.stderr) == []


def test_a_coordinator_logs_no_token_and_no_body(scene: Scene) -> None:
    """Right and wrong tokens, bodies that are no JSON, a Redis that lets it in no longer."""
    fleet = scene.fleet
    (fleet.folder / "redis-password").write_text(scene.standing())
    token = fleet.run("coordinator", "token", "eva", "--role", "admin").stdout.strip()
    replica = ServerProcess("coordinator", fleet.folder / "coordinator.log")
    replica.start(
        [*COMMAND, "--config", str(fleet.config), "coordinator"], cwd=fleet.folder, env=dict(os.environ)
    )

    def events(name: str) -> list[dict[str, Any]]:
        return logged_events(replica.log, name)

    try:
        replica.wait_ready(lambda: bool(events("coordinator_started")), 60)
        url = str(events("coordinator_started")[0]["address"])
        for bearer in (token, "canary-token", f"{token}canary"):
            for method, path, body in (
                ("GET", "/v1/routes", None),
                ("PUT", "/v1/routes/digits", b"canary-body"),
                ("PUT", "/v1/routes/digits", b'{"canary-member": 31337}'),
                ("POST", "/v1/rollouts", b'{"route": "canary"}'),
            ):
                ask(
                    url + path,
                    method,
                    body,
                    {"authorization": f"Bearer {bearer}", "x-canary": "canary-header"},
                )
        wait_until(lambda: events("request_refused"), 20, "refused requests are told")
        with scene.client() as admin:
            admin.config_set("requirepass", "canary-third")
            admin.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: events("control_store_away"), 30, "the store is away")
    finally:
        replica.stop()
    said = replica.log.read_text()

    assert {event["service"] for event in logged_events(replica.log)} == {"inferfleet-coordinator"}
    assert token not in said
    assert scene.seen(said) == []


def ask(url: str, method: str, body: bytes | None, headers: dict[str, str]) -> None:
    """Send a request; whatever is answered."""
    request = urllib.request.Request(
        url, body, {**headers, "content-type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        error.close()
