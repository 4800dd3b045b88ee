"""Variants and shadows of a route: which versions there are, and which buckets each of them owns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from inferfleet import tables
from inferfleet.config import Name
from inferfleet.errors import ConfigError
from inferfleet.tables import Leaf

BUCKETS = 10_000
MAX_VARIANTS = 64

Ranges = tuple[tuple[int, int], ...]
"""Ascending ranges of buckets that do not touch, each from its first bucket to its last, exclusive."""


class Variant(NamedTuple):
    """A model version with the buckets that it answers."""

    name: str
    version: str
    weight: float
    ranges: Ranges

    @property
    def buckets(self) -> int:
        """How many of the buckets it owns."""
        return sum(high - low for low, high in self.ranges)


class Shadow(NamedTuple):
    """A model version that sees what the variants answer, and whose own answers no user ever gets.

    ``sample`` is the share of the keys that it may see, 0 to 1; its buckets come from a salt of its own.
    ``secondary`` is the share of those on which the answering version runs once more, to know its noise.
    """

    name: str
    version: str
    sample: float = 1.0
    secondary: float = 0.05


VersionNumber = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]{0,17}\Z", description='a positive whole number as text, such as "1"')
]
_Share = Annotated[float, Meta(ge=0, le=1)]


class _VariantTable(msgspec.Struct):
    name: Name
    version: VersionNumber
    weight: Annotated[float, Meta(gt=0, lt=1e9)]
    ranges: tuple[tuple[int, int], ...] | None = None


class _ShadowTable(msgspec.Struct):
    name: Name
    version: VersionNumber
    sample: Annotated[float, Meta(gt=0, le=1)] = 1.0
    secondary: _Share = 0.05


def parse_variants(
    entry: Mapping[str, Any], version: str | None, place: str, where: str, origin: str
) -> tuple[Variant, ...]:
    """Return the variants of a route's table; weights become ranges where it gives none."""
    written = entry.get("variants")
    if (version is None) == (written is None):
        said = "needs version or variants" if version is None else "has both version and variants; keep one"
        raise ConfigError(f"{place}: {said}")
    if version is not None:
        return (Variant("stable", version, 1.0, ((0, BUCKETS),)),)
    parsed = [
        tables.build(_VariantTable, leaves, f"{where} variant", origin=origin)
        for leaves in _listed(written, place, origin, "variant", "name, version, weight")
    ]
    if not parsed:
        raise ConfigError(f"{place}: variants must be a list of 1 to {MAX_VARIANTS} tables")
    given = [each.ranges for each in parsed if each.ranges is not None]
    if given and len(given) < len(parsed):
        raise ConfigError(f"{place}: ranges stand with each variant or with none")
    if given:
        _check_ranges(given, place)
        return tuple(Variant(each.name, each.version, each.weight, each.ranges or ()) for each in parsed)
    highs = list(accumulate(bucket_counts([each.weight for each in parsed])))
    return tuple(
        Variant(each.name, each.version, each.weight, ((low, high),))
        for each, (low, high) in zip(parsed, pairwise([0, *highs]), strict=True)
    )


def parse_shadows(entry: Mapping[str, Any], place: str, where: str, origin: str) -> tuple[Shadow, ...]:
    """Return the shadows of a route's table."""
    parsed = [
        tables.build(_ShadowTable, leaves, f"{where} shadow", origin=origin)
        for leaves in _listed(entry.get("shadows", []), place, origin, "shadow", "name, version, sample")
    ]
    return tuple(Shadow(each.name, each.version, each.sample, each.secondary) for each in parsed)


def refuse_latest(entry: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError for ``version = "latest"``: what it means would change without a trace."""
    if entry.get("version") == "latest":
        raise ConfigError(
            f'{place}: version = "latest" would change without a trace; name the number, such as "1"'
        )


def _listed(written: Any, place: str, origin: str, what: str, keys: str) -> list[dict[str, Leaf]]:
    if not isinstance(written, list) or len(written) > MAX_VARIANTS:
        raise ConfigError(f"{place}: {what}s must be a list of 1 to {MAX_VARIANTS} tables")
    found: list[dict[str, Leaf]] = []
    names: set[object] = set()
    for each in written:
        if not isinstance(each, Mapping):
            raise ConfigError(f"{place}: a {what} is a table {{ {keys} }}")
        refuse_latest(each, place)
        name = each.get("name")
        if isinstance(name, str) and name in names:
            raise ConfigError(f"{place}: two {what}s have the same name")
        names.add(name if isinstance(name, str) else None)
        found.append({key: Leaf(value, origin) for key, value in each.items()})
    return found


def _check_ranges(given: Iterable[Ranges], place: str) -> None:
    """Refuse ranges that overlap, leave a bucket to nobody, or give a variant none."""
    at = 0
    for low, high in sorted(each for ranges in given for each in ranges):
        if low != at or high <= low:
            raise ConfigError(f"{place}: the variants' ranges must cover 0 to {BUCKETS} once (see {at})")
        at = high
    if at != BUCKETS or not all(given):
        raise ConfigError(f"{place}: the variants' ranges must cover 0 to {BUCKETS} once, each its part")


def plain_variants(variants: Sequence[Variant], shadows: Sequence[Shadow]) -> dict[str, Any]:
    """Return variants and shadows in the words of the routes file."""
    plain: dict[str, Any] = {
        "variants": [
            {
                "name": each.name,
                "version": each.version,
                "weight": each.weight,
                "ranges": [list(pair) for pair in each.ranges],
            }
            for each in variants
        ]
    }
    if shadows:
        plain["shadows"] = [each._asdict() for each in shadows]
    return plain


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
