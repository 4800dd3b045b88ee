"""``inferfleet topics``: every topic and right that the routes need, in the form that creates them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

import click

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.cli.topology import Principals, Right, Topic, plan_rights, plan_topics
from inferfleet.config import Config
from inferfleet.routes import Route

FORMATS = ("text", "json", "sh", "strimzi", "acls")


@click.group(epilog="Example: inferfleet topics plan")
def topics() -> None:
    """Plan the topics and rights; workers never create topics."""


@topics.command(epilog="Example: inferfleet topics plan digits --format acls > acls.sh")
@click.argument("route_names", metavar="[ROUTE]...", nargs=-1)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--apply", "applied", is_flag=True, help="Create the topics that are missing.")
@click.option("--partitions", type=click.IntRange(1), default=6, show_default=True)
@click.option("--replication", type=click.IntRange(1), default=1, show_default=True)
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
) -> None:
    """Print every source, result and dead-letter topic of the routes (all, if none is named).

    sh prints kafka-topics.sh lines, strimzi KafkaTopic resources, acls the kafka-acls.sh lines that give
    each user exactly what it needs.
    """
    if as_json:
        form = "json"
    if applied and form not in ("text", "json"):
        raise click.UsageError("--apply goes with --format text or json")
    config = session.config
    routes = chosen(session, route_names)
    needed = plan_topics(config, routes, partitions, replication)
    who = Principals(principal, client_principal, operator_principal)
    if applied:
        _apply(config, needed, form == "json")
    elif form == "json":
        rights = plan_rights(config, routes, who)
        echo_json({"topics": needed, "rights": rights})
    elif form == "text":
        _print(needed)
    elif form == "sh":
        click.echo("\n".join(topic_commands(config, needed)))
    elif form == "strimzi":
        click.echo("---\n".join(strimzi(config, each) for each in needed), nl=False)
    else:
        click.echo("\n".join(acl_commands(config, plan_rights(config, routes, who))))


def chosen(session: Session, names: Sequence[str]) -> tuple[Route, ...]:
    """Return the named routes, all of them if none is named."""
    table = session.routes
    return tuple(table.named(name) for name in names) if names else table.routes


def _print(needed: Sequence[Topic]) -> None:
    rows = [
        (each.name, ", ".join(each.roles), ", ".join(each.routes), each.partitions, each.replication)
        for each in needed
    ]
    echo_table(("topic", "role", "routes", "partitions", "replication"), rows)


def _apply(config: Config, needed: Sequence[Topic], as_json: bool) -> None:
    from inferfleet.cli.kafka import Cluster

    cluster = Cluster(config)
    standing = cluster.topics()
    missing = [each for each in needed if each.name not in standing]
    created = cluster.create((each.name, each.partitions, each.replication) for each in missing)
    unseen = [each.name for each in missing if each.name not in created]
    if unseen:
        standing |= {name: facts.partitions for name, facts in cluster.describe_topics(unseen).items()}
    rows = [
        (each.name, "created" if each.name in created else "stood", standing.get(each.name, each.partitions))
        for each in needed
    ]
    if as_json:
        echo_json([{"topic": name, "outcome": outcome, "partitions": count} for name, outcome, count in rows])
    else:
        echo_table(("topic", "outcome", "partitions"), rows)


def _tool(config: Config, name: str) -> str:
    tool = f"{name} --bootstrap-server {shlex.quote(config.kafka.bootstrap_servers)}"
    if config.kafka.client.get("security.protocol", "PLAINTEXT").upper() == "PLAINTEXT":
        return tool
    return f"{tool} --command-config admin.properties"


def topic_commands(config: Config, needed: Sequence[Topic]) -> list[str]:
    """Return one kafka-topics.sh line per topic."""
    tool = _tool(config, "kafka-topics.sh")
    return [
        f"{tool} --create --if-not-exists --topic {shlex.quote(each.name)} "
        f"--partitions {each.partitions} --replication-factor {each.replication}"
        for each in needed
    ]


def acl_commands(config: Config, rights: Sequence[Right]) -> list[str]:
    """Return one kafka-acls.sh line per right."""
    tool = _tool(config, "kafka-acls.sh")
    lines = []
    for each in rights:
        pattern = "" if each.pattern == "literal" else f" --resource-pattern-type {each.pattern}"
        lines.append(
            f"{tool} --add --allow-principal {shlex.quote(each.principal)} --operation {each.operation} "
            f"--{each.resource} {shlex.quote(each.name)}{pattern}"
        )
    return lines


def strimzi(config: Config, topic: Topic) -> str:
    """Return a KafkaTopic resource; its name is the topic's in the alphabet of Kubernetes."""
    name = re.sub(r"[^a-z0-9.-]+", "-", topic.name.lower()).strip("-.")
    return (
        "apiVersion: kafka.strimzi.io/v1beta2\n"
        "kind: KafkaTopic\n"
        "metadata:\n"
        f"  name: {json.dumps(name)}\n"
        "  labels:\n"
        f"    strimzi.io/cluster: {json.dumps(config.fleet.name)}\n"
        "spec:\n"
        f"  topicName: {json.dumps(topic.name)}\n"
        f"  partitions: {topic.partitions}\n"
        f"  replicas: {topic.replication}\n"
    )
