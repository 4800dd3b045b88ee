"""The figures of a drain: pure functions over what was seen."""

from __future__ import annotations

import pytest

from loadtest import subjects
from loadtest.drain import Drain, Look, steady_rates, summary


def _drain(subject: str, rate: float) -> Drain:
    return Drain(subject, 1000, rate, rate, rate * 2, 1.0, 0)


def test_the_ratio_is_the_median_over_neighbouring_runs() -> None:
    """A minute in which everything is slow moves both of a pair, not the ratio."""
    rates = [(100.0, 50.0), (10.0, 5.0), (100.0, 60.0)]
    done = [
        _drain(name, rate)
        for pair in rates
        for name, rate in zip((subjects.BARE, subjects.WORKER), pair, strict=True)
    ]

    found = summary("tiny", done)

    assert found["ratio"] == pytest.approx(0.5)
    assert found["ratio_per_cpu_s"] == pytest.approx(0.5)


def test_one_subject_alone_has_no_ratio() -> None:
    """Nothing is compared with nothing."""
    assert summary("tiny", [_drain(subjects.WORKER, 10.0)])["ratio"] is None


def test_the_steady_rate_leaves_out_both_ends() -> None:
    """Start and end of a drain are slower for reasons of their own."""
    seen = [Look(0.0, 0, 0.0), Look(5.0, 100, 1.0), Look(9.0, 900, 5.0), Look(20.0, 1000, 6.0)]

    assert steady_rates(seen, 1000) == (pytest.approx(200.0), pytest.approx(200.0))
