"""``inferfleet dlt`` on real brokers: what is listed, what is sent again, and what never goes twice."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Producer

from inferfleet.cli import cli
from inferfleet.cli.amqp_line import Confirms, open_line
from inferfleet.cli.dead_queue import DeadQueue
from inferfleet.cli.deadletters import MARK, DeadLetters
from inferfleet.cli.kafka import Cluster
from inferfleet.cli.letters import EVERYTHING, Choice
from inferfleet.cli.pace import Pace
from inferfleet.cli.rabbit_topology import plan_permissions
from inferfleet.cli.redrive import Redrive
from inferfleet.cli.topology import Principals
from inferfleet.config import load
from inferfleet.errors import BrokerError, Code
from inferfleet.routes import load_routes
from tests.support.fleet import Fleet
from tests.support.graves import FIRST_DELAY_MS, NOW_MS, Grave, KafkaGrave, Letter, RabbitGrave
from tests.support.servers import KafkaServer, RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


@pytest.fixture
def kafka_grave(kafka: KafkaServer, tmp_path: Path) -> Iterator[KafkaGrave]:
    """A route ``r`` on Kafka with its topics, and no worker."""
    with Fleet(tmp_path, kafka) as fleet:
        fleet.route("r", model="m")
        yield KafkaGrave(fleet.prepare())


@pytest.fixture
def rabbit_grave(rabbitmq: RabbitServer, tmp_path: Path) -> Iterator[RabbitGrave]:
    """A route ``r`` on RabbitMQ with its queues, and no worker."""
    with Fleet(tmp_path, None, rabbitmq=rabbitmq) as fleet:
        fleet.route("r", model="m")
        yield RabbitGrave(fleet.prepare())


@pytest.fixture(params=["kafka", "rabbit"])
def grave(request: pytest.FixtureRequest) -> Grave:
    """A route ``r`` on either broker."""
    found: Grave = request.getfixturevalue(f"{request.param}_grave")
    return found


def run(grave: Grave, *words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, ["--config", str(grave.fleet.config), "dlt", *words])
    assert done.exit_code == code, done.output
    return done


def listed(grave: Grave, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(grave, "list", "r", "--json", *words).stdout)
    return found


def ids(found: Sequence[dict[str, Any]]) -> list[str]:
    return [each["id"] for each in found]


def test_letters_are_found_by_code_model_and_time(grave: Grave) -> None:
    """Each filter narrows the list, the newest stay under the limit, and looking changes nothing."""
    hour = 3_600_000
    grave.bury(
        Letter("a", code=Code.SHAPE, version="", failed_ms=NOW_MS),
        Letter("b", version="1", failed_ms=NOW_MS + hour),
        Letter("c", version="2", failed_ms=NOW_MS + 2 * hour),
        Letter("d", version="2", code=Code.INTERNAL, failed_ms=NOW_MS + 3 * hour),
    )

    assert ids(listed(grave)) == ["a", "b", "c", "d"]
    assert ids(listed(grave, "--limit", "2")) == ["c", "d"]
    assert ids(listed(grave, "--code", "E_SHAPE", "--code", "E_INTERNAL")) == ["a", "d"]
    assert ids(listed(grave, "--model", "m:2")) == ["c", "d"]
    assert ids(listed(grave, "--model", "m")) == ["a", "b", "c", "d"]
    assert ids(listed(grave, "--model", "other")) == []
    assert ids(listed(grave, "--since", "2026-09-21T15:30:00Z", "--until", "2026-09-21T16:30:00Z")) == ["c"]
    assert ids(listed(grave, "--since", "1h")) == []
    text = run(grave, "list", "r").stdout
    assert "why 3" in text
    assert "E_SHAPE" in text
    assert "no dead letters that fit" in run(grave, "list", "r", "--model", "x").stdout
    assert "neither an instant" in run(grave, "list", "r", "--since", "soon", code=2).stderr


def test_one_letter_is_shown_with_its_bytes(grave: Grave) -> None:
    """By place, and on RabbitMQ by id too; a place that holds none is one line."""
    grave.bury(Letter("a"), Letter("b", body=b'{"x": [1]}'))
    place = listed(grave)[1]["place"]

    assert run(grave, "show", "r", place, "--raw").stdout == '{"x": [1]}'
    assert "inferfleet-code: E_MODEL" in run(grave, "show", "r", place).stdout
    assert json.loads(run(grave, "show", "r", place, "--json").stdout)["id"] == "b"
    if isinstance(grave, RabbitGrave):
        assert run(grave, "show", "r", "b", "--raw").stdout == '{"x": [1]}'
    nowhere = run(grave, "show", "r", "0:77" if isinstance(grave, KafkaGrave) else "77", code=1).stderr
    assert len(nowhere.splitlines()) == 1
    assert "77" in nowhere


def test_a_redriven_request_is_what_it_was(grave: Grave) -> None:
    """Key, body and headers are the caller's, behind them its first place, and its attempts begin anew."""
    grave.bury(
        Letter("a", headers=(("x-tenant", b"t"), ("traceparent", b"00-1")), body=b'{"x": [1]}'),
        Letter(None, body=b'{"id": "mine", "inputs": []}'),
        Letter(None, body=b"[1, 2]", key=None),
    )
    before_ms = time.time_ns() // 1_000_000
    said = run(grave, "redrive", "r", "--yes").stdout
    first, own, without = grave.retried()

    assert "3 of 3 letters in" in said
    assert said.endswith("sent 3\n")
    assert (first.key, first.body) == (b"k", b'{"x": [1]}')
    given = {"inferfleet-id": b"a", "x-tenant": b"t", "traceparent": b"00-1"}
    assert {name: first.header(name) for name in given} == given
    assert first.header("inferfleet-origin-topic") == grave.fleet.source("r").encode()
    assert first.header("inferfleet-origin-partition") == first.header("inferfleet-origin-offset") == b"0"
    assert first.header("inferfleet-origin-timestamp") == b"%d" % (NOW_MS - 1000)
    assert first.header("inferfleet-attempt") == b"1"
    assert before_ms <= int(first.header("inferfleet-not-before-ms")) <= time.time_ns() // 1_000_000
    names = {name for name, _ in first.headers}
    assert not names & {"inferfleet-code", "inferfleet-error", "inferfleet-failed-at", "inferfleet-served"}
    assert not any(name.startswith("x-d") for name in names)
    assert "inferfleet-id" not in dict(own.headers)
    assert (without.key, without.body) == (None, b"[1, 2]")
    called = f"{grave.fleet.source('r')}-0-2".encode()
    assert without.header("inferfleet-id") == (called if isinstance(grave, KafkaGrave) else b"m-2")


def test_no_letter_goes_twice(grave: Grave) -> None:
    """A second run sends only what has come since."""
    grave.bury(Letter("a"), Letter("b"))
    run(grave, "redrive", "r", "--yes", "--limit", "1")
    run(grave, "redrive", "r", "--yes")
    grave.bury(Letter("c"))
    run(grave, "redrive", "r", "--yes")
    last = run(grave, "redrive", "r", "--yes").stdout

    assert [each.header("inferfleet-id") for each in grave.retried()] == [b"a", b"b", b"c"]
    assert last.endswith("sent 0\n")
    if isinstance(grave, KafkaGrave):
        assert "not sent: 3 that were redriven before" in last
        assert [each["redriven"] for each in listed(grave)] == [True, True, True]
    else:
        assert listed(grave) == []


def test_what_would_only_fail_again_is_left_out_unless_named(grave: Grave) -> None:
    """Callers' faults and late requests stay, and are counted; a cut letter cannot go at all."""
    past = (("inferfleet-deadline-ms", b"1790000000000"),)
    grave.bury(
        Letter("shape", code=Code.SHAPE),
        Letter("cut", cut=True, body=b""),
        Letter("late", headers=past),
        Letter("good"),
    )
    place = listed(grave)[1]["place"]

    planned = run(grave, "redrive", "r", "--dry-run").stdout
    assert planned.splitlines() == [
        planned.splitlines()[0],
        "not sent: 1 whose caller is at fault (E_SHAPE 1); a --code or a PLACE sends them",
        "not sent: 1 whose deadline has passed; a PLACE sends them",
        f"not sent: {place} was cut, its request is not there any more",
    ]
    assert planned.startswith("1 of 4 letters in")
    done = json.loads(run(grave, "redrive", "r", "--yes", "--json").stdout)
    assert (done["sent"], done["codes"], done["dry_run"]) == (1, {"E_MODEL": 1}, False)
    assert done["skipped"] == {"redriven": 0, "caller": 1, "late": 1, "over": 0}
    assert done["cut"] == [place]
    run(grave, "redrive", "r", "--yes", "--code", "E_SHAPE")
    assert "sent 1" in run(grave, "redrive", "r", "late", "--yes").stdout
    assert "cannot be sent again" in run(grave, "redrive", "r", "cut", "--yes", code=1).stderr
    assert "there is no letter nobody among" in run(grave, "redrive", "r", "nobody", "--yes", code=1).stderr

    assert [each.header("inferfleet-id") for each in grave.retried()] == [b"good", b"shape", b"late"]


def test_nothing_is_sent_without_a_yes(grave: Grave) -> None:
    """Where nobody can be asked, --yes or --dry-run is needed; a dry run sends nothing."""
    grave.bury(Letter("a"))

    assert "give --yes, or --dry-run" in run(grave, "redrive", "r", code=2).stderr
    assert json.loads(run(grave, "redrive", "r", "--dry-run", "--json").stdout)["chosen"] == 1
    assert "--again goes with the PLACE" in run(grave, "redrive", "r", "--again", "--yes", code=2).stderr
    assert "is no rate" in run(grave, "redrive", "r", "--rate", "fast", "--yes", code=2).stderr
    assert grave.retried() == []
    assert len(listed(grave)) == 1


def test_letters_go_no_faster_than_their_rate(grave: Grave) -> None:
    """Six letters at ten a second need two fifths of one at least."""
    grave.bury(*(Letter(f"a{number}") for number in range(6)))
    began = time.monotonic()
    run(grave, "redrive", "r", "--yes", "--rate", "10/s")

    assert time.monotonic() - began >= 0.4
    assert len(grave.retried()) == 6


def test_a_missing_way_back_is_one_line(grave: Grave) -> None:
    """The topic or queue is named with the mend, and every letter is still there."""
    grave.bury(Letter("a"))
    if isinstance(grave, KafkaGrave):
        missing = grave.fleet.retries("r", FIRST_DELAY_MS)
        grave.fleet.kafka.delete_topics([missing])
        admin = grave.fleet.kafka.admin()
        wait_until(lambda: missing not in admin.list_topics(timeout=5).topics, 10, "the topic is gone")
    else:
        missing = grave.fleet.retries("r", "ready")
        grave.fleet.rabbitmq.delete_queue(missing)
    said = run(grave, "redrive", "r", "--yes", code=1).stderr

    assert len(said.splitlines()) == 1
    assert f"{missing} does not exist" in said
    assert "`inferfleet topics plan`" in said
    assert ids(listed(grave)) == ["a"]


# Kafka: marks and transactions


def redrive_of(grave: KafkaGrave, cluster: Cluster) -> tuple[Redrive, DeadLetters]:
    config = load(grave.fleet.config, {})
    route = load_routes(grave.fleet.routes_file, config.fleet.name).named("r")
    letters = DeadLetters(cluster, config.group_of(route.pool), grave.fleet.dead_letters("r"))
    return Redrive(config, route, letters, grave.fleet.retries("r", FIRST_DELAY_MS)), letters


def test_of_two_redrives_the_later_takes_over_and_none_goes_twice(kafka_grave: KafkaGrave) -> None:
    """The earlier one is told, and what it had sent is not sent by the later."""
    kafka_grave.bury(*(Letter(f"a{number}") for number in range(5)))
    cluster = Cluster(load(kafka_grave.fleet.config, {}))
    redrive, letters = redrive_of(kafka_grave, cluster)
    route = load_routes(kafka_grave.fleet.routes_file, kafka_grave.fleet.name).named("r")
    found = letters.choose(Choice(route, EVERYTHING), NOW_MS)

    def interrupted(count: int) -> None:
        if count == 2:
            assert run(kafka_grave, "redrive", "r", "--yes").stdout.endswith("sent 3\n")

    with pytest.raises(BrokerError, match=r"another redrive of route r has taken over .*before that: 2;"):
        redrive.send(found, Pace(1.5), interrupted)
    redrive.close()
    cluster.close()

    named = [each.header("inferfleet-id").decode() for each in kafka_grave.retried()]
    assert named == [f"a{number}" for number in range(5)]


def test_an_operator_who_dies_between_sending_and_marking_has_sent_nothing(kafka_grave: KafkaGrave) -> None:
    """What an open transaction holds is seen by nobody, and the next redrive sends all of it once."""
    kafka_grave.bury(Letter("a"), Letter("b"))
    cluster = Cluster(load(kafka_grave.fleet.config, {}))
    redrive, _ = redrive_of(kafka_grave, cluster)
    producer: Producer = redrive._producer
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce(kafka_grave.fleet.retries("r", FIRST_DELAY_MS), b"{}", headers=[("inferfleet-id", b"a")])
    assert producer.flush(10) == 0
    run(kafka_grave, "redrive", "r", "--yes")
    cluster.close()

    assert [each.header("inferfleet-id") for each in kafka_grave.retried()] == [b"a", b"b"]


def test_a_letter_goes_again_only_by_name_and_on_purpose(kafka_grave: KafkaGrave) -> None:
    """--again sends what was redriven; a caller's header cannot pass for a mark."""
    kafka_grave.bury(Letter("a"), Letter("b", headers=((MARK, b"1"),), body=b'{"offsets": [0]}'))
    run(kafka_grave, "redrive", "r", "0:0", "--yes")
    again = run(kafka_grave, "redrive", "r", "0:0", "--yes").stdout
    forced = run(kafka_grave, "redrive", "r", "0:0", "--again", "--yes").stdout

    assert "not sent: 1 that were redriven before" in again
    assert forced.endswith("sent 1\n")
    assert [(each["id"], each["redriven"]) for each in listed(kafka_grave)] == [("a", True), ("b", False)]
    assert ids(listed(kafka_grave, "--limit", "1")) == ["b"]
    assert "has no dead letter at 0:2" in run(kafka_grave, "show", "r", "0:2", code=1).stderr


def test_a_letter_too_large_for_the_retry_topic_stays_alone(kafka: KafkaServer, tmp_path: Path) -> None:
    """Its neighbours go; it is named with the reason and can be sent when the topic has been mended."""
    with Fleet(tmp_path, kafka) as fleet:
        fleet.route("r", model="m")
        fleet.write()
        kafka.create_topics({fleet.dead_letters("r"): 1})
        kafka.create_topics({fleet.retries("r", FIRST_DELAY_MS): 1}, config={"max.message.bytes": "4000"})
        grave = KafkaGrave(fleet)
        grave.bury(*(Letter(f"a{n}", body=b"x" * (6000 if n == 3 else 10)) for n in range(6)))
        said = run(grave, "redrive", "r", "--yes", code=1)

        assert "sent 5" in said.stdout, said.output
        assert "1 refused and kept; the first is 0:3" in said.stderr
        named = sorted(each.header("inferfleet-id").decode() for each in grave.retried())
        assert named == ["a0", "a1", "a2", "a4", "a5"]
        assert [each["id"] for each in listed(grave) if not each["redriven"]] == ["a3"]


# RabbitMQ: a queue that is only looked at by taking


def test_letters_that_stay_keep_their_order(rabbit_grave: RabbitGrave) -> None:
    """What is not sent goes back to where it stood, however often somebody looks."""
    rabbit_grave.bury(*(Letter(f"a{n}", code=Code.SHAPE if n % 2 else Code.MODEL) for n in range(8)))
    run(rabbit_grave, "redrive", "r", "--yes", "--limit", "2")
    for _ in range(3):
        assert ids(listed(rabbit_grave)) == ["a1", "a3", "a4", "a5", "a6", "a7"]

    assert [each.header("inferfleet-id") for each in rabbit_grave.retried()] == [b"a0", b"a2"]


def until_nothing_is_held(grave: RabbitGrave) -> None:
    """Wait until the node has taken back what a reader held when its connection ended."""
    node, letters = grave.fleet.rabbitmq, grave.fleet.dead_letters("r")
    wait_until(lambda: node.unacked(letters) == 0, 30, "no letter is held")


def test_a_connection_that_breaks_loses_no_letter(rabbit_grave: RabbitGrave) -> None:
    """What was not moved is still there, in one line it is said how many were, and the next run goes on."""
    sent = [f"a{number}" for number in range(8)]
    rabbit_grave.bury(*(Letter(name) for name in sent))
    queue = DeadQueue(load(rabbit_grave.fleet.config, {}), rabbit_grave.fleet.dead_letters("r"))
    route = load_routes(rabbit_grave.fleet.routes_file, rabbit_grave.fleet.name).named("r")
    ready = rabbit_grave.fleet.retries("r", "ready")

    def broken(moved: int) -> None:
        if moved == 2:
            rabbit_grave.fleet.rabbitmq.close_connections()

    with pytest.raises(BrokerError, match=r"does not answer: .*\(moved before that: \d\)"):
        queue.redrive(Choice(route, EVERYTHING), ready, NOW_MS, Pace(8), broken)
    until_nothing_is_held(rabbit_grave)
    run(rabbit_grave, "redrive", "r", "--yes")

    assert {each.header("inferfleet-id").decode() for each in rabbit_grave.retried()} == set(sent)
    assert listed(rabbit_grave) == []


def test_headers_that_no_client_reads_hold_up_no_letter(rabbit_grave: RabbitGrave) -> None:
    """A table nested thousands deep is listed, and leaves as the bytes that came."""
    deep = b""
    for _ in range(3000):
        deep = b"\x01aF" + struct.pack(">I", len(deep)) + deep
    own = [("inferfleet-id", b"deep"), ("inferfleet-code", b"E_MODEL")]
    table = deep + b"".join(
        bytes((len(name),)) + name.encode() + b"S" + struct.pack(">I", len(value)) + value
        for name, value in own
    )
    properties = struct.pack(">HI", 0x2000, len(table)) + table
    config = load(rabbit_grave.fleet.config, {})

    async def publish() -> None:
        line = await open_line(config)
        out = await Confirms.opened(line, rabbit_grave.fleet.dead_letters("r"), 10)
        assert await out.publish([(properties, b"{}")]) == [""]
        await line.close()

    asyncio.run(publish())
    rabbit_grave.bury(Letter("plain"))

    assert ids(listed(rabbit_grave)) == ["deep", "plain"]
    assert run(rabbit_grave, "redrive", "r", "--yes").stdout.endswith("sent 2\n")
    assert rabbit_grave.fleet.rabbitmq.depth(rabbit_grave.fleet.retries("r", "ready")) == 2


# Rights: what `topics plan` prints for operators is enough


def test_the_printed_rights_are_enough_on_kafka(secure_kafka: KafkaServer, tmp_path: Path) -> None:
    """Without the transactional id redrive says what is missing; with the rules it lists and sends."""
    with Fleet(tmp_path, secure_kafka, user="bob") as fleet:
        fleet.route("r", model="m")
        grave = KafkaGrave(fleet.prepare())
        grave.bury(Letter("a"))
        words = ["topics", "plan", "--format", "acls", "--operator-principal", "User:bob"]
        rules = CliRunner().invoke(cli, ["--config", str(fleet.config), *words]).stdout.splitlines()
        secure_kafka.apply_acls([each for each in rules if "--transactional-id" not in each])
        wait_until(lambda: _quiet(grave, "list", "r") == 0, 10, "the rules to hold")
        refused = run(grave, "redrive", "r", "--yes", code=1).stderr
        secure_kafka.apply_acls(rules)
        wait_until(lambda: _quiet(grave, "redrive", "r", "--yes") == 0, 10, "the last rule to hold")

        assert f"may not write as transactional id {fleet.name}.default.r.redrive" in refused
        assert len(refused.splitlines()) == 1
        assert [each["redriven"] for each in listed(grave)] == [True]


def _quiet(grave: Grave, *words: str) -> int:
    return CliRunner().invoke(cli, ["--config", str(grave.fleet.config), "dlt", *words]).exit_code


def test_the_printed_rights_are_enough_on_rabbitmq(rabbit_grave: RabbitGrave) -> None:
    """An operator reads the dead letters and writes to queues by name, and nothing else."""
    fleet = rabbit_grave.fleet
    rabbit_grave.bury(Letter("a"), Letter("b"))
    who = Principals("User:w", "User:c", f"User:{fleet.name}")
    routes = load_routes(fleet.routes_file, fleet.name).routes
    given = next(
        each for each in plan_permissions(load(fleet.config, {}), routes, who) if each.user == fleet.name
    )
    url = fleet.rabbitmq.add_user(fleet.name, "secret", "^$", "^$", given.read)
    fleet.settings["rabbitmq"]["url"] = url
    fleet.write()
    refused = run(rabbit_grave, "redrive", "r", "--yes", code=1).stderr
    fleet.rabbitmq.set_permissions(fleet.name, given.configure, given.write, given.read)
    until_nothing_is_held(rabbit_grave)

    assert "`inferfleet topics plan` prints the rights" in refused
    assert "secret" not in refused
    assert len(refused.splitlines()) == 1
    assert ids(listed(rabbit_grave)) == ["a", "b"]
    assert run(rabbit_grave, "redrive", "r", "--yes").stdout.endswith("sent 2\n")
