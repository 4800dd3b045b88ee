"""The operator's verbs against a real RabbitMQ: what is declared, what is found wrong, what waits."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from inferfleet import config as settings_of
from inferfleet.cli import cli
from inferfleet.cli.rabbitmq import RabbitCluster
from inferfleet.cli.topology import needs
from inferfleet.errors import BrokerError
from inferfleet.routes import load_routes
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import row_of, v2_body
from tests.support.servers import RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

WORKER, PASSWORD = "ifl-worker", "canary-secret"


def run(fleet: Fleet, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["--config", str(fleet.config), *arguments])
    assert result.exit_code == code, result.output
    return result


def made(folder: Path, rabbitmq: RabbitServer) -> Fleet:
    """Return a fleet with a route from RabbitMQ to an exchange, its model, and files but no queues."""
    fleet = Fleet(folder, None, rabbitmq=rabbitmq, settings={"retry": {"delays_ms": [100, 2000]}})
    fleet.checksum()
    fleet.route("r")
    fleet.write()
    return fleet


@pytest.fixture
def fleet(rabbitmq: RabbitServer, tmp_path: Path) -> Fleet:
    """A fleet of the administrator's whose queues do not exist."""
    return made(tmp_path, rabbitmq)


@pytest.fixture(scope="module")
def limited(rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose queues stand and whose worker's user has no rights yet."""
    fleet = made(tmp_path_factory.mktemp("limited"), rabbitmq)
    fleet.create_topics()
    rabbitmq.ctl("add_user", WORKER, PASSWORD)
    fleet.settings["rabbitmq"] = {"url": rabbitmq.url_of(WORKER, PASSWORD)}
    fleet.write()
    yield fleet
    rabbitmq.ctl("delete_user", WORKER)


def findings(fleet: Fleet, code: int = 1) -> dict[str, tuple[str, str]]:
    output = run(fleet, "doctor", "--no-load", "--json", code=code).stdout
    return {each["name"]: (each["verdict"], each["text"]) for each in json.loads(output)}


def started(fleet: Fleet) -> str:
    """Return what a worker's start says of its brokers, empty when all is well."""
    config = settings_of.load(fleet.config, {})
    routes = load_routes(fleet.routes_file, fleet.name).routes
    try:
        with RabbitCluster(config) as cluster:
            cluster.check(needs(config, routes))
    except BrokerError as error:
        return str(error)
    return ""


def refused(fleet: Fleet, *words: str) -> None:
    """Check that doctor fails with exactly one line that holds ``words``, and that the start says so too."""
    examined = run(fleet, "doctor", "--no-load", code=1).stdout
    failed = [line for line in examined.splitlines() if line.startswith("FAIL")]
    said = started(fleet)
    print("", *failed, said, sep="\n")
    assert len(failed) == 1, examined
    assert "\n" not in said
    for line in (failed[0], said):
        assert not [word for word in words if word not in line], (words, line)
    assert PASSWORD not in examined + said


def test_what_is_applied_is_what_doctor_wants(fleet: Fleet) -> None:
    """--apply declares everything, twice changes nothing, and doctor has nothing more to say."""
    first = json.loads(run(fleet, "topics", "plan", "--apply", "--json").stdout)
    second = json.loads(run(fleet, "topics", "plan", "--apply", "--json").stdout)
    after = findings(fleet, code=0)

    names = [
        fleet.source("r"), fleet.dead_letters("r"),
        *(fleet.retries("r", wait) for wait in (100, 2000, "ready")), fleet.results("r"),
    ]  # fmt: skip
    assert [each["queue"] for each in first if "queue" in each] == names
    assert {each["outcome"] for each in first if "binding" not in each} == {"created"}
    assert {each["outcome"] for each in second} == {"stood"}
    assert {verdict for verdict, _ in after.values()} == {"ok"}
    assert set(after) >= {*(f"queue {name}" for name in names[:-1]), f"exchange {fleet.name}"}


def test_the_printed_script_declares_the_same(fleet: Fleet, rabbitmq: RabbitServer, tmp_path: Path) -> None:
    """What rabbitmqctl imports has the arguments that --apply would have given."""
    script = run(fleet, "topics", "plan", "--format", "sh").stdout
    file = tmp_path / "definitions.json"
    file.write_text(script[script.index("{") : script.rindex("}") + 1])
    rabbitmq.ctl("import_definitions", str(file))
    outcomes = json.loads(run(fleet, "topics", "plan", "--apply", "--json").stdout)

    assert {each["outcome"] for each in outcomes} == {"stood"}
    assert started(fleet) == ""


def test_what_waits_comes_back_to_the_ready_queue(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """A retry with a delay of its own passes the declared chain, and reaches nobody else's queue."""
    fleet.create_topics()
    rabbitmq.publish(fleet.retries("r", 100), b"again", expiration="80")
    (came,) = rabbitmq.take(fleet.retries("r", "ready"), 1)
    rabbitmq.publish(fleet.results("r"), b"answer", exchange=fleet.name)

    assert came.body == b"again"
    assert rabbitmq.depth(fleet.source("r")) == 0
    assert rabbitmq.depth(fleet.results("r")) == 1


def test_a_queue_with_other_arguments_is_named_and_left_alone(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """All others are declared; the one that differs is told with what differs, and the exit code is 1."""
    rabbitmq.declare(fleet.source("r"))
    result = run(fleet, "topics", "plan", "--apply", "--json", code=1)
    outcomes = {each.get("queue"): each for each in json.loads(result.stdout)}

    assert outcomes[fleet.source("r")]["outcome"] == "differs"
    assert outcomes[fleet.retries("r", "ready")]["outcome"] == "created"
    assert f"{fleet.source('r')} stood with other arguments" in result.stderr
    assert "x-delivery-limit" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_standing_exchange_gets_no_queue_that_nobody_reads(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """Whoever made the exchange has bound readers, of whatever type it is: the proposal is left out."""
    rabbitmq.declare_exchange(fleet.name, "topic")
    rows = json.loads(run(fleet, "topics", "plan", "--apply", "--json").stdout)
    outcomes = {(each.get("queue") or each.get("exchange")): each["outcome"] for each in rows}

    assert outcomes[fleet.results("r")] == "left out"
    assert outcomes[fleet.name] == "stood"
    assert not any("binding" in each for each in rows)
    assert not rabbitmq.exists(fleet.results("r"))
    assert started(fleet) == ""


def test_exactly_the_printed_rights_are_enough(limited: Fleet) -> None:
    """A worker's user that may declare nothing passes doctor, starts, answers, and buries what is bad."""
    lines = run(limited, "topics", "plan", "--format", "acls", "--principal", f"User:{WORKER}").stdout
    (mine,) = (line for line in lines.splitlines() if f" {WORKER} " in line)
    limited.rabbitmq.ctl(*shlex.split(mine)[1:])
    assert {verdict for verdict, _ in findings(limited, code=0).values()} == {"ok"}
    assert started(limited) == ""
    with limited.running():
        limited.rabbitmq.publish(limited.source("r"), v2_body([row_of(1)]), b"not json")
        answers = limited.rabbitmq.take(limited.results("r"), 2)
        (letter,) = limited.rabbitmq.take(limited.dead_letters("r"), 1)
    assert {each.headers.get("inferfleet-code") for each in answers} == {None, "E_DECODE"}
    assert letter.body == b"not json"
    said = run(limited, "topics", "plan", "--apply", code=1).stderr
    assert "whoever declares needs the right to configure it" in said
    assert said.count("\n") == 1


def delete_queue(fleet: Fleet) -> None:
    fleet.rabbitmq.delete_queue(fleet.retries("r", 2000))


def delete_exchange(fleet: Fleet) -> None:
    fleet.rabbitmq.delete_exchange(fleet.name)


def classic_source(fleet: Fleet) -> None:
    fleet.rabbitmq.delete_queue(fleet.source("r"))
    with fleet.rabbitmq.channel() as channel:
        channel.queue_declare(fleet.source("r"), durable=True, arguments={"x-queue-type": "classic"})


def wrong_password(fleet: Fleet) -> None:
    fleet.settings["rabbitmq"] = {"url": fleet.rabbitmq.url, "password": PASSWORD}
    fleet.write()


def no_such_virtual_host(fleet: Fleet) -> None:
    fleet.settings["rabbitmq"] = {"url": f"{fleet.rabbitmq.url}nowhere"}
    fleet.write()


def no_such_host(fleet: Fleet) -> None:
    fleet.settings["rabbitmq"] = {"url": "amqp://127.0.0.1:1/"}
    fleet.write()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (delete_queue, ("retry.2000", "retries of route r", "does not exist", "topics plan")),
        (delete_exchange, ("exchange t", "results of route r", "does not exist")),
        (classic_source, ("r.requests", "source of route r", "is a classic queue", "must be a quorum queue")),
        (wrong_password, ("refused the login", "[rabbitmq]", "password")),
        (no_such_virtual_host, ("nowhere", "refused the virtual host", "[rabbitmq] url")),
        (no_such_host, ("127.0.0.1:1", "does not answer", "[rabbitmq] url")),
    ],
)
def test_what_is_wrong_is_one_line(
    fleet: Fleet, spoil: Callable[[Fleet], None], words: tuple[str, ...]
) -> None:
    """Doctor and the start name the same thing, what it is for, and the mend; no password is shown."""
    fleet.create_topics()
    spoil(fleet)
    refused(fleet, *words)


@pytest.mark.parametrize(
    ("write", "read", "words"),
    [
        ("{fleet}|amq.default", "nothing", ("r.requests", "no read right", "--format acls")),
        ("nothing", ".*requests.*", ("no write right", "--format acls")),
        ("amq.default", ".*requests.*", ("exchange t", "results of route r", "no write right")),
        ("{fleet}", ".*requests.*", ("amq.default", "by name", "no write right")),
    ],
)
def test_a_right_that_lacks_is_named(limited: Fleet, write: str, read: str, words: tuple[str, ...]) -> None:
    """To read the source, to write to the exchange, to reach queues by name: each told from the others."""
    limited.rabbitmq.set_permissions(WORKER, "^$", write.format(fleet=limited.name), read)
    failed = [text for verdict, text in findings(limited).values() if verdict == "FAIL"]
    said = started(limited)
    print("", *failed, said, sep="\n")
    assert not [word for word in words if word not in said], said
    # Each thing that the right was for has a line of its own: two queues are read, two exchanges written.
    assert len(failed) == (2 if "nothing" in (write, read) else 1)


def test_looking_takes_no_message(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """A look at the right to read and at the queue's type leaves every message undelivered."""
    fleet.create_topics()
    rabbitmq.publish(fleet.source("r"), b"1", b"2")
    assert started(fleet) == ""

    assert [each.redelivered for each in rabbitmq.take(fleet.source("r"), 2)] == [False, False]


def test_status_shows_what_waits_where(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """Ready messages and consumers for each queue; lag is what nobody has taken, retries apart."""
    fleet.create_topics()
    rabbitmq.publish(fleet.source("r"), b"1", b"2")
    rabbitmq.publish(fleet.retries("r", "ready"), b"3")
    rabbitmq.publish(fleet.dead_letters("r"), b"4")
    with rabbitmq.channel() as channel:
        channel.basic_qos(prefetch_count=1)
        channel.basic_consume(fleet.source("r"), lambda *_: None)
        channel.connection.process_data_events(1)
        (pool,) = json.loads(run(fleet, "status", "--json").stdout)["pools"]
        shown = run(fleet, "status").stdout
    rabbitmq.delete_queue(fleet.retries("r", 100))
    (after,) = json.loads(run(fleet, "status", "--json").stdout)["pools"]

    found = {each["queue"]: (each["role"], each["ready"], each["consumers"]) for each in pool["queues"]}
    assert found[fleet.source("r")] == ("source", 1, 1)
    assert found[fleet.retries("r", "ready")] == ("ready retries", 1, 0)
    assert (pool["lag"], pool["retrying"], pool["note"], pool["state"]) == (1, 1, "", "-")
    assert "lag 1  1 wait for a further attempt" in shown
    assert fleet.dead_letters("r") in shown
    assert after["note"] == f"queue {fleet.retries('r', 100)} does not exist"


def test_a_frozen_broker_is_waited_for_within_a_bound(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """One that accepts and never answers is told as away, with patience once, and a question ends in time."""
    config = settings_of.load(fleet.config, {})
    told: list[str] = []
    with RabbitCluster(config, answer_s=0.5) as cluster:
        rabbitmq.pause()
        try:
            with pytest.raises(BrokerError, match="does not answer"):
                cluster.queues(["q"])
            began = time.monotonic()
            with pytest.raises(BrokerError, match="does not answer"):
                RabbitCluster(config, answer_s=0.5).open(0.8, lambda error: told.append(str(error)))
            took = time.monotonic() - began
        finally:
            rabbitmq.resume()
    assert len(told) == 1
    assert took < 6


def test_a_route_is_paused_and_resumed_at_one_worker(fleet: Fleet, rabbitmq: RabbitServer) -> None:
    """While it is paused another route is answered and it is not; status says why; resume lets it go on."""
    fleet.route("other")
    fleet.prepare()
    with fleet.running() as worker:
        run(fleet, "route", "pause", "r", "--admin", worker.address, "--reason", "model 7")
        wait_until(lambda: "r" in worker.status()["paused"], 10, "the worker has paused the route")
        for route in ("r", "other"):
            rabbitmq.publish(fleet.source(route), v2_body([row_of(1)]), message_id=route)
        rabbitmq.take(fleet.results("other"), 1)
        shown = run(fleet, "status", "--admin", worker.address).stdout
        unanswered = rabbitmq.depth(fleet.results("r"))
        run(fleet, "route", "resume", "r", "--admin", worker.address)
        (answer,) = rabbitmq.take(fleet.results("r"), 1)

    assert unanswered == 0
    assert "route r is paused: model 7" in shown
    assert answer.headers["inferfleet-id"] == "r"
