"""The cost line: what it learns from batches, and that it never expects nonsense."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from inferfleet.core.cost import CostLine, padding
from inferfleet.records import Requests
from tests.support.builders import chunk

_SECONDS = st.floats(0, 100, allow_nan=False)


def test_nothing_is_expected_before_anything_was_observed() -> None:
    """An unknown lane is no reason to close a batch early."""
    assert CostLine().expect(64) == 0.0


@given(st.floats(0, 1), st.floats(0, 0.1), st.lists(st.integers(1, 64), min_size=3, max_size=40))
def test_a_straight_line_is_found(intercept: float, slope: float, sizes: list[int]) -> None:
    """Exact observations of a line give the line back, at sizes never seen too."""
    assume(len(set(sizes)) > 1)
    line = CostLine()
    for rows in sizes:
        line.observed(rows, intercept + slope * rows)
    assert line.expect(100) == pytest.approx(intercept + slope * 100, rel=1e-3, abs=1e-4)


@given(st.lists(st.tuples(st.integers(1, 10_000), _SECONDS), min_size=1, max_size=60), st.integers(1, 10_000))
def test_expectations_are_never_negative_and_grow_with_rows(
    observed: list[tuple[int, float]], rows: int
) -> None:
    """Whatever noise was seen, more rows are never expected to take less time."""
    line = CostLine()
    for size, seconds in observed:
        line.observed(size, seconds)
    assert 0.0 <= line.expect(rows) <= line.expect(rows + 100) + 1e-9


@given(st.integers(1, 64), st.lists(_SECONDS, min_size=1, max_size=20))
def test_one_size_only_gives_an_average(rows: int, seconds: list[float]) -> None:
    """Without two sizes there is no slope: what was seen is what is expected."""
    line = CostLine()
    for each in seconds:
        line.observed(rows, each)
    assert min(seconds) - 1e-6 <= line.expect(rows * 2) <= max(seconds) + 1e-6


def test_it_follows_a_device_that_slowed_down() -> None:
    """A hundred slow batches outweigh a thousand quick ones."""
    line = CostLine()
    for rows in range(1, 1001):
        line.observed(rows % 64 + 1, 0.001 * (rows % 64 + 1))
    for rows in range(1, 101):
        line.observed(rows % 64 + 1, 0.01 * (rows % 64 + 1))
    assert line.expect(64) == pytest.approx(0.64, rel=0.05)


def test_padding_is_what_the_longest_request_makes_of_the_others() -> None:
    """By the sizes of the bodies; where nothing is sorted by them, nobody pads."""

    def part(costs: list[int] | None) -> Requests:
        return Requests(chunk([b""] * 2), [0, 1], ["a", "b"], {}, costs=costs)

    assert padding([part([10, 10])]) == 0
    assert padding([part([10, 30]), part([20, 40])]) == pytest.approx(1 - 100 / 160)
    assert padding([part(None)]) is None
    assert padding([part([0, 0])]) is None
