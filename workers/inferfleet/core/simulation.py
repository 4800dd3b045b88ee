"""Rollouts in virtual time: how often a policy stops a good version, and how often it lets a bad one through.

What is simulated are the sums that workers would report, minute by minute and arm by arm; what is decided on
them is decided by the machine itself (:mod:`inferfleet.core.rollout`). Messages come in batches. A share of
the failures takes whole batches, and where keys repeat the others belong to keys, which fail always or never:
both are what makes messages less independent than they look. Where keys do not repeat, groups of keys are
left out: their variance could only make the machine more careful.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from inferfleet.core import comparing, rollout_verbs
from inferfleet.core.comparing import Interval
from inferfleet.core.rollout import Start, Step, advance, begin, took_effect
from inferfleet.core.routing import KEY_GROUPS
from inferfleet.evidence import CANARY, CONTROL, Arm, Evidence, FirstSeen
from inferfleet.policies import Policy
from inferfleet.records import Array
from inferfleet.rollouts import Rollout
from inferfleet.routes import Route
from inferfleet.summaries import SCALE, Comparison
from inferfleet.variants import BUCKETS

START_MS = 1_800_000_000_000
LOOK_S = 60.0
QUIET_LOOK_S = 120.0
"""How far apart looks are where nothing new is exposed: as far as may be without losing time."""
SPREAD = 0.3
"""Standard deviation of the logarithm of spans."""
COMPUTE_S, LATENCY_S = 0.01, 0.05
CHUNK = 10
ROLLOUT_S = 9_000


class Scenario(NamedTuple):
    """What happens on the route: messages a second, and what the old and the new version do with them.

    ``error_rate`` is the old version's, ``regression`` the new one's; ``slow`` is the new one's model time
    over the old one's. ``batch_errors`` is the share of failures that take whole batches.
    ``repeat_keys`` is how many messages a key has over a rollout; above 1 the other failures belong to keys.
    ``approve`` lets people approve each gate at once; else nobody does.
    """

    rate: float = 200.0
    error_rate: float = 0.01
    regression: float | None = None
    slow: float = 1.0
    batch_size: int = 8
    batch_errors: float = 0.0
    repeat_keys: float = 1.0
    approve: bool = False

    def errors(self, arm: str) -> float:
        """Return the share of an arm's messages that fail."""
        bad = arm == CANARY and self.regression is not None
        return self.regression if bad and self.regression is not None else self.error_rate


class Outcome(NamedTuple):
    """How one rollout ended: spans since it began and since the new version first answered, and what it met.

    ``answered`` counts messages that the new version answered before the decision, ``failed`` its failures.
    """

    phase: str
    reason: str
    seconds: float
    exposed_s: float
    answered: int
    failed: int
    holds: int


class Ticks(NamedTuple):
    """What an arm does in some looks: sums of clusters, spans by bucket, sums by group of keys."""

    sums: Array
    compute: Array
    latency: Array
    trials: Array | None
    events: Array | None


class Traffic:
    """The messages of one arm of one rollout; it fills the arm's sums look by look."""

    def __init__(self, scenario: Scenario, name: str, rng: np.random.Generator) -> None:
        self.scenario, self.name, self.rng = scenario, name, rng
        self.arm = Arm()
        self.first, self.compute_p = _spans(COMPUTE_S * (scenario.slow if name == CANARY else 1.0))
        self.latency_first, self.latency_p = _spans(LATENCY_S)
        self.middles = 2.0 ** ((self.first + np.arange(len(self.compute_p)) - 0.5) / SCALE)
        self.total = np.zeros(6)
        self.totals = [np.zeros(len(each), dtype=np.int64) for each in (self.compute_p, self.latency_p)]
        self.groups = np.zeros((2, KEY_GROUPS))
        self.keys = np.zeros((2, KEY_GROUPS))
        self.share = 0.0
        self._ticks: Ticks | None = None
        self._at = 0

    def expose(self, share: float) -> None:
        """Let the arm have this share of the messages from now on; more share means more keys."""
        added = max(0.0, share - self.share)
        if self.scenario.repeat_keys > 1 and added:
            count = max(1_000.0, self.scenario.rate * ROLLOUT_S / self.scenario.repeat_keys)
            fresh = self.rng.poisson(count * added / KEY_GROUPS, KEY_GROUPS)
            self.keys[0] += fresh
            self.keys[1] += self.rng.binomial(fresh, self._single())
        self.share = share
        self._ticks = None

    def _single(self) -> float:
        """Return the chance of a failure that does not take its batch along."""
        whole = self.scenario.errors(self.name) * self.scenario.batch_errors
        return min(
            1.0, self.scenario.errors(self.name) * (1 - self.scenario.batch_errors) / max(1e-12, 1 - whole)
        )

    def tick(self, look_s: float) -> None:
        """Let the next look's messages come."""
        if self._ticks is None or self._at >= CHUNK:
            self._ticks, self._at = self._make(look_s), 0
        ticks, at = self._ticks, self._at
        self._at += 1
        self.total += ticks.sums[at]
        self.totals[0] += ticks.compute[at]
        self.totals[1] += ticks.latency[at]
        if ticks.trials is not None and ticks.events is not None:
            self.groups[0] += ticks.trials[at]
            self.groups[1] += ticks.events[at]
        self._fill(ticks, at)

    def _fill(self, ticks: Ticks, at: int) -> None:
        arm, failures = self.arm, self.arm.failures
        clusters, trials, events, trials_2, events_2, product = self.total.tolist()
        failures.clusters, failures.trials, failures.events = int(clusters), trials, events
        failures.trials_2, failures.events_2, failures.product = trials_2, events_2, product
        arm.requests, arm.dead_letters = int(trials), int(events)
        arm.compute.buckets = dict(enumerate(self.totals[0].tolist(), self.first))
        arm.latency.buckets = dict(enumerate(self.totals[1].tolist(), self.latency_first))
        if self.scenario.repeat_keys > 1:
            pairs = zip(self.groups[0].tolist(), self.groups[1].tolist(), strict=True)
            arm.key_groups = dict(enumerate(pairs))
        requests, failed = float(ticks.sums[at][1]), float(ticks.sums[at][2])
        if requests:
            arm.letters.add(requests, failed)
            arm.cost.add(requests, float(ticks.compute[at] @ self.middles))

    def _make(self, look_s: float) -> Ticks:
        """Return the next looks' messages: batches of one size, so that sums of squares follow."""
        rng, size = self.rng, self.scenario.batch_size
        batches = rng.poisson(self.scenario.rate * self.share * look_s / size, CHUNK)
        whole = rng.binomial(batches, self.scenario.errors(self.name) * self.scenario.batch_errors)
        trials = by_group = None
        if self.scenario.repeat_keys > 1:
            trials = _spread(rng, batches * size)
            mine = rng.binomial(trials, np.minimum(1, self.keys[1] / np.maximum(1, self.keys[0])))
            by_group = np.minimum(trials, mine + _spread(rng, whole * size))
            single = np.minimum(mine.sum(axis=1), (batches - whole) * size)
        else:
            single = rng.binomial((batches - whole) * size, self._single())
        squares, events = self._in_batches(batches - whole, single)
        events = events + whole * size
        squares = squares + whole * size * size
        sums = np.stack(
            [batches, batches * size, events, batches * size * size, squares, events * size], axis=1
        )
        compute = rng.multinomial(batches, self.compute_p) * size
        latency = rng.multinomial(batches, self.latency_p) * size
        return Ticks(sums.astype(float), compute, latency, trials, by_group)

    def _in_batches(self, batches: Array, single: Array) -> tuple[Array, Array]:
        """Return the sum of squares and the sum of single failures by batch, drawn slot by slot."""
        squares = np.zeros(CHUNK)
        events = np.zeros(CHUNK)
        for index, (count, failed) in enumerate(zip(batches.tolist(), single.tolist(), strict=True)):
            if count and failed:
                slots = self.rng.choice(
                    count * self.scenario.batch_size, failed, replace=False, shuffle=False
                )
                each = np.bincount(slots // self.scenario.batch_size)
                squares[index], events[index] = float(each @ each), failed
        return squares, events


def _spread(rng: np.random.Generator, counts: Array) -> Array:
    return rng.multinomial(counts, np.full(KEY_GROUPS, 1 / KEY_GROUPS))


def _spans(median: float) -> tuple[int, Array]:
    """Return the first bucket and the chances of the buckets of log-normal spans."""
    middle = np.log2(median) * SCALE
    width = SPREAD / np.log(2) * SCALE
    first = int(np.floor(middle - 3.5 * width))
    buckets = np.arange(first, int(np.ceil(middle + 3.5 * width)) + 1)
    density = np.exp(-(((buckets - middle) / width) ** 2) / 2)
    return first, density / density.sum()


class World:
    """One rollout: its route, its clock, its two arms, and nobody but the machine to decide."""

    def __init__(self, policy: Policy, scenario: Scenario, route: Route, rng: np.random.Generator) -> None:
        self.scenario, self.rng = scenario, rng
        self.now_ms = START_MS
        self.evidence = Evidence()
        self.arms = {name: Traffic(scenario, name, rng) for name in (CANARY, CONTROL)}
        self.revisions = 0
        self.exposed_ms: int | None = None
        self.holds = 0
        self.rollout: Rollout
        self._take(begin(Start("simulated", "2", "", "simulation"), route, policy, self.now_ms))

    def run(self) -> Outcome:
        """Let time pass until the rollout has ended."""
        while not self.rollout.ended:
            self._look()
        canary = self.evidence.arm(CANARY)
        exposed = self.now_ms - (self.now_ms if self.exposed_ms is None else self.exposed_ms)
        return Outcome(
            phase=self.rollout.phase,
            reason=self.rollout.outcome,
            seconds=(self.now_ms - START_MS) / 1_000,
            exposed_s=exposed / 1_000,
            answered=canary.requests,
            failed=int(canary.failures.events),
            holds=self.holds,
        )

    def _look(self) -> None:
        look_s = LOOK_S if self.rollout.phase == "step" else QUIET_LOOK_S
        self.now_ms += int(look_s * 1_000)
        self.bring(look_s)
        self.evidence.observe(self.now_ms, 0)
        before = self.rollout.hold_count
        self._take(advance(self.rollout, self.evidence, self.now_ms))
        self.holds += max(0, self.rollout.hold_count - before)
        if self.scenario.approve and self.rollout.phase == "gate":
            for person in range(self.rollout.policy.approvals):
                self._take(rollout_verbs.approve(self.rollout, f"person {person}", self.now_ms))

    def bring(self, look_s: float) -> None:
        """Let the messages of one look come, and be answered by the arms that the phase has."""
        if self.rollout.phase == "shadow":
            self._compare(look_s)
        elif self.rollout.phase == "bake":
            self._bake(look_s)
        else:
            for name, traffic in self.arms.items():
                traffic.tick(look_s)
                self._count_keys(name, traffic, look_s)

    def _compare(self, look_s: float) -> None:
        """Let the shadow answer alike; what its answers may differ by is another question."""
        pairs = int(self.rng.poisson(self.scenario.rate * self.rollout.policy.shadow.sample * look_s))
        known = self.evidence.comparison or Comparison(kind="labels")
        known.pairs += pairs
        known.identical += pairs
        self.evidence.comparison = known

    def _bake(self, look_s: float) -> None:
        baked = self.evidence.arms.setdefault("baked", Arm())
        size = self.scenario.batch_size
        batches = int(self.rng.poisson(self.scenario.rate * look_s / size))
        errors = self.scenario.errors(CANARY)
        whole = self.rng.binomial(1, errors * self.scenario.batch_errors, batches) * size
        each = np.maximum(whole, self.rng.binomial(size, errors * (1 - self.scenario.batch_errors), batches))
        failed, squares = float(each.sum()), float(each @ each)
        baked.failures.clusters += batches
        baked.failures.trials += batches * size
        baked.failures.events += failed
        baked.failures.trials_2 += batches * size * size
        baked.failures.events_2 += squares
        baked.failures.product += failed * size
        baked.requests += batches * size
        if batches:
            baked.letters.add(batches * size, failed)

    def _count_keys(self, name: str, traffic: Traffic, look_s: float) -> None:
        seen = self.evidence.first_seen.setdefault(self.revisions, {}).setdefault("w", FirstSeen())
        fresh = int(self.rng.poisson(self.scenario.rate * traffic.share * look_s / self.scenario.repeat_keys))
        if name == CANARY:
            seen.canary += fresh
        else:
            seen.control += fresh

    def _take(self, step: Step) -> None:
        self.rollout = step.rollout
        if step.route is None:
            return
        self.revisions += 1
        at_ms = self.now_ms if step.effective_from_ms is None else step.effective_from_ms
        self.rollout = took_effect(step.rollout, self.revisions, at_ms, self.now_ms)
        shares = {each.name: each.buckets / BUCKETS for each in step.route.variants}
        if CANARY in shares:
            self.exposed_ms = self.now_ms if self.exposed_ms is None else self.exposed_ms
            for name, traffic in self.arms.items():
                traffic.expose(shares.get(name, 0.0))
                if traffic.share:
                    self.evidence.arms[name] = traffic.arm


class Summary(NamedTuple):
    """What many rollouts came to; intervals are Wilson's at 95 %, spans are in seconds."""

    rollouts: int
    aborted: Interval
    promoted: Interval
    inconclusive: Interval
    seconds: tuple[float, float]
    exposed_s: tuple[float, float]
    answered: tuple[float, float]
    failed: tuple[float, float]
    reasons: dict[str, int]
    held: int


def simulate(policy: Policy, scenario: Scenario, route: Route, rollouts: int, seed: int) -> list[Outcome]:
    """Return how each of ``rollouts`` ended; the same seed gives the same."""
    return [
        World(policy, scenario, route, np.random.default_rng([seed, number])).run()
        for number in range(rollouts)
    ]


def summary(outcomes: list[Outcome]) -> Summary:
    """Return shares with intervals, and medians with 90th percentiles, of at least one outcome."""
    count = len(outcomes)
    phases = [each.phase for each in outcomes]
    reasons: dict[str, int] = {}
    for each in outcomes:
        word = f"{each.phase}: {each.reason.partition(':')[0]}" if each.phase == "aborted" else each.phase
        reasons[word] = reasons.get(word, 0) + 1

    def share(phase: str) -> Interval:
        return comparing.wilson(phases.count(phase), count)

    def spread(key: str) -> tuple[float, float]:
        values = [getattr(each, key) for each in outcomes]
        return float(np.median(values)), float(np.quantile(values, 0.9))

    return Summary(
        rollouts=count,
        aborted=share("aborted"),
        promoted=share("done"),
        inconclusive=share("inconclusive"),
        seconds=spread("seconds"),
        exposed_s=spread("exposed_s"),
        answered=spread("answered"),
        failed=spread("failed"),
        reasons=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        held=sum(each.holds > 0 for each in outcomes),
    )
