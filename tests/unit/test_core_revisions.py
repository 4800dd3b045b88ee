"""The log of revisions: who answers a time, what must be kept, and whose log may be adopted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.revisions import (
    Adoption,
    adoption,
    appended,
    chain_fault,
    in_force,
    kept,
    timeline,
)
from inferfleet.revisions import EMPTY_LOG, Head, Revision, RouteLog, sealed
from inferfleet.routes import Destination, Route
from inferfleet.variants import Variant


def revision(number: int, start: int | None, **other: Any) -> Revision:
    """Return a revision of route ``r``."""
    values: dict[str, Any] = {"epoch": 0, "name": "r", "at_ms": 0, "author": "a", "action": "apply"}
    return Revision(number=number, effective_from_ms=start, **({"route": None} | values | other))


_STARTS = st.lists(st.none() | st.integers(0, 30), max_size=12)
_LOGS = _STARTS.map(lambda starts: [revision(i + 1, start) for i, start in enumerate(starts)])
_TIMES = st.integers(-5, 40)


def _brute(revisions: Sequence[Revision], time_ms: int) -> Revision | None:
    """The highest-numbered revision that has begun; before all of them, the first that will."""
    begun = [r for r in revisions if r.effective_from_ms is not None and r.effective_from_ms <= time_ms]
    if begun:
        return max(begun, key=lambda each: each.number)
    timed = [r for r in revisions if r.effective_from_ms is not None]
    first = min((r.effective_from_ms or 0 for r in timed), default=0)
    return max((r for r in timed if r.effective_from_ms == first), key=lambda each: each.number, default=None)


@given(_LOGS, _TIMES)
def test_in_force_is_the_highest_number_that_has_begun(revisions: list[Revision], time_ms: int) -> None:
    """Whatever the order of their times: a later revision with an earlier time hides those between."""
    assert in_force(revisions, time_ms) == _brute(revisions, time_ms)
    assert in_force(list(reversed(revisions)), time_ms) == _brute(revisions, time_ms)


@given(_LOGS)
def test_a_timeline_rises_in_times_and_in_numbers(revisions: list[Revision]) -> None:
    """And names no announcement."""
    found = timeline(revisions)
    assert list(found.starts_ms) == sorted(set(found.starts_ms))
    numbers = [each.number for each in found.revisions]
    assert numbers == sorted(set(numbers))
    assert [each.effective_from_ms for each in found.revisions] == list(found.starts_ms)


@given(_LOGS, _TIMES)
def test_what_is_kept_answers_like_all(revisions: list[Revision], since_ms: int) -> None:
    """Every time from ``since_ms`` on; and nothing is kept that answers no such time."""
    left = kept(revisions, since_ms)
    for time_ms in range(since_ms, 45):
        assert in_force(left, time_ms) == in_force(revisions, time_ms)
    answering = {in_force(revisions, time_ms) for time_ms in range(since_ms, 45)}
    spare = [each for each in left if each not in answering]
    assert all(each.effective_from_ms is None and each is revisions[-1] for each in spare)


@given(_LOGS, _TIMES, _TIMES)
def test_keeping_twice_is_keeping_from_the_later_time(
    revisions: list[Revision], first_ms: int, second_ms: int
) -> None:
    """So it does not matter when somebody forgets."""
    later = max(first_ms, second_ms)
    assert kept(kept(revisions, min(first_ms, second_ms)), later) == kept(revisions, later)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.integers(0, 30)), max_size=10))
def test_appending_one_by_one_or_at_once_keeps_the_same(steps: list[tuple[str, int | None]]) -> None:
    """All who append the same revisions have the same log."""
    made = [
        revision(i + 1, start, name=name, at_ms=3 * i, horizon_ms=9) for i, (name, start) in enumerate(steps)
    ]
    one_by_one = EMPTY_LOG
    for each in made:
        one_by_one = appended(one_by_one, [each])
    assert one_by_one == appended(EMPTY_LOG, made)
    for name in "ab":
        own = [each for each in made if each.name == name]
        since = own[-1].at_ms - 9 if own else 0
        for time_ms in range(since, 45):
            assert in_force(one_by_one.kept.get(name, ()), time_ms) == in_force(own, time_ms)


def test_a_later_epoch_takes_the_place_of_everything() -> None:
    """A person has gone back: what was before counts no longer."""
    log = appended(EMPTY_LOG, [revision(1, 0), revision(2, 0, name="s")])
    log = appended(log, [revision(3, 0, epoch=1)])
    assert log == RouteLog(Head(1, 3, log.head.hash), {"r": (revision(3, 0, epoch=1),)}, "3")


_HEADS = st.builds(Head, st.integers(0, 2), st.integers(0, 4), st.sampled_from("xy"))


@given(_HEADS, _HEADS, st.none() | st.sampled_from("xy"))
def test_only_a_person_goes_back(own: Head, found: Head, link: str | None) -> None:
    """A log is adopted if it goes on from one's own, or if its epoch is a later one."""
    verdict = adoption(own, found, link)
    if found.epoch != own.epoch:
        assert verdict is (Adoption.NEWER if found.epoch > own.epoch else Adoption.OLDER)
    elif found.number < own.number:
        assert verdict is Adoption.OLDER
    elif found.number == own.number:
        assert verdict is (Adoption.SAME if found == own else Adoption.FORKED)
    else:
        assert verdict is (Adoption.FORKED if link not in (None, own.hash) else Adoption.NEWER)


def _chain() -> list[Revision]:
    first = sealed(revision(1, 0))
    return [first, sealed(revision(2, 5, previous=first.hash))]


def test_a_chain_is_checked_link_by_link() -> None:
    """Each names the one before, and numbers rise."""
    first, second = _chain()
    assert chain_fault([]) is chain_fault([first]) is chain_fault([first, second]) is None
    assert chain_fault([second, first]) == "revision 1 follows revision 2"
    forged = sealed(revision(2, 5, previous="0" * 64))
    assert chain_fault([first, forged]) == "revision 2 does not continue revision 1"


@pytest.mark.parametrize("number", [1, 2])
def test_an_announcement_waits_only_at_the_end(number: int) -> None:
    """What follows it has taken its place."""
    route = Route(
        name="r",
        source=Destination("kafka", "in"),
        results=(Destination("kafka", "out"),),
        model="m",
        variants=(Variant("stable", "1", 1.0, ((0, 10_000),)),),
        salt="s",
    )
    revisions = [revision(1, None, route=route), revision(2, 7, route=route)][:number]
    log = appended(EMPTY_LOG, revisions)
    announced = log.announced("r")
    assert (announced is not None) == (number == 1)
    assert log.latest("r") == number
    assert [each.name for each in log.table().routes] == (["r"] if number == 2 else [])
