"""The main job on a locked broker: SASL_SSL, no topic made by itself, only the rights that are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import (
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from inferfleet import Client
from inferfleet.brokers.kafka_outlet import KafkaOutlet, producer_properties
from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Envelopes
from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Sender, judge, row_of, v2_body
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

WORKER, CLIENT = "worker", "alice"


@pytest.fixture(scope="module")
def fleet(
    secure_kafka: KafkaServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Topics by the administrator, rights as printed, the worker's own user in the settings."""
    folder = tmp_path_factory.mktemp("secure")
    with Fleet(folder, secure_kafka, redis_server, user=WORKER) as made:
        made.checksum()
        made.route("first", redis=True)
        made.route("second", partitions=1)
        made.prepare()
        users = ["--principal", f"User:{WORKER}", "--client-principal", f"User:{CLIENT}"]
        rules = made.run(
            "topics", "plan", "--format", "acls", *users, "--operator-principal", "User:bob"
        ).stdout
        secure_kafka.apply_acls(rules)
        yield made


@pytest.fixture(scope="module")
def worker(fleet: Fleet) -> Iterator[WorkerProcess]:
    with fleet.running() as started:
        yield started


def read(kafka: KafkaServer, fleet: Fleet, route: str) -> Reader:
    """Return a reader that comes in as the client, with the group name that its right covers."""
    return Reader(kafka.client_config(CLIENT), fleet.results(route), f"{fleet.name}.client.tests")


def test_the_main_job_works_with_exactly_the_printed_rights(
    fleet: Fleet, worker: WorkerProcess, secure_kafka: KafkaServer, redis_server: RedisServer
) -> None:
    """The client's user sends and reads, the worker's takes, answers, buries and commits; nobody is super."""
    sender = Sender(secure_kafka.client_config(CLIENT))
    sent = {f"s-{n}": row_of(n) for n in range(500)}
    for name, row in sent.items():
        sender.send(fleet.source("first"), v2_body([row]), id=name)
    sender.send(fleet.source("first"), b"not json", id="bad")
    sender.flush()
    with (
        read(secure_kafka, fleet, "first") as reader,
        Reader(
            secure_kafka.client_config("bob"), fleet.dead_letters("first"), f"{fleet.name}.default"
        ) as dead,
        redis_server.client() as redis,
    ):
        reader.wait_ids([*sent, "bad"])
        (letter,) = dead.wait_count(1)
        assert reader.by_id.pop("bad")[0].code == "E_DECODE"
        verdict = judge(sent, reader)
        key = f"{fleet.name}:result:first:s-7"
        stored = json.loads(wait_until(lambda: redis.get(key), 20, "the result is in Redis"))

    assert verdict.right, verdict
    assert letter.value == b"not json"
    assert tuple(stored["outputs"][0]["data"]) == expected_checksum("1", row_of(7))
    assert worker.events("kafka_problem") == []
    assert worker.events("commit_refused") == []


def test_the_client_of_the_library_needs_no_more_rights(
    fleet: Fleet, worker: WorkerProcess, secure_kafka: KafkaServer
) -> None:
    """inferfleet.Client as the client's user submits and hears its answer."""
    settings = fleet.folder / "client.toml"
    text = fleet.config.read_text()
    for old, new in ((WORKER, CLIENT), (secure_kafka.users[WORKER], secure_kafka.users[CLIENT])):
        text = text.replace(json.dumps(old) + "\n", json.dumps(new) + "\n")
    settings.write_text(text)
    with Client(str(settings)) as client:
        name = client.submit("first", {"x": [list(row_of(3))]})
        answer = client.result(name, 30)

    assert tuple(answer.outputs["check"].ravel()) == expected_checksum("1", row_of(3))


def test_the_workers_user_can_do_nothing_else(fleet: Fleet, secure_kafka: KafkaServer) -> None:
    """It cannot send requests: the rights are the smallest that do."""
    refused: list[KafkaError] = []
    producer = Producer({**secure_kafka.client_config(WORKER), "log_level": 0, "message.timeout.ms": 5000})
    producer.produce(fleet.source("first"), b"x", on_delivery=lambda error, _: refused.append(error))
    producer.flush(10)

    assert [error.code() for error in refused] == [KafkaError.TOPIC_AUTHORIZATION_FAILED]


def test_a_right_that_is_taken_away_holds_its_route_until_it_is_back(
    fleet: Fleet, worker: WorkerProcess, secure_kafka: KafkaServer
) -> None:
    """Without Write on its results a route waits and says why, until it is back; nothing is lost."""
    topic = fleet.results("second")
    admin = secure_kafka.admin()
    gone = AclBindingFilter(
        ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{WORKER}", None,
        AclOperation.ANY, AclPermissionType.ANY,
    )  # fmt: skip
    for future in admin.delete_acls([gone], request_timeout=10).values():
        future.result(10)
    sender = Sender(secure_kafka.client_config(CLIENT))
    sent = {f"d-{n}": row_of(n) for n in range(100)}

    def paused() -> str:
        # A rule takes a moment to reach every part of the broker: what passes before is answered.
        number = len(sent)
        sent[f"d-{number}"] = row_of(number)
        sender.send(fleet.source("second"), v2_body([row_of(number)]), id=f"d-{number}")
        return str(worker.status()["paused"].get("second", ""))

    for name, row in sent.items():
        sender.send(fleet.source("second"), v2_body([row]), id=name)
    reason = wait_until(paused, 30, "the route is held", every_s=0.2)
    sender.send(fleet.source("first"), v2_body([row_of(1)]), id="meanwhile")
    sender.flush()
    with read(secure_kafka, fleet, "first") as other:
        other.wait_ids(["meanwhile"])
    assert worker.ready
    rule = f"kafka-acls.sh --add --allow-principal User:{WORKER} --operation Write --topic {topic}"
    secure_kafka.apply_acls(rule)
    with read(secure_kafka, fleet, "second") as reader:
        reader.wait_ids(sent, 60)
        verdict = judge(sent, reader)

    print(f"\nright taken away ({reason}): {verdict}")
    assert topic in reason
    assert verdict.right, verdict
    assert worker.metric("dead_letters_total", route="second") == 0


def test_a_wrong_password_is_one_line(fleet: Fleet, secure_kafka: KafkaServer) -> None:
    """Worker and doctor name the refused login at once, without the password, and exit 1."""
    env = {"INFERFLEET__KAFKA__CLIENT__SASL_PASSWORD": "canary-secret"}
    worker = fleet.run("worker", code=1, env=env)
    doctor = fleet.run("doctor", "--no-load", code=1, env=env)

    assert len(worker.errors) == 1, worker.stderr
    assert "authentication" in worker.errors[0].lower()
    assert secure_kafka.bootstrap_servers in worker.errors[0]
    assert any("FAIL" in line and "refused the login" in line for line in doctor.stdout.splitlines())
    assert "canary-secret" not in worker.stderr + doctor.stdout + doctor.stderr


def test_a_user_without_rights_is_told_which(fleet: Fleet, secure_kafka: KafkaServer) -> None:
    """The start names the topic that the user may not read, in one line with the mend."""
    env = {
        "INFERFLEET__KAFKA__CLIENT__SASL_USERNAME": "bob",
        "INFERFLEET__KAFKA__CLIENT__SASL_PASSWORD": secure_kafka.users["bob"],
    }
    done = fleet.run("worker", code=1, env=env, timeout_s=60)
    print(done.errors)

    assert len(done.errors) == 1, done.stderr
    assert fleet.name in done.errors[0]
    assert "topics plan" in done.errors[0]


class Heard:
    """A receipt that keeps what it is told."""

    def __init__(self) -> None:
        self.done = 0
        self.refusals: list[Refusal] = []

    def confirmed(self, count: int) -> None:
        self.done += count

    def refused(self, index: int, refusal: Refusal) -> None:
        self.refusals.append(refusal)


def test_a_producer_that_may_write_nowhere_refuses_until_it_may(
    fleet: Fleet, secure_kafka: KafkaServer
) -> None:
    """Kafka denies such a user even a producer id, which kills the producer: the outlet gets over it."""
    topic = f"{fleet.name}.elsewhere"
    secure_kafka.create_topics({topic: 1})
    outlet = KafkaOutlet(producer_properties(secure_kafka.client_config("bob"), {}, 1_000_000))

    def published() -> Heard:
        heard = Heard()
        outlet.publish(Envelopes(topic, [b"k"], [b"v"], [[]]), heard)

        def told() -> bool:
            outlet.poll(0.05)
            return bool(heard.done or heard.refusals)

        wait_until(told, 30, "the record is confirmed or refused")
        return heard

    first = published()
    rule = f"kafka-acls.sh --add --allow-principal User:bob --operation Write --topic {topic}"
    secure_kafka.apply_acls(rule)
    wait_until(lambda: published().done, 30, "the record passes", every_s=0.2)
    assert outlet.close(5) == 0

    assert [refusal.kind for refusal in first.refusals] == [RefusalKind.DENIED]
