"""Which revision answers a record, which revisions must be kept, and whose log may be adopted. Pure.

A record is answered by the highest-numbered revision whose ``effective_from`` is not after its routing time.
So a later revision with an earlier time hides those between (an abort), and every worker and every
redelivery agree without talking to each other.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from inferfleet.revisions import Head, Revision, RouteLog


class Timeline(NamedTuple):
    """When which revision is in force: from ``starts_ms[i]`` on ``revisions[i]``, until the next.

    A time before the first start means the first: the log is not kept further back.
    """

    starts_ms: tuple[int, ...]
    revisions: tuple[Revision, ...]

    def at(self, time_ms: int) -> Revision:
        """Return the revision in force at a routing time; the timeline is not empty."""
        return self.revisions[max(0, bisect_right(self.starts_ms, time_ms) - 1)]


def timeline(revisions: Iterable[Revision]) -> Timeline:
    """Return when each of a route's revisions is in force; announcements and hidden ones are left out."""
    steps: list[tuple[int, Revision]] = []
    for revision in sorted(revisions, key=lambda each: each.number):
        start = revision.effective_from_ms
        if start is None:
            continue
        while steps and steps[-1][0] >= start:
            steps.pop()
        steps.append((start, revision))
    return Timeline(tuple(start for start, _ in steps), tuple(revision for _, revision in steps))


def in_force(revisions: Iterable[Revision], time_ms: int) -> Revision | None:
    """Return the revision that answers a record of ``time_ms``; ``None`` where there is none at all."""
    found = timeline(revisions)
    return found.at(time_ms) if found.revisions else None


def kept(revisions: Sequence[Revision], since_ms: int) -> tuple[Revision, ...]:
    """Return those that are in force at some time from ``since_ms`` on, and a last announcement.

    What is left answers every routing time from ``since_ms`` on as all of them would.
    """
    found = timeline(revisions)
    first = max(0, bisect_right(found.starts_ms, since_ms) - 1)
    left = list(found.revisions[first:])
    if revisions and revisions[-1].effective_from_ms is None:
        left.append(revisions[-1])
    return tuple(sorted(left, key=lambda each: each.number))


def appended(log: RouteLog, revisions: Iterable[Revision]) -> RouteLog:
    """Return the log with these at its end, kept as far back as each of them says.

    A function of the log and the revisions alone, so that all who append the same keep the same. The
    first revision of a later epoch takes the place of everything before.
    """
    head, by_route = log.head, dict(log.kept)
    for revision in revisions:
        if revision.epoch > head.epoch:
            by_route.clear()
        standing = by_route.get(revision.name, ())
        by_route[revision.name] = kept((*standing, revision), revision.at_ms - revision.horizon_ms)
        head = revision.head
    return RouteLog(head, by_route, str(head.number))


class Adoption(Enum):
    """What a worker does about a log that it finds, knowing its own head."""

    SAME = "same"
    NEWER = "newer"
    OLDER = "older"
    """Its head is lower: the store has lost revisions, for example in a failover. Never adopted."""
    FORKED = "forked"
    """It does not continue our own: the store lost revisions and went on with others. Never adopted."""


def adoption(own: Head, found: Head, link: str | None = None) -> Adoption:
    """Say whether a log may be adopted over one's own.

    ``link`` is the hash that the found log holds at our own head's number, ``None`` where that is kept no
    longer. Only a higher epoch, which a person sets, goes back.
    """
    if found.epoch != own.epoch:
        return Adoption.NEWER if found.epoch > own.epoch else Adoption.OLDER
    if found.number < own.number:
        return Adoption.OLDER
    if found.number == own.number:
        return Adoption.SAME if found.hash == own.hash else Adoption.FORKED
    return Adoption.NEWER if link is None or link == own.hash else Adoption.FORKED


def chain_fault(revisions: Sequence[Revision]) -> str | None:
    """Return what is wrong with consecutive revisions of one log, or ``None``."""
    for before, after in itertools.pairwise(revisions):
        if (after.epoch, after.number) <= (before.epoch, before.number):
            return f"revision {after.number} follows revision {before.number}"
        if after.previous != before.hash:
            return f"revision {after.number} does not continue revision {before.number}"
    return None
