"""Routes, changes and stores of the control plane for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferfleet.plane import AuditEntry, Change, Draft
from inferfleet.routes import Route, route_of
from inferfleet.summaries import Window


def route(name: str = "digits", version: str = "1", fleet: str = "f", **keys: Any) -> Route:
    """Return a route from a topic of its own name into Redis; ``keys`` as in the routes file."""
    plain = {"name": name, "source": f"kafka:{name}.requests", "results": ["redis"], "model": "digits"}
    return route_of(plain | {"version": version} | keys, fleet, "test")


def entry(name: str = "digits", **keys: Any) -> AuditEntry:
    """Return an audit entry of an apply; the store places it."""
    return AuditEntry(**{"actor": "ada", "action": "apply", "subject": f"route {name}"} | keys)


def change(
    *drafts: Draft, expected: Mapping[str, int] | None = None, audited: bool = True, **keys: Any
) -> Change:
    """Return a change by ada with one audit entry for each draft."""
    entries = tuple(entry(draft.name) for draft in drafts) if audited else ()
    return Change(**{"actor": "ada", "audit": entries, "expected": expected or {}, "drafts": drafts} | keys)


def draft(
    name: str = "digits", version: str | None = "1", effective_from_ms: int | None = 1_000, **keys: Any
) -> Draft:
    """Return a draft of a route's next revision; ``version`` ``None`` takes the route away."""
    made = None if version is None else route(name, version, **keys)
    return Draft(name, made, effective_from_ms, "apply")


def window(worker: str = "w-1", name: str = "digits", requests: int = 1, **keys: Any) -> Window:
    """Return a summary of version 1."""
    plain = {"worker": worker, "route": name, "model": "digits", "version": "1", "variant": "stable"}
    return Window(**plain | {"requests": requests} | keys)
