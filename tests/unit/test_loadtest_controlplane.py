"""The figures of the control plane at size: pure functions over what was seen."""

from __future__ import annotations

import pytest

from loadtest.controlplane import Instants, figures, from_clients, rates, route
from loadtest.crowd import Sightings


def test_a_change_is_effective_when_it_is_in_force_and_the_last_worker_knows() -> None:
    """Whichever comes later; the barrier is the part before the coordinator gave it its time."""
    early = Instants(announced=10.0, timed=12.0, in_force=14.0, seen=12.5)
    late = Instants(announced=20.0, timed=21.0, in_force=23.0, seen=26.0)

    assert figures([early, late]) == {
        "effective_everywhere_s": 5.0,
        "effective_everywhere_most_s": 6.0,
        "barrier_s": 1.5,
        "known_to_all_after_s": 2.75,
        "known_to_all_after_most_s": 5.0,
    }


def test_rates_are_differences_and_leave_out_what_is_rare() -> None:
    """A command that was not called before the first look counts from nothing."""
    before = {"cmdstat_get": {"calls": 100}, "cmdstat_info": {"calls": 1}}
    after = {"cmdstat_get": {"calls": 150}, "cmdstat_xadd": {"calls": 20}, "cmdstat_info": {"calls": 2}}

    found = rates(before, after, 20.0)

    assert found == {"get": 2.5, "xadd": 1.0}
    assert from_clients(found) == 2.5


def test_sightings_count_each_worker_once_for_each_revision() -> None:
    """A worker that skips numbers has seen those between; what the start brought is not counted."""
    found = Sightings(known=10)
    found.add(0, 10)
    found.add(10, 12)
    found.add(11, 12)

    assert {number: count for number, (count, _, _) in found.seen.items()} == {11: 1, 12: 2}
    assert all(first <= last for _, first, last in found.seen.values())


@pytest.mark.parametrize(("number", "pool"), [(0, "p-0"), (13, "p-3")])
def test_routes_are_spread_over_the_pools(number: int, pool: str) -> None:
    """Each has a name, a source and a model of its own."""
    made = route(number, 10)

    assert (made.name, made.pool, made.model) == (f"r-{number:03d}", pool, f"m-{number:03d}")
