"""Opens what a worker's routes come from, a file or the control plane, and finds the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from inferfleet.cli.slot import state_folder
from inferfleet.config import Config
from inferfleet.control.filefeed import FileFeed
from inferfleet.control_ports import RouteFeed
from inferfleet.errors import ConfigError
from inferfleet.ports import Clock
from inferfleet.revisions import RouteLog
from inferfleet.routes import Route, RouteTable, load_routes, refuse_unsupported

log = structlog.get_logger(__name__)


def open_feed(config: Config, clock: Clock, wake: Callable[[], None], patience_s: float) -> RouteFeed:
    """Return a feed that follows; ``wake`` is called on another thread when there is news. Close it.

    Without a copy of the routes, the control plane's Redis has ``patience_s`` seconds to answer. Raises
    ControlError where neither is to be had.
    """
    if config.routes.source != "fleet":
        return FileFeed(lambda: _read(config), clock)
    from inferfleet.control.feed import FeedOptions, RedisRouteFeed
    from inferfleet.redis_access import control_place_of, open_redis

    place = replace(control_place_of(config), client_name=config.worker_id)
    feed = RedisRouteFeed(
        lambda: open_redis(place),
        config.fleet.name,
        address=place.shown,
        copy=state_folder(config) / f"{config.fleet.name}.{config.worker.pool}.routes.json",
        wake=wake,
        options=FeedOptions(start_s=patience_s),
        utc_ms=clock.utc_ms,
    )
    feed.start()
    return feed


def first_routes(config: Config, feed: RouteFeed) -> tuple[Route, ...]:
    """Return the routes of this worker's pool, announced ones too; the control plane may have none yet.

    Raises ConfigError for a file that is wrong.
    """
    pool = config.worker.pool
    if config.routes.source != "fleet":
        return feed.log().table().of_pool(pool)
    try:
        found = feed.log()
    except ConfigError as error:
        log.error("routes_refused", error=str(error), kept="")
        found = feed.log()  # it is told once; the other routes are good
    routes = _of_pool(found, pool)
    if not routes:
        log.warning("waiting_for_routes", pool=pool, revision=found.head.number)
    return routes


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
        refuse_unsupported(route, f"{path}: ")
    return table
