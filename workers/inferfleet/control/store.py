"""The control plane's store in Redis or Valkey: one server, sentinels or a cluster.

Every change is one script that compares the head document and the lease before it writes, so any number of
coordinators may write. What a change comes to is computed here (:mod:`inferfleet.control.step`) on what was
read; where another change came between, it is read and computed anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import structlog

from inferfleet.control.calls import Calls
from inferfleet.control.keys import COMMIT, LEAD, MAX_REVISIONS, REMOVE, Keys
from inferfleet.control.logbook import (
    HeadRecord,
    chain_entry,
    encode_head,
    join_bodies,
    last_entry,
    parser,
    read_head,
    split_bodies,
)
from inferfleet.control.pauses import decode_pause
from inferfleet.control.step import AuditHead, Step, step
from inferfleet.errors import ConfigError, ConflictError, ControlError, FencedError, LogLostError
from inferfleet.plane import AuditEntry, Change, Lease, Stored, WorkerReport, seal
from inferfleet.revisions import Head, Revision, RouteLog
from inferfleet.summaries import Window, decode_window

log = structlog.get_logger(__name__)

ROUNDS = 50
"""How often a change is computed anew because others came between. One of them is done in each round."""
READS = 20
PAGE = 500


class RedisControlStore:
    """Implements :class:`~inferfleet.control_ports.ControlStore`; any thread may call it.

    ``connect`` returns a client that answers with bytes and does not retry. A commit whose answer is lost
    raises ControlError although it may have happened: what stands then says so.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        *,
        address: str,
        utc_ms: Callable[[], int],
        horizon_ms: int = 3_600_000,
        max_revisions: int = MAX_REVISIONS,
    ) -> None:
        self._calls = Calls(connect, address)
        self._address = address
        self._keys = Keys(fleet)
        self._utc_ms = utc_ms
        self._horizon_ms = horizon_ms
        self._max_revisions = max_revisions
        self._parse = parser(fleet)
        self._lock = threading.Lock()
        self._known: tuple[bytes, RouteLog] | None = None
        self._documents: tuple[bytes, Mapping[str, Stored]] | None = None

    def __repr__(self) -> str:
        return f"RedisControlStore({self._address}, {self._keys!r})"

    # The log

    def head(self) -> Head:
        """Return the log's head."""
        return self._head()[0].head

    def load(self) -> RouteLog:
        """Return the log as it is kept; read anew only when something was changed."""
        record, document = self._head()
        for _ in range(READS):
            with self._lock:
                if self._known is not None and document and self._known[0] == document:
                    return self._known[1]
            kept = {
                name.decode(): self._revisions(value)
                for name, value in self._calls.run("HGETALL", self._keys.routes).items()
            }
            again, now = self._head()
            if now == document:
                return self._checked(RouteLog(record.head, kept, str(record.head.number)), document)
            record, document = again, now
        raise ControlError(f"redis at {self._address}: the route log changes faster than it can be read")

    def _checked(self, found: RouteLog, document: bytes) -> RouteLog:
        """Keep and return a log; the revision at its head is always among those that are kept."""
        newest = max((each[-1].number for each in found.kept.values()), default=0)
        if newest != found.head.number:
            raise ControlError(
                f"redis at {self._address}: the routes end at revision {newest} and the log at "
                f"{found.head.number}; restore them, or write them anew by `inferfleet route apply --reset`"
            )
        with self._lock:
            self._known = (document, found)
        return found

    def history(self, name: str | None = None, *, before: int = 0, limit: int = 100) -> list[Revision]:
        """Return revisions of a route (or of all), newest first, with numbers below ``before`` unless 0."""
        found: list[Revision] = []
        last = f"({before}-0" if before else "+"
        while len(found) < limit:
            entries = self._calls.run("XREVRANGE", self._keys.revisions, last, "-", "COUNT", PAGE)
            for entry in entries:
                revision = self._parse(chain_entry(*entry)[2])
                if name is None or revision.name == name:
                    found.append(revision)
            if len(entries) < PAGE:
                break
            last = "(" + entries[-1][0].decode()
        return found[:limit]

    # Changes

    def commit(self, change: Change) -> tuple[Revision, ...]:
        """Do everything that ``change`` says at once, and return its revisions."""
        for _ in range(ROUNDS):
            self._check_lease(change.lease)  # a leader that is fenced shall know it, whatever else is refused
            record, document = self._head()
            done = self._step(change, record)
            verdict = self._calls.script(
                COMMIT, self._commit_keys(), self._words(change, record, document, done)
            )
            if verdict == b"done":
                return done.revisions
            if verdict == b"fenced":
                continue
            if verdict == b"behind":
                raise LogLostError(
                    f"redis at {self._address}: the head of the route log lies behind the log itself; "
                    "`inferfleet route apply --reset` starts above it"
                )
        raise ConflictError("other changes came between each time; try again")

    def _check_lease(self, lease: Lease | None) -> None:
        if lease is not None and self._calls.run("GET", self._keys.lease) != _lease(lease).encode():
            raise FencedError(f"the lease of {lease.holder} is gone; nothing was changed")

    def _commit_keys(self) -> list[str]:
        keys = self._keys
        return [keys.head, keys.routes, keys.revisions, keys.audit, keys.rollouts, keys.lease]

    def _step(self, change: Change, record: HeadRecord) -> Step:
        """Return what a change comes to on what stands now; it holds only if the head does not move."""
        keys = self._keys
        names = sorted({*change.expected, *(each.name for each in change.drafts)})
        standing = self._fields(keys.routes, names)
        kept: dict[str, tuple[Revision, ...]] = {}
        for name, value in standing.items():
            try:
                kept[name] = self._revisions(value)
            except ConfigError:
                if not change.reset:  # which takes the place of what nobody understands
                    raise
        documents = {
            name: _stored(value) for name, value in self._fields(keys.rollouts, change.documents).items()
        }
        audit, known = record.audit, []
        if change.reset:
            known = [each.head for each in self.workers()]
            known += self._ends()
            last = last_entry(self._calls.run, keys.audit)
            if last is not None and last[0] > audit.number:
                audit = AuditHead(last[0], last[1])
        return step(
            change,
            RouteLog(record.head, kept, str(record.head.number)),
            audit,
            documents,
            at_ms=self._utc_ms(),
            horizon_ms=self._horizon_ms,
            known=known,
        )

    def _ends(self) -> list[Head]:
        """Return the end of the revisions, which a head that was lost or restored may lie behind."""
        last = last_entry(self._calls.run, self._keys.revisions)
        return [] if last is None else [Head(0, last[0], last[1])]

    def _words(self, change: Change, record: HeadRecord, document: bytes, done: Step) -> list[Any]:
        changed = {each.name: join_bodies(done.log.kept[each.name]) for each in done.revisions}
        documents = {
            name: b"" if stored is None else b"%d %b" % stored for name, stored in done.documents.items()
        }
        fresh = HeadRecord(done.log.head, done.audit_head, record.changes + 1)
        revisions = [(each.number, each.hash, each.body) for each in done.revisions]
        audit = [(entry.number, seal(entry)[1], body) for entry, body in done.audit]
        return [
            document,
            "" if change.lease is None else _lease(change.lease),
            encode_head(fresh),
            self._max_revisions,
            "1" if change.reset else "",
            revisions[0][0] if revisions else "",
            audit[0][0] if audit else "",
            *_listed(revisions),
            *_listed(audit),
            *_listed(changed.items()),
            *_listed(documents.items()),
        ]

    def documents(self) -> Mapping[str, Stored]:
        """Return all rollouts by their ids; read anew only when something was changed."""
        document = self._head()[1]
        with self._lock:
            if self._documents is not None and document and self._documents[0] == document:
                return self._documents[1]
        values = self._calls.run("HGETALL", self._keys.rollouts)
        found = MappingProxyType({name.decode(): _stored(value) for name, value in values.items()})
        if document and self._head()[1] == document:
            with self._lock:
                self._documents = (document, found)
        return found

    def audit(self, *, after: int = 0, limit: int = 1_000) -> list[tuple[AuditEntry, bytes]]:
        """Return audit entries with numbers above ``after``, in order, each with its document as stored.

        An entry that cannot be read comes with its number and nothing else, for whoever verifies the chain.
        """
        first = f"{after + 1}-0"
        entries = self._calls.run("XRANGE", self._keys.audit, first, "+", "COUNT", limit)
        found = [chain_entry(*entry) for entry in entries]
        return [_audited(number, body) for number, _, body in found]

    # Pauses

    def paused(self, route: str) -> str:
        """Return why a route is paused for its pool; empty where it is not."""
        found = self._calls.run("GET", self._keys.paused(route))
        return "" if found is None else decode_pause(found).shown

    def resume(self, route: str, reason: str) -> None:
        """Take a route's pause away, if it is for this reason."""
        key = self._keys.paused(route)
        found = self._calls.run("GET", key)
        if found is not None and decode_pause(found).shown == reason:
            self._calls.script(REMOVE, [key], [found])

    # Workers

    def workers(self) -> list[WorkerReport]:
        """Return the workers that have reported lately, by pool and id."""
        members = sorted(self._calls.run("ZRANGE", self._keys.index, 0, -1))
        if not members:
            return []
        names = [self._keys.worker(member.decode()) for member in members]
        found = [value for value in self._calls.run("MGET", *names) if value is not None]
        reports = [report for value in found if (report := _report(value)) is not None]
        return sorted(reports, key=lambda each: (each.pool, each.worker))

    def windows(self, route: str, after: str = "", *, limit: int = 1_000) -> tuple[list[Window], str]:
        """Return summaries of a route in the order they came, after a place, and the place of the last.

        What came together is returned together, so there may be some more than ``limit``. What cannot be
        read, from a release with another form, is left out.
        """
        found: list[Window] = []
        place = after
        while len(found) < limit:
            first = f"({place}" if place else "-"
            count = min(PAGE, limit - len(found))
            entries = self._calls.run("XRANGE", self._keys.reports(route), first, "+", "COUNT", count)
            for entry, fields in entries:
                place = entry.decode()
                found += [window for body in fields.values() if (window := _window(body)) is not None]
                if len(found) >= limit:
                    break
            if len(entries) < count:
                break
        return found, place

    # The lease

    def lead(self, holder: str, ttl_ms: int) -> Lease | None:
        """Take the lease, or hold it for another ``ttl_ms``; ``None`` while another holds it."""
        token = self._calls.script(LEAD, [self._keys.lease, self._keys.tokens], [holder, ttl_ms])
        return None if token is None else Lease(holder, token)

    def resign(self, lease: Lease) -> None:
        """Give the lease back, if it is still ours."""
        self._calls.script(REMOVE, [self._keys.lease], [_lease(lease)])

    def leader(self) -> Lease | None:
        """Return the lease that stands; ``None`` while nobody leads."""
        found = self._calls.run("GET", self._keys.lease)
        if found is None:
            return None
        token, _, holder = found.decode().partition(" ")
        return Lease(holder, int(token))

    def close(self) -> None:
        """Let go of the connection."""
        self._calls.close()

    # Reading

    def _head(self) -> tuple[HeadRecord, bytes]:
        return read_head(self._calls.run, self._keys)

    def _revisions(self, value: bytes) -> tuple[Revision, ...]:
        return tuple(self._parse(body) for body in split_bodies(value))

    def _fields(self, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Return those fields of a hash that there are."""
        wanted = list(names)
        if not wanted:
            return {}
        values = self._calls.run("HMGET", key, *wanted)
        return {name: value for name, value in zip(wanted, values, strict=True) if value is not None}


def _listed(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return rows as words behind their number, as the script takes them."""
    found = list(rows)
    return [len(found), *(word for row in found for word in row)]


def _lease(lease: Lease) -> str:
    return f"{lease.token} {lease.holder}"


def _stored(value: bytes) -> Stored:
    version, _, body = value.partition(b" ")
    return Stored(int(version), body)


def _audited(number: int, body: bytes) -> tuple[AuditEntry, bytes]:
    try:
        return msgspec.json.decode(body, type=AuditEntry), body
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return AuditEntry(number=number, actor="", action="", subject="unreadable"), body


def _report(value: bytes) -> WorkerReport | None:
    try:
        return msgspec.json.decode(value, type=WorkerReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("worker_report_unreadable", error=str(error))
        return None


def _window(body: bytes) -> Window | None:
    try:
        return decode_window(body)
    except msgspec.MsgspecError as error:
        log.warning("window_unreadable", error=str(error))
        return None
