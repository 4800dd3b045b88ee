"""The changes of routes: announced, given their time, withdrawn, deleted. Nothing here reads or writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from inferfleet.core.barrier import Barrier, Verdict, barriers, live, unacknowledged
from inferfleet.core.planning import RouteChange
from inferfleet.plane import AuditEntry, Change, Draft, WorkerReport
from inferfleet.revisions import Revision, RouteLog
from inferfleet.routes import Route, plain_route


class Author(NamedTuple):
    """Who changes something, and why."""

    actor: str
    reason: str = ""


class Timing(NamedTuple):
    """How far ahead a change takes effect, and how long the barrier may take; ``[routing]`` has defaults."""

    lead_ms: int = 2_000
    barrier_s: float = 300.0


class Plan(NamedTuple):
    """What would change; ``latest`` says what each model's latest version is now, as far as it was asked for.

    ``idle`` lists the pools among them that have no live worker.
    """

    changes: tuple[RouteChange, ...]
    latest: Mapping[str, str]
    idle: frozenset[str]


class Applied(NamedTuple):
    """How one route's change ended; ``unacknowledged`` names live workers that have not adopted it yet.

    ``revision`` is the one with a time; ``None`` where ``problem`` says why there is none.
    """

    name: str
    revision: Revision | None
    problem: str = ""
    workers: int = 0
    unacknowledged: tuple[str, ...] = ()


def activate_ready(
    log: RouteLog, workers: Sequence[WorkerReport], now_ms: int, timing: Timing, author: Author
) -> list[tuple[Change, Barrier]]:
    """Return the changes that finish announcements now, each with where it stood. Pure.

    What is ready gets its time; what a worker refuses, or what has waited for ``barrier_s``, is withdrawn.
    Announcements of rollouts are the rollouts' own.
    """
    found: list[tuple[Change, Barrier]] = []
    for each in barriers(log, workers):
        if each.announcement.rollout:
            continue
        verdict = each.verdict(now_ms, timing.barrier_s * 1000)
        newest = log.newest(each.name)
        if verdict is Verdict.READY:
            found.append((activation(each.announcement, newest, author, now_ms, timing.lead_ms), each))
        elif verdict is not Verdict.WAITING:
            found.append((withdrawal(each.announcement, newest, author, str(each)), each))
    return found


def activation(
    announcement: Revision, standing: Revision | None, author: Author, now_ms: int, lead_ms: int
) -> Change:
    """Return the change that gives an announced route its time."""
    draft = Draft(announcement.name, announcement.route, now_ms + lead_ms, "activate", announcement.rollout)
    reason = author.reason or announcement.reason
    return _single(announcement, draft, standing, Author(author.actor, reason))


def withdrawal(announcement: Revision, standing: Revision | None, author: Author, why: str) -> Change:
    """Return the change that takes an announcement back: what stood is appended again, with its own time."""
    old = standing.route if standing is not None else None
    since = 0 if standing is None or standing.effective_from_ms is None else standing.effective_from_ms
    draft = Draft(announcement.name, old, since, "withdraw", standing.rollout if standing is not None else "")
    return _single(announcement, draft, standing, Author(author.actor, why))


def _single(announcement: Revision, draft: Draft, standing: Revision | None, author: Author) -> Change:
    before = standing.route if standing is not None else None
    entry = AuditEntry(
        actor=author.actor,
        action=draft.action,
        subject=f"route {draft.name}",
        reason=author.reason,
        before=plain(announcement.route if draft.action == "withdraw" else before),
        after=plain(draft.route),
    )
    return Change(
        actor=author.actor,
        reason=author.reason,
        audit=(entry,),
        expected={draft.name: announcement.number},
        drafts=(draft,),
    )


def draft_of(
    change: RouteChange, idle: Collection[str], now_ms: int, lead_ms: int, action: str
) -> Draft | None:
    """Return what is to be appended for a change; ``None`` where it is announced already."""
    if change.same:
        return None
    if change.kind == "withdrawn":
        standing = change.standing
        since = 0 if standing is None else standing.effective_from_ms or 0
        return Draft(change.name, change.after, since, "withdraw")
    if change.after is None:
        return Draft(change.name, None, now_ms + lead_ms, "delete")
    time_ms = now_ms if change.after.pool in idle else None
    return Draft(change.name, change.after, time_ms, action)


def entry_of(change: RouteChange, draft: Draft, author: Author, digests: Mapping[str, str]) -> AuditEntry:
    """Return what the audit log says of a change: the route before and after, and the bytes it will run."""
    after = plain(change.after)
    if after is not None and change.after is not None:
        names = [f"{change.after.model}:{version}" for version in change.after.versions]
        after["digests"] = {name: digests[name] for name in sorted(names) if name in digests}
    return AuditEntry(
        actor=author.actor,
        action=draft.action,
        subject=f"route {change.name}",
        reason=author.reason,
        before=plain(change.before),
        after=after,
    )


def plain(route: Route | None) -> dict[str, Any] | None:
    """Return a route in the words of the routes file."""
    return None if route is None else plain_route(route)


def expected_by(changes: Iterable[RouteChange], log: RouteLog) -> dict[str, int]:
    """Return the last revisions that must still be so: of what changes, and of what a new shadow sees."""
    written = [each for each in changes if each.changes]
    seen = [each.after.shadow_of for each in written if each.after is not None and each.after.shadow_of]
    return {name: log.latest(name) for name in seen} | {each.name: each.number for each in written}


def idle_pools(changes: Iterable[RouteChange], workers: Sequence[WorkerReport]) -> frozenset[str]:
    """Return the pools of what changes that have no live worker: nobody there can be waited for."""
    pools = {each.after.pool for each in changes if each.changes and each.after is not None}
    return frozenset(pool for pool in pools if not live(workers, pool))


def finished_by_another(found: Barrier, log: RouteLog) -> Applied:
    """Return how an announcement ended that is not the route's last revision any more."""
    wanted = found.announcement
    newest = log.newest(found.name)
    if newest is not None and newest.number > wanted.number and newest.route == wanted.route:
        return Applied(found.name, newest, workers=found.workers)
    last = log.announced(found.name) or newest
    by = "somebody" if last is None else f"{last.author} ({last.action} {last.number}: {last.reason or '-'})"
    return Applied(found.name, None, f"revision {wanted.number} was replaced by {by}", found.workers)


def looked_at(done: Applied, workers: Sequence[WorkerReport]) -> Applied:
    """Return how a change ended, with the live workers that have not adopted it yet."""
    revision = done.revision
    if revision is None or revision.route is None:
        return done
    mine = live(workers, revision.route.pool)
    late = unacknowledged(revision, workers, revision.route.pool)
    return done._replace(workers=len(mine), unacknowledged=tuple(late))
