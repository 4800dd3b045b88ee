"""Open loop: when things are planned, and what its figures say about answers, silences and events."""

import numpy as np
import pytest

pytest.importorskip("hdrh")

from inferfleet.testing.checksum import expected_checksum
from loadtest import ledger
from loadtest.ledger import Arrival, Event
from loadtest.openloop import KILL_LIMIT_S, MOVE_LIMIT_S, Plan
from loadtest.traffic import body_of, is_right, row_of


def _event(at_ms=1000.0, limit_s=5.0, uncommitted=(3, 2)):
    return Event("SIGKILL w-1", at_ms / 1000, at_ms, limit_s, list(uncommitted))


def test_even_times_lie_one_step_apart():
    """Without ``poisson`` request n is due n steps after the start."""
    times = ledger.planned_times(4, 2)
    assert times.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_poisson_times_are_repeatable_and_keep_the_rate():
    """Random gaps come out the same for the same seed, ascend, and reach the asked rate."""
    times = ledger.planned_times(1000, 20, poisson=True, seed=7)
    assert np.array_equal(times, ledger.planned_times(1000, 20, poisson=True, seed=7))
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 20
    assert len(times) == pytest.approx(20_000, rel=0.05)


def test_each_outcome_is_judged_by_its_own_request():
    """Lost, repeated, differing, wrong and foreign outcomes are told apart."""
    arrivals = [
        Arrival(0, 1, b"0"),
        Arrival(0, 2, b"0"),
        Arrival(1, 3, b"1"),
        Arrival(1, 4, b"x"),
        Arrival(2, 5, b"2", "model_failed"),
        Arrival(-1, 6, b"?"),
        Arrival(9, 7, b"9"),
    ]
    tally = ledger.judge(4, arrivals, lambda number, value: value == b"%d" % number)
    assert tally == ledger.Tally(sent=4, answered=3, lost=1, duplicates=2, unequal=1, wrong=2, foreign=2)


def test_an_answer_is_right_for_one_request_alone():
    """The checksum of another input, of another version, or no checksum at all is wrong."""

    def answer(version, number):
        version, check = expected_checksum(version, row_of(number))
        return b'{"outputs":[{"name":"check","data":[%d,%d]}]}' % (version, check)

    assert is_right(7, answer(1, 7))
    assert not is_right(7, answer(1, 8))
    assert not is_right(7, answer(2, 7))
    assert not is_right(7, b'{"error":"no"}')
    assert not is_right(7, b'{"outputs":[]}')
    assert b"[7.0,7.5,-7.0,1.0]" in body_of(7)


def test_the_first_copy_answers_and_the_others_are_copies():
    """Whatever order outcomes were read in, the earliest one is the answer."""
    first, copies = ledger.first_answers(3, [Arrival(0, 30, b""), Arrival(0, 10, b""), Arrival(2, 20, b"")])
    assert first[[0, 2]].tolist() == [10, 20]
    assert np.isnan(first[1])
    assert copies.tolist() == [30]


def test_silence_is_told_for_each_partition():
    """The longest gap of each partition counts, and a gap that reaches into the span counts in full."""
    # Even numbers are partition 0, odd ones partition 1.
    first = np.array([0, 0, 100, 900, 4100, 1000, 4200, 1100, 9000, 6000], float)
    assert ledger.longest_silences(first, 2, 500, 4150) == pytest.approx([4.0, 4.9])
    assert ledger.longest_silences(first, 2, 4150, 4180) == pytest.approx([0.1, 4.9])


def test_a_partition_without_answers_is_silent_throughout():
    """Where no answer comes the whole span is silence."""
    first = np.array([np.nan, 1500.0])
    assert ledger.longest_silences(first, 2, 1000, 6000) == pytest.approx([5.0, 4.5])


def test_events_get_what_followed_them_until_the_next():
    """Rows in flight, repeated rows and silences belong to the event before them."""
    sent = np.array([0.0, 10, 900, 910, 1990, 2000])
    first = np.array([5.0, 20, 1500, 1400, 2500, 2600])
    events = [_event(1000.0), _event(2000.0)]
    ledger.settle_events(events, sent, first, np.array([1600.0, 2700, 9000]), 2600)
    assert [event.unanswered for event in events] == [2, 2]
    assert [event.duplicates for event in events] == [1, 2]
    assert events[0].silences == pytest.approx([1.495, 1.38])
    assert events[0].in_flight == 5


def test_latency_counts_from_the_planned_time_and_skips_what_was_lost():
    """Percentiles are in ms over the answered requests."""
    found = ledger.latency(np.array([0.0, 0, 0]), np.array([10.0, np.nan, 30]))
    assert found["count"] == 2
    assert found["p50"] == pytest.approx(10, rel=0.01)
    assert found["max"] == pytest.approx(30, rel=0.01)


RIGHT = ledger.Tally(sent=100, answered=100, lost=0, duplicates=5, unequal=0, wrong=0, foreign=0)


def test_repeated_rows_within_the_bound_are_no_shortfall():
    """As many duplicates as rows were in flight hold; one more does not."""
    event = _event()
    event.unanswered, event.silences = 1, [5.0, 0.1]
    assert ledger.shortfalls(RIGHT, [event], [0]) == []
    (line,) = ledger.shortfalls(RIGHT._replace(duplicates=6), [event])
    assert line == "6 duplicates, but only 5 rows were in flight at the events"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lost": 1}, "1 requests without an outcome"),
        ({"unequal": 2}, "2 requests with differing copies"),
        ({"wrong": 3}, "3 wrong answers"),
        ({"foreign": 4}, "4 outcomes of requests that nobody sent"),
    ],
)
def test_each_fault_is_named(change, line):
    """Every kind of fault has a line of its own."""
    assert ledger.shortfalls(RIGHT._replace(duplicates=0, **change), []) == [line]


def test_long_silences_bad_exits_and_idle_events_are_named():
    """A silence above its limit, a drain that fails and an event with nothing in flight do not hold."""
    event = _event()
    event.silences = [5.1]
    assert ledger.shortfalls(RIGHT, [event], [0, -9]) == [
        "1 drained workers that did not exit 0",
        "SIGKILL w-1: silence of 5.1 s, limit 5 s",
        "SIGKILL w-1: no row was in flight, so it shows nothing",
    ]


def test_requests_flow_long_enough_after_the_last_kill():
    """No worker goes so late that the silence it may cause could not be seen."""
    killed = Plan(seconds=95, kill_every=15)
    assert killed.limit_s == KILL_LIMIT_S
    assert killed.moments() == [(15 * number, None) for number in range(1, 6)]
    drained = Plan(seconds=50, kill_every=15, sigterm=True)
    assert drained.limit_s == MOVE_LIMIT_S
    assert drained.moments() == [(15, None), (30, None), (45, None)]


def test_sizes_change_at_equal_intervals():
    """The first size is the start, the others come in equal parts."""
    plan = Plan(seconds=60, scale=(3, 6, 3))
    assert plan.size == 3
    assert plan.moments() == [(20, 6), (40, 3)]
    assert Plan(seconds=60).moments() == []
