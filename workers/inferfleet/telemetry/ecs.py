"""A log line as a document of Elastic's common schema (ECS), of the shape that ``ecs-logging`` writes.

``@timestamp``, ``log.level``, ``message`` and ``ecs.version`` stand at the top, in that order and with their
dots; all else is nested. What the schema has no name for is under ``inferfleet``, with the types of
:mod:`inferfleet.telemetry.vocabulary`; what is in no vocabulary, such as the extras of a library, is text
under ``labels``. So no two lines ever claim different types for one field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structlog.typing import EventDict, WrappedLogger

from inferfleet.telemetry.vocabulary import ECS_VERSION, KEYS, Type


class _Place:
    """Where a key goes: the objects on its way, its last name, its type."""

    __slots__ = ("last", "type", "way")

    def __init__(self, dotted: str, kind: Type) -> None:
        *self.way, self.last = dotted.split(".")
        self.type = kind


_PLACES = {name: _Place(key.name(name), key.type) for name, key in KEYS.items()}
_TAKES: dict[Type, tuple[type, ...]] = {"long": (int,), "double": (int, float), "boolean": (bool,)}


def ecs(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Return the line as a document; a value that is not of its key's type goes to ``labels`` as text."""
    name = event.get("event", "")
    document: dict[str, Any] = {
        "@timestamp": event.get("timestamp"),
        "log.level": event.get("level"),
        "message": name,
        "ecs.version": ECS_VERSION,
    }
    if "logger" not in event:  # an event of ours, not a line of a library
        document["event"] = {"action": name}
    labels: dict[str, Any] = {}
    for key, value in event.items():
        if key in ("timestamp", "level", "event") or value is None:
            continue
        place = _PLACES.get(key)
        fitting = None if place is None else _fitted(value, place.type)
        if place is None or fitting is None:
            labels[key.replace(".", "_")] = _words(value)
            continue
        at = document
        for step in place.way:
            at = at.setdefault(step, {})
        at[place.last] = fitting
    if labels:
        document["labels"] = labels
    return document


def _fitted(value: object, kind: Type) -> object:
    """Return the value as its field takes it, ``None`` if it cannot be that."""
    if kind in ("keyword", "text"):
        return _words(value)
    if isinstance(value, bool) and kind != "boolean":
        return None
    return value if isinstance(value, _TAKES[kind]) else None


def _words(value: object) -> str | list[str]:
    """Return a value as text; a list stays one, a table becomes a list of ``name=value``."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, list | tuple):
        return [each if isinstance(each, str) else str(each) for each in value]
    return str(value)
