"""What the leader makes of brakes: a version that a worker has stopped is taken back, then its route goes on.

A worker whose version fails pauses the route for the pool, before anything is emptied into the dead letters.
Where that version is on its way in by a rollout, the pause is all the evidence that is needed. When no worker
steers by a revision with that version any longer, the pause has no reason left, and what was held back is
answered by the version that stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.core.revisions import in_force
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
    the version that failed.
    """
    found: dict[str, str] = {}
    for name in sorted(log.kept):
        newest, current = log.newest(name), in_force(log.kept[name], now_ms)
        if newest is None or newest is not current or newest.route is None:
            continue
        pool = [worker for worker in workers if worker.pool == newest.route.pool]
        reasons = {worker.paused[name] for worker in pool if name in worker.paused}
        answering = {variant.version for variant in newest.route.variants if variant.buckets}
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
