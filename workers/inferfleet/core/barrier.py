"""The ready barrier: what a pool's workers must have done before a change of a route gets its time. Pure.

An announcement is ready when every live worker of the route's pool has acknowledged it and has each of its
versions loaded, checked and warm. Who decides reads the workers first and the log afterwards: a worker may
have adopted what was committed between the two, but never the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from inferfleet.plane import WorkerReport, version_name
from inferfleet.revisions import Head, Revision, RouteLog

AHEAD_MS = 5_000
BEHIND_MS = 60_000
"""How far a worker's last word may lie in the future, and in the past, of a clock that is right."""


class Waiting(NamedTuple):
    """A worker that an announcement waits for; ``behind``: it has not acknowledged the revision."""

    worker: str
    missing: tuple[str, ...]
    behind: bool

    def __str__(self) -> str:
        said = [f"has not loaded {', '.join(self.missing)}"] if self.missing else []
        return f"{self.worker} {' and '.join(said or ['has not acknowledged the revision'])}"


class Refused(NamedTuple):
    """A version that a worker cannot serve, and why."""

    worker: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.worker} refuses {self.version}: {self.reason}"


class Verdict(Enum):
    """What is to be done about an announcement."""

    READY = "ready"
    WAITING = "waiting"
    REFUSED = "refused"
    EXPIRED = "expired"


class Barrier(NamedTuple):
    """Where an announcement stands: how many live workers its pool has, who is waited for, who refuses."""

    announcement: Revision
    workers: int
    waiting: tuple[Waiting, ...]
    refused: tuple[Refused, ...]

    @property
    def name(self) -> str:
        """The route's name."""
        return self.announcement.name

    def verdict(self, now_ms: int, limit_ms: float) -> Verdict:
        """Say what is to be done at ``now_ms``, where an announcement may wait for ``limit_ms``."""
        if self.refused:
            return Verdict.REFUSED
        if not self.waiting:
            return Verdict.READY
        over = now_ms - self.announcement.at_ms >= limit_ms
        return Verdict.EXPIRED if over else Verdict.WAITING

    def __str__(self) -> str:
        return "; ".join(map(str, self.refused or self.waiting))


def needed(revision: Revision) -> tuple[str, ...]:
    """Return the versions, as ``model:version``, that a revision's route needs."""
    route = revision.route
    return () if route is None else tuple(version_name(route.model, each) for each in sorted(route.versions))


def live(workers: Iterable[WorkerReport], pool: str) -> list[WorkerReport]:
    """Return the workers of a pool that a change must wait for: those that drain take nothing any more."""
    return [each for each in workers if each.pool == pool and not each.draining]


def barrier(announcement: Revision, workers: Iterable[WorkerReport], pool: str) -> Barrier:
    """Return where an announcement of a route of ``pool`` stands.

    A refusal counts once its worker knows the announcement: before, it may be of an earlier try.
    """
    waiting: list[Waiting] = []
    refused: list[Refused] = []
    mine = live(workers, pool)
    for each in mine:
        missing = tuple(name for name in needed(announcement) if name not in each.ready)
        knows = (each.head.epoch, each.head.number) >= (announcement.epoch, announcement.number)
        said = [name for name in missing if knows and name in each.refused and name not in each.loading]
        refused.extend(Refused(each.worker, name, each.refused[name]) for name in said)
        behind = each.adopted.get(announcement.name, 0) < announcement.number
        if missing or behind:
            waiting.append(Waiting(each.worker, missing, behind))
    return Barrier(announcement, len(mine), tuple(waiting), tuple(refused))


def pool_of(log: RouteLog, announcement: Revision) -> str:
    """Return the pool whose workers must be ready: the announced route's, else that of what stands."""
    if announcement.route is not None:
        return announcement.route.pool
    standing = log.newest(announcement.name)
    return standing.route.pool if standing is not None and standing.route is not None else ""


def barriers(log: RouteLog, workers: Sequence[WorkerReport]) -> list[Barrier]:
    """Return where each announcement of the log stands, by the routes' names."""
    announced = [log.announced(name) for name in sorted(log.kept)]
    return [barrier(each, workers, pool_of(log, each)) for each in announced if each is not None]


def unacknowledged(revision: Revision, workers: Iterable[WorkerReport], pool: str) -> list[str]:
    """Return the live workers of a pool that have not adopted a revision yet."""
    return [
        each.worker for each in live(workers, pool) if each.adopted.get(revision.name, 0) < revision.number
    ]


def clock_fault(now_ms: int, workers: Iterable[WorkerReport]) -> str | None:
    """Return in words how a clock differs from the workers', or ``None`` where it does not by much.

    A change takes effect at a time of the clock of whoever makes it: were that an hour off, so would the
    switch be. A report is as old as a heartbeat, and gone when it is some times as old.
    """
    stamped = [each for each in workers if each.at_ms]
    if not stamped:
        return None
    newest = max(stamped, key=lambda each: each.at_ms)
    off_ms = newest.at_ms - now_ms
    if off_ms > AHEAD_MS:
        return f"{off_ms / 1000:,.0f} s behind that of worker {newest.worker}"
    if off_ms < -BEHIND_MS:
        return f"{-off_ms / 1000:,.0f} s ahead of that of worker {newest.worker}"
    return None


class Ahead(NamedTuple):
    """A worker whose log the store has not, and what it says of it."""

    worker: str
    head: Head
    text: str


def ahead(
    head: Head, workers: Iterable[WorkerReport], link: Callable[[Head], str | None] = lambda _: None
) -> list[Ahead]:
    """Return the workers whose log is not a beginning of the store's: the store has lost revisions.

    ``link`` returns the hash that the store holds at the number of a lower head, ``None`` where it is kept no
    longer; then the worker is believed.
    """
    found: list[Ahead] = []
    for each in workers:
        theirs = each.head
        if theirs.number == 0 and theirs.epoch == 0:
            continue
        if (theirs.epoch, theirs.number) > (head.epoch, head.number):
            found.append(
                Ahead(each.worker, theirs, f"holds revision {theirs.number} of epoch {theirs.epoch}")
            )
        elif theirs.epoch == head.epoch:
            known = head.hash if theirs.number == head.number else link(theirs)
            if known is not None and known != theirs.hash:
                text = f"holds another revision {theirs.number} than the store"
                found.append(Ahead(each.worker, theirs, text))
    return found
