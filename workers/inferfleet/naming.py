"""Names that derive from a route: its dead letters and its delayed retries, on the broker it takes from."""

from __future__ import annotations

import re
from collections.abc import Callable

from inferfleet.addresses import rabbitmq_source, to_queue
from inferfleet.config import Config, dead_letter_topic
from inferfleet.routes import Route

READY = "ready"
"""Stands in a retry queue's name where the delay stands: what has waited arrives there."""


def source_address(route: Route) -> str:
    """Return the source that the route's requests are taken from."""
    name = route.source.name
    return rabbitmq_source(name) if route.source.kind == "rabbitmq" else name


def dead_letter_name(config: Config, route: Route, group: str | None = None) -> str:
    """Return the topic or queue of a route's dead letters, for its pool's group or another one."""
    return dead_letter_topic(config, route.source.name, group or config.group_of(route.pool))


def retry_name(config: Config, route: Route, delay: int | str) -> str:
    """Return the topic or queue of the retries that wait ``delay`` milliseconds, or that are ready."""
    return config.names.retry.format(source=route.source.name, group=config.group_of(route.pool), ms=delay)


def dead_letter_address(config: Config, route: Route) -> str:
    """Return where a route's dead letters are published."""
    return _published(route, dead_letter_name(config, route))


def retry_addresses(config: Config, route: Route) -> list[str]:
    """Return where delayed attempts are published, one for each of ``[retry] delays_ms``."""
    if route.order == "key" or route.shadow_of is not None:
        return []  # a request that comes back later would overtake nobody and be overtaken by all
    return [_published(route, retry_name(config, route, delay)) for delay in config.retry.delays_ms]


def retry_sources(config: Config, route: Route) -> list[str]:
    """Return the sources that delayed attempts are taken from when their time has come."""
    if route.order == "key" or route.shadow_of is not None or not config.retry.delays_ms:
        return []
    if route.source.kind == "rabbitmq":
        return [rabbitmq_source(retry_name(config, route, READY))]
    return [retry_name(config, route, delay) for delay in config.retry.delays_ms]


def redrive_id(config: Config, route: Route) -> str:
    """Return the Kafka transactional id of whoever redrives a route's dead letters: one at a time."""
    return f"{config.group_of(route.pool)}.{route.name}.redrive"


def retry_group(config: Config, pool: str) -> str:
    """Return the Kafka consumer group in which a pool takes its retries."""
    return f"{config.group_of(pool)}.retry"


def retry_topics(config: Config) -> Callable[[str], bool]:
    """Return a test for the names of this pool's retry topics, whatever their source."""
    delays = "|".join(str(delay) for delay in config.retry.delays_ms)
    if not delays:
        return lambda _: False
    parts = {"{source}": ".+", "{group}": re.escape(config.group), "{ms}": f"(?:{delays})"}
    pieces = re.split(r"(\{source\}|\{group\}|\{ms\})", config.names.retry)
    pattern = re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))
    return lambda name: pattern.fullmatch(name) is not None


def _published(route: Route, name: str) -> str:
    return to_queue(name) if route.source.kind == "rabbitmq" else name
