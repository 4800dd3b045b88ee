"""What the leader makes of brakes: a version that a worker has stopped is taken back, then its route goes on.

A worker whose version fails pauses the route for the pool, before anything is emptied into the dead letters.
Where that version is on its way in by a rollout, the pause is all the evidence that is needed. When no worker
steers by a revision with that version any longer, the pause has no reason left, and what was held back is
answered by the version that stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.core.revisions import timeline
from inferfleet.plane import AuditEntry, WorkerReport, braked_version
from inferfleet.revisions import RouteLog
from inferfleet.rollouts import Rollout


def braked(rollout: Rollout, workers: Sequence[WorkerReport]) -> str:
    """Return why a rollout's version was stopped by a worker, empty where it was not."""
    if rollout.ended or rollout.phase == "shadow":
        return ""
    for worker in workers:
        reason = worker.paused.get(rollout.route, "")
        if braked_version(reason) == rollout.to_version:
            return f"{worker.worker} stopped the route: {reason}"
    return ""


def to_resume(log: RouteLog, workers: Sequence[WorkerReport], now_ms: int) -> dict[str, str]:
    """Return the routes that a brake has paused for a version which answers nobody any more, and the reasons.

    Every live worker of the pool must steer by the newest revision, or it would run what was held back by
    the version that failed. So it would where an earlier revision still gives that version what is of its
    time: a person who has replaced it from now on decides when what waits may go on.
    """
    found: dict[str, str] = {}
    for name in sorted(log.kept):
        times = timeline(log.kept[name])
        newest = log.newest(name)
        if newest is None or newest.route is None or newest is not times.at(now_ms):
            continue
        pool = [worker for worker in workers if worker.pool == newest.route.pool]
        reasons = {worker.paused[name] for worker in pool if name in worker.paused}
        answering = {
            variant.version
            for revision in times.revisions
            if revision.route is not None
            for variant in revision.route.variants
            if variant.buckets
        }
        gone = [each for each in reasons if braked_version(each) and braked_version(each) not in answering]
        if gone and all(worker.adopted.get(name, 0) >= newest.number for worker in pool):
            found[name] = gone[0]
    return found


def resumed(name: str, reason: str) -> AuditEntry:
    """Return what the audit log says of a route that goes on."""
    return AuditEntry(
        actor="coordinator",
        action="route resume",
        subject=f"route {name}",
        reason="the version that was stopped answers nobody any more",
        before=reason,
        after=None,
    )
