"""Follows the route log in Redis for one worker: a daemon thread, and a copy on disk."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from inferfleet.control.disk import DiskCopy
from inferfleet.control.following import Follower, refusal
from inferfleet.control.link import Link, Outage
from inferfleet.core.revisions import Adoption
from inferfleet.errors import ConfigError, ControlError
from inferfleet.revisions import RouteLog

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FeedOptions:
    """How long a read waits for news, how long a failure keeps from asking again, how long a start waits.

    A server that lost revisions makes no news, so its head is looked at after each ``block_s`` without any.
    ``block_s`` stays below the client's own timeout. ``copy_start_s`` bounds a start that has a copy on disk.
    """

    block_s: float = 2.0
    backoff_first_s: float = 0.5
    backoff_max_s: float = 5.0
    start_s: float = 60.0
    copy_start_s: float = 5.0
    close_s: float = 2.0


class RedisRouteFeed:
    """Implements :class:`~inferfleet.control_ports.RouteFeed`; any thread may call it.

    Call :meth:`start` once. ``connect`` returns a client that answers with bytes and does not retry;
    ``address`` names the server in messages; ``wake`` is called on the feed's thread when there is something
    new. The log on disk, at ``copy``, is as good as one's own: what the store offers must continue it.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        *,
        address: str,
        copy: Path | None,
        wake: Callable[[], None] = lambda: None,
        options: FeedOptions | None = None,
        utc_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._link = Link(connect)
        self._address = address
        self._wake = wake
        self._options = options or FeedOptions()
        self._utc_ms = utc_ms
        self._follower = Follower(self._link.run, fleet)
        self._copy = None if copy is None else DiskCopy(copy, self._follower.parse)
        self._lock = threading.Lock()
        self._log = self._follower.log
        self._unheard: ConfigError | None = None
        self._told: dict[str, str] = {}
        self._away = ""
        self._refused = ""
        self._outage = Outage("routes_away", "routes_back")
        self._failures = 0
        self._answered = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="routes", daemon=True)

    def __repr__(self) -> str:
        return f"RedisRouteFeed(number={self._log.head.number}, stale={self.stale!r})"

    def start(self) -> None:
        """Begin to follow, and wait for the first log, from Redis or else from disk.

        Raises ControlError when neither is to be had within the start's bound.
        """
        options = self._options
        copied = None if self._copy is None else self._copy.load()
        if copied is not None:
            self._follower.log = copied
            self._log = copied
        self._thread.start()
        patience_s = options.start_s if copied is None else options.copy_start_s
        if self._answered.wait(patience_s):
            return
        if copied is None:
            self.close()
            raise ControlError(
                f"{self._away or f'redis at {self._address} does not answer'}, and there is no copy of the "
                'routes on disk ([control] or [redis] url; [routes] source = "fleet")'
            )
        log.warning("routes_from_disk", revision=copied.head.number, redis=self._address)

    def log(self) -> RouteLog:
        """Return the newest log that may be adopted; raises ConfigError, once, for what cannot be read."""
        with self._lock:
            unheard, self._unheard = self._unheard, None
        if unheard is not None:
            raise unheard
        return self._log

    @property
    def stale(self) -> str:
        """Why the log may be old; empty if it is not."""
        return "; ".join(filter(None, (self._away, self.refused)))

    @property
    def refused(self) -> str:
        """Why the log, or a revision in it, is not adopted; empty if it is."""
        return "; ".join(filter(None, (self._refused, *self._told.values())))

    def close(self) -> None:
        """Stop following."""
        self._stopping.set()
        # The thread sits in a read; without its connection it ends at once.
        self._link.drop()
        if self._thread.is_alive():
            self._thread.join(self._options.close_s)

    # On the thread

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                verdict = self._follower.turn(self._block_s())
            except Exception as error:
                if not self._stopping.is_set():
                    self._lost(error)
                continue
            self._found(verdict)
        self._link.drop()

    def _block_s(self) -> float:
        """The first turn looks and does not wait; so does one after a failure."""
        return self._options.block_s if self._answered.is_set() and not self._away else 0.0

    def _found(self, verdict: Adoption) -> None:
        """Show what a turn brought."""
        follower = self._follower
        self._away, self._failures = "", 0
        self._outage.over()
        refused = refusal(verdict, follower.log.head, follower.offered)
        if refused != self._refused:
            self._refused = refused
            if refused:
                log.error("routes_refused", reason=refused, redis=self._address)
        fresh = {name: text for name, text in follower.troubles.items() if self._told.get(name) != text}
        self._told = dict(follower.troubles)
        news = follower.log is not self._log
        with self._lock:
            self._log = follower.log
            if fresh:
                self._unheard = ConfigError("; ".join(fresh.values()))
        if news and self._copy is not None and not follower.troubles:
            self._copy.save(follower.log)
        first = not self._answered.is_set()
        self._answered.set()
        if news or fresh or first:
            self._wake()
        if refused:
            self._stopping.wait(self._options.block_s)

    def _lost(self, error: Exception) -> None:
        """Say that Redis is away, and wait before it is asked again."""
        if not self._away:
            since = datetime.fromtimestamp(self._utc_ms() / 1000, UTC).isoformat(timespec="seconds")
            self._away = f"redis at {self._address} does not answer since {since}: {error}"
            self._wake()
        self._outage.began(error)
        options = self._options
        wait_s = min(options.backoff_max_s, options.backoff_first_s * 2.0 ** min(self._failures, 16))
        self._failures += 1
        # A fleet whose Redis comes back does not ask it all at once.
        self._stopping.wait(wait_s * random.uniform(0.5, 1.0))
