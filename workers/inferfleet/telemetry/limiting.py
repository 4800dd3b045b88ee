"""Keeps a flood of equal warnings or errors out of the log, and says how many lines it kept.

Only warnings and errors: what happens once, like a start or an assignment, is always told. Equal means the
same event at the same place (route, model, topic, ...) with the same error, numbers in it aside.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from inferfleet.telemetry.repeats import NOTHING_HELD, Held, Kind, Repeats

Tell = Callable[[dict[str, Any]], None]
"""Writes a line of the limiter's own."""

LIMITED = frozenset({"warning", "error", "exception", "critical"})
# Order does not matter: one place in the code names its keys in one order.
PLACES = frozenset(
    {"route", "version", "model", "destination", "topic", "queue", "exchange", "use", "file", "rollout"}
)
ERRORS = frozenset({"code", "kind", "reason", "error"})
NAMED = ("route", "model", "version", "code", "kind")
"""What a line of the limiter's own says under the same keys as the lines that it stands for."""
TOLD = "lines_suppressed"
_NUMBERS = re.compile(r"\d+")
_SHAPE = 160
"""Characters of an error's text that are compared."""


class Limiter:
    """A processor of structlog and a filter of ``logging``, over the same counts; safe for threads."""

    def __init__(self, lines: int, window_s: float, clock: Callable[[], float], tell: Tell) -> None:
        self._repeats = Repeats(lines, window_s)
        self._window_s = window_s
        self._clock = clock
        self._tell = tell
        self._lock = threading.RLock()
        self._look_at = clock() + window_s

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Return the line, with ``suppressed`` where some like it were held back; raise DropEvent for one."""
        if method in LIMITED:
            requests = event.get("requests", 0)
            held = self._heard(_kind(event), requests if isinstance(requests, int) else 0)
            if held is None:
                raise structlog.DropEvent
            event.update(_counts(held))
        else:
            self._look(self._clock())
        return event

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a line of a library is told; its template is what is compared, not what fills it."""
        if record.levelno < logging.WARNING:
            self._look(self._clock())
            return True
        held = self._heard((record.name, str(record.msg)[:_SHAPE]))
        if held is not None and held.lines:
            record.suppressed = held.lines
        return held is not None

    def _heard(self, kind: Kind, requests: int = 0) -> Held | None:
        now = self._clock()
        with self._lock:
            held = self._repeats.heard(kind, now, requests)
        self._look(now)  # only now: this line carries its own count
        return held

    def _look(self, now: float) -> None:
        """Tell, once in a window, of lines that were held back in windows that have ended."""
        if now < self._look_at:
            return
        with self._lock:
            self._look_at = now + self._window_s
            found = self._repeats.overdue(now)
        self._say(found)

    def finish(self) -> None:
        """Tell of all lines that were held back and not told of yet."""
        with self._lock:
            found = self._repeats.rest()
        self._say(found)

    def _say(self, found: list[tuple[Kind, Held]]) -> None:
        for (event, *marks), held in found:
            pairs = dict(mark.partition("=")[::2] for mark in marks)
            named = {key: pairs.pop(key) for key in NAMED if key in pairs}
            rest = {"reason": " ".join(f"{key}={value}" if value else key for key, value in pairs.items())}
            self._tell({"event": TOLD, "of": event, **named, **(rest if pairs else {}), **_counts(held)})


def _kind(event: Mapping[str, Any]) -> Kind:
    kind = [str(event.get("event"))]
    for key, value in event.items():
        if key in PLACES:
            kind.append(f"{key}={value}")
        elif key in ERRORS:
            kind.append(f"{key}={_NUMBERS.sub('#', str(value)[:_SHAPE])}")
    info = event.get("exc_info")
    if isinstance(info, BaseException):
        kind.append(f"kind={type(info).__name__}")
    return tuple(kind)


def _counts(held: Held) -> dict[str, int]:
    if held is NOTHING_HELD or not held.lines:
        return {}
    told = {"suppressed": held.lines}
    if held.requests:
        told["suppressed_requests"] = held.requests
    return told
