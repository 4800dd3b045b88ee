"""Routes: which model versions answer which topic, and where the answers go; parsed from ``routes.toml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import xxhash
from msgspec import Meta

from inferfleet import tables
from inferfleet.config import Milliseconds, Name, Positive
from inferfleet.errors import ConfigError
from inferfleet.tables import Leaf
from inferfleet.variants import BUCKETS as BUCKETS
from inferfleet.variants import Shadow as Shadow
from inferfleet.variants import Variant as Variant
from inferfleet.variants import (
    VersionNumber,
    parse_shadows,
    parse_variants,
    plain_variants,
    refuse_latest,
)

DestinationKind = Literal["kafka", "rabbitmq", "redis", "reply"]


class Destination(NamedTuple):
    """Where requests come from or outcomes go.

    ``name`` is a topic, a queue (as a source), ``EXCHANGE/ROUTING_KEY`` (as a result), or empty.
    """

    kind: DestinationKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One assignment: the requests of ``source`` are answered by ``variants`` of ``model`` into ``results``.

    The ranges of the variants do not overlap and cover all buckets; the first variant is the stable one.
    ``shadow_of`` names the route whose source this one sees without answering anybody (a detached shadow).
    ``warm`` are further versions that workers keep loaded, so that going back to them takes no time.
    """

    name: str
    source: Destination
    results: tuple[Destination, ...]
    model: str
    variants: tuple[Variant, ...]
    shadows: tuple[Shadow, ...] = ()
    shadow_of: str | None = None
    warm: tuple[str, ...] = ()
    pool: str = "default"
    split_by: str = "key"
    salt: str
    input: Literal["v2", "columns"] = "v2"
    goal_p99_ms: float | None = None
    deadline_ms: int | None = None
    ttl_s: int | None = None
    order: Literal["none", "key"] = "none"
    nan: Literal["error", "allow"] = "error"
    time: Literal["record", "received"] = "record"
    max_batch_size: int | None = None
    max_queue_delay_ms: float | None = None

    def variant_at(self, bucket: int) -> Variant:
        """Return the variant whose range holds the bucket."""
        for variant in self.variants:
            if any(low <= bucket < high for low, high in variant.ranges):
                return variant
        raise LookupError(f"route {self.name}: no variant owns bucket {bucket}")

    @property
    def versions(self) -> frozenset[str]:
        """The versions of ``model`` that have to be loaded: what it runs, shadows, and ``warm`` ones."""
        run = [each.version for each in self.variants] + [each.version for each in self.shadows]
        return frozenset([*run, *self.warm])

    def shadow_salt(self, shadow: Shadow) -> str:
        """The salt of a shadow's sampling, so that it does not line up with the variants."""
        return f"{self.salt}/shadow/{shadow.name}"


class RouteTable(NamedTuple):
    """All routes of a file; ``revision`` is a hash of what they mean, not of how they are written."""

    revision: str
    routes: tuple[Route, ...]

    def of_pool(self, pool: str) -> tuple[Route, ...]:
        """Return the routes that the workers of a pool serve."""
        return tuple(route for route in self.routes if route.pool == pool)

    def named(self, name: str) -> Route:
        """Return a route by its name; unknown ones raise ConfigError with the nearest."""
        for route in self.routes:
            if route.name == name:
                return route
        known = [route.name for route in self.routes]
        hint = tables.nearest(name, known) or f"; there are: {', '.join(known) or 'none'}"
        raise ConfigError(f'no route is named "{name}"{hint}')


class _RouteTable(msgspec.Struct, kw_only=True):
    """The keys of one ``[[route]]``, as users write them."""

    name: Name
    source: str
    results: Annotated[tuple[str, ...], Meta(description='a list such as ["kafka:TOPIC", "redis"]')] = ()
    model: Name
    version: VersionNumber | None = None
    shadow_of: Name | None = None
    warm: Annotated[tuple[VersionNumber, ...], Meta(max_length=16)] = ()
    pool: Name = "default"
    split_by: Annotated[
        str,
        Meta(pattern=r"^(key|id|header:[!-~]{1,64})\Z", description='"key", "id" or "header:NAME"'),
    ] = "key"
    salt: str | None = None
    input: Literal["v2", "columns"] = "v2"
    goal_p99_ms: Annotated[float, Meta(gt=0)] | None = None
    deadline_ms: Positive | None = None
    ttl_s: Positive | None = None
    order: Literal["none", "key"] = "none"
    nan: Literal["error", "allow"] = "error"
    time: Literal["record", "received"] = "record"
    max_batch_size: Positive | None = None
    max_queue_delay_ms: Milliseconds | None = None


def refuse_unsupported(route: Route, where: str = "") -> None:
    """Raise ConfigError for what a route may say and no release does yet; ``where`` begins the message."""
    if route.order != "none":
        raise ConfigError(f'{where}route "{route.name}": order = "{route.order}" does not exist yet')


def load_routes(path: Path, fleet: str) -> RouteTable:
    """Return the routes of a file; anything wrong raises ConfigError with file, route and key."""
    return parse_routes(tables.read_text(path, "routes file"), fleet, str(path))


def parse_routes(text: str, fleet: str, origin: str) -> RouteTable:
    """Return the routes of a document; ``origin`` names it in errors, ``fleet`` is part of default salts."""
    return route_table(tables.parse_toml(text, origin), fleet, origin)


def route_table(tree: Mapping[str, Any], fleet: str, origin: str) -> RouteTable:
    """Return the routes of a parsed document, ``{"route": [...]}``; anything wrong raises ConfigError."""
    for key in tree:
        if key != "route":
            mend = tables.nearest(key, ["route"])
            raise ConfigError(f'{origin}: there is no table "{key}"{mend}; routes are written [[route]]')
    entries = tree.get("route", [])
    if not isinstance(entries, list) or not all(isinstance(each, Mapping) for each in entries):
        raise ConfigError(f"{origin}: routes are written [[route]], with two brackets")
    routes = tuple(_route(entry, index, fleet, origin) for index, entry in enumerate(entries))
    _check_together(routes, origin)
    return RouteTable(_revision(routes), routes)


def _revision(routes: Sequence[Route]) -> str:
    ordered = sorted(routes, key=lambda route: route.name)
    return xxhash.xxh3_64(msgspec.json.encode(ordered)).hexdigest()[:12]


def _check_together(routes: Sequence[Route], origin: str) -> None:
    names: set[str] = set()
    sources: dict[tuple[str, Destination], str] = {}
    for route in routes:
        if route.name in names:
            raise ConfigError(f'{origin}: two routes are named "{route.name}"; names are unique')
        names.add(route.name)
        other = sources.setdefault((route.pool, route.source), route.name)
        if other != route.name:
            raise ConfigError(
                f'{origin}: routes "{other}" and "{route.name}" share the source {route.source} '
                f'in pool "{route.pool}"; give one of them another pool'
            )
    queues = {each.source: each.name for each in routes if each.shadow_of is None}
    for route in routes:
        if route.shadow_of is not None and route.source.kind == "rabbitmq" and route.source in queues:
            raise ConfigError(
                f'{origin}: route "{route.name}" is a shadow and takes from {route.source} like '
                f'"{queues[route.source]}", so each would get a part of the requests; '
                "give it a queue of its own"
            )


def _route(entry: Mapping[str, Any], index: int, fleet: str, origin: str) -> Route:
    name = entry.get("name")
    where = f'route "{name}"' if isinstance(name, str) else f"route number {index + 1}"
    place = f"{origin}: {where}"
    refuse_latest(entry, place)
    plain = {key: Leaf(value, origin) for key, value in entry.items() if key not in ("variants", "shadows")}
    table = tables.build(_RouteTable, plain, where, extra=("variants", "shadows"), origin=origin)
    source = _destination(table.source, place, "source")
    results = tuple(_destination(each, place, "results") for each in table.results)
    _check_results(source, results, place, table.shadow_of)
    return Route(
        source=source,
        results=results,
        variants=parse_variants(entry, table.version, place, where, origin),
        shadows=parse_shadows(entry, place, where, origin),
        salt=f"{fleet}/{table.name}" if table.salt is None else table.salt,
        **{key: getattr(table, key) for key in _COPIED},
    )


_COPIED = tuple(
    key for key in _RouteTable.__struct_fields__ if key not in ("source", "results", "version", "salt")
)


def _check_results(
    source: Destination, results: Sequence[Destination], place: str, shadow_of: str | None
) -> None:
    if bool(results) == (shadow_of is not None):
        if results:
            raise ConfigError(f"{place}: shadow_of and results exclude each other: a shadow answers nobody")
        raise ConfigError(f'{place}: results must be a list such as ["kafka:TOPIC", "redis"]')
    if len(set(results)) != len(results):
        raise ConfigError(f"{place}: results names a destination twice")
    if source in results or Destination("rabbitmq", f"/{source.name}") in results:
        raise ConfigError(f"{place}: {source} is source and result; it would answer its own answers")
    if Destination("reply", "") in results and source.kind != "rabbitmq":
        raise ConfigError(f"{place}: results names reply, which only requests from a rabbitmq:QUEUE can have")


def _destination(text: str, place: str, key: str) -> Destination:
    kind, _, name = text.partition(":")
    if key == "results" and text in ("redis", "reply"):
        return Destination(text, "")  # type: ignore[arg-type]  # one of two literals
    said = f'{place}: {key} "{text}"'
    if kind == "kafka" and name:
        if len(name) <= 249 and name not in (".", "..") and set(name) <= _TOPIC_CHARACTERS:
            return Destination("kafka", name)
        raise ConfigError(f"{said}: a topic has at most 249 of the characters a-z A-Z 0-9 . _ -")
    if kind == "rabbitmq" and name:
        return _rabbitmq(name, said, key)
    raise ConfigError(f"{said} must be {_WANTED[key]}{_kind_hint(kind, key)}")


def _rabbitmq(name: str, said: str, key: str) -> Destination:
    exchange, slash, routing_key = name.partition("/")
    if (
        not name.isprintable()
        or " " in name
        or any(len(part.encode()) > 255 for part in (exchange, routing_key))
    ):
        raise ConfigError(f"{said}: a name is at most 255 bytes, without spaces and control characters")
    if key == "source" and slash:
        raise ConfigError(f"{said}: a source is a queue, rabbitmq:QUEUE, without a slash")
    if key == "results" and not (slash and routing_key):
        raise ConfigError(
            f"{said}: a result is rabbitmq:EXCHANGE/ROUTING_KEY; rabbitmq:/QUEUE reaches a queue by its name"
        )
    return Destination("rabbitmq", name)


_TOPIC_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_WANTED = {
    "source": "kafka:TOPIC or rabbitmq:QUEUE",
    "results": "kafka:TOPIC, rabbitmq:EXCHANGE/ROUTING_KEY, redis or reply",
}


def _kind_hint(kind: str, key: str) -> str:
    kinds = ["kafka", "rabbitmq"] if key == "source" else ["kafka", "rabbitmq", "redis", "reply"]
    return "" if kind in kinds else tables.nearest(kind, kinds)


def plain_route(route: Route) -> dict[str, Any]:
    """Return a route in the words of the routes file, without what is default; :func:`route_of` reads it."""
    plain: dict[str, Any] = {
        "name": route.name,
        "source": str(route.source),
        "results": [str(each) for each in route.results],
        "model": route.model,
        "salt": route.salt,
        **plain_variants(route.variants, route.shadows),
    }
    for field in msgspec.structs.fields(_RouteTable):
        if field.name not in plain and field.name != "version":
            value = getattr(route, field.name)
            if value != field.default:
                plain[field.name] = value
    return plain


def route_of(plain: Mapping[str, Any], fleet: str, origin: str) -> Route:
    """Return the route that a table says; anything wrong raises ConfigError."""
    return route_table({"route": [plain]}, fleet, origin).routes[0]
