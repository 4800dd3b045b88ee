"""Routes: which model versions answer which topic, and where the answers go; parsed from ``routes.toml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import xxhash
from msgspec import Meta

from inferfleet import tables
from inferfleet.config import Milliseconds, Name, Positive
from inferfleet.errors import ConfigError
from inferfleet.tables import Leaf

BUCKETS = 10_000
MAX_VARIANTS = 64

DestinationKind = Literal["kafka", "rabbitmq", "redis", "reply"]


class Destination(NamedTuple):
    """Where requests come from or outcomes go.

    ``name`` is a topic, a queue (as a source), ``EXCHANGE/ROUTING_KEY`` (as a result), or empty.
    """

    kind: DestinationKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


class Variant(NamedTuple):
    """A model version with its range of buckets, ``low`` to ``high`` (exclusive)."""

    name: str
    version: str
    weight: float
    low: int
    high: int


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One assignment: the requests of ``source`` are answered by ``variants`` of ``model`` into ``results``.

    The ranges of the variants are in order, have no gap, and cover all buckets.
    """

    name: str
    source: Destination
    results: tuple[Destination, ...]
    model: str
    variants: tuple[Variant, ...]
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
        return next(each for each in self.variants if each.low <= bucket < each.high)


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


_Version = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]{0,17}\Z", description='a positive whole number as text, such as "1"')
]


class _VariantTable(msgspec.Struct):
    name: Name
    version: _Version
    weight: Annotated[float, Meta(gt=0, lt=1e9)]


class _RouteTable(msgspec.Struct):
    """The keys of one ``[[route]]``, as users write them."""

    name: Name
    source: str
    results: Annotated[
        tuple[str, ...], Meta(min_length=1, description='a list such as ["kafka:TOPIC", "redis"]')
    ]
    model: Name
    version: _Version | None = None
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


def load_routes(path: Path, fleet: str) -> RouteTable:
    """Return the routes of a file; anything wrong raises ConfigError with file, route and key."""
    return parse_routes(tables.read_text(path, "routes file"), fleet, str(path))


def parse_routes(text: str, fleet: str, origin: str) -> RouteTable:
    """Return the routes of a document; ``origin`` names it in errors, ``fleet`` is part of default salts."""
    tree = tables.parse_toml(text, origin)
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


def _route(entry: Mapping[str, Any], index: int, fleet: str, origin: str) -> Route:
    name = entry.get("name")
    where = f'route "{name}"' if isinstance(name, str) else f"route number {index + 1}"
    place = f"{origin}: {where}"
    if entry.get("shadows"):
        raise ConfigError(f"{place}: shadows are not available yet in this release; remove them")
    if entry.get("version") == "latest":
        raise ConfigError(
            f'{place}: version = "latest" would change without a trace; name the number, such as "1"'
        )
    plain = {key: Leaf(value, origin) for key, value in entry.items() if key not in ("variants", "shadows")}
    table = tables.build(_RouteTable, plain, where, extra=("variants", "shadows"), origin=origin)
    source = _destination(table.source, place, "source")
    results = tuple(_destination(each, place, "results") for each in table.results)
    _check_results(source, results, place)
    return Route(
        source=source,
        results=results,
        variants=_variants(entry, table.version, place, where, origin),
        salt=f"{fleet}/{table.name}" if table.salt is None else table.salt,
        **{key: getattr(table, key) for key in _COPIED},
    )


_COPIED = tuple(
    key for key in _RouteTable.__struct_fields__ if key not in ("source", "results", "version", "salt")
)


def _check_results(source: Destination, results: Sequence[Destination], place: str) -> None:
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


def _variants(
    entry: Mapping[str, Any], version: str | None, place: str, where: str, origin: str
) -> tuple[Variant, ...]:
    written = entry.get("variants")
    if (version is None) == (written is None):
        said = "needs version or variants" if version is None else "has both version and variants; keep one"
        raise ConfigError(f"{place}: {said}")
    if version is not None:
        return (Variant("stable", version, 1.0, 0, BUCKETS),)
    if not isinstance(written, list) or not written or len(written) > MAX_VARIANTS:
        raise ConfigError(f"{place}: variants must be a list of 1 to {MAX_VARIANTS} tables")
    parsed = [_variant(each, place, where, origin) for each in written]
    names = [each.name for each in parsed]
    if len(set(names)) != len(names):
        raise ConfigError(f"{place}: two variants have the same name")
    shares = bucket_counts([each.weight for each in parsed])
    highs = list(accumulate(shares))
    return tuple(
        Variant(each.name, each.version, each.weight, high - share, high)
        for each, share, high in zip(parsed, shares, highs, strict=True)
    )


def _variant(entry: Any, place: str, where: str, origin: str) -> _VariantTable:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place}: a variant is a table {{ name, version, weight }}")
    if entry.get("version") == "latest":
        raise ConfigError(
            f'{place}: version = "latest" would change without a trace; name the number, such as "1"'
        )
    leaves = {key: Leaf(value, origin) for key, value in entry.items()}
    return tables.build(_VariantTable, leaves, f"{where} variant", origin=origin)


def bucket_counts(weights: Sequence[float]) -> list[int]:
    """Return how many of the buckets each weight gets: they sum to all, by largest remainder.

    Every weight is positive and gets at least one bucket.
    """
    total = sum(weights)
    exact = [weight * BUCKETS / total for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    missing = BUCKETS - sum(counts)
    if missing >= 0:
        for i in by_remainder[:missing]:
            counts[i] += 1
    else:
        # Minimum shares went over: the largest give them back.
        for _ in range(-missing):
            counts[counts.index(max(counts))] -= 1
    return counts
