"""Brakes of routes: what is counted, what is held back, and what runs again when somebody resumes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.control.pauses import LocalPauses
from inferfleet.errors import RULES, Code
from inferfleet.plane import braked_version
from inferfleet.records import Chunk, Origin, Requests, RowFailure, Served
from inferfleet.worker.brakes import Brakes
from tests.support.builders import chunk, requests

BRAKING = [code for code in Code if RULES[code].brake]


class Bench:
    """The brakes of routes ``a`` and ``b``, which trip at three failures in a row."""

    def __init__(self, consecutive: int = 3, share: float = 1.0, board: LocalPauses | None = None) -> None:
        self.board = LocalPauses() if board is None else board
        self.brakes = Brakes(self.board, consecutive, share)
        self.brakes.routes({"a", "b"})
        self._next = 0

    def failures(
        self, codes: Sequence[Code], *, attempt: int = 1, of: Chunk | None = None
    ) -> list[RowFailure]:
        """Return failures of new requests; a later ``attempt`` came through a retry topic."""
        made = chunk([b"b"] * len(codes), first=self._next) if of is None else of
        self._next += len(codes)
        if attempt > 1:
            made.origins = [Origin("s", 0, position, 0, attempt) for position in made.positions]
        return [
            RowFailure(requests(made, [row]), code, "no", retryable=True) for row, code in enumerate(codes)
        ]

    def batch(self, codes: Sequence[Code], ok: int = 0, route: str = "a", **options: int) -> list[RowFailure]:
        """Let a batch end; return the failures that end now."""
        return list(self.brakes.passed(route, self.failures(codes, **options), ok))


def parts(failures: Sequence[RowFailure]) -> list[Requests]:
    return [failure.part for failure in failures]


@pytest.mark.parametrize("code", BRAKING)
def test_nothing_more_ends_once_the_model_has_failed_in_a_row(code: Code) -> None:
    """Two are dead letters; the third and all after it stay where they are."""
    bench = Bench()
    assert len(bench.batch([code, code])) == 2
    assert bench.board.current() == {}
    assert bench.batch([code]) == []
    assert list(bench.board.current()) == ["a"]
    assert bench.batch([code] * 5) == []
    assert bench.brakes.withheld() == 6


def test_a_version_that_fails_is_not_hidden_by_what_another_answers() -> None:
    """Five per cent of a route's keys are all of a canary's: its brake is its own, and the pause names it."""
    bench = Bench()
    served = Served("a", "m", "2", "canary", "1")
    for _ in range(3):
        bench.brakes.answered("a", "1", 50)
        failed = bench.failures([Code.MODEL])
        failed[0].part.served = served
        ended = bench.brakes.passed("a", failed, 0)
    assert ended == []
    assert braked_version(bench.board.current()["a"]) == "2"


def test_a_batch_that_trips_the_brake_is_held_back_whole() -> None:
    """It is counted before anything of it is moved."""
    bench = Bench()
    assert bench.batch([Code.MODEL] * 64) == []
    assert bench.brakes.withheld() == 64


@pytest.mark.parametrize("code", [code for code in Code if not RULES[code].brake])
def test_what_is_not_the_models_fault_is_neither_counted_nor_held(code: Code) -> None:
    """A flood of bad requests stops nobody, and is answered while the route is stopped."""
    bench = Bench()
    assert len(bench.batch([code] * 10)) == 10
    assert bench.board.current() == {}
    bench.batch([Code.MODEL] * 3)
    assert [f.code for f in bench.batch([code, Code.MODEL, code])] == [code, code]


def test_beside_an_answer_of_the_same_batch_nothing_failed_in_a_row() -> None:
    """Their order among each other is nobody's knowledge."""
    bench = Bench()
    assert len(bench.batch([Code.MODEL] * 5, ok=1)) == 5
    bench.batch([Code.MODEL] * 2)
    bench.brakes.answered("a", "", 1)
    assert len(bench.batch([Code.MODEL] * 2)) == 2
    assert bench.board.current() == {}
    assert bench.batch([Code.MODEL]) == []


def test_a_share_of_the_window_trips_too() -> None:
    """Now and then is too often, when it is one in twenty."""
    bench = Bench(consecutive=1_000, share=0.005)
    for _ in range(4):
        assert len(bench.batch([Code.MODEL], ok=50)) == 1
    assert bench.batch([Code.MODEL], ok=50) == []


def test_later_attempts_are_not_counted() -> None:
    """They have failed before, and come together; but while the route stands they are held back as well."""
    bench = Bench()
    assert len(bench.batch([Code.MODEL] * 10, attempt=2)) == 10
    assert bench.board.current() == {}
    bench.batch([Code.MODEL] * 3)
    assert bench.batch([Code.MODEL] * 2, attempt=3) == []
    assert bench.brakes.withheld() == 5


def test_a_request_that_comes_again_counts_once() -> None:
    """A crash repeats what was not committed."""
    bench = Bench()
    first = bench.failures([Code.MODEL])
    for _ in range(5):
        assert list(bench.brakes.passed("a", first, 0)) == first


def test_routes_have_brakes_of_their_own() -> None:
    """What one model does says nothing about another."""
    bench = Bench()
    bench.batch([Code.MODEL] * 3)
    assert len(bench.batch([Code.MODEL] * 2, route="b")) == 2
    assert list(bench.board.current()) == ["a"]


def test_a_pause_from_outside_holds_back_too() -> None:
    """The first worker that noticed, or a person, has stopped the route for the whole pool."""
    bench = Bench()
    bench.board.pause("a", "told to")
    assert bench.batch([Code.MODEL]) == []
    assert bench.brakes.held() == {}, "told with the next look"
    assert bench.brakes.released() == []
    assert bench.brakes.held() == {"a": "told to"}


def test_a_resume_gives_back_all_that_was_held_in_its_order() -> None:
    """And the brake has forgotten everything: the route may fail anew before it stops again."""
    bench = Bench()
    failed = bench.failures([Code.MODEL] * 4)
    bench.brakes.passed("a", failed, 0)
    assert bench.brakes.released() == []
    assert list(bench.brakes.held()) == ["a"]
    bench.board.resume("a")
    assert bench.brakes.released() == parts(failed)
    assert (bench.brakes.held(), bench.brakes.withheld(), bench.brakes.released()) == ({}, 0, [])
    assert list(bench.brakes.passed("a", failed[:2], 0)) == failed[:2]
    assert bench.batch([Code.MODEL]) == []


def test_a_resume_that_comes_before_the_next_look_is_not_missed() -> None:
    """A pause of a moment leaves nothing behind."""
    bench = Bench()
    failed = bench.failures([Code.MODEL] * 3)
    bench.brakes.passed("a", failed, 0)
    bench.board.resume("a")
    assert bench.brakes.released() == parts(failed)
    assert len(bench.batch([Code.MODEL] * 2)) == 2


def test_a_failure_that_comes_before_the_next_look_does_not_undo_a_resume() -> None:
    """What ran on when the route was paused is counted anew: the brake has to find it wrong again."""
    bench = Bench()
    bench.batch([Code.MODEL] * 3)
    bench.board.resume("a")
    assert len(bench.batch([Code.MODEL] * 2)) == 2
    assert bench.board.current() == {}
    assert len(bench.brakes.released()) == 3


def test_a_route_that_is_watched_no_longer_gives_back_what_it_held() -> None:
    """Nobody would resume it here."""
    bench = Bench()
    failed = bench.failures([Code.MODEL] * 3)
    bench.brakes.passed("a", failed, 0)
    bench.brakes.released()
    bench.brakes.routes({"b"})
    assert bench.brakes.released() == parts(failed)


def test_what_was_taken_away_is_not_held_back() -> None:
    """Whoever has the stream now runs it; what is on its way for a lost channel ends as it began."""
    bench = Bench()
    dead, live, orphan = (chunk([b"b"] * 3) for _ in range(3))
    for of in (dead, live):
        bench.brakes.passed("a", bench.failures([Code.MODEL] * 3, of=of), 0)
    dead.live = False
    orphan.live, orphan.orphaned = False, True
    late = bench.failures([Code.MODEL] * 3, of=orphan)
    assert list(bench.brakes.passed("a", late, 0)) == late
    assert bench.brakes.withheld() == 3
    assert {part.chunk for part in bench.brakes.drop_dead()} == {dead}
    assert bench.brakes.drop_dead() == []
    bench.board.resume("a")
    assert {part.chunk for part in bench.brakes.released()} == {live}


def test_a_shared_board_stops_the_whole_pool() -> None:
    """One worker's brake trips; the other's failures stay where they are."""
    one = Bench()
    two = Bench(board=one.board)
    one.batch([Code.MODEL] * 3)
    assert two.batch([Code.MODEL]) == []
    one.board.resume("a")
    assert len(one.brakes.released()) == 3
    assert len(two.brakes.released()) == 1


@given(st.data())
def test_no_failure_is_lost_or_ends_twice(data: st.DataObject) -> None:
    """Each ends, is held, or is given back exactly once; and before the brake trips only so many end."""
    bench = Bench(consecutive=data.draw(st.integers(1, 6)))
    ended: list[Requests] = []
    held: list[Requests] = []
    in_a_row = 0
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["fail", "fail", "fail", "ok", "resume", "look"]))
        if step == "fail":
            failed = bench.failures([Code.MODEL] * data.draw(st.integers(1, 5)))
            now = parts(list(bench.brakes.passed("a", failed, 0)))
            ended += now
            held += [part for part in parts(failed) if part not in now]
            in_a_row += len(now)
            assert in_a_row < bench.brakes._consecutive
        elif step == "ok":
            bench.brakes.answered("a", "", 1)
            in_a_row = 0
        elif step == "resume":
            bench.board.resume("a")
        if step in ("resume", "look"):
            again = bench.brakes.released()
            if again:
                assert again == held
                held, in_a_row = [], 0
        assert bench.brakes.withheld() == len(held)
