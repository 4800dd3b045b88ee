"""The plan of topics, queues and rights in the forms that create them: scripts and resources. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence

from yarl import URL

from inferfleet.cli.rabbit_topology import QUORUM, Arguments, Permission, RabbitPlan
from inferfleet.cli.topology import Right, Topic
from inferfleet.config import Config


def virtual_host(config: Config) -> str:
    """Return the virtual host that ``[rabbitmq] url`` names; ``/`` where it names none."""
    return URL(config.rabbitmq.url.split(",")[0].strip()).path[1:] or "/"


def topic_commands(config: Config, needed: Iterable[Topic]) -> list[str]:
    """Return one kafka-topics.sh line per topic."""
    tool = _tool(config, "kafka-topics.sh")
    return [
        f"{tool} --create --if-not-exists --topic {shlex.quote(each.name)} "
        f"--partitions {each.partitions} --replication-factor {each.replication}"
        for each in needed
    ]


def acl_commands(config: Config, rights: Iterable[Right]) -> list[str]:
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


def _tool(config: Config, name: str) -> str:
    tool = f"{name} --bootstrap-server {shlex.quote(config.kafka.bootstrap_servers)}"
    if config.kafka.client.get("security.protocol", "PLAINTEXT").upper() == "PLAINTEXT":
        return tool
    return f"{tool} --command-config admin.properties"


def definition_commands(config: Config, plan: RabbitPlan) -> list[str]:
    """Return the rabbitmqctl call that imports what is missing; empty where there is nothing to declare.

    Unlike rabbitmqadmin, whose options changed with RabbitMQ 4, it is the same in every version; what
    stands it leaves alone.
    """
    if not plan.queues and not plan.exchanges:
        return []
    vhost = virtual_host(config)
    plain = {"vhost": vhost, "durable": True, "auto_delete": False}
    document = {
        "queues": [{"name": each.name, **plain, "arguments": each.arguments} for each in plan.queues],
        "exchanges": [
            {"name": each.name, **plain, "type": each.type, "internal": False, "arguments": {}}
            for each in plan.exchanges
        ],
        "bindings": [
            {
                "source": each.exchange,
                "vhost": vhost,
                "destination": each.queue,
                "destination_type": "queue",
                "routing_key": each.key,
                "arguments": {},
            }
            for each in plan.bindings
        ],
    }
    return [f"rabbitmqctl import_definitions --format=json <<'END'\n{json.dumps(document, indent=1)}\nEND"]


def permission_commands(config: Config, permissions: Iterable[Permission]) -> list[str]:
    """Return one rabbitmqctl line per user; it replaces what the user had in this virtual host."""
    tool = f"rabbitmqctl set_permissions -p {shlex.quote(virtual_host(config))}"
    return [
        " ".join([tool, *map(shlex.quote, (each.user, each.configure, each.write, each.read))])
        for each in permissions
    ]


def resources(config: Config, topics: Sequence[Topic], plan: RabbitPlan) -> list[str]:
    """Return Kubernetes resources: Strimzi's, and those of RabbitMQ's topology operator."""
    found = [_strimzi(config, each) for each in topics]
    found += [
        _rabbitmq(
            config,
            "Queue",
            each.name,
            [
                f"name: {json.dumps(each.name)}",
                f"type: {QUORUM}",
                "durable: true",
                "autoDelete: false",
                *_arguments(each.arguments),
            ],
        )
        for each in plan.queues
    ]
    found += [
        _rabbitmq(
            config,
            "Exchange",
            each.name,
            [f"name: {json.dumps(each.name)}", f"type: {each.type}", "durable: true", "autoDelete: false"],
        )
        for each in plan.exchanges
    ]
    found += [
        _rabbitmq(
            config,
            "Binding",
            f"{each.exchange}.{each.key}",
            [
                f"source: {json.dumps(each.exchange)}",
                f"destination: {json.dumps(each.queue)}",
                "destinationType: queue",
                f"routingKey: {json.dumps(each.key)}",
            ],
        )
        for each in plan.bindings
    ]
    return found


def _arguments(arguments: Arguments) -> list[str]:
    # The type of a queue has a key of its own in the resource.
    rest = {key: value for key, value in arguments.items() if key != "x-queue-type"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()]
    return ["arguments:", *lines] if lines else []


def _strimzi(config: Config, topic: Topic) -> str:
    return (
        "apiVersion: kafka.strimzi.io/v1beta2\n"
        "kind: KafkaTopic\n"
        "metadata:\n"
        f"  name: {json.dumps(_resource_name(topic.name))}\n"
        "  labels:\n"
        f"    strimzi.io/cluster: {json.dumps(config.fleet.name)}\n"
        "spec:\n"
        f"  topicName: {json.dumps(topic.name)}\n"
        f"  partitions: {topic.partitions}\n"
        f"  replicas: {topic.replication}\n"
    )


def _rabbitmq(config: Config, kind: str, name: str, spec: Iterable[str]) -> str:
    lines = [
        "apiVersion: rabbitmq.com/v1beta1",
        f"kind: {kind}",
        "metadata:",
        f"  name: {json.dumps(_resource_name(name))}",
        "spec:",
        f"  vhost: {json.dumps(virtual_host(config))}",
        *(f"  {line}" for line in spec),
        "  rabbitmqClusterReference:",
        f"    name: {json.dumps(config.fleet.name)}",
    ]
    return "\n".join(lines) + "\n"


def _resource_name(name: str) -> str:
    """Return a name in the alphabet of Kubernetes."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.")
