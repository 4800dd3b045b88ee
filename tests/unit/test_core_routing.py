"""Routing: the published formula, honest shares, and variants that keep their keys."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.routing import BUCKETS, Steering, bucket

_SALT = "inferfleet/digits"
_UPPERS = st.sets(st.integers(1, BUCKETS - 1), max_size=5).map(lambda cuts: [*sorted(cuts), BUCKETS])
_KEYS = st.lists(st.binary(max_size=40), max_size=50)


@given(_UPPERS, _KEYS)
def test_split_agrees_with_the_single_decision_and_with_the_formula(
    uppers: list[int], keys: list[bytes]
) -> None:
    """Every key is in exactly one part: that of the range its bucket falls into."""
    steering = Steering(_SALT, uppers)
    parts = steering.split(keys)
    assert sorted(index for part in parts for index in part) == list(range(len(keys)))
    lows = [0, *uppers[:-1]]
    for variant, part in enumerate(parts):
        assert part == sorted(part)
        for index in part:
            assert steering.variant(keys[index]) == variant
            assert lows[variant] <= bucket(_SALT, keys[index]) < uppers[variant]


@given(st.text(max_size=20), st.binary(max_size=300))
def test_a_bucket_is_always_one_of_ten_thousand(salt: str, key: bytes) -> None:
    """The hash is scaled, never cut."""
    assert 0 <= bucket(salt, key) < BUCKETS


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.95, 0.05], [0.99, 0.01], [0.2, 0.3, 0.5]])
def test_shares_are_kept_within_four_standard_deviations(shares: list[float]) -> None:
    """Sequential keys, the worst that clients send, spread like random ones."""
    count = 40_000
    uppers = [round(upper * BUCKETS) for upper in accumulate(shares)]
    parts = Steering(_SALT, uppers).split([b"order-%d" % i for i in range(count)])
    for share, part in zip(shares, parts, strict=True):
        assert abs(len(part) - share * count) <= 4 * math.sqrt(count * share * (1 - share))


@given(st.integers(1, BUCKETS - 2), st.integers(1, BUCKETS - 1), _KEYS)
def test_widening_moves_only_the_keys_it_must(low: int, more: int, keys: list[bytes]) -> None:
    """A key that has seen the widened variant stays with it; the rest moves only inside the added range."""
    high = min(low + more, BUCKETS - 1)
    before, after = Steering(_SALT, [low, BUCKETS]), Steering(_SALT, [high, BUCKETS])
    for key in keys:
        if before.variant(key) == 0:
            assert after.variant(key) == 0
        elif after.variant(key) == 0:
            assert low <= bucket(_SALT, key) < high


def test_another_salt_is_another_draw() -> None:
    """Two routes do not put the same keys into their canaries."""
    keys = [b"%d" % i for i in range(10_000)]
    one = set(Steering("fleet/one", [1_000, BUCKETS]).split(keys)[0])
    two = set(Steering("fleet/two", [1_000, BUCKETS]).split(keys)[0])
    assert abs(len(one & two) - 100) <= 4 * math.sqrt(100)


@pytest.mark.parametrize(
    "uppers", [[], [5_000], [0, BUCKETS], [5_000, 5_000, BUCKETS], [7_000, 5_000, BUCKETS]]
)
def test_ranges_that_do_not_cover_all_buckets_once_are_refused(uppers: list[int]) -> None:
    """A gap or an overlap would leave keys without an answer, or with two."""
    with pytest.raises(ValueError, match="must ascend and end at 10000"):
        Steering(_SALT, uppers)
