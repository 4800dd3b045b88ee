"""What both clients stand on: addresses, the topics of routes, and requests made ready to send."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from inferfleet import config as settings
from inferfleet.client.request import Request, body_of, headers_of
from inferfleet.client.sender import Message, producer_properties
from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import ConfigError
from inferfleet.redis_access import Place, place_of
from inferfleet.routes import load_routes
from inferfleet.tables import nearest
from inferfleet.wire.stored import payload_hash


class Door(NamedTuple):
    """Where a route's requests go, and whether its bodies are plain columns."""

    topic: str
    columns: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a client knows before it connects. ``reply`` names its own reply stream, if it has one."""

    fleet: str
    kafka: Mapping[str, Any]
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
        headers = {**described, **headers_of(request, request_id, self.reply)}
        key = request.key.encode() if isinstance(request.key, str) else request.key
        return Message(request_id, door.topic, key, value, list(headers.items())), payload_hash(value)

    def route_named(self, route: str | None) -> str:
        """Return ``route``, or the only one there is. Raises ValueError where that does not decide."""
        if route is not None:
            return route
        if len(self.doors) == 1:
            return next(iter(self.doors))
        raise ValueError("this client did not submit the id; say which route it belongs to, route=")

    def _door(self, route: str, topic: str | None) -> Door:
        door = self.doors.get(route)
        if topic is not None:
            return Door(topic, door.columns if door is not None else False)
        if door is None:
            known = nearest(route, list(self.doors)) or f"; there are: {', '.join(self.doors) or 'none'}"
            raise ConfigError(f'no route is named "{route}"{known}; or give topic=')
        return door


def open_session(
    config: Config | str | os.PathLike[str] | None,
    *,
    bootstrap_servers: str | None = None,
    redis_url: str | None = None,
    fleet: str | None = None,
    routes: Mapping[str, str] | None = None,
    reply: bool = True,
) -> Session:
    """Return a session; arguments overrule the configuration, ``routes`` (name to topic) its routes file.

    Without ``config`` and ``bootstrap_servers`` the configuration is found as the console command finds it.
    Raises ConfigError.
    """
    if config is None and bootstrap_servers is not None:
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
        producer_properties(kafka),
        place,
        _doors(config) if routes is None else {name: Door(topic) for name, topic in routes.items()},
        f"c-{secrets.token_hex(12)}" if reply else None,
    )


def _doors(config: Config) -> dict[str, Door]:
    path = config.routes_path
    if path is None:
        raise ConfigError(
            '[routes] source = "fleet": name the topics yourself, routes={"digits": "digits.requests"}'
        )
    table = load_routes(path, config.fleet.name)
    return {
        route.name: Door(route.source.name, route.input == "columns")
        for route in table.routes
        if route.source.kind == "kafka"
    }
