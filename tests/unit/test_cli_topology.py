"""What the routes need of RabbitMQ, what a worker must find on both brokers, and the forms of the plan."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from inferfleet.cli import cli
from inferfleet.cli.rabbit_topology import (
    DELIVERY_LIMIT,
    Binding,
    Exchange,
    Fan,
    Permission,
    Queue,
    RabbitPlan,
    plan_permissions,
    plan_rabbitmq,
    shadow_fans,
)
from inferfleet.cli.topology import Need, Principals, needs, plan_rights, plan_topics
from inferfleet.config import Config, parse
from inferfleet.errors import ConfigError
from inferfleet.routes import Route, parse_routes

SOURCE = Path(__file__).resolve().parents[2] / "workers" / "inferfleet"
WHO = Principals("User:w", "User:c", "User:o")
GROUP = "work.inferfleet.default"


def route(source: str, *results: str, name: str = "r", **keys: str) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(
        [
            f'[[route]]\nname = "{name}"\nsource = "{source}"\nresults = {json.dumps(results)}',
            'model = "m"\nversion = "1"',
            *lines,
            "",
        ]
    )


def routes(*texts: str) -> tuple[Route, ...]:
    return parse_routes("".join(texts), "inferfleet", "x").routes


def test_a_route_on_rabbitmq_needs_a_chain_of_queues() -> None:
    """Source, dead letters, a queue for each delay that hands on to the ready queue; nothing of Kafka."""
    planned = plan_rabbitmq(
        parse("[retry]\ndelays_ms = [5000, 30000]"), routes(route("rabbitmq:work", "redis"))
    )
    kept = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}

    def waiting(delay_ms: int) -> dict[str, str | int]:
        return {
            "x-queue-type": "quorum",
            "x-message-ttl": delay_ms * 12 // 10,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": f"{GROUP}.retry.ready",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }

    assert planned == RabbitPlan(
        (
            Queue("work", ("source",), ("r",), kept),
            Queue(f"{GROUP}.dlt", ("dead letters",), ("r",), kept),
            Queue(f"{GROUP}.retry.5000", ("retries",), ("r",), waiting(5000)),
            Queue(f"{GROUP}.retry.30000", ("retries",), ("r",), waiting(30000)),
            Queue(f"{GROUP}.retry.ready", ("ready retries",), ("r",), kept),
        )
    )
    assert plan_topics(Config(), routes(route("rabbitmq:work", "redis")), 6, 1) == []
    assert plan_rights(Config(), routes(route("rabbitmq:work", "redis")), WHO) == []


@pytest.mark.parametrize(
    ("settings", "keys"), [("[retry]\ndelays_ms = []", {}), ("", {"order": "key"})], ids=["none", "in order"]
)
def test_without_retries_there_are_no_queues_for_them(settings: str, keys: dict[str, str]) -> None:
    """Neither with an empty list of delays nor where a retry would be out of order."""
    chosen = routes(route("rabbitmq:work", "redis", **keys))

    names = [each.name for each in plan_rabbitmq(parse(settings), chosen).queues]
    assert names == ["work", f"{GROUP}.dlt"]
    assert {each.name for each in needs(parse(settings), chosen)} == {*names, "amq.default"}


def test_results_need_an_exchange_and_a_reader() -> None:
    """An exchange is shared by its routes; a queue is proposed for each key, needed if reached by name."""
    planned = plan_rabbitmq(
        Config(),
        routes(
            route("kafka:a", "rabbitmq:answers/a.done", name="a"),
            route("kafka:b", "rabbitmq:answers/b.done", "rabbitmq:/direct", name="b"),
            route("kafka:c", "rabbitmq:amq.topic/c", name="c"),
        ),
    )
    quorum = {"x-queue-type": "quorum"}

    assert planned.exchanges == (Exchange("answers", ("a", "b")),)
    assert planned.queues == (
        Queue("direct", ("results",), ("b",), quorum),
        Queue("a.done", ("results",), ("a",), quorum, proposed=True),
        Queue("b.done", ("results",), ("b",), quorum, proposed=True),
        Queue("c", ("results",), ("c",), quorum, proposed=True),
    )
    assert planned.bindings == (
        Binding("answers", "a.done", "a.done"),
        Binding("answers", "b.done", "b.done"),
        Binding("amq.topic", "c", "c"),
    )


def test_a_queue_that_is_source_and_result_is_declared_once() -> None:
    """One route's answers are another's requests: it has the arguments of both."""
    chosen = routes(
        route("rabbitmq:one", "rabbitmq:/two", name="a"), route("rabbitmq:two", "redis", name="b")
    )
    (shared,) = (each for each in plan_rabbitmq(Config(), chosen).queues if each.name == "two")
    (chained,) = (each for each in plan_rabbitmq(Config(), chosen[::-1]).queues if each.name == "two")

    assert (shared.roles, shared.routes) == (("results", "source"), ("a", "b"))
    assert (
        shared.arguments
        == chained.arguments
        == {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
    )


def test_a_derived_name_that_amqp_cannot_carry_is_named() -> None:
    """The source fits and its retries do not: the error says what to shorten."""
    with pytest.raises(ConfigError, match=r"of route r has a name over 255 bytes; shorten its source"):
        plan_rabbitmq(Config(), routes(route("rabbitmq:" + "q" * 240, "redis")))


# What a quorum queue of RabbitMQ 4 can be declared with, and what it asks for together.
QUORUM_ARGUMENTS = {
    "x-queue-type", "x-delivery-limit", "x-message-ttl", "x-expires", "x-max-length", "x-max-length-bytes",
    "x-overflow", "x-single-active-consumer", "x-queue-leader-locator", "x-quorum-initial-group-size",
    "x-quorum-target-group-size", "x-dead-letter-exchange", "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
}  # fmt: skip
REFUSED_ARGUMENTS = {
    "x-queue-mode", "x-queue-version", "x-queue-master-locator", "x-max-priority",
    "x-max-in-memory-length", "x-max-in-memory-bytes", "x-ha-policy", "x-cancel-on-ha-failover",
}  # fmt: skip


def everything() -> RabbitPlan:
    return plan_rabbitmq(
        Config(),
        routes(
            route("rabbitmq:work", "rabbitmq:answers/done", "rabbitmq:/direct", "reply", name="a"),
            route("rabbitmq:more", "kafka:t", "redis", name="b"),
        ),
    )


def test_nothing_is_declared_that_rabbitmq_4_refuses() -> None:
    """Each queue is a durable quorum queue with arguments that 3.10 and 4.x both take.

    Refused by 4.3 (https://github.com/rabbitmq/rabbitmq-server/releases/tag/v4.3.0, and item by item in
    https://docs.aws.amazon.com/amazon-mq/latest/developer-guide/rabbitmq-43.html): queues that are neither
    durable nor exclusive, x-queue-mode, x-queue-version = 1, x-queue-master-locator, basic.qos with
    global = true. By 4.0 (release notes of v4.0.1): mirroring, and more than 20 redeliveries unless a limit
    is set. The arguments of quorum queues are those of ``capabilities/0`` in
    https://github.com/rabbitmq/rabbitmq-server/blob/main/deps/rabbit/src/rabbit_quorum_queue.erl, which has
    no x-max-priority; that at-least-once needs reject-publish is said in
    https://www.rabbitmq.com/docs/quorum-queues#activating-at-least-once-dead-lettering.
    """
    for queue in everything().queues:
        arguments = queue.arguments
        assert arguments["x-queue-type"] == "quorum", queue
        assert set(arguments) <= QUORUM_ARGUMENTS - REFUSED_ARGUMENTS, queue
        assert not queue.name.startswith("amq."), queue
        assert int(arguments.get("x-delivery-limit", 0)) >= 0, queue  # -1 is new in 4.0
        assert 0 <= int(arguments.get("x-message-ttl", 0)) < 2**32, queue
        if arguments.get("x-dead-letter-strategy") == "at-least-once":
            assert arguments["x-overflow"] == "reject-publish", queue
            assert "x-dead-letter-exchange" in arguments, queue
        if queue.roles[0] in ("source", "dead letters", "ready retries"):
            assert int(arguments["x-delivery-limit"]) > 20, queue
    assert {each.type for each in everything().exchanges} == {"direct"}


def test_no_code_declares_what_is_not_durable_or_asks_for_a_shared_prefetch() -> None:
    """The whole package is read: prefetch is per consumer, and what is declared lasts or is exclusive.

    Both are denied by default since 4.3 (features ``global_qos`` and ``transient_nonexcl_queues``,
    https://www.rabbitmq.com/release-information/deprecated-features-list).
    """
    for path in SOURCE.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            name = ast.unparse(call.func).rpartition(".")[2]
            assert given.get("global_", "False") == "False", f"{path}:{call.lineno}"
            if name in ("queue_declare", "declare_queue"):
                kinds = (given.get("durable"), given.get("passive"), given.get("exclusive"))
                assert "True" in kinds, f"{path}:{call.lineno}"


def test_each_user_gets_exactly_what_it_needs() -> None:
    """Nobody declares but callers their reply queue; the expressions match these names and no others."""
    chosen = routes(route("rabbitmq:wo.rk", "rabbitmq:answers/done", "reply"))
    group = r"wo\.rk\.inferfleet\.default"
    worker, client, operator = plan_permissions(Config(), chosen, WHO)

    assert worker == Permission("w", "^$", r"^(answers|amq\.default)$", rf"^(wo\.rk|{group}\.retry\.ready)$")
    assert client == Permission("c", r"^(amq\.gen-.*)$", r"^(amq\.default)$", r"^(done|amq\.gen-.*)$")
    assert operator == Permission("o", "^$", r"^(amq\.default)$", rf"^({group}\.dlt)$")
    assert re.search(worker.read, "wo.rk")
    assert not any(re.search(worker.read, name) for name in ("work", "wo.rk2", "my.wo.rk", "wo.rk.x.dlt"))


def test_answers_to_an_exchange_alone_need_no_way_to_every_queue() -> None:
    """A route from Kafka to an exchange may write to that exchange and read nothing."""
    chosen = routes(route("kafka:t", "rabbitmq:a+b/done"))

    assert plan_permissions(Config(), chosen, WHO) == [
        Permission("w", "^$", r"^(a\+b)$", "^$"),
        Permission("c", "^$", "^$", "^(done)$"),
    ]


def test_what_a_worker_must_find_is_listed_once_for_both_brokers() -> None:
    """Everything of its routes, with the accesses of all of them, named by the first."""
    config = parse("[retry]\ndelays_ms = [100]")
    chosen = routes(
        route("kafka:in", "kafka:out", "rabbitmq:answers/done", name="a"),
        route("rabbitmq:work", "kafka:out", "rabbitmq:answers/more", name="b"),
    )
    read, write, nothing = frozenset(["READ"]), frozenset(["WRITE"]), frozenset[str]()

    assert needs(config, chosen) == [
        Need("kafka", "topic", "in", "source of route a", read),
        Need("kafka", "topic", "out", "results of route a", write),
        Need("kafka", "topic", "in.inferfleet.default.dlt", "dead letters of route a", write),
        Need("kafka", "topic", "in.inferfleet.default.retry.100", "retries of route a", read | write),
        Need("rabbitmq", "exchange", "answers", "results of route a", write),
        Need("rabbitmq", "queue", "work", "source of route b", read),
        Need("rabbitmq", "queue", f"{GROUP}.dlt", "dead letters of route b", nothing),
        Need("rabbitmq", "queue", f"{GROUP}.retry.100", "retries of route b", nothing),
        Need("rabbitmq", "queue", f"{GROUP}.retry.ready", "ready retries of route b", read),
        Need("rabbitmq", "exchange", "amq.default", "queues that route b writes to by name", write),
    ]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text(
        '[rabbitmq]\nurl = "amqp://host/my%2Fshop, amqp://other/my%2Fshop"\n'
    )
    text = route("rabbitmq:work", "rabbitmq:answers/done", "kafka:out", "reply")
    (tmp_path / "routes.toml").write_text(text)
    return tmp_path / "fleet.toml"


def plan(fleet: Path, form: str) -> str:
    result = CliRunner().invoke(cli, ["--config", str(fleet), "topics", "plan", "--format", form])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_script_imports_definitions(fleet: Path) -> None:
    """One call that is the same for every RabbitMQ, in the virtual host of the settings; Kafka beside it."""
    kafka, rabbitmq = plan(fleet, "sh").split("rabbitmqctl")
    command, _, rest = rabbitmq.partition("\n")
    document = json.loads(rest.removesuffix("END\n"))
    queues = {each["name"]: each for each in document["queues"]}

    assert kafka.startswith("kafka-topics.sh")
    assert kafka.count("\n") == 1
    assert shlex.split(command.replace("<<", "")) == ["import_definitions", "--format=json", "END"]
    assert {each["vhost"] for kind in document.values() for each in kind} == {"my/shop"}
    assert all(each["durable"] for each in document["queues"] + document["exchanges"])
    assert queues[f"{GROUP}.retry.5000"]["arguments"]["x-message-ttl"] == 6000
    (binding,) = document["bindings"]
    assert (binding["source"], binding["destination"], binding["routing_key"]) == ("answers", "done", "done")


def test_resources_are_those_of_the_operators(fleet: Path) -> None:
    """KafkaTopic, Queue, Exchange and Binding, each with its real name; the type of a queue stands once."""
    documents = plan(fleet, "strimzi").split("---\n")
    kinds = re.findall(r"^kind: (\w+)$", "".join(documents), re.MULTILINE)

    assert sorted(kinds) == ["Binding", "Exchange", "KafkaTopic", *["Queue"] * 7]
    waiting = next(each for each in documents if f'name: "{GROUP}.retry.5000"' in each)
    assert "apiVersion: rabbitmq.com/v1beta1\n" in waiting
    assert '  vhost: "my/shop"\n' in waiting
    assert "  type: quorum\n" in waiting
    assert '    "x-message-ttl": 6000\n' in waiting
    assert "x-queue-type" not in "".join(documents)


def test_rights_are_a_line_for_each_user(fleet: Path) -> None:
    """rabbitmqctl lines carry what was planned, quoted for a shell; JSON holds the same."""
    lines = [shlex.split(each) for each in plan(fleet, "acls").splitlines()]
    rabbitmq = [each for each in lines if each[0] == "rabbitmqctl"]
    plain = json.loads(plan(fleet, "json"))

    assert [each[:4] for each in rabbitmq] == [["rabbitmqctl", "set_permissions", "-p", "my/shop"]] * 3
    assert [each[4:] for each in rabbitmq] == [list(each.values()) for each in plain["permissions"]]
    assert {each["name"] for each in plain["queues"]} >= {"work", "done"}


def test_the_table_says_what_is_only_proposed(fleet: Path) -> None:
    """Topics, queues, exchanges and bindings one below the other."""
    printed = plan(fleet, "text")

    assert re.search(r"^done +results \(proposed\) +r +x-queue-type=quorum$", printed, re.MULTILINE)
    for heading in ("TOPIC", "QUEUE", "EXCHANGE", "BINDING OF"):
        assert re.search(rf"^{heading} ", printed, re.MULTILINE)


def test_routes_on_rabbitmq_are_shown_as_they_are_written(fleet: Path) -> None:
    """list and show name queue, exchange and key; the TOML parses to the same route."""
    text = fleet.with_name("routes.toml").read_text()

    def shown(*arguments: str) -> str:
        return CliRunner().invoke(cli, ["--config", str(fleet), "route", *arguments]).stdout

    assert "rabbitmq:work" in shown("list")
    assert "rabbitmq:answers/done, kafka:out, reply" in shown("show", "r")
    assert routes(shown("show", "r", "--toml")) == routes(text)


# Detached shadows

PRIMARY = route("rabbitmq:work", "redis", name="primary")
SHADOW = """
[[route]]
name = "next"
source = "rabbitmq:work.next"
shadow_of = "primary"
pool = "shadow"
model = "m"
version = "2"
"""


def test_a_detached_shadow_has_a_queue_beside_its_primarys() -> None:
    """Both are bound to one exchange under one key, so that each gets every request."""
    table = routes(PRIMARY, SHADOW)
    fans = shadow_fans(table[1:], table)
    planned = plan_rabbitmq(Config(), table[1:], fans)
    client = next(each for each in plan_permissions(Config(), table, WHO, fans) if each.user == "c")

    assert fans == [Fan("next", "primary", "work", "work", "work.next", "work", ours=True)]
    assert planned.exchanges == (Exchange("work", ("primary", "next")),)
    assert planned.bindings == (Binding("work", "work", "work"), Binding("work", "work.next", "work"))
    assert re.search(client.write, "work")


def test_an_exchange_that_stands_gets_only_the_shadows_binding() -> None:
    """What producers publish to already is not declared anew."""
    table = routes(PRIMARY, SHADOW)
    planned = plan_rabbitmq(Config(), table[1:], shadow_fans(table, table, "orders/new"))

    assert planned.exchanges == ()
    assert planned.bindings == (Binding("orders", "work.next", "new"),)


def test_a_shadow_on_its_primarys_queue_is_refused() -> None:
    """It would take requests away; without its primary nobody knows what it is to see."""
    same = [*routes(PRIMARY), *routes(SHADOW.replace("work.next", "work"))]
    with pytest.raises(ConfigError, match="needs a queue of its own, such as"):
        shadow_fans(same, same)
    with pytest.raises(ConfigError, match='shadow_of = "primary" names no rabbitmq route'):
        shadow_fans(same[1:], same[1:])


def test_the_plan_says_what_a_shadow_sees(tmp_path: Path) -> None:
    """In text and as commands."""
    (tmp_path / "fleet.toml").write_text("")
    (tmp_path / "routes.toml").write_text(PRIMARY + SHADOW)

    def plan(*arguments: str) -> str:
        command = ["--config", str(tmp_path / "fleet.toml"), "topics", "plan", "next", *arguments]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "route next sees what is published to exchange work with key work" in plan()
    assert "exchange orders with key work" in plan("--source-exchange", "orders")
    assert json.loads(plan("--json"))["bindings"][-1]["queue"] == "work.next"
