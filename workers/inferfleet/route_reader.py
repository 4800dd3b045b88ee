"""Reads the routes of the control plane once: for clients, and for verbs that only need to know them."""

from __future__ import annotations

from dataclasses import replace

from inferfleet.config import Config
from inferfleet.errors import ControlError
from inferfleet.redis_access import REDIS_ERRORS, control_place_of, open_redis
from inferfleet.revisions import Head, RouteLog, parse_revision
from inferfleet.routes import RouteTable

ANSWER_S = 3.0


def routes_key(fleet: str) -> str:
    """Return the Redis key whose hash holds each route's kept revisions, one document a line."""
    return f"{{{fleet}}}:routes"


def read_routes(config: Config, answer_s: float = ANSWER_S) -> RouteTable:
    """Return the routes that stand, waiting ``answer_s`` at most for each answer.

    Raises ControlError where Redis does not answer, ConfigError for what cannot be understood.
    """
    fleet = config.fleet.name
    place = replace(control_place_of(config), timeout_s=answer_s)
    try:
        client = open_redis(place)
        try:
            fields = client.hgetall(routes_key(fleet))
        finally:
            client.close()
    except REDIS_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ControlError(
            f'redis {place.shown} keeps the routes ([routes] source = "fleet") and does not answer: {said}'
        ) from None
    kept = {
        name.decode(): tuple(parse_revision(body, fleet) for body in value.split(b"\n"))
        for name, value in fields.items()
    }
    newest = max((each[-1].number for each in kept.values()), default=0)
    return RouteLog(Head(number=newest), kept, str(newest)).table()
