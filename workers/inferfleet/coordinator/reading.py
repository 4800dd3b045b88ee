"""What a rollout is judged by, in figures for people and programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from inferfleet.core.evidence import Arm, Evidence, Values
from inferfleet.core.judging import Finding
from inferfleet.core.label_judging import Judged, judged
from inferfleet.rollouts import Rollout
from inferfleet.summaries import Comparison

ORDER = ("stable", "control", "canary", "baked", "shadow")


def evidence_view(rollout: Rollout, evidence: Evidence, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the sums of each arm, what is found of them, and what waits; plain values throughout.

    Times are in milliseconds. ``findings`` are those of one look that was not acted on.
    """
    shares = {each.name: each.buckets / 100 for each in rollout.current.variants}
    shown: dict[str, Any] = {
        "shares": shares,
        "arms": {name: _arm(evidence.arms[name]) for name in ORDER if name in evidence.arms},
        "findings": [each._asdict() for each in findings],
        "watched_s": round(rollout.watched_s, 1),
        "lag": evidence.lag[max(evidence.lag)] if evidence.lag else 0,
        "crashes": len(evidence.crashes),
    }
    if evidence.comparison is not None:
        shown["comparison"] = _comparison(evidence.comparison) | {
            "seen": evidence.seen,
            "shed": evidence.shed,
        }
    if evidence.secondary is not None:
        shown["secondary"] = _comparison(evidence.secondary)
    if evidence.labels:
        shown["labels"] = {
            arm: {metric: _values(found) for metric, found in metrics.items()}
            for arm, metrics in evidence.labels.items()
        }
    metrics = judged(rollout, evidence)
    if metrics:
        shown["metrics"] = [_metric(each) for each in metrics]
    if rollout.looks:
        shown["looks"] = [
            {"number": each.number, "bound": each.bound, "z": each.z, "difference": each.difference}
            for each in rollout.looks
        ]
    return shown


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "requests": arm.requests,
        "failed": arm.failures.events,
        "failed_share": round(arm.failures.share, 6),
        "dead_letters": arm.dead_letters,
        "invalid": arm.invalid,
        "fallbacks": arm.fallbacks,
        "p95_compute_ms": round(arm.compute.quantile(0.95) * 1000, 3),
        "p95_latency_ms": round(arm.latency.quantile(0.95) * 1000, 3),
        "p99_latency_ms": round(arm.latency.quantile(0.99) * 1000, 3),
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "pairs": found.pairs,
        "identical": found.identical,
        "close": found.close,
        "different": found.different,
        "nonfinite": found.nonfinite,
        "label_changes": found.label_changes,
        "hard_flips": found.hard_flips,
    }


def _metric(found: Judged) -> dict[str, Any]:
    """Return how a metric stands; what is not known yet is ``None``, and above 0 is always worse."""
    known = math.isfinite(found.test.bound)
    return {
        "name": found.metric.name,
        "goal": found.metric.goal,
        "arm": found.arms[0],
        "against": found.arms[1],
        "labels": [round(each.effective) for each in (found.ours, found.theirs)],
        "margin": found.metric.margin,
        "worse_by": round(found.worse_by, 6) if known else None,
        "at_least": round(found.at_least, 6) if known else None,
        "z": round(found.test.z, 3) if known else None,
        "bound": round(found.test.bound, 3) if known else None,
        "passed": found.test.passed,
    }


def _values(found: Values) -> dict[str, Any]:
    return {"count": found.count, "mean": round(found.total / found.count, 6) if found.count else 0.0}
