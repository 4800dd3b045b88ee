"""What both clients stand on: addresses, the topics and queues of routes, requests made ready to send."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inferfleet import config as settings
from inferfleet.client.request import Request, body_of, headers_of
from inferfleet.client.sender import Message
from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import ConfigError
from inferfleet.naming import source_address
from inferfleet.redis_access import Place, place_of
from inferfleet.route_reader import read_routes
from inferfleet.routes import Route, load_routes
from inferfleet.tables import nearest
from inferfleet.wire.stored import payload_hash

if TYPE_CHECKING:
    from inferfleet.rabbitmq_access import AmqpPlace


class Door(NamedTuple):
    """Where a route's requests go, whether its bodies are plain columns, and how its answers come back.

    ``topic`` is an address. ``by_reply``: the route keeps no results in Redis and answers to the queue that a
    request names.
    """

    topic: str
    columns: bool = False
    by_reply: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a client knows before it connects. ``reply`` names its own reply stream, if it has one.

    ``amqp`` is asked for the place only by who needs it: aio-pika takes a tenth of a second to import.
    """

    fleet: str
    kafka: Mapping[str, Any]
    amqp: Callable[[], AmqpPlace]
    place: Place
    doors: Mapping[str, Door]
    reply: str | None

    def prepare(self, route: str, request: Request) -> tuple[Message, str]:
        """Return the record to send and its payload's hash.

        Raises ConfigError for an unknown route, ValueError for inputs or options that no request can have.
        """
        door = self._door(route, request.topic)
        value, described = body_of(request, columns=door.columns)
        request_id = request.id or uuid.uuid4().hex
        headers = {**described, **headers_of(request, request_id, None if door.by_reply else self.reply)}
        key = request.key.encode() if isinstance(request.key, str) else request.key
        by_reply = door.by_reply and self.reply is not None
        message = Message(request_id, door.topic, key, value, list(headers.items()), by_reply)
        return message, payload_hash(value)

    def stored_route(self, route: str | None) -> str:
        """Return ``route``, or the only one there is, whose results anybody can look up.

        Raises ValueError where that does not decide, and for a route that answers to each caller alone.
        """
        if route is None and len(self.doors) != 1:
            raise ValueError("this client did not submit the id; say which route it belongs to, route=")
        route = route if route is not None else next(iter(self.doors))
        if self.by_reply(route):
            raise ValueError(f"route {route} answers to the client that submitted, and this one did not")
        return route

    def by_reply(self, route: str) -> bool:
        """Return whether a route's answers come to the client's own queue alone."""
        door = self.doors.get(route)
        return door is not None and door.by_reply

    def _door(self, route: str, topic: str | None) -> Door:
        door = self.doors.get(route)
        if topic is not None:
            return door._replace(topic=_address(topic)) if door is not None else Door(_address(topic))
        if door is None:
            known = nearest(route, list(self.doors)) or f"; there are: {', '.join(self.doors) or 'none'}"
            raise ConfigError(f'no route is named "{route}"{known}; or give topic=')
        return door


def open_session(
    config: Config | str | os.PathLike[str] | None,
    *,
    bootstrap_servers: str | None = None,
    rabbitmq_url: str | None = None,
    redis_url: str | None = None,
    fleet: str | None = None,
    routes: Mapping[str, str] | None = None,
    reply: bool = True,
) -> Session:
    """Return a session; arguments overrule the configuration, ``routes`` (name to source) its routes.

    Without ``config`` and a broker's address the configuration is found as the console command finds it.
    Raises ConfigError, and ControlError where routes come from a control plane that does not answer.
    """
    if config is None and (bootstrap_servers is not None or rabbitmq_url is not None):
        config = Config()
        routes = routes or {}
    elif not isinstance(config, Config):
        config = settings.load(None if config is None else Path(config), os.environ)
    kafka = {**kafka_client_config(config), **config.kafka.producer}
    if bootstrap_servers is not None:
        kafka["bootstrap.servers"] = bootstrap_servers
    place = place_of(config)
    if redis_url is not None:
        place = Place(redis_url, client_name=place.client_name)
    return Session(
        fleet or config.fleet.name,
        kafka,
        partial(_amqp_place, config, rabbitmq_url),
        place,
        _doors(config) if routes is None else {name: Door(_address(each)) for name, each in routes.items()},
        f"c-{secrets.token_hex(12)}" if reply else None,
    )


def _amqp_place(config: Config, url: str | None) -> AmqpPlace:
    from inferfleet.rabbitmq_access import amqp_place

    return amqp_place(config, url)


def _doors(config: Config) -> dict[str, Door]:
    path = config.routes_path
    table = read_routes(config) if path is None else load_routes(path, config.fleet.name)
    return {route.name: _door_of(route) for route in table.routes}


def _door_of(route: Route) -> Door:
    kinds = {each.kind for each in route.results}
    return Door(source_address(route), route.input == "columns", "reply" in kinds and "redis" not in kinds)


def _address(source: str) -> str:
    """Return the address of a source as a program names it; ``kafka:`` may be left out."""
    return source.removeprefix("kafka:")
