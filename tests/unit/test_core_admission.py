"""Admission: bounds hold, shares are sure, and taking does not flap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.admission import RESUME_SHARE, Admission

ROUTES = ("a", "b", "c")


def test_taking_stops_at_a_bound_and_resumes_well_below_it() -> None:
    """Between the bound and three quarters of it, what was decided last stands."""
    admission = Admission(["a"], 100, 1_000_000)
    admission.took("a", 99, 10)
    assert admission.may_take("a")
    admission.took("a", 1, 10)
    assert admission.full
    assert not admission.may_take("a")
    admission.freed("a", 25, 0)
    assert not admission.may_take("a")
    admission.freed("a", 1, 0)
    assert not admission.full
    assert admission.may_take("a")


def test_bytes_are_a_bound_of_their_own() -> None:
    """A few huge records stop taking as many small ones do."""
    admission = Admission(["a"], 100, 1_000)
    admission.took("a", 1, 1_000)
    assert not admission.may_take("a")
    admission.freed("a", 1, 1_000)
    assert admission.may_take("a")


def test_a_route_below_its_share_may_take_from_a_full_worker() -> None:
    """One busy route cannot starve another: idle shares are lent, not given away."""
    admission = Admission(["a", "b"], 100, 1_000)
    admission.took("a", 100, 0)
    assert not admission.may_take("a")
    assert admission.may_take("b")
    admission.took("b", 38, 0)
    assert not admission.may_take("b")


def test_a_take_may_always_bring_something() -> None:
    """Room is what is left, and never nothing: a take of zero records would be no take."""
    admission = Admission(["a", "b"], 100, 1_000)
    assert admission.room() == (100, 1_000)
    admission.took("a", 150, 2_000)
    admission.took("b", 38, 375)
    assert admission.room() == (1, 1)


def test_a_full_worker_takes_in_chunks_for_a_route_below_its_share() -> None:
    """A route whose neighbour fills the worker goes on at its pace, not record by record."""
    admission = Admission(["a", "b", "c"], 1_200, 12_000)
    admission.took("a", 1_500, 12_500)
    assert admission.room() == (300, 3_000)
    admission.took("b", 100, 2_000)
    assert admission.room() == (200, 1_000)


def test_routes_come_and_go_while_their_rows_are_held() -> None:
    """A removed route's rows stay counted until they end; any iterable of names will do."""
    admission = Admission(["a", "b"], 100, 1_000)
    admission.took("a", 100, 6)
    admission.routes(name for name in ("b", "c"))
    assert admission.held("a") == (100, 6)
    assert admission.may_take("c"), "a share is sure, also of a worker that is full"
    assert admission.held("c") == (0, 0)
    admission.freed("a", 100, 6)
    admission.routes(["b", "c"])
    assert (admission.rows, admission.bytes) == (0, 0)
    admission.took("b", 100, 0)
    assert admission.may_take("c")
    admission.took("c", 37, 0)
    assert admission.may_take("c"), "two routes share now, not three"
    assert repr(admission) == "Admission(rows=137/100, bytes=0/1000)"


_TAKES = st.lists(
    st.tuples(st.sampled_from(ROUTES), st.integers(1, 60), st.integers(0, 400), st.booleans()), max_size=80
)


@given(_TAKES, st.sampled_from([1, 2, 3]))
def test_a_workers_total_stays_below_twice_its_bound(
    steps: list[tuple[str, int, int, bool]], routes: int
) -> None:
    """A bound plus what the other routes are sure of; with one route, the bound plus one chunk."""
    max_rows, max_bytes = 200, 2_000
    admission = Admission(ROUTES[:routes], max_rows, max_bytes)
    held: list[tuple[str, int, int]] = []
    for route, rows, size_bytes, free in steps:
        if free and held:
            admission.freed(*held.pop(0))
        elif route in ROUTES[:routes] and admission.may_take(route):
            room, _ = admission.room()
            take = (route, min(rows, room), size_bytes)
            admission.took(*take)
            held.append(take)
        assert admission.rows == sum(rows for _, rows, _ in held)
        assert admission.bytes == sum(size for *_, size in held)
        assert admission.rows <= max_rows * (1 if routes == 1 else 2)
        assert admission.bytes <= max_bytes * (1 if routes == 1 else 2) + 400


@given(_TAKES)
def test_stopping_and_resuming_alternate_with_a_gap(steps: list[tuple[str, int, int, bool]]) -> None:
    """Each change to full happens at a bound, each change back below three quarters of both."""
    admission = Admission(["a"], 200, 2_000)
    held: list[tuple[str, int, int]] = []
    for _, rows, size_bytes, free in steps:
        before = admission.full
        if free and held:
            admission.freed(*held.pop(0))
        else:
            admission.took("a", rows, size_bytes)
            held.append(("a", rows, size_bytes))
        if admission.full and not before:
            assert admission.rows >= 200 or admission.bytes >= 2_000
        if before and not admission.full:
            assert admission.rows < 200 * RESUME_SHARE
            assert admission.bytes < 2_000 * RESUME_SHARE
