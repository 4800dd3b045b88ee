"""The planned looks of an A/B test, with keys as the unit. Pure.

Looks are group-sequential: equally spaced in what is known, against O'Brien-Fleming bounds. Several primary
metrics share each look's level by Holm's procedure; the others are reported after Benjamini and Hochberg. A
metric's variance is that between groups of keys, so that a key with many labels is one key.
"""

from __future__ import annotations

import math

from inferfleet.core import comparing, sequential
from inferfleet.core.sequential import Estimate
from inferfleet.evidence import CANARY, CONTROL, Evidence, Values
from inferfleet.policies import Metric
from inferfleet.rollouts import Look, Rollout

WINSORISED = 0.999
LEAST_GROUPS = 30


def planned_keys(rollout: Rollout) -> int:
    """Return how many independent labels each arm needs: the policy's number, or what its metrics ask for."""
    policy = rollout.policy
    if policy.ab.keys:
        return policy.ab.keys
    primaries = [metric for metric in policy.metrics if metric.primary]
    alpha = policy.ab.alpha / max(1, len(primaries))
    needed = [
        comparing.keys_needed(_spread(metric), metric.minimum_effect, alpha, policy.ab.power, policy.ab.looks)
        for metric in primaries
    ]
    return max(needed, default=1)


def _spread(metric: Metric) -> float:
    if metric.kind == "mean":
        return metric.baseline
    return math.sqrt(max(metric.baseline * (1 - metric.baseline), 1e-4))


def estimate(values: Values, metric: Metric, cap: float) -> Estimate:
    """Return a metric's mean in one arm; means of values that are not negative are winsorised at ``cap``."""
    if values.count < 2:
        return Estimate(0.0, math.inf, 0.0)
    plain = values.total / values.count
    alone = max(0.0, values.squares - values.total * plain) / (values.count - 1) / values.count
    effect = 1.0
    if len(values.groups) >= LEAST_GROUPS and alone > 0:
        effect = max(1.0, sequential.ratio_variance(sequential.of_groups(values.groups)) / alone)
    if metric.kind == "mean" and not values.negative and cap > 0:
        capped = comparing.winsorised_moments(values.values, cap)
        plain, alone = capped.mean, capped.variance / capped.size
    return Estimate(plain, max(alone * effect, 1e-18), values.count / effect)


def differences(rollout: Rollout, evidence: Evidence) -> dict[str, tuple[Estimate, Estimate]]:
    """Return each metric's estimates in the new and in the old version's arm."""
    found = {}
    for metric in rollout.policy.metrics:
        ours = evidence.labels.get(CANARY, {}).get(metric.name, Values())
        theirs = evidence.labels.get(CONTROL, {}).get(metric.name, Values())
        cap = max(ours.values.quantile(WINSORISED), theirs.values.quantile(WINSORISED))
        found[metric.name] = (estimate(ours, metric, cap), estimate(theirs, metric, cap))
    return found


def z_of(ours: Estimate, theirs: Estimate) -> float:
    """Return the difference in its standard errors; 0 where nothing is known."""
    variance = ours.variance + theirs.variance
    return 0.0 if not 0 < variance < math.inf else (ours.value - theirs.value) / math.sqrt(variance)


def look(rollout: Rollout, evidence: Evidence, now_ms: int) -> Look | None:
    """Return the look that is due; ``None`` until enough is known for the next.

    Where much came at once, the looks that were passed over are not made up for.
    """
    policy = rollout.policy
    found = differences(rollout, evidence)
    primaries = [metric for metric in policy.metrics if metric.primary]
    known = min(
        (min(found[each.name][0].effective, found[each.name][1].effective) for each in primaries), default=0.0
    )
    due = min(policy.ab.looks, math.floor(known / planned_keys(rollout) * policy.ab.looks + 1e-9))
    if due <= max((each.number for each in rollout.looks), default=0):
        return None
    bound = comparing.obrien_fleming(policy.ab.looks, policy.ab.alpha)[due - 1]
    z = {name: z_of(*pair) for name, pair in found.items()}
    p_values = {each.name: comparing.two_sided(z[each.name]) for each in primaries}
    clear = comparing.holm(p_values, comparing.two_sided(bound))
    goals = {each.name: 1 if each.goal == "up" else -1 for each in policy.metrics}
    signs = [goals[name] * z[name] for name in clear]
    verdict = "worse" if any(each < 0 for each in signs) else "better" if signs else "open"
    difference = {name: ours.value - theirs.value for name, (ours, theirs) in found.items()}
    return Look(number=due, at_ms=now_ms, bound=bound, z=z, difference=difference, verdict=verdict)


def beside(rollout: Rollout, look_taken: Look, rate: float = 0.05) -> set[str]:
    """Return the metrics beside the primary ones that differ, at most ``rate`` of them wrongly."""
    others = [metric.name for metric in rollout.policy.metrics if not metric.primary]
    return comparing.benjamini_hochberg(
        {name: comparing.two_sided(look_taken.z[name]) for name in others}, rate
    )


def said(look_taken: Look) -> str:
    """Return a look in words."""
    parts = [
        f"{name} {look_taken.difference[name]:+.4g} (z {z:.2f})" for name, z in sorted(look_taken.z.items())
    ]
    return f"look {look_taken.number}, bound {look_taken.bound:.2f}: {', '.join(parts)}"
