"""Which routes are paused: in this process alone, or in Redis for all workers of the fleet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from inferfleet.control.link import Link, Outage

MAX_REASON = 500
MAX_ACTOR = 200


class Pause(msgspec.Struct, frozen=True, omit_defaults=True):
    """What stands under a route's pause key, as JSON: why, since when (epoch milliseconds), and by whom.

    ``by`` names the process; ``actor`` is the person, where one has asked for it.
    """

    reason: str
    at_ms: int = 0
    by: str = ""
    actor: str = ""

    @property
    def shown(self) -> str:
        """The reason, with the person where there is one: what all who look at the pause see."""
        return f"{self.reason} (by {self.actor})" if self.actor else self.reason


def pause_key(fleet: str, route: str) -> str:
    """Return the Redis key whose existence pauses a route."""
    return f"{{{fleet}}}:paused:{route}"


def encode_pause(pause: Pause) -> bytes:
    """Return the value that pauses a route."""
    reason = pause.reason[:MAX_REASON].encode(errors="replace").decode()
    actor = pause.actor[:MAX_ACTOR].encode(errors="replace").decode()
    return msgspec.json.encode(msgspec.structs.replace(pause, reason=reason, actor=actor))


def decode_pause(value: bytes) -> Pause:
    """Return what stands under a pause key; whatever somebody wrote there by hand pauses too."""
    try:
        found = msgspec.json.decode(value, type=Pause)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = Pause(value.decode(errors="replace")[:MAX_REASON])
    return found if found.reason else msgspec.structs.replace(found, reason="paused")


class LocalPauses:
    """Implements :class:`~inferfleet.ports.PauseBoard` for one process; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._routes: frozenset[str] = frozenset()
        self._paused: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"LocalPauses({self._paused})"

    def watch(self, routes: Collection[str]) -> None:
        """Show these routes from now on."""
        self._routes = frozenset(routes)

    def current(self) -> Mapping[str, str]:
        """Return the paused ones of the routes that are watched, with their reasons."""
        with self._lock:
            return {route: reason for route, reason in self._paused.items() if route in self._routes}

    def pause(self, route: str, reason: str) -> None:
        """Pause a route; one that is paused keeps its reason."""
        with self._lock:
            self._paused.setdefault(route, reason)

    def resume(self, route: str) -> None:
        """Take the pause away."""
        with self._lock:
            self._paused.pop(route, None)

    def close(self) -> None:
        """Do nothing: the pauses end with the process."""


@dataclass(frozen=True, slots=True)
class PauseOptions:
    """How often Redis is asked, how long a failure keeps from asking again, and how long closing may take."""

    every_s: float = 1.0
    backoff_first_s: float = 0.5
    backoff_max_s: float = 5.0
    close_s: float = 2.0


class RedisPauses:
    """Implements :class:`~inferfleet.ports.PauseBoard` for a fleet; any thread may call it.

    One daemon thread owns the connection and asks for the watched routes. While Redis is away the last known
    pauses hold; what this process changed meanwhile holds for it at once and is written when Redis is back.
    ``connect`` returns a client that answers with bytes and does not retry. ``by`` names this process.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        by: str,
        *,
        options: PauseOptions | None = None,
        utc_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._link = Link(connect)
        self._fleet = fleet
        self._by = by
        self._options = options or PauseOptions()
        self._utc_ms = utc_ms
        self._lock = threading.Lock()
        self._routes: tuple[str, ...] = ()
        self._shared: dict[str, str] = {}
        """Route to reason, as Redis said last."""
        self._unsaid: dict[str, Pause | None] = {}
        """What Redis has not been told yet: a pause, or ``None`` for a resume."""
        self._current: Mapping[str, str] = MappingProxyType({})
        self._outage = Outage("pauses_away", "pauses_back")
        self._failures = 0
        self._stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="pauses", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"RedisPauses({dict(self._current)}, unsaid={sorted(self._unsaid)})"

    def watch(self, routes: Collection[str]) -> None:
        """Ask for exactly these routes from now on, at once for the first time."""
        with self._lock:
            self._routes = tuple(sorted(routes))
            self._refresh()
        self._wake.set()

    def current(self) -> Mapping[str, str]:
        """Return the paused ones of the routes that are watched, with their reasons, as far as is known."""
        return self._current

    def pause(self, route: str, reason: str) -> None:
        """Pause a route, here at once and for the fleet as soon as may be; a pause that is known stays."""
        with self._lock:
            paused = self._unsaid[route] is not None if route in self._unsaid else route in self._shared
            if paused:
                return
            self._unsaid[route] = Pause(reason, self._utc_ms(), self._by)
            self._refresh()
        self._wake.set()

    def resume(self, route: str) -> None:
        """Take the pause away, whoever set it: here at once, for the fleet as soon as may be."""
        with self._lock:
            self._unsaid[route] = None
            self._refresh()
        self._wake.set()

    def close(self) -> None:
        """Write what is not written yet, within ``close_s``, and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join(self._options.close_s)
        if self._thread.is_alive():
            # It sits in a read; without its connection it ends at once.
            self._link.drop()

    def _refresh(self) -> None:
        """Derive what holds from what Redis said and what it has not heard; the lock is held."""
        holds = dict(self._shared)
        for route, pause in self._unsaid.items():
            if pause is None:
                holds.pop(route, None)
            else:
                holds.setdefault(route, pause.reason)
        shown = {route: holds[route] for route in self._routes if route in holds}
        if shown != self._current:
            self._current = MappingProxyType(shown)

    # On the thread

    def _serve(self) -> None:
        while not self._stopping or self._unsaid:
            try:
                self._tell()
                self._look()
            except Exception as error:
                if self._stopping:
                    break
                self._outage.began(error)
                wait_s = self._backoff_s()
            else:
                self._outage.over()
                self._failures = 0
                wait_s = self._options.every_s
            if not self._stopping:
                self._wake.wait(wait_s)
                self._wake.clear()
        self._link.drop()

    def _backoff_s(self) -> float:
        options = self._options
        wait_s = min(options.backoff_max_s, options.backoff_first_s * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return wait_s

    def _tell(self) -> None:
        """Write what Redis has not been told; a pause that stands there already, stays."""
        while True:
            with self._lock:
                found = next(iter(self._unsaid.items()), None)
            if found is None:
                return
            route, pause = found
            key = pause_key(self._fleet, route)
            if pause is None:
                self._link.run("DEL", key)
            else:
                self._link.run("SET", key, encode_pause(pause), "NX")
            with self._lock:
                if pause is None:
                    self._shared.pop(route, None)
                else:
                    self._shared.setdefault(route, pause.reason)
                if self._unsaid[route] is pause:  # else it was changed while Redis was told
                    del self._unsaid[route]
                self._refresh()

    def _look(self) -> None:
        """Ask which of the watched routes are paused."""
        routes = self._routes
        if not routes:
            return
        values = self._link.run("MGET", *[pause_key(self._fleet, route) for route in routes])
        shared = {
            route: decode_pause(value).shown
            for route, value in zip(routes, values, strict=True)
            if value is not None
        }
        with self._lock:
            self._shared = shared
            self._refresh()
