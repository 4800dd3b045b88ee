"""``inferfleet topics``: every topic, queue and right that the routes need, in the form that creates them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from inferfleet import tables
from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.cli.rabbit_topology import (
    Fan,
    RabbitPlan,
    plan_permissions,
    plan_rabbitmq,
    shadow_fans,
)
from inferfleet.cli.topic_forms import (
    acl_commands,
    definition_commands,
    permission_commands,
    resources,
    topic_commands,
)
from inferfleet.cli.topology import Principals, Topic, plan_rights, plan_topics
from inferfleet.config import Config
from inferfleet.coordinator.route_checks import resolve_latest
from inferfleet.errors import BrokerError
from inferfleet.routes import Route, RouteTable, route_table

if TYPE_CHECKING:
    from inferfleet.cli.rabbitmq import Declared

FORMATS = ("text", "json", "sh", "strimzi", "acls")


@click.group(epilog="Example: inferfleet topics plan")
def topics() -> None:
    """Plan topics, queues and rights; workers never create any."""


@topics.command(epilog="Example: inferfleet topics plan digits --format acls > acls.sh")
@click.argument("route_names", metavar="[ROUTE]...", nargs=-1)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--apply", "applied", is_flag=True, help="Create what is missing, on Kafka and RabbitMQ.")
@click.option("--partitions", type=click.IntRange(1), default=6, show_default=True, help="Kafka only.")
@click.option("--replication", type=click.IntRange(1), default=1, show_default=True, help="Kafka only.")
@click.option("--principal", default="User:inferfleet-worker", show_default=True, help="The workers' user.")
@click.option(
    "--client-principal", default="User:inferfleet-client", show_default=True, help="The callers' user."
)
@click.option(
    "--operator-principal",
    default="User:inferfleet-operator",
    show_default=True,
    help="The user of status, doctor and dlt.",
)
@click.option(
    "--source-exchange",
    default="",
    metavar="NAME[/KEY]",
    help="RabbitMQ, detached shadows: where producers publish; by default one of the source queue's name.",
)
@click.option(
    "--routes",
    "routes_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan for the routes of this file, before `route apply` brings them to the control plane.",
)
@pass_session
def plan(
    session: Session,
    route_names: tuple[str, ...],
    form: str,
    as_json: bool,
    applied: bool,
    partitions: int,
    replication: int,
    principal: str,
    client_principal: str,
    operator_principal: str,
    source_exchange: str,
    routes_file: Path | None,
) -> None:
    """Print every topic, queue and exchange of the routes (all, if none is named).

    Sources, results, dead letters and delayed retries. sh prints kafka-topics.sh lines and a rabbitmqctl
    import, strimzi the resources of Kubernetes operators, acls the kafka-acls.sh and rabbitmqctl lines that
    give each user exactly what it needs (on RabbitMQ without "User:").
    """
    if as_json:
        form = "json"
    if applied and form not in ("text", "json"):
        raise click.UsageError("--apply goes with --format text or json")
    config = session.config
    table = session.routes if routes_file is None else _read(session, routes_file)
    routes = _named(table, route_names)
    fans = shadow_fans(routes, table.routes, source_exchange)
    needed, queues = plan_topics(config, routes, partitions, replication), plan_rabbitmq(config, routes, fans)
    who = Principals(principal, client_principal, operator_principal)
    if applied:
        _apply(config, needed, queues, form == "json")
    elif form == "text":
        _print(needed, queues)
        _print_fans(fans)
    elif form == "sh":
        click.echo("\n".join([*topic_commands(config, needed), *definition_commands(config, queues)]))
    elif form == "strimzi":
        click.echo("---\n".join(resources(config, needed, queues)), nl=False)
    else:
        rights, permissions = plan_rights(config, routes, who), plan_permissions(config, routes, who, fans)
        if form == "json":
            rabbitmq = {"queues": queues.queues, "exchanges": queues.exchanges, "bindings": queues.bindings}
            echo_json({"topics": needed, "rights": rights, **rabbitmq, "permissions": permissions})
        else:
            lines = [*acl_commands(config, rights), *permission_commands(config, permissions)]
            click.echo("\n".join(lines))


def chosen(session: Session, names: Sequence[str]) -> tuple[Route, ...]:
    """Return the named routes, all of them if none is named."""
    return _named(session.routes, names)


def _named(table: RouteTable, names: Sequence[str]) -> tuple[Route, ...]:
    return tuple(table.named(name) for name in names) if names else table.routes


def _read(session: Session, file: Path) -> RouteTable:
    """Return the routes of a file that is to be applied; which version is the latest matters not here."""
    tree = tables.parse_toml(tables.read_text(file, "routes file"), str(file))
    return route_table(resolve_latest(tree, lambda _: "1")[0], session.config.fleet.name, str(file))


def _print(needed: Sequence[Topic], plan: RabbitPlan) -> None:
    tables: list[tuple[Sequence[str], Sequence[Sequence[object]]]] = [
        (
            ("topic", "role", "routes", "partitions", "replication"),
            [
                (each.name, ", ".join(each.roles), ", ".join(each.routes), each.partitions, each.replication)
                for each in needed
            ],
        ),
        (
            ("queue", "role", "routes", "arguments"),
            [
                (
                    each.name,
                    ", ".join(each.roles) + (" (proposed)" if each.proposed else ""),
                    ", ".join(each.routes),
                    " ".join(f"{key}={value}" for key, value in each.arguments.items()),
                )
                for each in plan.queues
            ],
        ),
        (
            ("exchange", "type", "routes"),
            [(each.name, each.type, ", ".join(each.routes)) for each in plan.exchanges],
        ),
        (
            ("binding of", "key", "to queue"),
            [(each.exchange, each.key, each.queue) for each in plan.bindings],
        ),
    ]
    _print_tables(tables)


def _print_fans(fans: Sequence[Fan]) -> None:
    for fan in fans:
        click.echo(
            f"\nroute {fan.shadow} sees what is published to exchange {fan.exchange} with key {fan.key}; "
            f"what is sent to queue {fan.primary_queue} itself, as `inferfleet submit` does, it does not"
        )


def _print_tables(tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]]]]) -> None:
    first = True
    for headings, rows in tables:
        if rows:
            if not first:
                click.echo()
            echo_table(headings, rows)
            first = False


def _apply(config: Config, needed: Sequence[Topic], plan: RabbitPlan, as_json: bool) -> None:
    made = _create_topics(config, needed) if needed else []
    declared = _declare(config, plan) if plan.queues or plan.exchanges else []
    if as_json:
        rows: list[dict[str, object]] = [
            {"topic": name, "outcome": outcome, "partitions": count} for name, outcome, count in made
        ]
        rows += [{each.kind: each.name, "outcome": each.outcome, "text": each.text} for each in declared]
        echo_json(rows)
    else:
        outcomes = [(each.kind, each.name, each.outcome, each.text) for each in declared]
        _print_tables(
            [(("topic", "outcome", "partitions"), made), (("kind", "name", "outcome", ""), outcomes)]
        )
    differing = [each for each in declared if each.outcome == "differs"]
    if differing:
        raise BrokerError(
            f"RabbitMQ: {', '.join(each.name for each in differing)} stood with other arguments "
            f"({differing[0].text}); nothing was changed: delete it once it is empty and apply again"
        )


def _create_topics(config: Config, needed: Sequence[Topic]) -> list[tuple[str, str, int]]:
    from inferfleet.cli.kafka import Cluster

    cluster = Cluster(config)
    standing = cluster.topics()
    missing = [each for each in needed if each.name not in standing]
    created = cluster.create((each.name, each.partitions, each.replication) for each in missing)
    unseen = [each.name for each in missing if each.name not in created]
    if unseen:
        standing |= {name: facts.partitions for name, facts in cluster.describe_topics(unseen).items()}
    return [
        (each.name, "created" if each.name in created else "stood", standing.get(each.name, each.partitions))
        for each in needed
    ]


def _declare(config: Config, plan: RabbitPlan) -> list[Declared]:
    from inferfleet.cli.rabbitmq import RabbitCluster

    with RabbitCluster(config) as cluster:
        return cluster.declare(plan)
