"""Documents of one route, and applying them to a plane in memory."""

from __future__ import annotations

from typing import Any

from inferfleet.core.revisions import in_force
from tests.support.control_plane import Plane

V1: dict[str, Any] = {
    "name": "digits",
    "source": "kafka:in",
    "results": ["kafka:out"],
    "model": "digits",
    "variants": [{"name": "stable", "version": "1", "weight": 1}],
}
V2: dict[str, Any] = {**V1, "variants": [{"name": "stable", "version": "2", "weight": 1}]}
V3: dict[str, Any] = {**V1, "variants": [{"name": "stable", "version": "3", "weight": 1}]}


def tree(*routes: dict[str, Any]) -> dict[str, Any]:
    return {"route": list(routes)}


def apply(plane: Plane, *routes: dict[str, Any], prune: bool = False) -> list[str]:
    """Apply a document; return what went wrong."""
    plan = plane.control.plan(tree(*routes), "x", prune=prune)
    done = plane.control.apply(plan.changes, author="eva@host", reason="why")
    return [each.problem for each in done if each.problem]


def version_at(plane: Plane, time_ms: int, name: str = "digits") -> str | None:
    found = in_force(plane.store.load().kept[name], time_ms)
    return None if found is None or found.route is None else found.route.variants[0].version
