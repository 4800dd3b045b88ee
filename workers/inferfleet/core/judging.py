"""What the evidence says of a rollout: what ends it, what holds it, and whether there is enough of it. Pure.

Chances: ``[guardrails] alpha`` bounds the chance that a version which is nowhere worse than its margins is
ended by a test, over all looks of a whole rollout. It is split evenly over the six guardrails of the steps,
the two of the bake, and one for each metric of labels that the policy names
(:mod:`inferfleet.core.label_judging`), by Bonferroni: so it holds however the tests depend on each other, and
even where each of them lies exactly on its margin. Hard aborts are no tests and have no such promise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from inferfleet.core import sequential, shadow_verdict
from inferfleet.core.sequential import Estimate, Test, Times
from inferfleet.evidence import Arm, Evidence
from inferfleet.policies import Aborts, Guardrails, Policy
from inferfleet.rollouts import Rollout

TESTS = 8
TUNED_WINDOWS = 100
"""How many windows a mean between windows is tuned at: an hour or so of a few workers."""


class Finding(NamedTuple):
    """One thing that was looked at, and what follows: ``text`` is for people."""

    name: str
    verdict: Literal["pass", "wait", "hold", "abort"]
    text: str


def hard_aborts(policy: Policy, evidence: Evidence, arm_name: str) -> list[Finding]:
    """Return what ends a rollout without a test, seen in the arm of the new version."""
    arm, aborts = evidence.arm(arm_name), policy.aborts
    found = []
    crash = _crashes(evidence, aborts)
    if crash:
        found.append(Finding("crashes", "abort", crash))
    if arm.invalid >= aborts.invalid_messages and arm.invalid > aborts.invalid_share * arm.requests:
        said = f"{arm.invalid} of {arm.requests} answers were invalid (limit {aborts.invalid_share:.2%})"
        found.append(Finding("invalid", "abort", said))
    errors = arm.failures
    if errors.events > aborts.error_share * errors.trials and errors.trials >= aborts.error_messages:
        estimate = sequential.proportion(errors, arm.key_groups)
        if estimate.effective >= aborts.error_messages * 0.999:
            said = f"{errors.events:.0f} of {errors.trials:.0f} failed (limit {aborts.error_share:.1%})"
            found.append(Finding("errors", "abort", said))
    return found


def _crashes(evidence: Evidence, aborts: Aborts) -> str:
    times = sorted(evidence.crashes.values())
    for first, last in zip(times, times[aborts.crashes - 1 :], strict=False):
        if last - first <= aborts.crash_window_s * 1_000:
            return f"workers crashed {aborts.crashes} times within {aborts.crash_window_s:g} s"
    return ""


def alpha_of_each(policy: Policy) -> float:
    """Return the level of each single test; an A/B test's metrics have looks of their own and take none."""
    metrics = 0 if policy.kind == "ab" else len(policy.metrics)
    return policy.guardrails.alpha / (TESTS + metrics)


def guardrails(policy: Policy, treated: Arm, control: Arm, *, baking: bool = False) -> list[Finding]:
    """Return how each guardrail stands; ``baking`` compares with the past, so only what must never rise."""
    rails, alpha = policy.guardrails, alpha_of_each(policy)
    tests = _error_tests(rails, alpha, treated, control)
    if not baking:
        tests = itertools.chain(tests, _cost_tests(rails, alpha, treated, control))
    return [_finding(name, said, test) for name, said, test in tests]


def _finding(name: str, said: str, test: Test) -> Finding:
    if test is sequential.UNKNOWN:
        return Finding(name, "wait", f"{said}: too little yet")
    shown = f"{said} (z {test.z:.2f}, bound {test.bound:.2f})"
    return Finding(name, "abort" if test.passed else "pass", shown)


def _error_tests(
    rails: Guardrails, alpha: float, treated: Arm, control: Arm
) -> Iterator[tuple[str, str, Test]]:
    points = rails.error_points / 100
    said = f"against +{rails.error_points:g} points and x{rails.error_ratio:g}"
    failed = _failed(treated), _failed(control)
    for name, word, ours, theirs in (
        ("errors", "failed", *failed),
        ("dead letters", "dead-lettered", _lettered(treated, failed[0]), _lettered(control, failed[1])),
    ):
        test = sequential.worse_share(
            ours, theirs, points=points, ratio=rails.error_ratio, alpha=alpha, tuned_at=rails.tuning_messages
        )
        yield name, f"{ours.value:.3%} {word}, control {theirs.value:.3%}, {said}", test


def _failed(arm: Arm) -> Estimate:
    return sequential.proportion(arm.failures, arm.key_groups)


def _lettered(arm: Arm, failed: Estimate) -> Estimate:
    """Return the share of dead letters, which are as dependent on each other as failures are, or more."""
    effect = arm.failures.trials / failed.effective if failed.effective else 1.0
    return sequential.proportion(arm.letters, effect=effect)


def _cost_tests(
    rails: Guardrails, alpha: float, treated: Arm, control: Arm
) -> Iterator[tuple[str, str, Test]]:
    # Requests of a batch have one span of model time: a batch counts once.
    ours, theirs = sequential.kish(treated.failures), sequential.kish(control.failures)
    compute = Times(treated.compute, ours), Times(control.compute, theirs)
    latency = Times(treated.latency, ours), Times(control.latency, theirs)
    for name, (mine, other), share, ratio in (
        ("p95 compute", compute, 0.95, rails.p95_compute_ratio),
        ("p95 latency", latency, 0.95, rails.p95_latency_ratio),
        ("p99 latency", latency, 0.99, rails.p99_latency_ratio),
    ):
        test = sequential.worse_quantile(
            mine, other, share=share, ratio=ratio, alpha=alpha, tuned_at=rails.tuning_messages
        )
        yield name, f"{name} against x{ratio:g} of the control's", test
    test = sequential.worse_mean(
        treated.cost, control.cost, ratio=rails.cost_ratio, alpha=alpha, tuned_at=TUNED_WINDOWS
    )
    mine_s, other_s = treated.cost.share * 1_000, control.cost.share * 1_000
    said = f"{mine_s:.3g} s for 1,000, control {other_s:.3g} s, against x{rails.cost_ratio:g}"
    yield "cost", said, test


def shadow_findings(policy: Policy, evidence: Evidence) -> list[Finding]:
    """Return what the compared answers say, once there are enough pairs."""
    found = evidence.comparison
    pairs = found.pairs if found else 0
    wanted = policy.shadow.minimum_pairs
    if found is None or pairs < max(1, wanted):
        return [Finding("pairs", "wait", f"{pairs} of {wanted} pairs compared")]
    said = shadow_verdict.verdict(found, evidence.secondary)
    text = "; ".join(said.reasons) or f"{pairs} pairs compared"
    stops = {"block": ("block",), "warn": ("warn", "block"), "never": ()}[policy.shadow.stop_at]
    return [Finding("comparison", "abort" if said.level in stops else "pass", f"{said.level}: {text}")]


def independent(arm: Arm, since: float = 0.0) -> float:
    """Return how many independent messages an arm has answered since it had answered ``since``.

    A batch or a key whose messages fail together counts for less than its size.
    """
    estimate = sequential.proportion(arm.failures, arm.key_groups)
    if arm.failures.trials <= 0:
        return 0.0
    return (arm.failures.trials - since) * min(1.0, estimate.effective / arm.failures.trials)


def holds(rollout: Rollout, evidence: Evidence, now_ms: int, gap_ms: int) -> list[Finding]:
    """Return what keeps the rollout where it is; ``gap_ms`` is the time since it was last looked at."""
    policy = rollout.policy.holds
    found = []
    if gap_ms < 0 or gap_ms > policy.stale_s * 1_000:
        said = "the clock went back" if gap_ms < 0 else f"nobody watched for {gap_ms / 1_000:.0f} s"
        found.append(Finding("unwatched", "hold", said))
    heard = max(evidence.heard_ms, rollout.since_ms)
    if abs(now_ms - heard) > policy.stale_s * 1_000:
        found.append(
            Finding("stale", "hold", f"no worker has reported for {abs(now_ms - heard) / 1_000:.0f} s")
        )
    evidence_of_mismatch = sample_ratio(rollout, evidence)
    if evidence_of_mismatch * policy.srm_p >= 1:
        said = f"keys are not split as planned (evidence {evidence_of_mismatch:.3g} to 1)"
        found.append(Finding("sample ratio", "hold", said))
    if evidence.drift:
        found.append(Finding("drift", "hold", evidence.drift))
    if evidence.unheard and rollout.kind != "ab":
        found.append(Finding("labels", "hold", evidence.unheard))
    if lag_rises(evidence, policy.lag_windows, policy.lag_records, now_ms):
        found.append(Finding("lag", "hold", f"the lag has risen for {policy.lag_windows} minutes"))
    wrong = [digest for digest in evidence.digests if rollout.digest and digest != rollout.digest]
    if wrong:
        found.append(Finding("digest", "hold", f"a worker serves other bytes than were started: {wrong[0]}"))
    return found


def sample_ratio(rollout: Rollout, evidence: Evidence) -> float:
    """Return the evidence that keys are not split as the newest revision says; 1 where nothing is known.

    Keys of one worker are told apart by it. Where a key stays with one worker (Kafka, split by the record's
    key) all workers' counts add up; elsewhere each worker's evidence stands for itself, and the mean counts.
    """
    shares = {each.name: each.buckets for each in rollout.current.variants}
    canary, control = shares.get("canary", 0), shares.get("control", 0)
    workers = evidence.first_seen.get(max(evidence.first_seen, default=0), {})
    counts = [(each.canary, each.control) for each in workers.values() if not each.full]
    if not canary or not control or not counts:
        return 1.0
    if rollout.before.source.kind == "kafka" and rollout.before.split_by == "key":
        counts = [(sum(mine for mine, _ in counts), sum(other for _, other in counts))]
    least = rollout.policy.holds.srm_keys
    share = canary / (canary + control)
    # A planned arm that gets nothing is the worst mismatch: what is expected decides, not what came.
    enough = [each for each in counts if sum(each) * min(share, 1 - share) >= least]
    values = [sequential.srm_e_value(each, share) for each in enough] + [1.0] * (len(counts) - len(enough))
    return sum(values) / len(values)


def lag_rises(evidence: Evidence, windows: int, records: int, now_ms: int) -> bool:
    """Say whether the lag rose in each of the last whole minutes, by at least ``records`` in all."""
    known = sorted(evidence.lag)
    whole = [minute for minute in known[-windows - 2 :] if minute < now_ms // 60_000][-windows - 1 :]
    lags = [evidence.lag[minute] for minute in whole]
    rises = all(after > before for before, after in itertools.pairwise(lags))
    return len(lags) == windows + 1 and rises and lags[-1] - lags[0] >= records
