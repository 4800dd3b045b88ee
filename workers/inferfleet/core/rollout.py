"""The machine of a rollout: from its state, the evidence and the time to the next state and route. Pure.

Rules, in the order in which :func:`advance` looks at them:

1. What has ended stays so.
2. A hard abort or a passed guardrail goes back to the route before, from the rollout's first revision on.
3. While a route waits for its barrier, a hold stands, or somebody has paused it, nothing moves on.
4. A phase that lasts longer than its limit ends inconclusive: back to the route before, never promoted.
5. A phase is passed only after it was watched for its time, with its minimum of independent messages.

Time passes by being watched: between two looks further apart than ``[holds] stale_s``, or with a clock that
goes back, none has passed. So neither a jump of a clock nor a coordinator that was away brings a promotion
nearer.

Who calls it commits :attr:`Step.route` as :attr:`Step.effect` says, in one change with the new state, and
calls :func:`took_effect` when the revision is in force.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from inferfleet.core import ab, judging, label_judging, rollout_routes
from inferfleet.core.judging import Finding
from inferfleet.core.rollout_moves import Step as Step
from inferfleet.core.rollout_moves import (
    abort,
    back,
    enter,
    finish,
    go,
    onward,
    through_gate,
    told,
)
from inferfleet.core.rollout_moves import load_refused as load_refused
from inferfleet.evidence import Evidence
from inferfleet.policies import Policy
from inferfleet.rollouts import Hold, Pause, RefusedError, Rollout, replace
from inferfleet.routes import Route

COUNTED_HOLDS = ("shadow", "step", "test")
"""Phases in which too many holds ask for a person: in the others nothing is decided."""


class Start(NamedTuple):
    """What a person asks for: an id that no rollout had, the version with its digest, who asks and why."""

    id: str
    to_version: str
    digest: str
    actor: str
    reason: str = ""


def begin(start: Start, route: Route, policy: Policy, now_ms: int) -> Step:
    """Return the first step of a rollout on ``route``; raises RefusedError where there can be none."""
    versions = sorted({variant.version for variant in route.variants})
    if len(versions) != 1:
        said = f"route {route.name} is answered by versions {', '.join(versions)}"
        raise RefusedError(f"{said}: a rollout starts from one; apply a route with one first")
    if start.to_version == versions[0]:
        raise RefusedError(f"route {route.name} is answered by version {start.to_version} already")
    rollout = Rollout(
        id=start.id,
        route=route.name,
        kind=policy.kind,
        policy=policy,
        policy_hash=policy.hash,
        model=route.model,
        from_version=versions[0],
        to_version=start.to_version,
        digest=start.digest,
        before=route,
        current=route,
        actor=start.actor,
        reason=start.reason,
        begun_ms=now_ms,
        last_ms=now_ms,
        since_ms=now_ms,
        phase="shadow",
    )
    if not policy.shadow.enabled:
        return onward(rollout, now_ms, start.reason or "begun", start.actor)
    plan = policy.shadow
    shadowed = rollout_routes.shadowed(route, start.to_version, plan.sample, plan.secondary)
    return enter(rollout, "shadow", now_ms, start.reason or "begun", route=shadowed, actor=start.actor)


def took_effect(rollout: Rollout, number: int, effective_from_ms: int, now_ms: int) -> Rollout:
    """Return the rollout after the revision ``number`` with its route has got its time."""
    fresh = rollout.first_revision == 0
    changes: dict[str, Any] = {
        "first_revision": number if fresh else rollout.first_revision,
        "first_ms": effective_from_ms if fresh else rollout.first_ms,
        "revision": number,
        "effect": "none",
    }
    if not rollout.ended:
        changes |= {"since_ms": now_ms, "last_ms": now_ms, "watched_s": 0.0, "age_s": 0.0}
        changes |= {"canary_from": -1.0, "control_from": -1.0}
        if rollout.phase == "bake" and not rollout.promoted_revision:
            changes["promoted_revision"] = number
    return replace(rollout, **changes)


def advance(rollout: Rollout, evidence: Evidence, now_ms: int) -> Step:
    """Look once: return the new state, and the route to commit if it changes."""
    if rollout.ended:
        return Step(rollout)
    found = _danger(rollout, evidence)
    bad = [each for each in found if each.verdict == "abort"]
    if bad:
        reason = "; ".join(f"{each.name}: {each.text}" for each in bad)
        return abort(rollout, now_ms, reason)._replace(reasons=tuple(found))
    watched = _watched(rollout, evidence, now_ms)
    found += watched.holds
    state, changed = watched.rollout, watched.changed
    over = _over(state)
    if over:
        return back(state, "inconclusive", now_ms, over)._replace(reasons=tuple(found))
    if state.effect == "none" and not state.paused and not state.holds:
        step = _progress(state, evidence, now_ms)
        if step is not None:
            return step._replace(reasons=(*found, *step.reasons), changed=True)
    return Step(state, reasons=tuple(found), changed=changed)


def _danger(rollout: Rollout, evidence: Evidence) -> list[Finding]:
    """Return what might end the rollout at once, in the arms that its phase has."""
    policy = rollout.policy
    if rollout.phase == "shadow":
        return judging.hard_aborts(policy, evidence, "shadow") + judging.shadow_findings(policy, evidence)
    baked = rollout.phase == "bake" and rollout.effect == "none"
    found = judging.hard_aborts(policy, evidence, "baked" if baked else "canary")
    found += label_judging.label_guardrails(rollout, evidence)
    control = evidence.arm("control" if policy.control or rollout.kind == "ab" else "stable")
    if baked:
        # A switch has no control slice: what stable answered before is all there is to compare with.
        past = control if control.requests else evidence.arm("stable")
        return found + judging.guardrails(policy, evidence.arm("baked"), past, baking=True)
    return found + judging.guardrails(policy, evidence.arm("canary"), control)


class _Watched(NamedTuple):
    rollout: Rollout
    holds: list[Finding]
    changed: bool


def _watched(rollout: Rollout, evidence: Evidence, now_ms: int) -> _Watched:
    """Let the time pass that was watched, and begin and end holds."""
    gap_ms = now_ms - rollout.last_ms
    stale_s = rollout.policy.holds.stale_s
    passed = gap_ms / 1_000 if 0 <= gap_ms <= stale_s * 1_000 else 0.0
    found = judging.holds(rollout, evidence, now_ms, gap_ms)
    by_person = rollout.paused is not None and rollout.paused.actor != ""
    still = rollout.effect != "none" or found or rollout.paused is not None
    changes: dict[str, Any] = {
        "last_ms": now_ms,
        "age_s": rollout.age_s + (0.0 if by_person else passed),
        "watched_s": rollout.watched_s + (0.0 if still else passed),
    }
    if rollout.canary_from < 0:
        changes["canary_from"] = evidence.arm("canary").failures.trials
        changes["control_from"] = evidence.arm("control").failures.trials
    if rollout.effect == "none":
        found += _too_few(replace(rollout, **changes), evidence)
    standing = {hold.kind: hold for hold in rollout.holds}
    kinds = {each.name for each in found}
    if kinds == set(standing):
        return _Watched(replace(rollout, **changes), found, "canary_from" in changes)
    fresh = [each for each in found if each.name not in standing]
    held = tuple(
        standing.get(each.name) or Hold(kind=each.name, reason=each.text, since_ms=now_ms) for each in found
    )
    changes |= {"holds": held, "hold_count": rollout.hold_count + len(fresh)}
    if fresh:
        text = "; ".join(f"{each.name}: {each.text}" for each in fresh)
        changes["history"] = told(rollout, now_ms, "hold", text)
    most = rollout.policy.holds.most
    if fresh and changes["hold_count"] >= most and rollout.phase in COUNTED_HOLDS and rollout.paused is None:
        reason = f"{changes['hold_count']} holds in one phase, the last: {fresh[-1].name}"
        changes["paused"] = Pause(actor="", reason=reason, at_ms=now_ms)
    return _Watched(replace(rollout, **changes), found, True)


def _too_few(rollout: Rollout, evidence: Evidence) -> list[Finding]:
    """Return the hold of a phase whose time is over and whose minimum is not reached."""
    plan = rollout.policy.shadow
    if rollout.phase == "shadow" and rollout.watched_s >= plan.duration_s:
        return [
            Finding("too few", "hold", each.text)
            for each in judging.shadow_findings(rollout.policy, evidence)
            if each.verdict == "wait"
        ]
    if rollout.phase == "step" and rollout.watched_s >= rollout.policy.steps[rollout.step].dwell_s:
        lacking = _lacking(rollout, evidence)
        if lacking:
            return [Finding("too few", "hold", lacking)]
    return []


def _lacking(rollout: Rollout, evidence: Evidence) -> str:
    """Say of what a step has too little to be passed, messages or labels; empty where it has enough."""
    minimum = rollout.policy.steps[rollout.step].minimum
    count = _counted(rollout, evidence)
    messages = f"{count:.0f} of {minimum} independent messages" if count < minimum else ""
    return ", ".join(filter(None, (messages, label_judging.lacking_labels(rollout, evidence))))


def _counted(rollout: Rollout, evidence: Evidence) -> float:
    """Return the independent messages of the step, in the smaller of the two arms."""
    count = judging.independent(evidence.arm("canary"), max(0.0, rollout.canary_from))
    if rollout.policy.control:
        control = judging.independent(evidence.arm("control"), max(0.0, rollout.control_from))
        # The slices are equal by plan, and never quite by chance.
        count = min(count, control * 1.25)
    return count


def _over(rollout: Rollout) -> str:
    """Say which limit has passed, if one has."""
    policy = rollout.policy
    limit = policy.ab.limit_s if rollout.phase == "test" else policy.step_limit_s
    if rollout.effect == "none" and rollout.phase == "gate":
        return (
            f"nobody let it pass in {policy.gate_limit_s:g} s" if rollout.age_s > policy.gate_limit_s else ""
        )
    if rollout.effect == "none" and rollout.phase == "bake":
        return ""
    if rollout.age_s <= limit:
        return ""
    if rollout.effect != "none" and rollout.paused is None:
        return f"the workers were not ready in {limit:g} s"
    held = "; ".join(hold.reason for hold in rollout.holds) or (
        rollout.paused.reason if rollout.paused else ""
    )
    return f"no decision in {limit:g} s" + (f" ({held})" if held else "")


def _progress(rollout: Rollout, evidence: Evidence, now_ms: int) -> Step | None:
    """Return the step to the next phase, ``None`` while this one is not passed."""
    policy = rollout.policy
    match rollout.phase:
        case "shadow":
            if rollout.watched_s < policy.shadow.duration_s:
                return None
            said = judging.shadow_findings(policy, evidence)[0]
            if said.verdict == "wait":
                return None
            if rollout.kind == "shadow":
                return back(rollout, "done", now_ms, said.text)
            return onward(rollout, now_ms, said.text)
        case "step":
            plan = policy.steps[rollout.step]
            if rollout.watched_s < plan.dwell_s or _lacking(rollout, evidence):
                return None
            count = _counted(rollout, evidence)
            return onward(rollout, now_ms, f"{count:.0f} independent messages in {rollout.watched_s:.0f} s")
        case "gate":
            return through_gate(rollout, now_ms)
        case "test":
            return _looked(rollout, evidence, now_ms)
        case _:
            return _baked(rollout, now_ms)


def _looked(rollout: Rollout, evidence: Evidence, now_ms: int) -> Step | None:
    look = ab.look(rollout, evidence, now_ms)
    if look is None:
        return None
    state = replace(rollout, looks=(*rollout.looks, look))
    text = ab.said(look)
    if look.verdict == "better":
        return go(state, 100.0, now_ms, text, "")
    if look.verdict == "worse":
        return back(state, "done", now_ms, f"version {state.from_version} stays: {text}")
    if look.number >= state.policy.ab.looks:
        return back(state, "inconclusive", now_ms, f"no winner at the last look: {text}")
    state = replace(state, history=told(state, now_ms, "look", text))
    return Step(state, changed=True)


def _baked(rollout: Rollout, now_ms: int) -> Step | None:
    policy = rollout.policy
    if rollout.watched_s < policy.bake_s:
        return None
    return finish(rollout, now_ms, f"no alarm in {rollout.watched_s:.0f} s after promotion")
