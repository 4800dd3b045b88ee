"""Evidence: windows sorted into arms, and sums that are the same in any order and grouping."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.evidence import (
    KEPT_CRASHES,
    KEPT_MINUTES,
    Evidence,
    arm_of,
    evidence_bytes,
    evidence_of,
    joined,
)
from inferfleet.rollouts import Rollout, replace
from inferfleet.summaries import Clustered, Comparison, Example, Histogram, Window
from tests.support.rollouts import Desk, compared, window


def a_rollout(first: int = 3, promoted: int = 0) -> Rollout:
    return replace(Desk().rollout, first_revision=first, promoted_revision=promoted)


def some_windows(seed: int) -> list[Window]:
    """Return windows of every arm, with whole numbers only, so that sums are exact."""
    rng = random.Random(seed)
    return [_some_window(rng) for _ in range(rng.randint(0, 6))]


def _some_window(rng: random.Random) -> Window:
    def count() -> int:
        return rng.randint(0, 50)

    trials = count()
    made = Window(
        worker=rng.choice(["w-1", "w-2"]),
        route="digits",
        model="digits",
        version=rng.choice(["1", "2"]),
        variant=rng.choice(["stable", "control", "canary"]),
        role=rng.choice(["primary", "primary", "shadow"]),
        revision=rng.randint(2, 8),
        start_ms=rng.randint(0, 100) * 60_000,
        end_ms=rng.randint(0, 100) * 60_000,
        requests=trials,
        rows=trials,
        dead_letters=count(),
        invalid=count(),
        compute_s=float(count()),
        first_seen=count(),
        first_seen_full=rng.random() < 0.2,
        seen=count(),
        shed=count(),
        crash=rng.random() < 0.3,
        key_groups={rng.randint(0, 5): (count(), count())},
        failures=Clustered(1, trials, count(), trials * trials, count(), count()),
        compute=Histogram(count(), {rng.randint(-9, 9): count()}, float(count())),
    )
    if rng.random() < 0.5:
        examples = [Example(str(count()), float(count()), "a", "b")]
        flips = {"a>b": count()}
        made.comparison = Comparison(kind="labels", pairs=count(), flips=flips, examples=examples)
    return made


def gathered(found: list[Window], rollout: Rollout) -> Evidence:
    evidence = Evidence()
    for each in found:
        evidence.add(each, rollout)
    evidence.observe(len(found) * 1_000, len(found))
    for index, each in enumerate(found):
        evidence.label("canary", "clicked", float(each.requests), index % 7)
    return evidence


def merged(*parts: Evidence) -> str:
    """Return the sum as text, with its maps in order."""
    total = Evidence()
    for part in parts:
        total.merge(evidence_of(evidence_bytes(part)))
    return json.dumps(msgspec.to_builtins(total, str_keys=True), sort_keys=True)


PARTS = st.integers(0, 2**32).map(some_windows)


@given(PARTS, PARTS, PARTS)
def test_merging_is_associative_and_commutative(a: list[Window], b: list[Window], c: list[Window]) -> None:
    """Whoever adds up, in whatever order and grouping, has the same."""
    rollout = a_rollout()
    one, two, three = (gathered(each, rollout) for each in (a, b, c))
    wanted = merged(one, two, three)
    right = evidence_of(evidence_bytes(two))
    right.merge(three)
    left = evidence_of(evidence_bytes(one))
    left.merge(two)

    assert merged(three, one, two) == wanted
    assert merged(two, three, one) == wanted
    assert merged(one, right) == wanted
    assert merged(left, three) == wanted


@given(PARTS, st.integers())
def test_windows_may_come_in_any_order(found: list[Window], seed: int) -> None:
    """A coordinator that reads the stream later has the same sums."""
    rollout = a_rollout()
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    one, two = Evidence(), Evidence()
    for each in found:
        one.add(each, rollout)
    for each in shuffled:
        two.add(each, rollout)

    assert merged(one) == merged(two)


@given(PARTS)
def test_what_is_stored_is_read_again(found: list[Window]) -> None:
    """Evidence survives its way through the store."""
    evidence = gathered(found, a_rollout())

    assert evidence_of(evidence_bytes(evidence)) == evidence


@given(PARTS)
def test_adding_leaves_windows_as_they_are(found: list[Window]) -> None:
    """A window that is added twice over, to two sums, counts the same in both."""
    before = msgspec.json.encode(found)
    gathered(found, a_rollout())
    gathered(found, a_rollout())

    assert msgspec.json.encode(found) == before


@pytest.mark.parametrize(
    ("variant", "version", "role", "revision", "arm"),
    [
        ("stable", "1", "primary", 3, "stable"),
        ("control", "1", "primary", 3, "control"),
        ("canary", "2", "primary", 3, "canary"),
        ("stable", "2", "primary", 8, "canary"),
        ("stable", "2", "primary", 9, "baked"),
        ("candidate", "2", "shadow", 3, "shadow"),
        ("old", "1", "shadow", 3, None),
        ("canary", "2", "primary", 2, None),
        ("canary", "7", "primary", 3, None),
    ],
)
def test_arms(variant: str, version: str, role: str, revision: int, arm: str | None) -> None:
    """The version and the revision say the arm; what was before the rollout is in none."""
    made = window(variant, version, requests=1, revision=revision)
    made.role = role

    assert arm_of(made, a_rollout(first=3, promoted=9)) == arm
    assert Evidence().add(made, a_rollout(first=3, promoted=9)) == (arm is not None)


def test_other_routes_and_models_are_not_meant() -> None:
    """Nor is anything before the first revision is in force."""
    made = window("canary", "2", requests=1)

    assert arm_of(made, replace(a_rollout(1), route="other")) is None
    assert arm_of(made, replace(a_rollout(1), model="other")) is None
    assert arm_of(made, a_rollout(0)) is None


def test_what_grows_with_time_is_bounded() -> None:
    """Minutes, lags, revisions and crashes: the newest are kept."""
    evidence, rollout = Evidence(), a_rollout()
    for index in range(300):
        made = window("canary", "2", requests=1, revision=3 + index, at_ms=index * 60_000)
        made.crash = True
        evidence.add(made, rollout)
        evidence.observe(index * 60_000, index)

    assert sorted(evidence.minutes) == list(range(300 - KEPT_MINUTES, 300))
    assert sorted(evidence.lag) == list(range(300 - KEPT_MINUTES, 300))
    assert sorted(evidence.first_seen) == [301, 302]
    assert len(evidence.crashes) == KEPT_CRASHES
    assert evidence.arm("canary").requests == 300
    assert evidence.heard_ms == 299 * 60_000


def test_a_crash_counts_once_for_a_life() -> None:
    """Two windows of one start are one crash; a crash of the old version alone is none of the rollout's."""
    evidence, rollout = Evidence(), a_rollout(1)
    for variant, version in (("canary", "2"), ("stable", "1"), ("stable", "2")):
        made = window(variant, version, requests=0)
        made.crash = True
        evidence.add(made, rollout)

    assert len(evidence.crashes) == 1


def test_comparisons_add_up_and_keep_the_worst_examples() -> None:
    """Counts and maps are summed, nothing of the parts is changed."""
    first, second = compared(10, 1), compared(20, 3)
    first.examples = [Example("a", 0.1, "x", "y")]
    second.examples = [Example(str(each), each, "x", "y") for each in range(30)]
    total = joined(first, second)

    assert total is not None
    assert (total.pairs, total.label_changes, total.flips, total.agreed) == (30, 4, {"a>b": 4}, {"a": 26})
    assert [each.distance for each in total.examples] == list(range(29, 9, -1))
    assert (first.pairs, joined(None, None)) == (10, None)
    assert joined(None, second) == second
