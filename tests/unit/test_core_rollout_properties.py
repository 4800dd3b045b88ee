"""What holds for every rollout, whatever comes: found by hypothesis, not by example."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.core import rollout_verbs as verbs
from inferfleet.core.rollout import Step, advance, begin, took_effect
from inferfleet.core.rollout_routes import divided, promoted, stepped
from inferfleet.core.routing import Steering, bucket
from inferfleet.evidence import Evidence, evidence_bytes, evidence_of
from inferfleet.policies import Policy, parse_policy
from inferfleet.rollouts import RefusedError, Rollout, decode_rollout, encode_rollout
from inferfleet.routes import Route
from inferfleet.variants import BUCKETS
from tests.support.rollouts import ROUTE, START, T0, compared, window

POLICY = """
bake_s = 60
step_limit_s = 1800
gate_limit_s = 1200
{more}
[shadow]
duration_s = 60
minimum_pairs = 30
[[step]]
percent = 2
dwell_s = 120
minimum = 40
[[step]]
percent = 20
dwell_s = 60
minimum = 50
"""
POLICIES = [
    parse_policy(POLICY.format(more=more), "policy.toml")
    for more in ("", "gate_before = [20, 100]", "gate_before = [100]\napprovals = 2", "control = false")
]
VERBS = ("approve-ada", "approve-bob", "resume", "pause", "promote", "abort")
MINUTES = st.tuples(st.just("minutes"), st.integers(1, 6), st.just(0))
ACTIONS = st.one_of(
    MINUTES,
    MINUTES,
    MINUTES,
    st.tuples(st.just("answer"), st.integers(0, 80), st.sampled_from([0, 0, 0, 1, 10])),
    st.tuples(st.just("look"), st.sampled_from([20, 60, 60, 60, 119]), st.just(0)),
    st.tuples(st.just("look"), st.sampled_from([60, 60, 121, 3_600, -3_600]), st.just(0)),
    st.tuples(st.just("effect"), st.just(0), st.just(0)),
    st.tuples(st.just("effect"), st.just(0), st.just(0)),
    st.tuples(st.just("drift"), st.sampled_from([0, 0, 1]), st.just(0)),
    st.tuples(st.just("verb"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("verb"), st.integers(0, len(VERBS) - 1), st.just(0)),
)
Action = tuple[str, int, int]


class Moment(NamedTuple):
    """The rollout after an action, the step if one was taken, and what had truly happened since the last."""

    rollout: Rollout
    step: Step | None
    by_hand: bool
    watched_s: float
    answered: int


class Replica:
    """One coordinator's memory of a rollout; ``forgetful`` ones keep nothing but what is stored."""

    def __init__(self, policy: Policy, forgetful: bool) -> None:
        self.forgetful = forgetful
        self.now_ms = T0
        self.evidence = Evidence()
        self.revisions = 0
        self.watched_s = 0.0
        self.answered = 0
        self.moments: list[Moment] = []
        self.rollout: Rollout
        self._keep(begin(START, ROUTE, policy, T0), by_hand=True)

    def do(self, action: Action) -> None:
        name, number, failed = action
        if name == "minutes":
            for _ in range(number):
                for each in (("effect", 0, 0), ("answer", 40, 0), ("look", 60, 0)):
                    self.do(each)
        elif name == "answer":
            self._answer(number, min(number, failed))
        elif name == "look":
            self.now_ms += number * 1_000
            self.evidence.observe(self.now_ms, 0)
            if 0 <= number <= 120 and self.rollout.effect == "none":
                self.watched_s += number
            self._keep(advance(self.rollout, self.evidence, self.now_ms), by_hand=False)
        elif name == "effect" and self.rollout.effect == "barrier":
            self.revisions += 1
            self.rollout = took_effect(self.rollout, self.revisions, self.now_ms, self.now_ms)
            self.watched_s = 0.0
            self.answered = 0
        elif name == "drift":
            self.evidence.drift = "moved" if number else ""
        elif name == "verb":
            self._ask(VERBS[number])
        if self.forgetful:
            self.rollout = decode_rollout(encode_rollout(self.rollout))
            self.evidence = evidence_of(evidence_bytes(self.evidence))

    def _answer(self, number: int, failed: int) -> None:
        versions = {each.name: each.version for each in self.rollout.current.variants}
        if self.rollout.phase == "shadow":
            made = window("candidate", "2", requests=number, revision=self.revisions)
            made.role, made.comparison = "shadow", compared(number)
            self.evidence.add(made, self.rollout)
        for name, version in versions.items():
            bad = failed if name == "canary" else 0
            made = window(name, version, requests=number, failed=bad, revision=self.revisions)
            if self.evidence.add(made, self.rollout) and name == "canary":
                self.answered += number

    def _ask(self, verb: str) -> None:
        word, _, person = verb.partition("-")
        try:
            if word == "approve":
                step = verbs.approve(self.rollout, person, self.now_ms)
            else:
                step = getattr(verbs, word)(self.rollout, "ada", "", self.now_ms)
        except RefusedError:
            return
        self._keep(step, by_hand=True)

    def _keep(self, step: Step, *, by_hand: bool) -> None:
        self.rollout = step.rollout
        self.moments.append(Moment(step.rollout, step, by_hand, self.watched_s, self.answered))


def played(policy: Policy, actions: list[Action], *, forgetful: bool = False) -> Replica:
    replica = Replica(policy, forgetful)
    for action in actions:
        replica.do(action)
    return replica


RUNS = given(policy=st.sampled_from(POLICIES), actions=st.lists(ACTIONS, min_size=8, max_size=30))
OFTEN = settings(max_examples=150, deadline=None)


def canary_buckets(rollout: Rollout) -> int:
    if rollout.phase in ("bake", "done"):
        return BUCKETS
    return sum(each.buckets for each in rollout.current.variants if each.version == rollout.to_version)


@OFTEN
@RUNS
def test_a_machine_that_is_stopped_anywhere_goes_on_the_same(policy: Policy, actions: list[Action]) -> None:
    """Whether a coordinator keeps all in memory or knows only what is stored, it takes the same steps."""
    one, two = played(policy, actions), played(policy, actions, forgetful=True)

    assert [moment.step for moment in one.moments] == [moment.step for moment in two.moments]
    assert one.rollout == two.rollout


@OFTEN
@RUNS
def test_the_end_is_the_end(policy: Policy, actions: list[Action]) -> None:
    """After an abort, or any other end, nothing changes and no route is made."""
    replica = played(policy, actions)
    ended = [index for index, moment in enumerate(replica.moments) if moment.rollout.ended]
    for index in ended[1:]:
        assert replica.moments[index].rollout == replica.moments[ended[0]].rollout
        assert replica.moments[index].step == Step(replica.moments[ended[0]].rollout)


@OFTEN
@RUNS
def test_shares_only_rise_until_the_end(policy: Policy, actions: list[Action]) -> None:
    """And a key that has met the new version stays with it."""
    replica = played(policy, actions)
    going_on = [m.rollout for m in replica.moments if m.rollout.phase not in ("aborted", "inconclusive")]
    for before, after in pairwise(going_on):
        assert canary_buckets(after) >= canary_buckets(before)
        if after.phase in ("step", "gate") and before.phase in ("step", "gate"):
            assert owned(before.current, "canary") <= owned(after.current, "canary")
            assert owned(before.current, "control") <= owned(after.current, "control")


@OFTEN
@RUNS
def test_nothing_rises_early_or_on_too_little(policy: Policy, actions: list[Action]) -> None:
    """Before each rise that no person made, the step was watched for its time and answered its minimum.

    Jumps of the clock by an hour, and absences, are among the actions; what is counted here are the looks
    that were close together, and the messages.
    """
    replica = played(policy, actions)
    for before, after in pairwise(replica.moments):
        left_step = before.rollout.phase == "step" and after.rollout.phase in ("step", "gate", "bake")
        rose = left_step and (after.rollout.step, after.rollout.phase) != (before.rollout.step, "step")
        if rose and not after.by_hand:
            plan = policy.steps[before.rollout.step]
            assert after.watched_s >= plan.dwell_s
            assert after.answered >= plan.minimum
        if after.rollout.phase == "gate" and before.rollout.phase != "gate":
            assert after.rollout.next_percent in policy.gate_before
        if before.rollout.phase == "gate" and after.rollout.phase in ("step", "bake") and not after.by_hand:
            people = {each.actor for each in after.rollout.approvals}
            assert len(people) >= policy.approvals


@OFTEN
@RUNS
def test_every_route_can_take_effect(policy: Policy, actions: list[Action]) -> None:
    """Ranges cover all buckets once; what goes back is the route before, from the first revision on."""
    for moment in played(policy, actions).moments:
        step = moment.step
        if step is None or step.route is None:
            continue
        ranges = sorted(pair for each in step.route.variants for pair in each.ranges)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == BUCKETS
        assert all(high == low for (_, high), (low, _) in pairwise(ranges))
        assert (step.effect == "barrier") == (step.effective_from_ms is None)
        if step.rollout.phase in ("aborted", "inconclusive"):
            assert step.route == ROUTE
            assert step.effect == "retroactive"
        if step.rollout.phase == "aborted" and step.rollout.first_ms is not None:
            assert step.effective_from_ms == step.rollout.first_ms


def owned(route: Route, name: str) -> set[int]:
    return {
        number
        for each in route.variants
        if each.name == name
        for low, high in each.ranges
        for number in range(low, high)
    }


PERCENTS = st.lists(st.floats(0.01, 50), min_size=1, max_size=5).map(sorted)


@settings(max_examples=50, deadline=None)
@given(percents=PERCENTS, control=st.booleans())
def test_keys_are_sticky_and_shares_exact(percents: list[float], control: bool) -> None:
    """I10: planned shares to the bucket; observed ones within 4 standard deviations; no key changes sides."""
    keys = [f"key-{number}".encode() for number in range(4_000)]
    route = ROUTE
    met: set[bytes] = set()
    compared_with: set[bytes] = set()
    for percent in percents:
        route = stepped(ROUTE, route, "2", percent, control=control)
        wanted = max(1, round(percent * 100))
        assert len(owned(route, "canary")) == wanted
        assert len(owned(route, "control")) == (min(wanted, BUCKETS - wanted) if control else 0)
        names = [each.name for each in route.variants]
        steering = Steering.over(route.salt, [each.ranges for each in route.variants])
        found = {key: names[steering.variant(key)] for key in keys}
        canary = {key for key, name in found.items() if name == "canary"}
        share = wanted / BUCKETS
        assert abs(len(canary) - 4_000 * share) <= 4 * math.sqrt(4_000 * share * (1 - share)) + 1
        assert met <= canary
        assert not canary & compared_with
        met, compared_with = canary, {key for key, name in found.items() if name == "control"}


def test_promotion_takes_the_rest_along() -> None:
    """All keys, and the variants keep their names and ranges."""
    route = promoted(ROUTE, "2", warm=True)

    assert [each.ranges for each in route.variants] == [each.ranges for each in ROUTE.variants]
    assert {each.version for each in route.variants} == {"2"}
    assert route.warm == ("1",)
    assert promoted(route, "3", warm=False).warm == ("1",), "what was warm before the rollout stays so"


def test_an_ab_test_divides_everything() -> None:
    """Two arms and no rest; the key decides alone."""
    route = divided(ROUTE, ROUTE, "2", canary=3_000, control=7_000)

    assert [(each.name, each.version, each.buckets) for each in route.variants] == [
        ("control", "1", 7_000),
        ("canary", "2", 3_000),
    ]
    assert route.variant_at(bucket(route.salt, b"a")).name in ("control", "canary")
