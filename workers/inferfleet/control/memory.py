"""The control plane in memory: the twins of the Redis adapters, for tests, simulations and a single process.

Everything of one fleet hangs on one :class:`MemoryControlStore`; any thread may call it. ``away = True``
makes it a store that does not answer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from inferfleet.control.following import refusal
from inferfleet.control.step import AuditHead, step
from inferfleet.core.revisions import Adoption, adoption
from inferfleet.errors import ControlError, FencedError
from inferfleet.plane import AuditEntry, Change, Lease, Stored, WorkerReport
from inferfleet.ports import Clock
from inferfleet.revisions import EMPTY_LOG, Head, Revision, RouteLog
from inferfleet.summaries import Window, decode_window, encode_window

MAX_REVISIONS = 10_000
MAX_WINDOWS = 10_000


class MemoryControlStore:
    """Implements :class:`~inferfleet.control_ports.ControlStore` for one process.

    Leases and registrations expire by the clock's monotonic face; revisions are dated by its UTC face.
    ``max_windows`` bounds what is kept for each route; the oldest go first.
    """

    def __init__(self, clock: Clock, *, horizon_ms: int = 3_600_000, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._horizon_ms = horizon_ms
        self._max_windows = max_windows
        self._lock = threading.RLock()
        self._log = EMPTY_LOG
        self._revisions: deque[Revision] = deque(maxlen=MAX_REVISIONS)
        self._audit: list[tuple[AuditEntry, bytes]] = []
        self._audit_head = AuditHead()
        self._documents: dict[str, Stored] = {}
        self._workers: dict[tuple[str, str], tuple[WorkerReport, float]] = {}
        self._windows: dict[str, deque[tuple[int, bytes]]] = {}
        self._counted = 0
        self._lease: tuple[Lease, float] | None = None
        self._tokens = 0
        self.pauses: dict[str, str] = {}
        self.away = False

    def __repr__(self) -> str:
        head = self._log.head
        return f"MemoryControlStore(epoch={head.epoch}, number={head.number}, away={self.away})"

    def load(self) -> RouteLog:
        """Return the log as it is kept."""
        with self._answering():
            return self._log

    def head(self) -> Head:
        """Return the log's head."""
        return self.load().head

    def link(self, number: int) -> str | None:
        """Return the hash of a revision by its number; ``None`` where it is kept no longer."""
        with self._answering():
            return next((each.hash for each in reversed(self._revisions) if each.number == number), None)

    def history(self, name: str | None = None, *, before: int = 0, limit: int = 100) -> list[Revision]:
        """Return revisions of a route (or of all), newest first, with numbers below ``before`` unless 0."""
        with self._answering():
            found = (
                each
                for each in reversed(self._revisions)
                if (name is None or each.name == name) and (not before or each.number < before)
            )
            return [each for each, _ in zip(found, range(limit), strict=False)]

    def commit(self, change: Change) -> tuple[Revision, ...]:
        """Do everything that ``change`` says at once, and return its revisions."""
        with self._answering():
            if change.lease is not None and self._standing() != change.lease:
                raise FencedError(f"the lease of {change.lease.holder} is gone; nothing was changed")
            done = step(
                change,
                self._log,
                self._audit_head,
                self._documents,
                at_ms=self._clock.utc_ms(),
                horizon_ms=self._horizon_ms,
                known=[each.head for each in self.workers()],
            )
            self._log, self._audit_head = done.log, done.audit_head
            self._revisions.extend(done.revisions)
            self._audit.extend(done.audit)
            for name, stored in done.documents.items():
                if stored is None:
                    self._documents.pop(name, None)
                else:
                    self._documents[name] = stored
            return done.revisions

    def documents(self) -> Mapping[str, Stored]:
        """Return all rollouts by their ids."""
        with self._answering():
            return dict(self._documents)

    def paused(self, route: str) -> str:
        """Return why a route is paused for its pool; empty where it is not."""
        with self._answering():
            return self.pauses.get(route, "")

    def resume(self, route: str, reason: str) -> None:
        """Take a route's pause away, if it is for this reason."""
        with self._answering():
            if self.pauses.get(route) == reason:
                del self.pauses[route]

    def workers(self) -> list[WorkerReport]:
        """Return the workers that have reported lately, by pool and id."""
        with self._answering():
            now = self._clock.monotonic()
            return [report for _, (report, until) in sorted(self._workers.items()) if until > now]

    def windows(self, route: str, after: str = "", *, limit: int = 1_000) -> tuple[list[Window], str]:
        """Return summaries of a route in the order they came, after a place, and the place of the last."""
        with self._answering():
            first = int(after or "0")
            found = [each for each in self._windows.get(route, ()) if each[0] > first][:limit]
            place = str(found[-1][0]) if found else after
            return [decode_window(body) for _, body in found], place

    def audit(self, *, after: int = 0, limit: int = 1_000) -> list[tuple[AuditEntry, bytes]]:
        """Return audit entries with numbers above ``after``, in order, each with its document as stored."""
        with self._answering():
            return self._audit[after : after + limit]

    def lead(self, holder: str, ttl_ms: int) -> Lease | None:
        """Take the lease, or hold it for another ``ttl_ms``; ``None`` while another holds it."""
        with self._answering():
            standing = self._standing()
            if standing is not None and standing.holder != holder:
                return None
            if standing is None:
                self._tokens += 1
                standing = Lease(holder, self._tokens)
            self._lease = (standing, self._clock.monotonic() + ttl_ms / 1000)
            return standing

    def resign(self, lease: Lease) -> None:
        """Give the lease back, if it is still ours."""
        with self._answering():
            if self._standing() == lease:
                self._lease = None

    def leader(self) -> Lease | None:
        """Return the lease that stands; ``None`` while nobody leads."""
        with self._answering():
            return self._standing()

    def close(self) -> None:
        """Do nothing: what is in memory needs no connection."""

    # What workers write, and what tests do to a store

    def report(self, report: WorkerReport, ttl_ms: int) -> None:
        """Keep a worker's report for ``ttl_ms``."""
        with self._answering():
            until = self._clock.monotonic() + ttl_ms / 1000
            self._workers[report.pool, report.worker] = (report, until)

    def leave(self, pool: str, worker: str) -> None:
        """Take a worker's registration away."""
        with self._answering():
            self._workers.pop((pool, worker), None)

    def add(self, windows: Sequence[Window]) -> None:
        """Keep summaries."""
        with self._answering():
            for window in windows:
                self._counted += 1
                kept = self._windows.setdefault(window.route, deque(maxlen=self._max_windows))
                kept.append((self._counted, encode_window(window)))

    def copy(self) -> RouteLog:
        """Return what a backup of the log holds; :meth:`restore` takes it."""
        return self._log

    def restore(self, log: RouteLog) -> None:
        """Become a store that was restored from an older copy: revisions above it are gone."""
        with self._lock:
            left = [each for each in self._revisions if each.number <= log.head.number]
            self._log = log
            self._revisions = deque(left, maxlen=MAX_REVISIONS)

    def _standing(self) -> Lease | None:
        if self._lease is None or self._lease[1] <= self._clock.monotonic():
            return None
        return self._lease[0]

    def _answering(self) -> threading.RLock:
        """Return the lock; raises ControlError while the store is away."""
        if self.away:
            raise ControlError("the control plane's memory does not answer")
        return self._lock


class MemoryRouteFeed:
    """Implements :class:`~inferfleet.control_ports.RouteFeed` over a store in memory, without a thread.

    It looks at the store whenever it is asked for the log, and adopts by the same rules as the real one.
    """

    def __init__(self, store: MemoryControlStore) -> None:
        self._store = store
        self._log = EMPTY_LOG
        self._stale = ""
        self._refused = ""

    def __repr__(self) -> str:
        return f"MemoryRouteFeed(number={self._log.head.number}, stale={self._stale!r})"

    def log(self) -> RouteLog:
        """Return the newest log that may be adopted."""
        own = self._log.head
        try:
            found = self._store.load()
            link = self._store.link(own.number)
        except ControlError as error:
            self._stale = str(error)
            return self._log
        verdict = adoption(own, found.head, link)
        self._stale = self._refused = refusal(verdict, own, found.head)
        if verdict is Adoption.NEWER:
            self._log = found
        return self._log

    @property
    def stale(self) -> str:
        """Why the log may be old; empty if it is not."""
        return self._stale

    @property
    def refused(self) -> str:
        """Why what the store holds is not adopted; empty if it is."""
        return self._refused

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""


class MemoryReporter:
    """Implements :class:`~inferfleet.control_ports.Reporter` over a store in memory, without a thread.

    While the store is away summaries wait, at most ``bound`` of them; they are written with the next call.
    """

    def __init__(self, store: MemoryControlStore, *, ttl_ms: int = 6_000, bound: int = 1_000) -> None:
        self._store = store
        self._ttl_ms = ttl_ms
        self._bound = bound
        self._last: WorkerReport | None = None
        self._waiting: list[Window] = []
        self._dropped = 0

    def __repr__(self) -> str:
        return f"MemoryReporter(waiting={len(self._waiting)}, dropped={self._dropped})"

    def heartbeat(self, report: WorkerReport) -> None:
        """Say how this worker is; the last word counts, and expires."""
        self._last = report
        self._tried(lambda: self._store.report(report, self._ttl_ms))
        self._flush()

    def append(self, windows: Sequence[Window]) -> None:
        """Add summaries; each is kept until it is stored or the bound drops the oldest."""
        self._waiting.extend(windows)
        self._flush()
        over = len(self._waiting) - self._bound
        if over > 0:
            del self._waiting[:over]
            self._dropped += over

    @property
    def dropped(self) -> int:
        """Summaries that were dropped since the start."""
        return self._dropped

    def close(self) -> None:
        """Send what waits and take the registration away, if the store answers."""
        self._flush()
        last = self._last
        if last is not None:
            self._tried(lambda: self._store.leave(last.pool, last.worker))

    def _flush(self) -> None:
        if self._waiting and self._tried(lambda: self._store.add(self._waiting)):
            self._waiting = []

    def _tried(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except ControlError:
            return False
        return True
