"""The brake: it trips where a list of all outcomes says so, and nowhere else."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.brake import WINDOW, Brake
from inferfleet.errors import RULES, Code

COUNTED = [Code.MODEL, Code.MODEL_OUTPUT, Code.INTERNAL]
SHARES = [Fraction(1, 1000), Fraction(2, 100), Fraction(5, 100), Fraction(7, 100), Fraction(1)]


class Naive:
    """Every outcome in a list: ``None``, or the id and code of a failure."""

    def __init__(self, consecutive: int, share: Fraction) -> None:
        self.consecutive, self.share = consecutive, share
        self.outcomes: list[tuple[str, Code] | None] = []
        self.in_a_row = 0
        self.tripped: set[Code] | None = None
        """The most frequent codes at the moment it tripped."""

    @property
    def failed(self) -> list[tuple[str, Code]]:
        return [outcome for outcome in self.outcomes[-WINDOW:] if outcome is not None]

    def ok(self, count: int) -> None:
        self.outcomes += [None] * count
        if count:
            self.in_a_row = 0

    def failure(self, request_id: str, code: Code) -> None:
        if code not in COUNTED or request_id in [known for known, _ in self.failed]:
            return
        self.outcomes.append((request_id, code))
        self.in_a_row += 1
        enough = len(self.failed) >= math.ceil(self.share * WINDOW)
        if self.tripped is None and (self.in_a_row >= self.consecutive or enough):
            codes = [code for _, code in self.failed]
            most = max(map(codes.count, codes))
            self.tripped = {code for code in codes if codes.count(code) == most}


_FAILURES = st.lists(st.tuples(st.integers(0, 200).map(str), st.sampled_from(list(Code))), max_size=8)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ok"), st.integers(0, 1_200), st.just([])),
        st.tuples(st.just("failures"), st.just(0), _FAILURES),
        st.tuples(st.just("batch"), st.integers(0, 64), _FAILURES),
        st.tuples(st.just("reset"), st.just(0), st.just([])),
    ),
    max_size=60,
)


@given(_STEPS, st.integers(1, 30), st.sampled_from(SHARES))
def test_it_trips_as_a_list_of_all_outcomes_says(
    steps: list[tuple[str, int, list[tuple[str, Code]]]], consecutive: int, share: Fraction
) -> None:
    """Whatever comes in whatever order, window, distinct ids and failures in a row are counted alike."""
    brake, naive = Brake(consecutive, float(share)), Naive(consecutive, share)
    for what, ok, failures in steps:
        ids, codes = [request_id for request_id, _ in failures], [code for _, code in failures]
        if what == "reset":
            brake.reset()
            naive = Naive(consecutive, share)
        elif what == "batch":
            brake.observe_batch(ok, ids, codes)
            naive.ok(ok)
            for failure in failures:
                naive.failure(*failure)
                naive.in_a_row = 0 if ok else naive.in_a_row
        else:
            brake.observe_ok(ok)
            brake.observe_failures(ids, codes)
            naive.ok(ok)
            for failure in failures:
                naive.failure(*failure)
        assert (brake.tripped is None) == (naive.tripped is None)
        if brake.tripped is not None and naive.tripped is not None:
            assert any(brake.tripped.endswith(f"most often with {code}") for code in naive.tripped)
            assert "\n" not in brake.tripped


def test_it_counts_what_its_rules_say() -> None:
    """The three codes that the contract names, and no other."""
    assert [code for code in Code if RULES[code].brake] == COUNTED


def test_twenty_in_a_row_trip_it() -> None:
    """Failures of distinct ids with nothing good between them, over any number of calls."""
    brake = Brake(20, 0.05)
    brake.observe_failures([f"{n}" for n in range(19)], [Code.MODEL] * 19)
    brake.observe_ok(1)
    brake.observe_failures([f"a{n}" for n in range(19)], [Code.MODEL] * 19)
    assert brake.tripped is None
    brake.observe_failures(["last"], [Code.MODEL_OUTPUT])
    assert brake.tripped == "20 requests in a row failed, most often with E_MODEL"


def test_the_share_is_taken_of_the_last_thousand() -> None:
    """Fifty failures trip it while the window holds them, however many requests went well between them."""
    brake = Brake(1_000, 0.05)
    for n in range(49):
        brake.observe_ok(19)
        brake.observe_failures([f"{n}"], [Code.INTERNAL])
    assert brake.tripped is None
    brake.observe_ok(19)
    assert repr(brake) == "Brake(in_a_row=0, failed=49/999)"
    brake.observe_failures(["last"], [Code.INTERNAL])
    assert brake.tripped == "50 of the last 1000 requests failed, most often with E_INTERNAL"


def test_failures_that_left_the_window_count_no_longer() -> None:
    """A model that failed a while ago and recovered is not stopped by a few failures more."""
    brake = Brake(100, 0.05)
    brake.observe_failures([f"{n}" for n in range(49)], [Code.MODEL] * 49)
    brake.observe_ok(999)
    brake.observe_failures([f"later{n}" for n in range(48)], [Code.MODEL] * 48)
    assert brake.tripped is None
    assert repr(brake) == "Brake(in_a_row=48, failed=48/1000)"


def test_a_flood_of_bad_callers_never_trips_it() -> None:
    """A caller's fault is no outcome at all: it neither counts nor ends a row of failures."""
    brake = Brake(20, 0.05)
    brake.observe_failures([f"{n}" for n in range(19)], [Code.MODEL] * 19)
    brake.observe_failures([f"bad{n}" for n in range(5_000)], [Code.SHAPE] * 5_000)
    assert brake.tripped is None
    brake.observe_failures(["20th"], [Code.MODEL])
    assert brake.tripped is not None


def test_one_request_that_comes_again_and_again_counts_once() -> None:
    """What a crash repeats says no more about the model than it did the first time."""
    brake = Brake(2, 0.002)
    brake.observe_failures(["same"] * 50, [Code.MODEL] * 50)
    assert brake.tripped is None
    brake.observe_ok(WINDOW)
    brake.observe_failures(["same"], [Code.MODEL])
    assert brake.tripped is None
    brake.observe_failures(["other"], [Code.MODEL])
    assert brake.tripped == "2 requests in a row failed, most often with E_MODEL"


def test_a_tripped_brake_stays_so_until_it_is_reset() -> None:
    """What still finishes does not undo it; afterwards it counts from nothing."""
    brake = Brake(1, 1.0)
    brake.observe_failures(["a"], [Code.MODEL])
    brake.observe_ok(5_000)
    assert brake.tripped == "1 request failed, most often with E_MODEL"
    brake.reset()
    assert repr(brake) == "Brake(in_a_row=0, failed=0/0)"


def test_failures_beside_an_answer_of_their_batch_are_not_in_a_row() -> None:
    """Nobody knows in which order the rows of a batch would have failed; they count for the share."""
    brake = Brake(3, 0.01)
    brake.observe_batch(1, ["a", "b", "c", "d"], [Code.MODEL] * 4)
    assert brake.tripped is None
    brake.observe_batch(0, ["e", "f"], [Code.MODEL] * 2)
    assert brake.tripped is None
    brake.observe_batch(60, ["g", "h", "i"], [Code.MODEL] * 3)
    assert brake.tripped is None
    brake.observe_batch(60, ["j"], [Code.MODEL])
    assert brake.tripped == "10 of the last 131 requests failed, most often with E_MODEL"
