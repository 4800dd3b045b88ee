"""Opens what a worker's routes come from, a file or the control plane, and waits for the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import structlog

from inferfleet.cli.slot import state_folder
from inferfleet.cli.starting import START_PATIENCE_S
from inferfleet.config import Config
from inferfleet.control.filefeed import FileFeed
from inferfleet.control_ports import RouteFeed
from inferfleet.errors import ConfigError
from inferfleet.ports import Clock
from inferfleet.revisions import RouteLog
from inferfleet.routes import Route, RouteTable, load_routes

log = structlog.get_logger(__name__)


def open_feed(config: Config, clock: Clock, wake: Callable[[], None]) -> RouteFeed:
    """Return a feed that follows; ``wake`` is called on another thread when there is news. Close it.

    Raises ControlError where neither the control plane's Redis nor a copy of its routes is to be had.
    """
    if config.routes.source != "fleet":
        return FileFeed(lambda: _read(config), clock)
    from inferfleet.control.feed import RedisRouteFeed
    from inferfleet.redis_access import control_place_of, open_redis

    place = replace(control_place_of(config), client_name=config.worker_id)
    feed = RedisRouteFeed(
        lambda: open_redis(place),
        config.fleet.name,
        address=place.shown,
        copy=state_folder(config) / f"{config.fleet.name}.{config.worker.pool}.routes.json",
        wake=wake,
        utc_ms=clock.utc_ms,
    )
    feed.start()
    return feed


def first_routes(
    config: Config, feed: RouteFeed, news: SimpleQueue[Any], patience_s: float = START_PATIENCE_S
) -> tuple[Route, ...]:
    """Return the routes of this worker's pool, announced ones too; from the control plane, wait for one.

    Raises ConfigError for a file that is wrong, and where the pool has no route within ``patience_s``.
    """
    pool = config.worker.pool
    if config.routes.source != "fleet":
        return feed.log().table().of_pool(pool)
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            found = _of_pool(feed.log(), pool)
        except ConfigError as error:
            log.error("routes_refused", error=str(error), kept="")
            continue  # it is told once; the other routes are good
        if found:
            return found
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ConfigError(
                f'no route of fleet {config.fleet.name} belongs to pool "{pool}"; '
                "`inferfleet route apply FILE` writes routes to the control plane"
            )
        if not told:
            told = True
            log.warning("waiting_for_routes", pool=pool, revision=feed.log().head.number)
        try:
            news.get(timeout=min(0.5, left_s))
        except Empty:
            continue


def _of_pool(found: RouteLog, pool: str) -> tuple[Route, ...]:
    table = found.table()
    known = {route.name for route in table.routes}
    announced = [each.route for name in sorted(found.kept) if (each := found.announced(name)) is not None]
    fresh = tuple(route for route in announced if route is not None and route.name not in known)
    return RouteTable(table.revision, table.routes + fresh).of_pool(pool)


def _read(config: Config) -> RouteTable:
    path = config.routes_path
    if path is None:
        raise ConfigError("[routes] source names no file")
    table = load_routes(path, config.fleet.name)
    if not table.of_pool(config.worker.pool):
        raise ConfigError(f"{path}: no route belongs to pool {config.worker.pool!r}")
    for route in table.of_pool(config.worker.pool):
        if route.order != "none":
            raise ConfigError(f'{path}: route {route.name}: order = "{route.order}" does not exist yet')
    return table
