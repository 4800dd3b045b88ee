"""What is to change between the routes that stand and those that are wanted. Pure.

Weights become ranges here, and not where a file is read: only beside the ranges that stand can one say which
buckets need not move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, NamedTuple

from inferfleet.core import ranges
from inferfleet.revisions import Revision, RouteLog
from inferfleet.routes import Route, RouteTable, plain_route
from inferfleet.variants import BUCKETS, Ranges, Variant, bucket_counts

Kind = Literal["added", "changed", "unchanged", "withdrawn", "deleted", "left"]
_SHOWN_APART = ("name", "variants")


class FieldChange(NamedTuple):
    """One key of a route before and after, in the words of the routes file; ``None`` where it is left out."""

    key: str
    before: Any
    after: Any


class ShareChange(NamedTuple):
    """A variant before and after: version and number of buckets; ``None`` and 0 where there is none."""

    variant: str
    version_before: str | None
    version_after: str | None
    buckets_before: int
    buckets_after: int


class RouteChange(NamedTuple):
    """What happens to one route.

    ``number`` is its last revision's, which the change was computed on. ``standing`` is the revision that
    ``before`` is of. ``moved`` counts the buckets that another version answers afterwards. ``pending`` is an
    announcement that waits now; ``same`` says that it announces just what is wanted.
    """

    name: str
    kind: Kind
    number: int
    before: Route | None
    after: Route | None
    fields: tuple[FieldChange, ...] = ()
    shares: tuple[ShareChange, ...] = ()
    moved: int = 0
    standing: Revision | None = None
    pending: Revision | None = None

    @property
    def same(self) -> bool:
        """Whether what is wanted is announced already."""
        return self.pending is not None and self.pending.route == self.after and self.kind != "withdrawn"

    @property
    def changes(self) -> bool:
        """Whether anything is to be written."""
        return self.kind not in ("unchanged", "left")


def replanned(before: Route | None, wanted: Route) -> Route:
    """Return ``wanted`` with the ranges that move the fewest buckets, seen from the route that stands.

    Ranges that are not those that the weights alone would give were written by somebody, and are kept.
    """
    if before is None or not by_weight(wanted.variants):
        return wanted
    counts = bucket_counts([each.weight for each in wanted.variants])
    return with_counts(before, wanted, counts)


def with_counts(before: Route, wanted: Route, counts: Sequence[int]) -> Route:
    """Return ``wanted`` with so many buckets for each variant, moving as few as can be.

    What a key meets is a version, so versions are planned first: no plan moves fewer buckets from one to
    another. Variants of one version then divide its buckets, each keeping what it has.
    """
    sizes = {each.name: count for each, count in zip(wanted.variants, counts, strict=True)}
    totals: dict[str, int] = {}
    for each in wanted.variants:
        totals[each.version] = totals.get(each.version, 0) + sizes[each.name]
    planned = ranges.replan(_by_version(before.variants), totals)
    standing = {each.name: each for each in before.variants}
    held = {name: each.ranges for name, each in standing.items()}
    divided: dict[str, Ranges] = {}
    for version, whole in planned.items():
        names = [each.name for each in wanted.variants if each.version == version]
        divided |= _divided(whole, {name: sizes[name] for name in names}, held)
    variants = tuple(_like(standing.get(v.name), v._replace(ranges=divided[v.name])) for v in wanted.variants)
    return _replaced(wanted, variants)


def _divided(whole: Ranges, sizes: Mapping[str, int], held: Mapping[str, Ranges]) -> dict[str, Ranges]:
    """Divide buckets among variants, each keeping what it holds of them as far as its size goes."""
    if len(sizes) == 1:
        return dict.fromkeys(sizes, whole)
    buckets = [bucket for low, high in whole for bucket in range(low, high)]
    owner: dict[int, str] = {}
    for name, size in sizes.items():
        mine = {bucket for low, high in held.get(name, ()) for bucket in range(low, high)}
        owner |= dict.fromkeys([bucket for bucket in buckets if bucket in mine][:size], name)
    free = iter([bucket for bucket in buckets if bucket not in owner])
    counts = Counter(owner.values())
    for name, size in sizes.items():
        owner |= dict.fromkeys(islice(free, size - counts[name]), name)
    return {name: _joined(bucket for bucket in buckets if owner[bucket] == name) for name in sizes}


def _joined(buckets: Iterable[int]) -> Ranges:
    found: list[tuple[int, int]] = []
    for bucket in buckets:
        if found and found[-1][1] == bucket:
            found[-1] = (found[-1][0], bucket + 1)
        else:
            found.append((bucket, bucket + 1))
    return tuple(found)


def _replaced(route: Route, variants: tuple[Variant, ...]) -> Route:
    values = {key: getattr(route, key) for key in route.__struct_fields__}
    return Route(**{**values, "variants": variants})


def _like(standing: Variant | None, planned: Variant) -> Variant:
    """Return the standing variant where only the way its weight is written differs."""
    alike = standing is not None and standing._replace(weight=planned.weight) == planned
    return standing if alike and standing is not None else planned


def by_weight(variants: Sequence[Variant]) -> bool:
    """Say whether the ranges are those that the weights alone would give."""
    highs = list(accumulate(bucket_counts([each.weight for each in variants])))
    return all(
        each.ranges == ((low, high),)
        for each, (low, high) in zip(variants, pairwise([0, *highs]), strict=True)
    )


def moved(before: Route | None, after: Route | None) -> int:
    """Return how many buckets another version answers after than before; a bucket nobody had counts not."""
    if before is None or after is None:
        return 0
    dealt_anew = before.salt != after.salt or before.split_by != after.split_by
    if dealt_anew or before.model != after.model:
        return BUCKETS
    return ranges.moved(_by_version(before.variants), _by_version(after.variants))


def _by_version(variants: Iterable[Variant]) -> Mapping[str, Ranges]:
    found: dict[str, Ranges] = {}
    for each in variants:
        found[each.version] = (*found.get(each.version, ()), *each.ranges)
    return {version: tuple(sorted(each)) for version, each in found.items()}


def field_changes(before: Route | None, after: Route | None) -> tuple[FieldChange, ...]:
    """Return every key whose value differs, but for the variants."""
    old = {} if before is None else plain_route(before)
    new = {} if after is None else plain_route(after)
    return tuple(
        FieldChange(key, old.get(key), new.get(key))
        for key in dict.fromkeys((*old, *new))
        if key not in _SHOWN_APART and old.get(key) != new.get(key)
    )


def share_changes(before: Route | None, after: Route | None) -> tuple[ShareChange, ...]:
    """Return each variant's version and buckets before and after, those that stay alike too."""
    old = {each.name: each for each in (before.variants if before is not None else ())}
    new = {each.name: each for each in (after.variants if after is not None else ())}
    found: list[ShareChange] = []
    for name in dict.fromkeys((*new, *old)):
        was, now = old.get(name), new.get(name)
        found.append(
            ShareChange(
                name,
                None if was is None else was.version,
                None if now is None else now.version,
                0 if was is None else was.buckets,
                0 if now is None else now.buckets,
            )
        )
    return tuple(found)


def change_of(log: RouteLog, name: str, wanted: Route | None) -> RouteChange:
    """Return what happens to one route where ``wanted``, with its ranges, is to stand; ``None``: nothing."""
    standing = log.newest(name)
    before = None if standing is None else standing.route
    pending = log.announced(name)
    if before == wanted:
        kind: Kind = "unchanged" if pending is None else "withdrawn"
    elif wanted is None:
        kind = "deleted"
    else:
        kind = "added" if before is None else "changed"
    return RouteChange(
        name,
        kind,
        log.latest(name),
        before,
        wanted,
        field_changes(before, wanted),
        share_changes(before, wanted),
        moved(before, wanted),
        standing,
        pending,
    )


def plan(log: RouteLog, wanted: RouteTable, *, prune: bool) -> tuple[RouteChange, ...]:
    """Return what happens to each route where those of a table are to stand.

    Routes that the table does not name are deleted with ``prune``, else named as left alone.
    """
    found = [_change(log, each) for each in wanted.routes]
    named = {each.name for each in wanted.routes}
    for name in sorted(log.kept):
        standing, pending = log.newest(name), log.announced(name)
        stands = standing is not None and standing.route is not None
        if name in named or not (stands or pending is not None):
            continue
        change = change_of(log, name, None)
        found.append(change if prune else change._replace(kind="left", fields=(), shares=(), moved=0))
    return tuple(found)


def _change(log: RouteLog, wanted: Route) -> RouteChange:
    standing, pending = log.newest(wanted.name), log.announced(wanted.name)
    planned = replanned(None if standing is None else standing.route, wanted)
    found = change_of(log, wanted.name, planned)
    if pending is not None and pending.route is not None and found.kind != "withdrawn":
        # An announcement of the same shares may have found other ranges; it is not announced twice.
        again = replanned(pending.route, wanted)
        if again == pending.route:
            return change_of(log, wanted.name, again)
    return found
