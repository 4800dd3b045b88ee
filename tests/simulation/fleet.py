"""What a simulated fleet is told: its routes, its settings, and the topics that they name."""

from __future__ import annotations

from functools import cache

from inferfleet import config as settings
from inferfleet.config import Config, dead_letter_topic
from inferfleet.naming import retry_sources
from inferfleet.routes import RouteTable, parse_routes

SOURCES = {"a": "a.in", "b": "b.in"}
RESULTS = {"a": "a.out", "b": "b.out"}
NEVER_TRIPS = 1_000

_ROUTES = """
[[route]]
name = "a"
source = "kafka:a.in"
results = ["kafka:a.out"]
model = "m"
[[route.variants]]
name = "stable"
version = "1"
weight = {stable}
[[route.variants]]
name = "next"
version = "2"
weight = {next}
"""
_ROUTE_B = """
[[route]]
name = "b"
source = "kafka:b.in"
results = ["kafka:b.out", "redis"]
model = "m"
version = "2"
max_batch_size = 3
"""
_CONFIG = """
[batching]
max_batch_size = {batch}
max_queue_delay_ms = {delay}
[limits]
max_request_rows = 8
[retry]
delays_ms = [300, 1_000, 3_000]
[brake]
consecutive = {consecutive}
share = 1.0
"""


@cache
def table(stable: int = 70, with_b: bool = True) -> RouteTable:
    """Return routes ``a``, of two versions, and ``b``, with results in Redis too."""
    text = _ROUTES.format(stable=stable, next=100 - stable) + (_ROUTE_B if with_b else "")
    return parse_routes(text, "inferfleet", "routes.toml")


@cache
def config(batch: int, delay: int, consecutive: int = NEVER_TRIPS) -> Config:
    """Return settings with these limits of a batch, and of failures in a row."""
    return settings.parse(_CONFIG.format(batch=batch, delay=delay, consecutive=consecutive))


def dead_letter_topics(of: Config) -> list[str]:
    """Return the dead-letter topic of each source."""
    return [dead_letter_topic(of, source) for source in SOURCES.values()]


def retry_topics(of: Config) -> dict[str, int]:
    """Return the retry topics of all routes, and the attempt that each is for."""
    return {
        topic: index + 2 for route in table().routes for index, topic in enumerate(retry_sources(of, route))
    }
