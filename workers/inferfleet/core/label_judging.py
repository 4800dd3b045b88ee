"""Guardrails by labels: a version that answers without an error, and wrongly, is found by them. Pure.

A metric's test compares the mean of its labels in two arms that answered at the same time, the canary's and
the control slice's, or, after a switch, with what the version before had answered. It may be looked at at any
time (:mod:`inferfleet.core.sequential`), and goes on in a canary's bake with labels that come late: that is
the same test, so that each metric takes one share of the policy's alpha.
"""

from __future__ import annotations

from typing import NamedTuple

from inferfleet.core import ab, sequential
from inferfleet.core.judging import Finding, alpha_of_each
from inferfleet.core.sequential import Estimate, Test
from inferfleet.evidence import CANARY, CONTROL, Evidence, Values
from inferfleet.policies import Metric, Policy
from inferfleet.rollouts import Rollout

BAKED = "baked"
STABLE = "stable"
MEAN_LEAST = 100.0
"""Independent labels in each arm below which nothing is concluded about a mean, whose tail nobody knows."""


class Judged(NamedTuple):
    """How one metric stands: arms, what their labels say, and the test of theirs - ours over the margin.

    For a metric whose goal is down the difference is taken the other way round: above 0 is always worse.
    """

    metric: Metric
    arms: tuple[str, str]
    ours: Estimate
    theirs: Estimate
    test: Test

    @property
    def worse_by(self) -> float:
        """How much worse the new version is, in the metric's own unit; below 0 it is better."""
        return self.test.excess + self.metric.margin

    @property
    def at_least(self) -> float:
        """The always-valid lower bound of how much worse it is."""
        return self.test.lower + self.metric.margin


def arms_of(rollout: Rollout) -> tuple[str, str]:
    """Return the arm of the new version and the one that it is compared with."""
    if rollout.kind == "blue-green":
        return BAKED, STABLE
    return CANARY, CONTROL if rollout.policy.control or rollout.kind == "ab" else STABLE


def judged(rollout: Rollout, evidence: Evidence) -> list[Judged]:
    """Return how each metric of a canary or a switch stands; an A/B test has its looks instead."""
    if rollout.kind not in ("canary", "blue-green"):
        return []
    arms = arms_of(rollout)
    return [_judged(metric, arms, evidence, rollout.policy) for metric in rollout.policy.metrics]


def label_guardrails(rollout: Rollout, evidence: Evidence) -> list[Finding]:
    """Return what the labels say of each metric: an end, nothing wrong, or too little yet."""
    if rollout.kind == "blue-green" and rollout.phase != "bake":
        return []
    return [_finding(each, rollout) for each in judged(rollout, evidence)]


def lacking_labels(rollout: Rollout, evidence: Evidence) -> str:
    """Say which metric of a canary's step has fewer labels than its minimum; empty where none has."""
    missing = []
    for each in judged(rollout, evidence):
        count, wanted = min(each.ours.effective, each.theirs.effective), each.metric.minimum_labels
        # A hair below is the sum of many roundings.
        if count < wanted * (1 - 1e-9):
            missing.append(f"{count:.0f} of {wanted} independent labels of {each.metric.name}")
    return ", ".join(missing)


def _judged(metric: Metric, arms: tuple[str, str], evidence: Evidence, policy: Policy) -> Judged:
    ours, theirs = (evidence.labels.get(arm, {}).get(metric.name, Values()) for arm in arms)
    cap = max(ours.values.quantile(ab.WINSORISED), theirs.values.quantile(ab.WINSORISED))
    mine, other = _estimate(ours, metric, cap), _estimate(theirs, metric, cap)
    least = sequential.LEAST_EFFECTIVE if metric.kind == "proportion" else MEAN_LEAST
    test = sequential.UNKNOWN
    if min(mine.effective, other.effective) >= least:
        sign = -1 if metric.goal == "up" else 1
        test = sequential.contrast(
            mine._replace(value=sign * mine.value),
            other._replace(value=sign * other.value),
            ratio=1,
            points=metric.margin,
            alpha=alpha_of_each(policy),
            tuned_at=policy.guardrails.tuning_messages,
        )
    return Judged(metric, arms, mine, other, test)


def _estimate(values: Values, metric: Metric, cap: float) -> Estimate:
    """Return a metric's mean; its variance is as if labels were independent, or that between groups of keys.

    Labels that are all alike are no certainty: a proportion's variance is at least that of
    (sum + 1/2)/(count + 1), which shares between 0 and 1 never exceed.
    """
    found = ab.estimate(values, metric, cap)
    if values.count < 2:
        return found
    if metric.kind == "mean":
        effect = _effect(values, _alone(values))
        alone = found.variance * found.effective / values.count
    else:
        smooth = min(1.0, max(0.0, (values.total + 0.5) / (values.count + 1)))
        alone = smooth * (1 - smooth) / values.count
        effect = _effect(values, alone)
    return Estimate(found.value, max(alone * effect, 1e-18), values.count / effect)


def _alone(values: Values) -> float:
    """Return the variance of the mean of independent labels."""
    plain = values.total / values.count
    return max(0.0, values.squares - values.total * plain) / (values.count - 1) / values.count


def _effect(values: Values, alone: float) -> float:
    """Return how many labels count for one: few groups of keys count once each, for nobody can say more."""
    clusters = sequential.of_groups(values.groups)
    if clusters.clusters < sequential.LEAST_CLUSTERS:
        return values.count / sequential.kish(clusters)
    return max(1.0, sequential.ratio_variance(clusters) / alone) if alone > 0 else 1.0


def _finding(found: Judged, rollout: Rollout) -> Finding:
    metric, (arm, other) = found.metric, found.arms
    name = f"metric {metric.name}"
    if found.theirs.effective <= 0 and rollout.kind == "blue-green":
        said = (
            f"no labels of version {rollout.from_version}'s answers in this rollout: nothing to compare with"
        )
        return Finding(name, "wait", said)
    if found.test is sequential.UNKNOWN:
        counts = (
            f"{found.ours.effective:.0f} independent labels ({arm}), {found.theirs.effective:.0f} ({other})"
        )
        return Finding(name, "wait", f"{counts}: too little yet")
    text = (
        f"{found.ours.value:.4g}, {other} {found.theirs.value:.4g}, margin {metric.margin:g}: "
        f"worse by {found.worse_by:+.3g}, at least {found.at_least:+.3g} "
        f"(z {found.test.z:.2f}, bound {found.test.bound:.2f})"
    )
    return Finding(name, "abort" if found.test.passed else "pass", text)
