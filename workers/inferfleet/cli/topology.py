"""What the routes need of Kafka: topics, and the rights of those who read and write them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from inferfleet.config import Config, dead_letter_topic
from inferfleet.routes import Route

Role = Literal["source", "results", "dead letters"]


class Topic(msgspec.Struct, frozen=True):
    """A topic that some routes need, in the order of first need."""

    name: str
    roles: tuple[Role, ...]
    routes: tuple[str, ...]
    partitions: int
    replication: int


class Right(msgspec.Struct, frozen=True, order=True):
    """One rule: who may do what to which topic or group; ``pattern`` is ``literal`` or ``prefixed``."""

    principal: str
    resource: Literal["topic", "group"]
    name: str
    operation: Literal["Read", "Write", "Describe"]
    pattern: Literal["literal", "prefixed"] = "literal"


class Principals(msgspec.Struct, frozen=True):
    """Who gets rights: the workers, the callers, and whoever runs ``status`` and ``dlt``."""

    worker: str
    client: str
    operator: str


def plan_topics(config: Config, routes: Iterable[Route], partitions: int, replication: int) -> list[Topic]:
    """Return every topic that the routes need, each once; dead-letter topics have one partition."""
    needs: dict[str, tuple[list[Role], list[str]]] = {}
    for route in routes:
        for role, name in route_topics(config, route):
            roles, names = needs.setdefault(name, ([], []))
            if role not in roles:
                roles.append(role)
            if route.name not in names:
                names.append(route.name)
    return [
        Topic(name, tuple(roles), tuple(names), 1 if roles == ["dead letters"] else partitions, replication)
        for name, (roles, names) in needs.items()
    ]


def route_topics(config: Config, route: Route) -> list[tuple[Role, str]]:
    """Return the topics of one route with their part in it."""
    found: list[tuple[Role, str]] = [("source", route.source.name)]
    found += [("results", each.name) for each in route.results if each.kind == "kafka"]
    found.append(("dead letters", dead_letter_topic(config, route.source.name, config.group_of(route.pool))))
    return found


def plan_rights(config: Config, routes: Sequence[Route], who: Principals) -> list[Right]:
    """Return exactly the rights that running these routes needs, without repetition.

    Read and Write imply Describe; an idempotent producer needs nothing beyond Write.
    """
    rights: list[Right] = []
    for route in routes:
        for role, name in route_topics(config, route):
            rights += _topic_rights(role, name, who)
        group = config.group_of(route.pool)
        rights.append(Right(who.worker, "group", group, "Read"))
        rights.append(Right(who.operator, "group", group, "Describe"))
    rights.append(Right(who.client, "group", f"{config.fleet.name}.client.", "Read", "prefixed"))
    order = {principal: place for place, principal in enumerate((who.worker, who.client, who.operator))}
    return sorted(dict.fromkeys(rights), key=lambda right: order[right.principal])


def _topic_rights(role: Role, name: str, who: Principals) -> list[Right]:
    if role == "source":
        return [
            Right(who.worker, "topic", name, "Read"),
            Right(who.client, "topic", name, "Write"),
            Right(who.operator, "topic", name, "Describe"),
        ]
    if role == "results":
        return [
            Right(who.worker, "topic", name, "Write"),
            Right(who.client, "topic", name, "Read"),
            Right(who.operator, "topic", name, "Describe"),
        ]
    return [Right(who.worker, "topic", name, "Write"), Right(who.operator, "topic", name, "Read")]
