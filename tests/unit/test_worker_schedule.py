"""Schedules: which plan answers a record's time, and what a chunk that spans several of them becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet import config as settings
from inferfleet.config import Config
from inferfleet.records import Chunk, Requests, Served, Signature, TensorSpec
from inferfleet.routes import Destination, Variant
from inferfleet.worker.plan import Decoders, RoutePlan
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.steered import MOST_SERVED, Steered
from tests.support.builders import STREAM, chunk, codes, v2
from tests.support.outlets import route_plan
from tests.unit.test_worker_reading import Bench

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
GOOD = v2([1, 2, 3, 4], [1, 4])
ALL = ((0, 10_000),)
ONE = (Variant("stable", "1", 1.0, ALL),)
TWO = (Variant("stable", "2", 1.0, ALL),)
DECODERS = Decoders()


def plan(number: int, variants: tuple[Variant, ...] = ONE, **options: Any) -> RoutePlan:
    """Return the plan of a revision; its engines are loaded and idle."""
    base = route_plan(
        SIGNATURE, variants=variants, results=["kafka:out"], source=Destination("kafka", STREAM.source)
    )
    return RoutePlan(
        base.route,
        str(number),
        options.pop("engines", base._engines),
        base._limits,
        Config(worker=settings.Worker(id="w-3")),
        number=number,
        decoders=DECODERS,
        **options,
    )


PLANS = [plan(1), plan(2, TWO), plan(3)]


@given(st.sets(st.integers(0, 50), min_size=1, max_size=3), st.lists(st.integers(-5, 60), min_size=1))
def test_each_record_goes_the_way_of_its_time(starts: set[int], times: list[int]) -> None:
    """Every record once, in order; one way for all costs no list."""
    plans = PLANS[: len(starts)]
    schedule = Schedule(plans[0], sorted(starts), plans)
    found: dict[int, RoutePlan] = {}
    ways = schedule.ways(times)
    for way in ways:
        rows = range(len(times)) if way.rows is None else way.rows
        assert list(rows) == sorted(rows)
        assert not found.keys() & set(rows)
        found |= dict.fromkeys(rows, way.plan)
    assert [found[row] for row in range(len(times))] == [schedule.at(time) for time in times]
    for time in times:
        begun = [index for index, start in enumerate(sorted(starts)) if start <= time]
        assert schedule.at(time) is plans[max(begun, default=0)]
    assert (len(ways) == 1) == (ways[0].rows is None)


def test_a_schedule_says_what_is_wrong_with_it() -> None:
    """The plan of now is one of its plans, and times ascend."""
    for plan_now, starts, plans in (
        (PLANS[0], [0], PLANS[1:2]),
        (PLANS[0], [0, 0], PLANS[:2]),
        (PLANS[0], [0], PLANS[:2]),
    ):
        with pytest.raises(ValueError, match="no schedule"):
            Schedule(plan_now, starts, plans)


def _spanning(times: list[int], values: list[bytes | None] | None = None) -> Chunk:
    made = chunk([GOOD] * len(times) if values is None else values)
    made.timestamps_ms = list(times)
    return made


def _waiting(bench: Bench) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for part in bench.batcher.parts():
        assert part.served is not None
        found.setdefault(part.served.revision, []).extend(part.rows)
    return {revision: sorted(rows) for revision, rows in found.items()}


def test_a_chunk_that_spans_revisions_is_read_once_and_settles_as_one() -> None:
    """Each record by the plan of its time; what cannot be read gets the error of its own plan."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    schedule = Schedule(PLANS[2], [10, 20, 30], PLANS)
    calls: list[int] = []
    right = PLANS[0].decoder.decode

    def counted(of: Chunk) -> Any:
        calls.append(len(of))
        return right(of)

    PLANS[0].decoder.decode = counted  # type: ignore[method-assign]  # how often it is asked is the question
    try:
        of = _spanning([5, 12, 25, 35, 31, 22], [GOOD, GOOD, GOOD, b"{", GOOD, v2([0] * 8, [2, 4])])
        bench.reading.read(schedule, of)
    finally:
        del PLANS[0].decoder.decode
    assert calls == [6]
    assert PLANS[0].decoder is PLANS[2].decoder is not PLANS[1].decoder
    assert _waiting(bench) == {"1": [0, 1], "2": [2, 5], "3": [4]}
    assert bench.codes("out") == ["E_DECODE"]
    assert b"revision=3" in (bench.outlet.to("out")[0].header("inferfleet-served") or b"")
    assert bench.admission.held("digits") == (7, of.size_bytes)
    assert bench.reading.settle(of, [0, 1, 2, 3, 4, 5])
    assert bench.admission.held("digits") == (0, 0)


def test_what_waits_under_a_hidden_revision_is_steered_anew() -> None:
    """An abort takes the bad version's place for every time since it began; others stay where they are."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    before = Schedule(PLANS[1], [0, 20], PLANS[:2])
    steered = Steered()
    steered.serve([before], list)
    of = _spanning([5, 25, 15, 28])
    bench.reading.read(before, of)
    assert _waiting(bench) == {"1": [0, 2], "2": [1, 3]}
    after = Schedule(PLANS[2], [0, 20], [PLANS[0], PLANS[2]])
    steered.serve([after], list)
    moved = bench.batcher.withdraw(lambda part: steered.moved(part, after))
    assert sorted(row for part in moved for row in part.rows) == [1, 3]
    bench.reading.again(after, moved)
    assert _waiting(bench) == {"1": [0, 2], "3": [1, 3]}
    assert bench.batcher.rows == 4
    assert not any(steered.moved(part, after) for part in bench.batcher.parts())


def test_a_request_that_the_later_revision_does_not_take_gets_its_error() -> None:
    """It names a version that the abort has taken away."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    before = Schedule(PLANS[1], [0], [PLANS[1]])
    of = chunk([v2([1, 2, 3, 4], [1, 4], model_version="2"), GOOD])
    bench.reading.read(before, of)
    parts = bench.batcher.withdraw(lambda _: True)
    bench.reading.again(Schedule(PLANS[2], [0], [PLANS[2]]), parts)
    assert (_waiting(bench), bench.codes("out")) == ({"3": [1]}, ["E_MODEL_UNKNOWN"])
    assert codes(PLANS[2].decoder.decode(of)) == {0: "E_MODEL_UNKNOWN"}


# Versions that are loaded no longer


def test_a_version_that_is_gone_is_answered_for_by_the_stable_one_of_now() -> None:
    """And the header says so; versions that are still there answer for themselves."""
    now = plan(9, TWO)
    split = (Variant("stable", "1", 50, ((0, 5_000),)), Variant("canary", "2", 50, ((5_000, 10_000),)))
    engines = {key: engine for key, engine in now._engines.items() if key == ("m", "2")}
    past = plan(4, split, engines=engines, instead=now)
    gone, there = past.variants
    assert gone.served == Served("digits", "m", "2", "stable", "4", True)
    assert there.served == Served("digits", "m", "2", "canary", "4", False)
    assert gone.header[1] == (
        b"route=digits;model=m;version=2;variant=stable;revision=4;worker=w-3;fallback=1"
    )
    assert gone.engine is there.engine


# Lanes


def _part(served: Served | None = None) -> Requests:
    return Requests(chunk([GOOD]), [0], ["a"], {"x": np.zeros((1, 4), np.float32)}, served=served)


def test_a_control_slice_has_a_lane_of_its_own() -> None:
    """Riding in the stable version's large batches it would make the canary look slow."""
    made = plan(
        1,
        (
            Variant("stable", "1", 90, ((0, 9_000),)),
            Variant("control", "1", 5, ((9_000, 9_500),)),
            Variant("canary", "2", 5, ((9_500, 10_000),)),
        ),
    )
    roles = [variant.lane(_part()).role for variant in made.variants]
    assert roles == ["primary", "control", "primary"]


# What is remembered


def test_what_old_revisions_called_their_variants_is_forgotten_unless_it_is_open() -> None:
    """The memory is bounded, and never lacks what a request still names."""
    steered = Steered()
    first = plan(1)
    steered.serve([Schedule.always(first)], list)
    part = _part(first.variants[0].served)
    for number in range(2, MOST_SERVED + 50):
        steered.serve([Schedule.always(plan(number))], lambda: [part])
        assert len(steered) <= MOST_SERVED + 1
    assert steered.of(part) == (first, first.variants[0])
    with pytest.raises(LookupError):
        steered.of(_part())
    with pytest.raises(LookupError):
        steered.of(_part(plan(2).variants[0].served))
