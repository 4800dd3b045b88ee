"""One suite for pauses kept here or in Redis, and one for crash marks kept in a file or in Redis."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from inferfleet.control.marks import MOST_PAUSE_S, FileMarks, RedisMarks, crash_key
from inferfleet.control.pauses import LocalPauses, PauseOptions, RedisPauses, decode_pause, pause_key
from inferfleet.ports import CrashMarks, PauseBoard
from inferfleet.redis_access import Place, open_redis
from inferfleet.testing.clock import FakeClock
from tests.support.process import free_ports
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

PATIENCE_S = 10.0
QUICK = PauseOptions(every_s=0.02, backoff_first_s=0.02, backoff_max_s=0.05, close_s=2.0)


def connector(server: RedisServer, timeout_s: float = 2.0) -> Callable[[], Any]:
    return lambda: open_redis(Place(server.url, timeout_s=timeout_s))


@pytest.fixture
def fleet() -> str:
    """A fleet that no other test has."""
    return f"test-{secrets.token_hex(4)}"


# Pauses


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.service)])
def board(request: pytest.FixtureRequest, fleet: str) -> Iterator[PauseBoard]:
    """Every board in turn, following the routes a and b."""
    made: PauseBoard = (
        LocalPauses()
        if request.param == "local"
        else RedisPauses(connector(request.getfixturevalue("redis_server")), fleet, "w-1", options=QUICK)
    )
    made.watch(["a", "b"])
    yield made
    made.close()


def test_a_pause_holds_at_once_and_until_it_is_resumed(board: PauseBoard) -> None:
    """Whoever pauses sees it in the next line; so does whoever resumes."""
    assert board.current() == {}
    board.pause("a", "20 in a row")
    assert board.current() == {"a": "20 in a row"}
    board.resume("a")
    assert board.current() == {}


def test_a_paused_route_keeps_its_first_reason(board: PauseBoard) -> None:
    """The reason that an operator reads is the one that stopped the route."""
    board.pause("a", "first")
    board.pause("a", "second")
    assert board.current() == {"a": "first"}
    board.resume("a")
    board.pause("a", "third")
    assert board.current() == {"a": "third"}


def test_routes_are_paused_each_by_itself(board: PauseBoard) -> None:
    """Resuming one leaves the others; resuming what is not paused changes nothing."""
    board.pause("a", "x")
    board.pause("b", "y")
    board.resume("a")
    board.resume("never-paused")
    assert board.current() == {"b": "y"}


def test_only_watched_routes_are_shown(board: PauseBoard) -> None:
    """A route that this worker does not serve is not shown; one that comes back is still paused."""
    board.pause("a", "x")
    board.watch(["b", "c"])
    assert board.current() == {}
    board.watch(["a"])
    wait_until(lambda: board.current() == {"a": "x"}, PATIENCE_S, "the pause is known again")


def test_a_snapshot_does_not_change(board: PauseBoard) -> None:
    """What was asked for before a pause still says what it said."""
    before = board.current()
    board.pause("a", "x")
    assert before == {}
    assert board.current() == {"a": "x"}


def test_any_thread_may_call(board: PauseBoard) -> None:
    """The loop brakes while an operator resumes through the admin address: nothing is lost or left over."""

    def flip(route: str) -> None:
        for n in range(200):
            board.pause(route, f"{n}")
            board.resume(route)
        board.pause(route, "last")

    threads = [threading.Thread(target=flip, args=(route,)) for route in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert board.current() == {"a": "last", "b": "last"}


def test_closing_twice_is_fine(board: PauseBoard) -> None:
    """The end of a worker may come by several ways."""
    board.close()


@pytest.fixture
def boards(redis_server: RedisServer, fleet: str) -> Iterator[Callable[[str], RedisPauses]]:
    """Workers of one fleet, each with a board of its own."""
    made: list[RedisPauses] = []

    def join(by: str) -> RedisPauses:
        board = RedisPauses(connector(redis_server), fleet, by, options=QUICK, utc_ms=lambda: 1_790)
        board.watch(["a", "b"])
        made.append(board)
        return board

    yield join
    for board in made:
        board.close()


@pytest.mark.service
def test_a_pause_is_shared_and_so_is_its_end(boards: Callable[[str], RedisPauses]) -> None:
    """One worker's brake stops the route everywhere, and anybody may let it go on."""
    one, other = boards("w-1"), boards("w-2")
    one.pause("a", "20 in a row")
    wait_until(lambda: other.current() == {"a": "20 in a row"}, PATIENCE_S, "the other one knows")
    other.resume("a")
    wait_until(lambda: one.current() == {}, PATIENCE_S, "the first one knows")


@pytest.mark.service
def test_of_two_pauses_the_first_one_stands(boards: Callable[[str], RedisPauses]) -> None:
    """Two workers brake at once: both come to show the same reason."""
    one, other = boards("w-1"), boards("w-2")
    one.pause("a", "one")
    other.pause("a", "other")
    wait_until(
        lambda: one.current() == other.current() and not one.current().keys() - {"a"},
        PATIENCE_S,
        "both agree",
    )
    assert one.current()["a"] in ("one", "other")


@pytest.mark.service
def test_the_key_says_why_when_and_by_whom(
    boards: Callable[[str], RedisPauses], redis_server: RedisServer, fleet: str
) -> None:
    """Its existence is the pause: whatever a person writes there pauses too, and deleting it resumes."""
    board = boards("w-1")
    board.pause("a", "because \ud800")
    with redis_server.client() as client:
        value = wait_until(lambda: client.get(pause_key(fleet, "a")), PATIENCE_S, "the key is written")
        assert json.loads(value) == {"reason": "because ?", "at_ms": 1_790, "by": "w-1"}
        assert pause_key("inferfleet", "digits") == "{inferfleet}:paused:digits"
        client.set(pause_key(fleet, "b"), b"by hand \xff")
        wait_until(lambda: "b" in board.current(), PATIENCE_S, "the pause by hand is seen")
        assert board.current()["b"] == "by hand \ufffd"
        client.delete(pause_key(fleet, "a"), pause_key(fleet, "b"))
        wait_until(lambda: board.current() == {}, PATIENCE_S, "both are resumed")


@pytest.mark.parametrize("value", [b"", b'{"reason": ""}', b"{}", b"[1]", b'{"reason": 7}', b"\xff"])
def test_an_odd_value_pauses_too_and_has_a_reason(value: bytes) -> None:
    """Nothing that may stand under the key is an error or an empty reason."""
    assert decode_pause(value).reason


@pytest.mark.service
def test_while_redis_is_away_the_last_known_holds_and_changes_are_written_later(
    data_folder: Path, fleet: str
) -> None:
    """Nobody waits for it: local changes hold at once, and reach the others when it is back; one log line."""
    with RedisServer(data_folder) as server, capture_logs() as logs:
        one = RedisPauses(connector(server, 0.2), fleet, "w-1", options=QUICK)
        one.watch(["a", "b"])
        one.pause("a", "before")
        with server.client() as client:
            wait_until(lambda: client.get(pause_key(fleet, "a")), PATIENCE_S, "the pause is shared")
        server.kill()
        wait_until(lambda: any(line["event"] == "pauses_away" for line in logs), PATIENCE_S, "it is noticed")
        assert one.current() == {"a": "before"}
        one.pause("b", "meanwhile")
        one.resume("a")
        assert one.current() == {"b": "meanwhile"}
        server.start()
        with server.client() as client:
            wait_until(lambda: client.get(pause_key(fleet, "b")), PATIENCE_S, "the pause is written")
            wait_until(lambda: not client.get(pause_key(fleet, "a")), PATIENCE_S, "the resume is written")
        wait_until(lambda: logs[-1]["event"] == "pauses_back", PATIENCE_S, "its return is told")
        assert one.current() == {"b": "meanwhile"}
        one.close()
    assert [line["event"] for line in logs] == ["pauses_away", "pauses_back"]


@pytest.mark.service
def test_a_frozen_redis_holds_up_nobody(data_folder: Path, fleet: str) -> None:
    """Pausing, asking and closing return at once while the connection hangs."""
    with RedisServer(data_folder) as server:
        board = RedisPauses(connector(server, 60.0), fleet, "w-1", options=replace(QUICK, close_s=0.2))
        board.watch(["a"])
        board.pause("a", "before")
        with server.client() as client:
            wait_until(lambda: client.get(pause_key(fleet, "a")), PATIENCE_S, "the pause is shared")
        server.pause()
        board.resume("a")
        assert board.current() == {}
        board.close()
        server.resume()


@pytest.mark.service
def test_closing_writes_what_is_not_written_yet(redis_server: RedisServer, fleet: str) -> None:
    """A worker whose brake trips while it drains stops the route for the others all the same."""
    slow = PauseOptions(every_s=60.0)
    board = RedisPauses(connector(redis_server), fleet, "w-1", options=slow)
    board.pause("a", "last words")
    board.close()
    with redis_server.client() as client:
        assert client.exists(pause_key(fleet, "a"))


# Marks


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.service)])
def life(request: pytest.FixtureRequest, fleet: str, tmp_path: Path) -> Callable[[], CrashMarks]:
    """Start one life of a worker after another: each call returns its view of the same marks."""
    if request.param == "file":
        return lambda: FileMarks(tmp_path / "state" / "w-1.crash.json")
    connect = connector(request.getfixturevalue("redis_server"))
    return lambda: RedisMarks(connect, fleet, "default", "w-1")


def test_a_first_life_finds_nothing(life: Callable[[], CrashMarks]) -> None:
    """Nobody has run before, so nobody has died."""
    assert life().load() is None


def test_a_life_that_does_not_end_leaves_its_mark(life: Callable[[], CrashMarks]) -> None:
    """An empty mark says that a process died; the last one saved says what it did then."""
    first = life()
    first.running()
    assert life().load() == {}
    first.save({"a": 1, "b": 2})
    first.save({"b": 1})
    assert life().load() == {"b": 1}


def test_a_clean_end_leaves_nothing(life: Callable[[], CrashMarks]) -> None:
    """The next life need not be careful, however careful this one was."""
    first = life()
    first.running()
    first.save({"a": 1})
    first.ended()
    assert life().load() is None
    life().ended()


def test_a_mark_that_stands_stays_until_another_is_saved(life: Callable[[], CrashMarks]) -> None:
    """A second life that dies before its first batch knows no more than the first did, and no less."""
    first = life()
    first.running()
    first.save({"a": 1})
    second = life()
    assert second.load() == {"a": 1}
    second.running()
    assert life().load() == {"a": 1}


def test_any_fingerprint_comes_back_as_it_was(life: Callable[[], CrashMarks]) -> None:
    """An id may hold what UTF-8 forbids, and there may be many; none of it raises on the record path."""
    mark = {"\ud800 \x00 {}:\n": 1, "ö": 2, "x" * 10_000: 1, **{f"{n}": 1 for n in range(2_000)}}
    first = life()
    first.running()
    first.save(mark)
    assert life().load() == mark


def test_half_a_file_says_that_a_process_died(tmp_path: Path) -> None:
    """What cannot be read names nobody, and the worker starts all the same."""
    path = tmp_path / "marks"
    for text in (b"", b'{"a": 1', b"[]", b'{"a": "x"}', b"\xff"):
        path.write_bytes(text)
        assert FileMarks(path).load() == {}


def test_a_file_that_cannot_be_written_costs_one_log_line(tmp_path: Path) -> None:
    """The worker goes on without marks, and tells when they are back."""
    folder = tmp_path / "state"
    folder.write_text("in the way")
    marks = FileMarks(folder / "marks")
    with capture_logs() as logs:
        marks.running()
        marks.save({"a": 1})
        marks.save({"a": 1})
        assert marks.load() is None
        marks.ended()
        folder.unlink()
        marks.running()
        marks.save({"a": 2})
    assert [line["event"] for line in logs] == ["crash_marks_away", "crash_marks_back"]
    assert marks.load() == {"a": 2}
    assert [path.name for path in folder.iterdir()] == ["marks"]


@pytest.mark.service
def test_each_worker_has_its_own_mark_and_old_ones_are_forgotten(
    redis_server: RedisServer, fleet: str
) -> None:
    """One hash for a pool; the marks of workers that never come back do not stay for ever."""
    connect = connector(redis_server)
    one, other = (RedisMarks(connect, fleet, "default", f"w-{n}") for n in (1, 2))
    one.running()
    one.save({"a": 1})
    assert other.load() is None
    assert RedisMarks(connect, fleet, "gpu", "w-1").load() is None
    other.running()
    other.ended()
    assert one.load() == {"a": 1}
    with redis_server.client() as client:
        assert client.hkeys(crash_key(fleet, "default")) == [b"w-1"]
        assert 0 < client.ttl(crash_key(fleet, "default")) <= 90 * 86_400
    assert crash_key("inferfleet", "default") == "{inferfleet}:crash:default"


class _Failing:
    """A Redis that takes its time to fail, on a clock that moves by hand."""

    def __init__(self, clock: FakeClock, takes_s: float) -> None:
        self.clock, self.takes_s, self.calls, self.well = clock, takes_s, 0, False

    def execute_command(self, *words: object) -> object:
        self.calls += 1
        if self.well:
            return 1
        self.clock.advance(self.takes_s)
        raise ConnectionError("refused")

    def close(self) -> None:
        """Nothing is open."""


def test_a_redis_that_is_away_takes_a_tenth_of_the_time_at_most() -> None:
    """Each failure keeps from asking again for ten times as long; nothing raises; one log line for all."""
    clock = FakeClock()
    client = _Failing(clock, 2.0)
    marks = RedisMarks(lambda: client, "f", "p", "w", now=clock.monotonic)
    began = clock.monotonic()
    with capture_logs() as logs:
        assert marks.load() is None
        marks.running()
        for _ in range(1_000):
            marks.save({"a": 1})
            clock.advance(0.1)
        spent_s = client.calls * client.takes_s
        assert client.calls > 2
        assert spent_s <= 0.1 * (clock.monotonic() - began) + client.takes_s
        client.takes_s = 600.0
        clock.advance(MOST_PAUSE_S)
        marks.save({})
        client.well = True
        clock.advance(MOST_PAUSE_S)
        marks.save({})
        marks.save({})
    assert [line["event"] for line in logs] == ["crash_marks_away", "crash_marks_back"]


def test_a_redis_that_nobody_serves_is_no_error() -> None:
    """A worker starts, works and ends without its marks."""
    (port,) = free_ports(1)
    place = Place(f"redis://127.0.0.1:{port}/0", timeout_s=0.5)
    marks = RedisMarks(lambda: open_redis(place), "f", "p", "w")
    marks.running()
    marks.save({"a": 1})
    assert marks.load() is None
    marks.ended()
