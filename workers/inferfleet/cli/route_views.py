"""How routes, their revisions and their changes are shown: tables, TOML, plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from inferfleet.core.planning import RouteChange, by_weight
from inferfleet.core.revisions import in_force
from inferfleet.revisions import Revision, RouteLog
from inferfleet.routes import BUCKETS, Route, Variant, plain_route
from inferfleet.variants import Shadow

OPTIONAL = (
    "shadow_of", "warm", "pool", "split_by", "salt", "input", "goal_p99_ms", "deadline_ms", "ttl_s", "order",
    "nan", "time", "max_batch_size", "max_queue_delay_ms",
)  # fmt: skip
"""Keys of a route beside its name, source, results, model, variants and shadows."""


def percent(buckets: int) -> str:
    """Return a share of the buckets."""
    return f"{buckets * 100 / BUCKETS:g}%"


def shares(route: Route) -> str:
    """Return each version with its share, in one line."""
    return ", ".join(f"{each.version} {percent(each.buckets)}" for each in route.variants)


def as_plain(found: Route) -> dict[str, object]:
    """Return a route in the words of the routes file, plus the bucket ranges."""
    plain: dict[str, object] = {
        "name": found.name,
        "source": str(found.source),
        "results": [str(each) for each in found.results],
        "model": found.model,
        "variants": [each._asdict() for each in found.variants],
    }
    if found.shadows:
        plain["shadows"] = [each._asdict() for each in found.shadows]
    return plain | optional(found)


def optional(found: Route) -> dict[str, Any]:
    """Return the other keys of a route that are set."""
    values = {key: getattr(found, key) for key in OPTIONAL}
    return {key: value for key, value in values.items() if value not in (None, ())}


def route_toml(found: Route) -> str:
    """Return the route as a ``[[route]]`` table that parses to the same route.

    Ranges are written where the weights alone would give others.
    """
    with_ranges = not by_weight(found.variants)
    lines = ["[[route]]", f"name = {_text(found.name)}", f"source = {_text(str(found.source))}"]
    if found.results:
        lines.append(f"results = [{', '.join(_text(str(each)) for each in found.results)}]")
    lines += [
        f"model = {_text(found.model)}",
        "variants = [",
        *(f"  {_variant(each, with_ranges)}," for each in found.variants),
        "]",
    ]
    if found.shadows:
        lines += ["shadows = [", *(f"  {_shadow(each)}," for each in found.shadows), "]"]
    lines += [f"{key} = {_value(value)}" for key, value in optional(found).items()]
    return "\n".join(lines) + "\n"


def _variant(each: Variant, with_ranges: bool) -> str:
    said = f"name = {_text(each.name)}, version = {_text(each.version)}, weight = {each.weight!r}"
    if with_ranges:
        said += f", ranges = [{', '.join(f'[{low}, {high}]' for low, high in each.ranges)}]"
    return f"{{ {said} }}"


def _shadow(each: Shadow) -> str:
    values = ", ".join(f"{key} = {_value(value)}" for key, value in each._asdict().items())
    return f"{{ {values} }}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_value(each) for each in value)}]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    # JSON leaves DEL as it is, which TOML does not allow.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# The log


def moment(time_ms: int | None) -> str:
    """Return a time as people read it, in UTC; ``-`` for none."""
    if time_ms is None:
        return "-"
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def age(span_ms: int) -> str:
    """Return a span as its largest whole unit."""
    seconds = max(0, span_ms // 1000)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def fleet_route(log: RouteLog, name: str, now_ms: int) -> dict[str, Any]:
    """Return what the log says of a route now: in force, coming, and announced."""
    revisions = log.kept[name]
    current, newest, pending = in_force(revisions, now_ms), log.newest(name), log.announced(name)
    coming = newest if newest is not None and newest is not current else None
    return {
        "name": name,
        "in_force": None if current is None else as_revision(current, now_ms),
        "coming": None if coming is None else as_revision(coming, now_ms),
        "announced": None if pending is None else as_revision(pending, now_ms),
    }


def as_revision(revision: Revision, now_ms: int | None = None) -> dict[str, Any]:
    """Return a revision as plain values; with ``now_ms`` its age too."""
    plain: dict[str, Any] = {
        "revision": revision.number,
        "epoch": revision.epoch,
        "effective_from_ms": revision.effective_from_ms,
        "at_ms": revision.at_ms,
        "author": revision.author,
        "action": revision.action,
        "reason": revision.reason,
        "rollout": revision.rollout,
        "hash": revision.hash,
        "route": None if revision.route is None else as_plain(revision.route),
    }
    return plain if now_ms is None else plain | {"age_s": max(0, now_ms - revision.at_ms) / 1000}


# Changes


def change_lines(change: RouteChange) -> list[str]:
    """Return a change of a route in lines: what happens, variant by variant, key by key."""
    if change.kind == "left":
        return [f"route {change.name}: is not in the file and left alone (--prune deletes it)"]
    if change.kind == "unchanged":
        return [f"route {change.name}: unchanged"]
    if change.kind == "withdrawn":
        number = change.pending.number if change.pending is not None else 0
        return [f"route {change.name}: announcement {number} is taken back; what stands goes on"]
    if change.kind == "deleted":
        return [f"route {change.name}: DELETED"]
    lines = [f"route {change.name}: {change.kind}{_moving(change)}{_waiting(change)}"]
    for each in change.shares:
        versions = f"version {each.version_after or each.version_before}"
        if each.version_before is not None and each.version_after not in (None, each.version_before):
            versions = f"version {each.version_before} -> {each.version_after}"
        before, after = percent(each.buckets_before), percent(each.buckets_after)
        moves = after if change.kind == "added" or before == after else f"{before} -> {after}"
        gone = "" if each.version_after is not None else ", removed"
        lines.append(f"  variant {each.variant}: {versions}, {moves}{gone}")
    for field in change.fields:
        said = _shown(field.after)
        if change.kind != "added":
            said = f"{_shown(field.before)} -> {said}"
        lines.append(f"  {field.key}: {said}")
    return lines


def _moving(change: RouteChange) -> str:
    if change.kind == "added":
        return ""
    if not change.moved:
        return ", no key moves to another version"
    return f", {change.moved:,} of {BUCKETS:,} buckets ({percent(change.moved)}) move to another version"


def _waiting(change: RouteChange) -> str:
    if change.pending is None:
        return ""
    number = change.pending.number
    return f"; announced already by revision {number}" if change.same else f"; replaces announcement {number}"


def _shown(value: object) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)


def change_plain(change: RouteChange) -> dict[str, Any]:
    """Return a change as plain values."""
    return {
        "route": change.name,
        "kind": change.kind,
        "revision": change.number,
        "moved_buckets": change.moved,
        "variants": [each._asdict() for each in change.shares],
        "fields": [each._asdict() for each in change.fields],
        "before": None if change.before is None else plain_route(change.before),
        "after": None if change.after is None else plain_route(change.after),
        "announced": None if change.pending is None else change.pending.number,
    }


def history_rows(revisions: Iterable[Revision]) -> Sequence[Sequence[object]]:
    """Return revisions as rows: number, time, from when, action, versions, author, reason."""
    return [
        (
            each.number,
            moment(each.at_ms),
            "announced" if each.effective_from_ms is None else moment(each.effective_from_ms),
            each.action,
            "-" if each.route is None else shares(each.route),
            each.author,
            " ".join(filter(None, (each.reason, f"[rollout {each.rollout}]" if each.rollout else ""))),
        )
        for each in revisions
    ]
