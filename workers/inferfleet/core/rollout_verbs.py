"""What people may ask of a rollout, and why it is refused where it is. Pure.

Each takes who asks and why; refusals are :class:`~inferfleet.rollouts.RefusedError` in one line.
"""

from __future__ import annotations

from inferfleet.core import rollout_moves as moves
from inferfleet.core.rollout_moves import Step
from inferfleet.rollouts import Approval, Pause, RefusedError, Rollout, replace


def pause(rollout: Rollout, actor: str, reason: str, now_ms: int) -> Step:
    """Return the rollout halted where it is; what ends it by itself still does."""
    _going_on(rollout, "paused")
    if rollout.paused is not None and rollout.paused.actor:
        raise RefusedError(f"rollout {rollout.id} is paused already, by {rollout.paused.actor}")
    state = replace(rollout, paused=Pause(actor=actor, reason=reason, at_ms=now_ms))
    return _noted(state, now_ms, "pause", reason, actor)


def resume(rollout: Rollout, actor: str, reason: str, now_ms: int) -> Step:
    """Return the rollout going on; holds are counted anew."""
    _going_on(rollout, "resumed")
    if rollout.paused is None:
        raise RefusedError(f"rollout {rollout.id} is not paused")
    state = replace(rollout, paused=None, hold_count=0, last_ms=now_ms)
    return _noted(state, now_ms, "resume", reason, actor)


def approve(
    rollout: Rollout, actor: str, now_ms: int, *, digest: str = "", policy: str = "", reason: str = ""
) -> Step:
    """Return the rollout with a person's approval of the gate that it waits at.

    ``digest`` and ``policy`` are what the person has seen; they have to be the rollout's. The step past the
    gate is taken at the next look.
    """
    _going_on(rollout, "approved")
    if rollout.phase != "gate":
        raise RefusedError(f"rollout {rollout.id} waits at no gate now (it is in phase {rollout.phase})")
    if digest and digest != rollout.digest:
        raise RefusedError(f"rollout {rollout.id} is of the bytes {rollout.digest}, not {digest}")
    if policy and policy != rollout.policy_hash:
        raise RefusedError(f"rollout {rollout.id} follows the policy {rollout.policy_hash}, not {policy}")
    if actor in moves.approvers(rollout, rollout.next_percent):
        raise RefusedError(f"{actor} has approved {rollout.next_percent:g} % of rollout {rollout.id} already")
    made = Approval(
        actor=actor,
        at_ms=now_ms,
        percent=rollout.next_percent,
        digest=rollout.digest,
        policy=rollout.policy_hash,
    )
    state = replace(rollout, approvals=(*rollout.approvals, made))
    return _noted(state, now_ms, "approve", reason or f"{rollout.next_percent:g} %", actor)


def abort(rollout: Rollout, actor: str, reason: str, now_ms: int) -> Step:
    """Return the abort by hand: retroactive, like one that the machine decides on."""
    _going_on(rollout, "aborted")
    return moves.abort(rollout, now_ms, reason or "aborted by hand", actor)


def promote(rollout: Rollout, actor: str, reason: str, now_ms: int) -> Step:
    """Return the promotion by hand, from any phase before it: a person takes the decision on what there is.

    Gates stay gates: the approvals of each that has not been passed have to be there.
    """
    _going_on(rollout, "promoted")
    if rollout.kind == "shadow":
        raise RefusedError(f"rollout {rollout.id} only shadows; start one of another kind to promote")
    if rollout.phase == "bake":
        raise RefusedError(f"rollout {rollout.id} is promoted already and bakes")
    if rollout.effect != "none":
        raise RefusedError(f"rollout {rollout.id} waits for the workers to be ready for its last step")
    for percent in sorted(each for each in rollout.policy.gate_before if each > rollout.percent):
        people = moves.approvers(rollout, percent)
        if len(people) < rollout.policy.approvals:
            said = f"{len(people)} of {rollout.policy.approvals} approvals of {percent:g} %"
            raise RefusedError(f"rollout {rollout.id} has {said}; its policy asks for them")
    return moves.go(rollout, 100.0, now_ms, reason or "promoted by hand", actor)


def _going_on(rollout: Rollout, what: str) -> None:
    if rollout.ended:
        raise RefusedError(f"rollout {rollout.id} has ended ({rollout.phase}) and cannot be {what}")


def _noted(rollout: Rollout, now_ms: int, action: str, reason: str, actor: str) -> Step:
    state = replace(rollout, history=moves.told(rollout, now_ms, action, reason, actor))
    return Step(state, action=f"rollout {action}", changed=True)
