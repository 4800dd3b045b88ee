"""What a step of a rollout writes, as one change: its state, its revision and its audit entry. Reads nothing.

A route that needs the ready barrier is announced with the step and gets its time in a second change; that it
did is not written but found in the log, so a crash between the two leaves nothing half done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from msgspec.structs import replace

from inferfleet.coordinator.announcing import Author, activation
from inferfleet.core.rollout import Step, took_effect
from inferfleet.core.rollout_moves import enter
from inferfleet.plane import AuditEntry, Change, Draft, Lease, Stored
from inferfleet.revisions import Revision, RouteLog
from inferfleet.rollouts import Rollout, decode_rollout, encode_rollout

COORDINATOR = Author("coordinator")


class Standing(NamedTuple):
    """A rollout as it stands, with the version of its document that it was read at."""

    version: int
    rollout: Rollout


def read(stored: Stored, log: RouteLog, now_ms: int) -> Standing:
    """Return a stored rollout, caught up with what the log says of its route.

    Raises ConfigError where it cannot be understood.
    """
    return Standing(stored.version, caught_up(decode_rollout(stored.body), log, now_ms))


def caught_up(rollout: Rollout, log: RouteLog, now_ms: int) -> Rollout:
    """Return the rollout after its last announcement has got its time, if the log says that it has."""
    newest = log.newest(rollout.route)
    if rollout.ended or newest is None or newest.rollout != rollout.id or newest.effective_from_ms is None:
        return rollout
    if rollout.effect == "none" or newest.number <= rollout.revision or newest.route != rollout.current:
        return rollout
    return took_effect(rollout, newest.number, newest.effective_from_ms, now_ms)


def displaced(rollout: Rollout, log: RouteLog) -> str:
    """Say how somebody else has changed the rollout's route; empty where nobody has."""
    if rollout.ended:
        return ""
    revisions = log.kept.get(rollout.route, ())
    if not revisions:
        return f"route {rollout.route} is no more: the log was reset without it"
    foreign = [each for each in revisions if each.rollout != rollout.id and each.number > rollout.base]
    # Whoever withdraws the rollout's own announcement leaves what the rollout had before.
    if not foreign:
        return ""
    last = foreign[-1]
    what = "took the route away" if last.route is None else "changed the route"
    return f"{last.author} {what} (revision {last.number}: {last.reason or last.action})"


def give_way(rollout: Rollout, reason: str, now_ms: int) -> Step:
    """Return the end of a rollout whose route was changed by somebody else: that change stands."""
    step = enter(rollout, "aborted", now_ms, reason)
    return step._replace(rollout=replace(step.rollout, outcome=reason))


def change_of(
    step: Step,
    before: Standing | None,
    log: RouteLog,
    author: Author,
    *,
    lease: Lease | None = None,
    beside: Mapping[str, tuple[int, bytes | None]] | None = None,
) -> Change:
    """Return the change that a step comes to; ``before`` is ``None`` for a rollout that begins.

    ``beside`` are further documents that change with it.
    """
    rollout = step.rollout
    drafts: tuple[Draft, ...] = ()
    if step.route is not None:
        drafts = (Draft(rollout.route, step.route, step.effective_from_ms, step.action, rollout.id),)
    return Change(
        actor=author.actor,
        reason=_reason(rollout, author),
        audit=_audit(step, before, author),
        expected={rollout.route: log.latest(rollout.route)} if drafts else {},
        drafts=drafts,
        documents={
            rollout.id: (0 if before is None else before.version, encode_rollout(rollout)),
            **(beside or {}),
        },
        lease=lease,
    )


def activation_of(
    rollout: Rollout, announcement: Revision, log: RouteLog, now_ms: int, lead_ms: int, lease: Lease
) -> Change:
    """Return the change that gives a rollout's announced route its time."""
    reason = rollout.history[-1].reason if rollout.history else rollout.reason
    author = Author(COORDINATOR.actor, reason)
    found = activation(announcement, log.newest(rollout.route), author, now_ms, lead_ms)
    return replace(found, lease=lease)


def _reason(rollout: Rollout, author: Author) -> str:
    return author.reason or (rollout.history[-1].reason if rollout.history else rollout.reason)


def _audit(step: Step, before: Standing | None, author: Author) -> tuple[AuditEntry, ...]:
    """Return what the audit log says of a step; what is only counted, such as time, is no change."""
    rollout = step.rollout
    told = rollout.history[-1:] != (before.rollout.history[-1:] if before is not None else ())
    if not told and step.route is None and before is not None and before.rollout.paused == rollout.paused:
        return ()
    entry = AuditEntry(
        actor=author.actor,
        action=step.action or f"rollout {rollout.history[-1].action if rollout.history else 'step'}",
        subject=f"rollout {rollout.id}",
        reason=_reason(rollout, author),
        before=None if before is None else _shown(before.rollout),
        after=_shown(rollout) | ({} if before is not None else _bound(rollout)),
    )
    return (entry,)


def _shown(rollout: Rollout) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "route": rollout.route,
        "version": rollout.to_version,
        "phase": rollout.phase,
        "percent": rollout.percent,
    }
    if rollout.holds:
        shown["holds"] = [each.kind for each in rollout.holds]
    if rollout.paused is not None:
        shown["paused_by"] = rollout.paused.actor or COORDINATOR.actor
    if rollout.approvals:
        shown["approvals"] = [f"{each.actor}: {each.percent:g} %" for each in rollout.approvals]
    return shown


def _bound(rollout: Rollout) -> dict[str, Any]:
    """Return what approvals are bound to: the model's bytes and the policy."""
    return {
        "model": rollout.model,
        "from_version": rollout.from_version,
        "digest": rollout.digest,
        "policy": rollout.policy_hash,
    }
