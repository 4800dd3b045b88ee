"""What the routes need of RabbitMQ: queues, exchanges, bindings, and each user's permissions. Pure.

Everything is what RabbitMQ 3.10 and 4.x both accept: durable quorum queues, durable direct exchanges, no
argument that either version refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from inferfleet.cli.topology import (
    DEFAULT_EXCHANGE,
    Principals,
    Role,
    retry_delays,
    route_exchanges,
    route_queues,
    writes_by_name,
)
from inferfleet.config import Config
from inferfleet.errors import ConfigError
from inferfleet.naming import READY, retry_name
from inferfleet.routes import Route

DELIVERY_LIMIT = 1_000_000
"""How often a message may be given back. RabbitMQ 4 drops it after 20 times unless told otherwise, and
every restart of a worker, every pause and every look at dead letters gives messages back."""
QUORUM = "quorum"
LONGEST_NAME = 255
_RESERVED = "amq."
_TTL_MARGIN = 1.2
"""A retry carries its own delay with up to this much jitter; the queue's limit must not cut it short."""
_NOTHING = "^$"

Arguments = dict[str, str | int]


class Queue(msgspec.Struct, frozen=True):
    """A durable queue that some routes need.

    ``proposed``: no worker needs it; it lets the answers behind a new exchange reach somebody.
    """

    name: str
    roles: tuple[Role, ...]
    routes: tuple[str, ...]
    arguments: Arguments
    proposed: bool = False


class Exchange(msgspec.Struct, frozen=True):
    """A durable exchange that some routes answer to."""

    name: str
    routes: tuple[str, ...]
    type: str = "direct"


class Binding(msgspec.Struct, frozen=True):
    """What an exchange sends to a queue."""

    exchange: str
    queue: str
    key: str


class Fan(NamedTuple):
    """How a detached shadow gets its own copy of each request: its queue is bound beside the primary's.

    Producers publish to ``exchange`` with ``key``; ``ours``: the exchange is made for it, else it stands.
    """

    shadow: str
    primary: str
    exchange: str
    key: str
    queue: str
    primary_queue: str
    ours: bool


class RabbitPlan(msgspec.Struct, frozen=True):
    """Everything that some routes need in one virtual host, in the order in which it can be declared."""

    queues: tuple[Queue, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    bindings: tuple[Binding, ...] = ()


class Permission(msgspec.Struct, frozen=True):
    """What one user may do in the virtual host: three regular expressions over names."""

    user: str
    configure: str
    write: str
    read: str


def queue_arguments(config: Config, route: Route, role: Role, name: str) -> Arguments:
    """Return the arguments that a queue of a route is declared with."""
    arguments: Arguments = {"x-queue-type": QUORUM}
    if role == "retries":
        delay = next(each for each in retry_delays(config, route) if retry_name(config, route, each) == name)
        return arguments | {
            "x-message-ttl": round(delay * _TTL_MARGIN),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": retry_name(config, route, READY),
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # at-least-once is not to be had with another one
        }
    if role != "results":
        arguments["x-delivery-limit"] = DELIVERY_LIMIT
    return arguments


def shadow_fans(routes: Iterable[Route], table: Iterable[Route], exchange: str = "") -> list[Fan]:
    """Return how the detached shadows among ``routes`` get their requests on RabbitMQ.

    ``table`` are all routes, among which their primaries are. ``exchange`` is ``NAME`` or ``NAME/KEY`` of the
    one that producers publish to; without it the plan makes one of the primary queue's name. Raises
    ConfigError for a shadow without a primary or without a queue of its own.
    """
    by_name = {each.name: each for each in table}
    found: list[Fan] = []
    for each in routes:
        if each.shadow_of is None or each.source.kind != "rabbitmq":
            continue
        primary = by_name.get(each.shadow_of)
        if primary is None or primary.source.kind != "rabbitmq":
            raise ConfigError(f'route "{each.name}": shadow_of = "{each.shadow_of}" names no rabbitmq route')
        queue = primary.source.name
        if each.source == primary.source:
            raise ConfigError(
                f'route "{each.name}": a shadow on RabbitMQ needs a queue of its own, such as '
                f'"rabbitmq:{queue}.{each.pool}": from the queue of "{primary.name}" it would take some away'
            )
        name, _, key = exchange.partition("/")
        found.append(
            Fan(each.name, primary.name, name or queue, key or queue, each.source.name, queue, not name)
        )
    return found


def plan_rabbitmq(config: Config, routes: Iterable[Route], fans: Sequence[Fan] = ()) -> RabbitPlan:
    """Return every queue, exchange and binding that the routes need, each once.

    Raises ConfigError for a derived name that AMQP cannot carry.
    """
    queues: dict[str, Queue] = {}
    exchanges: dict[str, Exchange] = {}
    bindings: dict[Binding, None] = {}

    def add(queue: Queue) -> None:
        if len(queue.name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f'queue "{queue.name}" of route {queue.routes[0]} has a name over {LONGEST_NAME} bytes; '
                "shorten its source, or the template under [names]"
            )
        queues[queue.name] = _joined(queues.get(queue.name), queue)

    chosen = list(routes)
    for route in chosen:
        for role, name in route_queues(config, route):
            add(Queue(name, (role,), (route.name,), queue_arguments(config, route, role, name)))
    for route in chosen:
        for name, key in route_exchanges(route):
            if not name.startswith(_RESERVED):  # those stand on every node and cannot be declared
                known = exchanges.get(name)
                names = dict.fromkeys((*(known.routes if known else ()), route.name))
                exchanges[name] = Exchange(name, tuple(names))
            add(Queue(key, ("results",), (route.name,), {"x-queue-type": QUORUM}, proposed=True))
            bindings[Binding(name, key, key)] = None
    for fan in fans:
        if fan.ours:
            known = exchanges.get(fan.exchange)
            names = dict.fromkeys((*(known.routes if known else ()), fan.primary, fan.shadow))
            exchanges[fan.exchange] = Exchange(fan.exchange, tuple(names))
            bindings[Binding(fan.exchange, fan.primary_queue, fan.key)] = None
        bindings[Binding(fan.exchange, fan.queue, fan.key)] = None
    return RabbitPlan(tuple(queues.values()), tuple(exchanges.values()), tuple(bindings))


def _joined(known: Queue | None, new: Queue) -> Queue:
    """Return one queue for two needs, with the arguments of both."""
    if known is None:
        return new
    return Queue(
        known.name,
        tuple(dict.fromkeys((*known.roles, *new.roles))),
        tuple(dict.fromkeys((*known.routes, *new.routes))),
        new.arguments | known.arguments,
        known.proposed and new.proposed,
    )


def plan_permissions(
    config: Config, routes: Sequence[Route], who: Principals, fans: Sequence[Fan] = ()
) -> list[Permission]:
    """Return what each user may do, exactly as much as running these routes needs; no user declares.

    Callers of routes that answer to ``reply`` make themselves a queue that the broker names.
    """
    queues = [each for route in routes for each in route_queues(config, route)]
    sources = [name for role, name in queues if role in ("source", "ready retries")]
    behind = [key for route in routes for _, key in route_exchanges(route)]
    results = [*(name for role, name in queues if role == "results"), *behind]
    dead = [name for role, name in queues if role == "dead letters"]
    exchanges = [name for route in routes for name, _ in route_exchanges(route)]
    by_name = [DEFAULT_EXCHANGE] if any(map(writes_by_name, routes)) else []
    asked = [DEFAULT_EXCHANGE] if any(route.source.kind == "rabbitmq" for route in routes) else []
    asked += [fan.exchange for fan in fans]
    replies = [r"amq\.gen-.*"] if any(d.kind == "reply" for route in routes for d in route.results) else []
    found = [
        Permission(who.worker, _NOTHING, _pattern([*exchanges, *by_name]), _pattern(sources)),
        Permission(who.client, _pattern([], replies), _pattern(asked), _pattern(results, replies)),
        Permission(who.operator, _NOTHING, _pattern(asked), _pattern(dead)),
    ]
    return [
        msgspec.structs.replace(each, user=each.user.removeprefix("User:"))
        for each in found
        if (each.configure, each.write, each.read) != (_NOTHING, _NOTHING, _NOTHING)
    ]


def _pattern(names: Iterable[str], more: Iterable[str] = ()) -> str:
    """Return the expression that matches exactly these names; RabbitMQ itself anchors nothing."""
    parts = [*(_escaped(name) for name in dict.fromkeys(names)), *more]
    return f"^({'|'.join(parts)})$" if parts else _NOTHING


def _escaped(name: str) -> str:
    return re.sub(r"([][\\.^$|?*+(){}])", r"\\\1", name)
