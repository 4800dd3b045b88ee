"""Sends a worker's reports and summaries to Redis, on a daemon thread."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from inferfleet.control.keys import INDEX_KEPT_S, MAX_REPORTS, REPORT, REPORTS_TTL_MS, Keys
from inferfleet.control.link import Link, Outage
from inferfleet.plane import WorkerReport
from inferfleet.summaries import Window, encode_window

log = structlog.get_logger(__name__)

LEAST_TTL_S = 6.0


@dataclass(frozen=True, slots=True)
class ReporterOptions:
    """Bounds: summaries that wait and that go in one call, a failure's pause, how long closing may take."""

    bound: int = 10_000
    at_once: int = 200
    backoff_first_s: float = 0.5
    backoff_max_s: float = 5.0
    close_s: float = 2.0


class RedisReporter:
    """Implements :class:`~inferfleet.control_ports.Reporter`; any thread may call it.

    ``connect`` returns a client that answers with bytes and does not retry. ``heartbeat_s`` is how often
    :meth:`heartbeat` is called: a registration stays three times as long, at least 6 s.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        pool: str,
        worker_id: str,
        *,
        heartbeat_s: float = 2.0,
        options: ReporterOptions | None = None,
    ) -> None:
        self._link = Link(connect)
        self._keys = Keys(fleet)
        self._member = f"{pool}:{worker_id}"
        self._ttl_ms = round(1000 * max(LEAST_TTL_S, 3 * heartbeat_s))
        self._options = options or ReporterOptions()
        self._lock = threading.Lock()
        self._report: WorkerReport | None = None
        self._waiting: deque[Window] = deque()
        self._dropped = 0
        self._sending: tuple[str, list[tuple[str, bytes]]] | None = None
        """Summaries on their way with the id of their group: it stays the same until they have arrived."""
        self._life = secrets.token_hex(6)
        self._groups = itertools.count(1)
        self._outage = Outage("reports_away", "reports_back")
        self._failures = 0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="reports", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"RedisReporter({self._member}, waiting={len(self._waiting)}, dropped={self._dropped})"

    def heartbeat(self, report: WorkerReport) -> None:
        """Say how this worker is; the last word counts, and expires."""
        self._report = report
        self._wake.set()

    def append(self, windows: Sequence[Window]) -> None:
        """Add summaries; each is kept until it is stored or the bound drops the oldest."""
        with self._lock:
            self._waiting.extend(windows)
            while len(self._waiting) > self._options.bound:
                self._waiting.popleft()
                self._dropped += 1
        self._wake.set()

    @property
    def dropped(self) -> int:
        """Summaries that were dropped since the start."""
        return self._dropped

    def close(self) -> None:
        """Send what waits and take the registration away, within ``close_s``."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(self._options.close_s)
        if self._thread.is_alive():
            # It sits in a read; without its connection it ends at once.
            self._link.drop()

    # On the thread

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._send()
            except Exception as error:
                self._outage.began(error)
                options = self._options
                wait_s = min(options.backoff_max_s, options.backoff_first_s * 2.0 ** min(self._failures, 16))
                self._failures += 1
                self._stopping.wait(wait_s)
                self._wake.set()
            else:
                self._outage.over()
                self._failures = 0
        self._end()

    def _end(self) -> None:
        """Send the rest and leave; a server that does not answer has the registration expire."""
        try:
            self._report = None
            self._send()
            self._link.run("DEL", self._keys.worker(self._member))
            self._link.run("ZREM", self._keys.index, self._member)
        except Exception as error:
            self._outage.began(error)
        self._link.drop()

    def _send(self) -> None:
        """Send the last report, then all summaries that wait; each of these arrives once.

        Summaries that the server refuses hold up no report.
        """
        report = self._report
        if report is not None:
            self._call(b"" if (body := _encoded(report)) is None else body, "", ())
            if self._report is report:
                self._report = None
        while self._sending is not None or self._waiting:
            self._sending = self._sending or self._next()
            self._dropped += self._call(b"", *self._sending)
            self._sending = None

    def _next(self) -> tuple[str, list[tuple[str, bytes]]]:
        """Take the next summaries, by route and as they are stored, with an id that no others have."""
        with self._lock:
            count = min(len(self._waiting), self._options.at_once)
            windows = [self._waiting.popleft() for _ in range(count)]
        found = [(each.route, body) for each in windows if (body := _encoded(each)) is not None]
        self._dropped += count - len(found)
        return f"{self._life}-{next(self._groups)}", found

    def _call(self, report: bytes, group: str, windows: Sequence[tuple[str, bytes]]) -> int:
        """Run the script; return how many summaries the server did not take and never will."""
        by_route: dict[str, list[bytes]] = {}
        for route, body in windows:
            by_route.setdefault(route, []).append(body)
        keys, member = self._keys, self._member
        refused: int = self._link.script(
            REPORT,
            [keys.worker(member), keys.index, keys.sent(member), *map(keys.reports, by_route)],
            [
                member,
                report,
                self._ttl_ms,
                group,
                MAX_REPORTS,
                REPORTS_TTL_MS,
                INDEX_KEPT_S,
                *(word for bodies in by_route.values() for word in (len(bodies), *bodies)),
            ],
        )
        return refused


def _encoded(said: WorkerReport | Window) -> bytes | None:
    """Return what is stored; ``None``, and a line in the log, for what no form can hold."""
    try:
        return msgspec.json.encode(said) if isinstance(said, WorkerReport) else encode_window(said)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        log.warning("report_unwritable", error=str(error))
        return None
