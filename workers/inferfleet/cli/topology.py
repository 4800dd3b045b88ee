"""What the routes need of their brokers: topics and rights of Kafka, and what a worker must find. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from inferfleet.addresses import exchange_and_key
from inferfleet.config import Config
from inferfleet.naming import READY, dead_letter_name, redrive_id, retry_group, retry_name
from inferfleet.routes import Route

Role = Literal["source", "results", "dead letters", "retries", "ready retries"]
Access = Literal["READ", "WRITE"]

NARROW: frozenset[Role] = frozenset(("dead letters", "retries"))
"""Topics of these roles alone have one partition: few records, in the order of their time."""
DEFAULT_EXCHANGE = "amq.default"
"""What RabbitMQ's rules call the exchange without a name, which reaches every queue by its name."""


class Topic(msgspec.Struct, frozen=True):
    """A topic that some routes need, in the order of first need."""

    name: str
    roles: tuple[Role, ...]
    routes: tuple[str, ...]
    partitions: int
    replication: int


class Right(msgspec.Struct, frozen=True, order=True):
    """One rule: who may do what to what; ``pattern`` is ``literal`` or ``prefixed``."""

    principal: str
    resource: Literal["topic", "group", "transactional-id"]
    name: str
    operation: Literal["Read", "Write", "Describe"]
    pattern: Literal["literal", "prefixed"] = "literal"


class Principals(msgspec.Struct, frozen=True):
    """Who gets rights: the workers, the callers, and whoever runs ``status``, ``doctor`` and ``dlt``."""

    worker: str
    client: str
    operator: str


class Need(NamedTuple):
    """One thing that a worker must find on a broker, with the accesses that it must have there.

    A queue without an access only has to exist: it is reached through an exchange.
    """

    broker: Literal["kafka", "rabbitmq"]
    kind: Literal["topic", "queue", "exchange"]
    name: str
    use: str
    access: frozenset[Access] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def uses_kafka(routes: Iterable[Route]) -> bool:
    """Return whether any of the routes takes from Kafka or answers there."""
    return any(each.kind == "kafka" for route in routes for each in (route.source, *route.results))


def uses_rabbitmq(routes: Iterable[Route]) -> bool:
    """Return whether any of the routes takes from RabbitMQ or answers there."""
    kinds = ("rabbitmq", "reply")
    return any(each.kind in kinds for route in routes for each in (route.source, *route.results))


def shares_pauses(config: Config, pool: Iterable[Route]) -> bool:
    """Return whether the workers on these routes of one pool look for pauses in Redis."""
    shared = config.control is not None or config.routes.source == "fleet"
    return shared or any(each.kind == "redis" for route in pool for each in route.results)


def retry_delays(config: Config, route: Route) -> list[int]:
    """Return the delays of a route's retries; with ``order = "key"`` and for a shadow there are none."""
    if route.order == "key" or route.shadow_of is not None:
        return []
    return list(dict.fromkeys(config.retry.delays_ms))


def route_topics(config: Config, route: Route) -> list[tuple[Role, str]]:
    """Return the Kafka topics of one route with their part in it."""
    found: list[tuple[Role, str]] = []
    if route.source.kind == "kafka":
        found.append(("source", route.source.name))
    found += [("results", each.name) for each in route.results if each.kind == "kafka"]
    if route.source.kind == "kafka" and route.shadow_of is None:
        found.append(("dead letters", dead_letter_name(config, route)))
        found += [("retries", retry_name(config, route, delay)) for delay in retry_delays(config, route)]
    return found


def route_queues(config: Config, route: Route) -> list[tuple[Role, str]]:
    """Return the RabbitMQ queues of one route with their part in it.

    Queues behind an exchange of the results are their readers', so they are not among them.
    """
    found: list[tuple[Role, str]] = []
    if route.source.kind == "rabbitmq":
        found.append(("source", route.source.name))
    direct = [exchange_and_key(each.name) for each in route.results if each.kind == "rabbitmq"]
    found += [("results", key) for exchange, key in direct if not exchange]
    if route.source.kind == "rabbitmq" and route.shadow_of is None:
        found.append(("dead letters", dead_letter_name(config, route)))
        delays = retry_delays(config, route)
        found += [("retries", retry_name(config, route, delay)) for delay in delays]
        if delays:
            found.append(("ready retries", retry_name(config, route, READY)))
    return found


def route_exchanges(route: Route) -> list[tuple[str, str]]:
    """Return the exchanges of a route's results, each with its routing key; never the default exchange."""
    found = [exchange_and_key(each.name) for each in route.results if each.kind == "rabbitmq"]
    return [(exchange, key) for exchange, key in found if exchange]


def writes_by_name(route: Route) -> bool:
    """Return whether a worker on this route publishes to queues by their names."""
    return (
        route.source.kind == "rabbitmq"  # its dead letters and its retries
        or any(each.kind == "reply" for each in route.results)
        or any(each.kind == "rabbitmq" and each.name.startswith("/") for each in route.results)
    )


def plan_topics(config: Config, routes: Iterable[Route], partitions: int, replication: int) -> list[Topic]:
    """Return every topic that the routes need, each once; see :data:`NARROW` for those of one partition."""
    needs: dict[str, tuple[list[Role], list[str]]] = {}
    for route in routes:
        for role, name in route_topics(config, route):
            roles, names = needs.setdefault(name, ([], []))
            if role not in roles:
                roles.append(role)
            if route.name not in names:
                names.append(route.name)
    return [
        Topic(name, tuple(roles), tuple(names), 1 if NARROW.issuperset(roles) else partitions, replication)
        for name, (roles, names) in needs.items()
    ]


def plan_rights(config: Config, routes: Sequence[Route], who: Principals) -> list[Right]:
    """Return exactly the rights on Kafka that running these routes needs, without repetition.

    Read and Write imply Describe; an idempotent producer needs nothing beyond Write. Redrive writes retries
    and, to the dead letters, the mark that it did, in one transaction.
    """
    rights: list[Right] = []
    for route in routes:
        topics = route_topics(config, route)
        for role, name in topics:
            rights += _topic_rights(role, name, who)
        groups = [config.group_of(route.pool)] if route.source.kind == "kafka" else []
        if any(role == "retries" for role, _ in topics):
            groups.append(retry_group(config, route.pool))
            rights.append(Right(who.operator, "transactional-id", redrive_id(config, route), "Write"))
        for group in groups:
            rights.append(Right(who.worker, "group", group, "Read"))
            rights.append(Right(who.operator, "group", group, "Describe"))
    if rights:
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
    if role == "retries":
        # Redrive writes transactions there; only who can read tells their ends from records that wait.
        return [
            Right(who.worker, "topic", name, "Read"),
            Right(who.worker, "topic", name, "Write"),
            Right(who.operator, "topic", name, "Read"),
            Right(who.operator, "topic", name, "Write"),
        ]
    return [
        Right(who.worker, "topic", name, "Write"),
        Right(who.operator, "topic", name, "Read"),
        Right(who.operator, "topic", name, "Write"),
    ]


TOPIC_ACCESS: dict[Role, frozenset[Access]] = {
    "source": frozenset(("READ",)),
    "results": frozenset(("WRITE",)),
    "dead letters": frozenset(("WRITE",)),
    "retries": frozenset(("READ", "WRITE")),
}
"""What a worker must be able to do with a topic of each role."""
_TAKEN: frozenset[Role] = frozenset(("source", "ready retries"))


def needs(config: Config, routes: Iterable[Route]) -> list[Need]:
    """Return everything that a worker on these routes must find on both brokers, each thing once.

    What several routes need is named by the first, with the accesses of all.
    """
    found: dict[tuple[str, str, str], Need] = {}

    def add(need: Need) -> None:
        known = found.setdefault(need[:3], need)
        found[need[:3]] = known._replace(access=known.access | need.access)

    for route in routes:
        for role, name in route_topics(config, route):
            add(Need("kafka", "topic", name, f"{role} of route {route.name}", TOPIC_ACCESS[role]))
        for role, name in route_queues(config, route):
            access: frozenset[Access] = frozenset(("READ",)) if role in _TAKEN else frozenset()
            add(Need("rabbitmq", "queue", name, f"{role} of route {route.name}", access))
        write: frozenset[Access] = frozenset(("WRITE",))
        for name, _ in route_exchanges(route):
            add(Need("rabbitmq", "exchange", name, f"results of route {route.name}", write))
        if writes_by_name(route):
            use = f"queues that route {route.name} writes to by name"
            add(Need("rabbitmq", "exchange", DEFAULT_EXCHANGE, use, write))
    return list(found.values())
