"""From shares to ranges: whatever changes, no bucket moves that need not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.core.ranges import moved, replan
from inferfleet.core.routing import BUCKETS, Steering, bucket
from inferfleet.variants import Ranges, bucket_counts

NAMES = ("stable", "control", "canary", "other")


@st.composite
def counts(draw: st.DrawFn) -> dict[str, int]:
    """Some of the names, and how many buckets each is to own."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    weights = [draw(st.integers(1, 1_000)) for _ in names]
    return dict(zip(names, bucket_counts(weights), strict=True))


def _buckets(ranges: Ranges) -> set[int]:
    return {each for low, high in ranges for each in range(low, high)}


@settings(max_examples=25, deadline=None)
@given(st.lists(counts(), min_size=1, max_size=4))
def test_shares_are_met_and_the_fewest_buckets_move(plans: list[dict[str, int]]) -> None:
    """Over any number of changes: what moves is what the shrinking ones lose, and growing ones keep all."""
    standing: dict[str, Ranges] = {}
    for wanted in plans:
        after = replan(standing, wanted)
        owned = {name: _buckets(ranges) for name, ranges in after.items()}
        assert {name: len(own) for name, own in owned.items()} == wanted
        assert sum(len(own) for own in owned.values()) == len(set().union(*owned.values())) == BUCKETS
        for ranges in after.values():
            assert all(low < high for low, high in ranges)
            assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        if standing:
            lost = sum(
                max(0, len(_buckets(ranges)) - wanted.get(name, 0)) for name, ranges in standing.items()
            )
            assert moved(standing, after) == lost
        for name, ranges in standing.items():
            before = _buckets(ranges)
            if wanted.get(name, 0) >= len(before):
                assert before <= owned[name]
            else:
                assert owned.get(name, set()) <= before
        standing = after


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4_000), min_size=1, max_size=5), st.lists(st.binary(), max_size=40))
def test_a_growing_canary_keeps_its_keys(steps: list[int], keys: list[bytes]) -> None:
    """Beside a control slice of its size; only keys that were neither's may come."""
    names = ("stable", "control", "canary")
    standing: dict[str, Ranges] = {"stable": ((0, BUCKETS),)}
    before: dict[bytes, str] = {}
    for size in sorted(steps):
        standing = replan(standing, {"stable": BUCKETS - 2 * size, "control": size, "canary": size})
        steering = Steering.over("salt", [standing[name] for name in names])
        after = {key: names[steering.variant(key)] for key in keys}
        for key, name in before.items():
            assert after[key] == name or name == "stable"
        before = after


def test_a_bucket_is_steered_to_its_owner() -> None:
    """Ranges that are not one block are read like any other."""
    standing = replan({"a": ((0, BUCKETS),)}, {"a": 6_000, "b": 4_000})
    standing = replan(standing, {"a": 3_000, "b": 5_000, "c": 2_000})
    assert len(standing["b"]) == 2
    steering = Steering.over("s", list(standing.values()))
    for number in range(500):
        key = b"%d" % number
        owner = list(standing)[steering.variant(key)]
        assert any(low <= bucket("s", key) < high for low, high in standing[owner])


@pytest.mark.parametrize("wanted", [{"a": 9_999}, {"a": 10_001}, {"a": -1, "b": 10_001}])
def test_shares_that_do_not_sum_to_all_are_refused(wanted: dict[str, int]) -> None:
    """A bucket would have no owner, or two."""
    with pytest.raises(ValueError, match="shares must sum to 10000"):
        replan({}, wanted)
