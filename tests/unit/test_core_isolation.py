"""Isolation: who is condemned, in which order spans run, and what that costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.isolation import Isolation, Span


def _isolate(
    count: int, bad: set[int], passing: set[int] | None = None
) -> tuple[list[int], list[Span], list[int]]:
    """Run to the end; ``passing`` requests fail their first try alone only.

    Returns the answered requests, every span that ran, and the condemned ones.
    """
    passing = set(passing or ())
    isolation = Isolation(count)
    answered: list[int] = []
    ran: list[Span] = []
    while (span := isolation.next_span()) is not None:
        ran.append(span)
        members = set(range(*span))
        if members & bad or members & passing:
            if len(members) == 1:
                passing -= members
            isolation.failed(span)
        else:
            answered.extend(range(*span))
    return answered, ran, isolation.condemned


_BATCHES = st.integers(1, 200).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1)))
)


@given(_BATCHES)
def test_every_request_is_answered_or_condemned_exactly_once(batch: tuple[int, set[int]]) -> None:
    """Only the bad are condemned, only the good are answered, and nobody is forgotten."""
    count, bad = batch
    answered, _, condemned = _isolate(count, bad)
    assert sorted(answered + condemned) == list(range(count))
    assert set(condemned) == bad


@given(_BATCHES)
def test_spans_end_left_to_right(batch: tuple[int, set[int]]) -> None:
    """Answers come in the order of the batch, and so do the condemned."""
    count, bad = batch
    answered, _, condemned = _isolate(count, bad)
    assert answered == sorted(answered)
    assert condemned == sorted(condemned)


@given(_BATCHES)
def test_k_bad_of_n_cost_k_log_n_runs(batch: tuple[int, set[int]]) -> None:
    """Each bad request fails one span a level, each with one neighbour beside it, and runs twice alone."""
    count, bad = batch
    _, ran, _ = _isolate(count, bad)
    levels = math.ceil(math.log2(count)) if count > 1 else 0
    assert len(ran) <= 2 + len(bad) * (2 * levels + 1)


@given(_BATCHES)
def test_a_passing_fault_condemns_nobody(batch: tuple[int, set[int]]) -> None:
    """A request that fails alone once and then succeeds is answered."""
    count, faults = batch
    if count == 1:
        faults = set()  # a batch of one had its first try before isolation began
    answered, _, condemned = _isolate(count, set(), faults)
    assert answered == list(range(count))
    assert condemned == []


def test_a_batch_of_one_has_one_more_try() -> None:
    """Its failing run was its first try alone, so two tries alike condemn it."""
    assert _isolate(1, {0}) == ([], [Span(0, 1)], [0])


def test_an_empty_batch_is_refused() -> None:
    """There is nothing to isolate in a batch without requests."""
    with pytest.raises(ValueError, match="0 requests"):
        Isolation(0)


def test_it_shows_what_is_left() -> None:
    """Its representation names the spans and the condemned."""
    assert repr(Isolation(2)) == "Isolation(todo=[Span(low=1, high=2), Span(low=0, high=1)], condemned=[])"
