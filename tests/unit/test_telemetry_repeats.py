"""Of equal warnings the first few are told and the rest counted: no line is lost from the counts."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.telemetry.logs import Logs, configure
from inferfleet.telemetry.repeats import (
    ANYTHING,
    MAX_KINDS,
    MAX_KINDS_OF_EVENT,
    NOTHING_HELD,
    OTHERS,
    Kind,
    Repeats,
)

EVENTS = st.sampled_from(["a", "b", "c"])
KINDS: st.SearchStrategy[Kind] = st.tuples(EVENTS, st.integers(0, 40).map(str))
STEPS = st.lists(
    st.tuples(KINDS, st.floats(0, 7, allow_nan=False), st.integers(0, 5), st.booleans()), max_size=300
)


@given(STEPS, st.integers(1, 4), st.sampled_from([0.0, 1.0, 10.0]))
def test_every_line_is_told_or_counted_once(
    steps: list[tuple[Kind, float, int, bool]], lines: int, window_s: float
) -> None:
    """What passes, what later lines carry, and what is told at the end add up to what was said."""
    repeats, now = Repeats(lines, window_s), 0.0
    told, held_lines, held_requests, all_requests = 0, 0, 0, 0
    passed_requests = 0
    for kind, pause_s, requests, look in steps:
        now += pause_s
        if look:
            for _, held in repeats.overdue(now):
                held_lines += held.lines
                held_requests += held.requests
        all_requests += requests
        verdict = repeats.heard(kind, now, requests)
        if verdict is not None:
            told += 1
            passed_requests += requests
            held_lines += verdict.lines
            held_requests += verdict.requests
        assert len(repeats) <= MAX_KINDS + 1
    for _, held in repeats.rest():
        held_lines += held.lines
        held_requests += held.requests

    assert told + held_lines == len(steps)
    assert passed_requests + held_requests == all_requests
    assert len(repeats) == 0


@given(STEPS, st.integers(1, 4))
def test_no_more_than_so_many_lines_of_a_kind_in_a_window(
    steps: list[tuple[Kind, float, int, bool]], lines: int
) -> None:
    """Whatever comes, two windows that touch hold twice the lines at most; the first ones always pass."""
    repeats, now, passed = Repeats(lines, 10.0), 0.0, defaultdict[Kind, list[float]](list)
    seen = Counter[Kind]()
    for kind, pause_s, _, _ in steps:
        now += pause_s
        seen[kind] += 1
        if repeats.heard(kind, now) is not None:
            passed[kind].append(now)
        elif len({each for each in seen if each[0] == kind[0]}) <= MAX_KINDS_OF_EVENT:
            assert seen[kind] > lines
    for kind, times in passed.items():
        if len({each for each in seen if each[0] == kind[0]}) <= MAX_KINDS_OF_EVENT:
            for at in times:
                assert sum(at <= each < at + 10.0 for each in times) <= 2 * lines


def test_errors_that_all_differ_share_what_is_left() -> None:
    """A text with something new in each line is no way round the bound, nor one with new events."""
    repeats = Repeats(2, 10.0)
    passed = [repeats.heard(("e", str(n)), 0.0) is not None for n in range(10_000)]
    assert sum(passed) == MAX_KINDS_OF_EVENT + 2

    passed = [repeats.heard((f"e{n}", ""), 0.0) is not None for n in range(10_000)]
    assert sum(passed) < MAX_KINDS + 2
    assert len(repeats) <= MAX_KINDS + 1
    assert {("e", OTHERS), ANYTHING} <= {kind for kind, _ in repeats.rest()}


def test_a_window_of_nothing_holds_nothing_back() -> None:
    """``repeat_window_s = 0`` turns it off."""
    repeats = Repeats(1, 0.0)

    assert all(repeats.heard(("e",), 5.0) is NOTHING_HELD or True for _ in range(100))
    assert repeats.rest() == []


class Scene:
    """A process's log in JSON, under a clock that is moved by hand."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.now = 0.0
        self.logs: Logs = configure(
            "json", "info", self.stream, repeat_lines=3, repeat_window_s=60.0, clock=lambda: self.now
        )
        self.log = structlog.get_logger()

    @property
    def lines(self) -> list[dict[str, object]]:
        """The lines so far; a thread that another test has left behind may log, too."""
        found = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in found if line.get("logger", "library") == "library"]


@pytest.fixture
def scene() -> Iterator[Scene]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Scene()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def test_the_next_line_says_how_many_were_held_back(scene: Scene) -> None:
    """Three pass; when the window is over, the next one carries the count of the others."""
    for n in range(50):
        scene.log.warning("requests_failed", route="r", code="E_MODEL", requests=2, batch=n)
    scene.now = 60.0
    scene.log.warning("requests_failed", route="r", code="E_MODEL", requests=2)

    assert [line.get("suppressed", 0) for line in scene.lines] == [0, 0, 0, 47]
    assert scene.lines[-1]["suppressed_requests"] == 94


def test_another_route_or_error_is_another_matter(scene: Scene) -> None:
    """What is equal is the event, where it happened, and the error, but for numbers in it."""
    for n in range(20):
        scene.log.warning("commit_refused", route="a", error=f"after {n} ms")
        scene.log.warning("commit_refused", route="b", error=f"after {n} ms")
        scene.log.warning("commit_refused", route="a", error=f"no, {n}")

    assert len(scene.lines) == 9


def test_lifecycle_is_always_told(scene: Scene) -> None:
    """Lines below warning are never held back."""
    for _ in range(50):
        scene.log.info("partitions_assigned", partitions="0-3")

    assert len(scene.lines) == 50


def test_a_count_that_no_line_carries_is_told_by_itself(scene: Scene) -> None:
    """Any later line, of whatever level, brings it out; the end of the process does too."""
    for _ in range(10):
        scene.log.error("model_refused", model="m", error="no")
    scene.now = 61.0
    scene.log.info("worker_ready")
    assert [line["event"] for line in scene.lines[3:]] == ["lines_suppressed", "worker_ready"]
    said = {"of": "model_refused", "suppressed": 7, "model": "m", "reason": "error=no"}
    assert said.items() <= scene.lines[3].items()

    for _ in range(5):
        scene.log.error("model_refused", model="m", error="no")
    scene.logs.finish()
    scene.logs.finish()
    assert [line.get("suppressed", 0) for line in scene.lines[5:]] == [0, 0, 0, 2]


def test_libraries_are_held_to_it_too(scene: Scene) -> None:
    """A library's warnings are compared by their template."""
    for n in range(10):
        logging.getLogger("library").warning("try %d", n)
        logging.getLogger("library").info("try %d", n)
    scene.now = 60.0
    logging.getLogger("library").warning("try %d", 99)
    warned = [line for line in scene.lines if line["level"] == "warning"]

    assert [line["event"] for line in warned] == ["try 0", "try 1", "try 2", "try 99"]
    assert warned[-1]["suppressed"] == 7
    assert len(scene.lines) == 14


def test_threads_lose_no_line_and_no_count(scene: Scene) -> None:
    """Eight threads at once: whole lines, and counts that add up."""

    def shout(number: int) -> None:
        for _ in range(500):
            scene.log.warning("shouted", topic=f"t{number % 2}", requests=1)
            scene.log.info("said", thread=number)

    threads = [threading.Thread(target=shout, args=(n,)) for n in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    scene.logs.finish()
    counted = Counter(line["event"] for line in scene.lines)
    held = sum(int(str(line.get("suppressed", 0))) for line in scene.lines)

    assert counted == {"said": 4000, "shouted": 6, "lines_suppressed": 2}
    assert held == 4000 - 6
