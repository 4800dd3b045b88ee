"""The moves between the phases of a rollout: each returns the next state with the route to commit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from inferfleet.core import rollout_routes
from inferfleet.core.judging import Finding
from inferfleet.rollouts import KEPT_DECISIONS, Decision, Effect, Phase, Rollout, replace
from inferfleet.routes import Route

MOST_REASON = 500


class Step(NamedTuple):
    """What one look came to.

    ``route`` is to be committed, ``None`` if nothing changes: by an announcement (``effect`` is
    ``barrier``), or at once from ``effective_from_ms`` on (``retroactive``). ``action`` names it, ``reasons``
    say for people what was found. ``changed`` says that the state has to be stored; without it only its
    clocks went on.
    """

    rollout: Rollout
    route: Route | None = None
    effect: Effect = "none"
    effective_from_ms: int | None = None
    action: str = ""
    reasons: tuple[Finding, ...] = ()
    changed: bool = False


def through_gate(rollout: Rollout, now_ms: int) -> Step | None:
    """Return the step past the gate if enough people have approved it as it is, else ``None``."""
    people = approvers(rollout, rollout.next_percent)
    if len(people) < rollout.policy.approvals:
        return None
    return go(rollout, rollout.next_percent, now_ms, f"approved by {', '.join(people)}", "")


def approvers(rollout: Rollout, percent: float) -> list[str]:
    """Return who has approved ``percent``, for these bytes and this policy."""
    return sorted(
        {
            each.actor
            for each in rollout.approvals
            if each.percent == percent
            and each.digest == rollout.digest
            and each.policy == rollout.policy_hash
        }
    )


def finish(rollout: Rollout, now_ms: int, reason: str) -> Step:
    """Return the end of a rollout whose version stays: the old one need not be kept warm any more."""
    route = rollout_routes.promoted(rollout.before, rollout.to_version, warm=False)
    step = enter(rollout, "done", now_ms, reason, route=route, effect="retroactive", percent=100.0)
    return step._replace(rollout=replace(step.rollout, outcome=f"promoted: {reason}"))


def onward(rollout: Rollout, now_ms: int, reason: str, actor: str = "") -> Step:
    """Return the step out of a phase that is passed: to the next share, or to the gate before it."""
    if rollout.kind == "ab":
        canary = max(1, min(9_999, round(rollout.policy.ab.share * 10_000)))
        route = rollout_routes.divided(
            rollout.before, rollout.current, rollout.to_version, canary=canary, control=10_000 - canary
        )
        return enter(rollout, "test", now_ms, reason, route=route, percent=canary / 100, actor=actor)
    steps = rollout.policy.steps
    upcoming = rollout.step + 1
    percent = steps[upcoming].percent if upcoming < len(steps) else 100.0
    if percent in rollout.policy.gate_before:
        step = enter(rollout, "gate", now_ms, reason, percent=rollout.percent, actor=actor)
        return step._replace(rollout=replace(step.rollout, next_percent=percent))
    return go(rollout, percent, now_ms, reason, actor)


def go(rollout: Rollout, percent: float, now_ms: int, reason: str, actor: str) -> Step:
    """Return the step to a share of the buckets; all of them is the promotion."""
    if percent >= 100:
        route = rollout_routes.promoted(rollout.before, rollout.to_version, warm=True)
        return enter(rollout, "bake", now_ms, reason, route=route, percent=100.0, actor=actor)
    control = rollout.policy.control
    route = rollout_routes.stepped(
        rollout.before, rollout.current, rollout.to_version, percent, control=control
    )
    step = enter(rollout, "step", now_ms, reason, route=route, percent=percent, actor=actor)
    return step._replace(rollout=replace(step.rollout, step=rollout.step + 1))


def enter(
    rollout: Rollout,
    phase: Phase,
    now_ms: int,
    reason: str,
    *,
    route: Route | None = None,
    effect: Effect = "barrier",
    percent: float = 0.0,
    actor: str = "",
) -> Step:
    """Return the step into a phase, with its clocks and holds as new."""
    pending: Effect = "barrier" if route is not None and effect == "barrier" else "none"
    state = replace(
        rollout,
        phase=phase,
        percent=percent,
        next_percent=0.0,
        current=rollout.current if route is None else route,
        effect=pending,
        since_ms=now_ms,
        last_ms=now_ms,
        watched_s=0.0,
        age_s=0.0,
        holds=(),
        hold_count=0,
        paused=None,
    )
    state = replace(state, history=told(state, now_ms, phase, reason, actor))
    at_once = now_ms if route is not None and effect == "retroactive" else None
    return Step(state, route, effect if route is not None else "none", at_once, f"rollout {phase}", (), True)


def back(rollout: Rollout, phase: Phase, now_ms: int, reason: str, actor: str = "") -> Step:
    """Return the end of a rollout that leaves the route as it was, from now on."""
    step = enter(rollout, phase, now_ms, reason, route=rollout.before, effect="retroactive", actor=actor)
    return step._replace(rollout=replace(step.rollout, outcome=shortened(reason)))


def abort(rollout: Rollout, now_ms: int, reason: str, actor: str = "") -> Step:
    """Return the abort: the route as it was, from the rollout's first revision on.

    So nothing that still waits meets the new version.
    """
    step = back(rollout, "aborted", now_ms, reason, actor)
    return step._replace(effective_from_ms=now_ms if rollout.first_ms is None else rollout.first_ms)


def load_refused(rollout: Rollout, reason: str, now_ms: int) -> Step:
    """Return the end of a rollout whose version a worker cannot serve: the old one serves on."""
    return Step(rollout) if rollout.ended else abort(rollout, now_ms, f"not loaded: {reason}")


def told(rollout: Rollout, now_ms: int, action: str, reason: str, actor: str = "") -> tuple[Decision, ...]:
    """Return the history with one more decision; the oldest go when there are too many."""
    made = Decision(
        at_ms=now_ms,
        action=action,
        phase=rollout.phase,
        percent=rollout.percent,
        reason=shortened(reason),
        actor=actor,
    )
    return (*rollout.history[-KEPT_DECISIONS + 1 :], made)


def shortened(text: str) -> str:
    """Return the start of a reason that nobody would read to its end, such as one that names every class."""
    return text if len(text) <= MOST_REASON else text[: MOST_REASON - 1] + "…"


def shown(findings: Sequence[Finding]) -> list[str]:
    """Return findings as lines for people."""
    return [f"{each.verdict:5} {each.name}: {each.text}" for each in findings]
