"""The loop where its parts meet: what a batch became and a brake, a pause and new routes, a lost channel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from inferfleet.config import Config, Retry, Worker
from inferfleet.control.pauses import LocalPauses
from inferfleet.errors import Code
from inferfleet.ports import RefusalKind
from inferfleet.records import (
    Amqp,
    Answer,
    Batch,
    BatchResult,
    Chunk,
    RowFailure,
    Signature,
    Stream,
    TensorSpec,
)
from inferfleet.routes import Destination, Variant
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.telemetry.traces import NO_TRACES, Traces
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful
from inferfleet.worker.engine import Engine, Finished
from inferfleet.worker.loop import LoopOptions, WorkerLoop
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule
from tests.support.builders import chunk, messages, v2
from tests.support.outlets import ScriptedOutlet, delivery, route_plan

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
GOOD = v2([1, 2, 3, 4], [1, 4])
DLT = "digits.requests.inferfleet.default.dlt"
QUEUE = Destination("rabbitmq", "q")


class HeldIntake:
    """An intake that gives out what a test has put in, unless the source is paused."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.settled: dict[Stream, int] = {}
        self.paused: set[str] = set()

    def subscribe(self, sources: Collection[str], listener: Any) -> None:
        self.sources, self.listener = list(sources), listener

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        given = [each for each in self.chunks if each.stream.source not in self.paused]
        self.chunks = [each for each in self.chunks if each not in given]
        return given

    def settle(self, positions: Mapping[Stream, int]) -> None:
        self.settled.update(positions)

    def pause(self, sources: Collection[str]) -> None:
        self.paused |= set(sources)

    def resume(self, sources: Collection[str]) -> None:
        self.paused -= set(sources)

    def lag(self) -> dict[Stream, int]:
        return {}


class Bench:
    """A loop with scripted ends; ``flying`` holds the batches of its engines."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        consecutive: int = 3,
        *,
        traces: Traces = NO_TRACES,
        retries: tuple[int, ...] = (),
        **route: Any,
    ) -> None:
        self.retries = retries
        self.clock = FakeClock()
        self.intake = HeldIntake()
        self.outlet = ScriptedOutlet(at_once=True)
        self.board = LocalPauses()
        self.metrics = PrometheusMetrics()
        brakes = Brakes(self.board, consecutive, 1.0)
        self.delivery = delivery(
            self.outlet, None, self.metrics, self.clock, brakes=brakes, delays_ms=retries
        )
        self.loop = WorkerLoop(
            self.intake,  # type: ignore[arg-type]  # a script of what it takes
            self.outlet,
            None,
            self.delivery,
            brakes,
            Careful(MemoryMarks()),
            SimpleQueue(),
            self.metrics,
            self.clock,
            LoopOptions(1_000, 1 << 20),
            traces,
        )
        self.flying: list[tuple[Engine, Batch]] = []

        def submit(engine: Engine, batch: Batch) -> None:
            engine.in_flight += 1
            self.flying.append((engine, batch))

        monkeypatch.setattr(Engine, "submit", submit)
        self.use(**route)

    def use(self, version: str = "1", **route: Any) -> RoutePlan:
        """Serve the route by this version from now on, and no longer by those before."""
        config = Config(worker=Worker(id="w"), retry=Retry(delays_ms=self.retries))
        variants = (Variant("stable", version, 100, ((0, 10_000),)),)
        plan = route_plan(SIGNATURE, variants=variants, config=config, **route)
        self.loop.use([Schedule.always(plan)])
        self.loop.engines.watch(plan.variants[0].engine)
        return plan

    def take(self, of: Chunk) -> None:
        """Let a chunk arrive and its requests be given to an engine."""
        self.loop.assigned([of.stream])
        self.intake.chunks.append(of)
        self.turn()

    def turn(self) -> None:
        for _ in range(3):
            self.clock.advance(0.6)
            self.loop.turn(0.0)

    def end(self, *, value: float = 0.0, fails: bool = False, retryable: bool = False) -> Batch:
        """Let the oldest batch end, with this value in all answers, or by failing each request alone."""
        engine, batch = self.flying.pop(0)
        result = BatchResult(batch)
        for part in batch.parts:
            if fails:
                singles = [part.slice(i, i + 1) for i in range(len(part))]
                result.failures += [RowFailure(each, Code.MODEL, "no", retryable) for each in singles]
            else:
                array = np.full((part.total_rows, 2), value, np.float32)
                result.answers.append(Answer(part, {"y": array}))
        self.loop._finished(self.loop.engines.finished(Finished(engine, result)))
        return batch

    def codes(self, destination: str) -> list[str]:
        return [(each.header("inferfleet-code") or b"ok").decode() for each in self.outlet.to(destination)]


@pytest.mark.parametrize("how", ["raises", "answers NaN"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_is_of_no_use_stops_its_route(
    how: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails or answers what is none: fewer than three in a row are buried, nothing else is."""
    bench = Bench(monkeypatch)
    for first in range(0, 6, size):
        bench.take(chunk([GOOD] * size, first=first))
        if bench.flying:
            bench.end(fails=how == "raises", value=float("nan"))
    assert len(bench.codes(DLT)) == 2
    assert bench.codes("out") == bench.codes(DLT)
    bench.turn()
    assert list(bench.loop.held) == ["digits"]
    assert bench.intake.paused == {"digits.requests"}


def test_bad_answers_beside_good_ones_stop_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its error, and the route goes on."""
    bench = Bench(monkeypatch)
    bench.take(chunk([GOOD] * 6))
    engine, batch = bench.flying.pop(0)
    (part,) = batch.parts
    array = np.zeros((6, 2), np.float32)
    array[1:] = np.nan
    result = BatchResult(batch, [Answer(part, {"y": array})])
    bench.loop._finished(bench.loop.engines.finished(Finished(engine, result)))
    assert sorted(bench.codes("out")) == ["E_MODEL_OUTPUT"] * 5 + ["ok"]
    assert bench.board.current() == {}


def test_a_route_that_is_rolled_back_and_resumed_answers_what_it_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the version that serves now; the one that failed is unloaded."""
    bench = Bench(monkeypatch, version="2")
    of = chunk([GOOD] * 5)
    bench.take(of)
    bad, _ = bench.flying[0]
    bench.end(fails=True)
    bench.turn()
    assert (of.open, list(bench.loop.held)) == (5, ["digits"])
    bench.use("1")
    bench.loop.engines.forget(bad)
    bench.turn()
    assert bench.flying == []
    bench.board.resume("digits")
    bench.turn()
    assert bench.end().lane.version == "1"
    bench.turn()
    assert bench.codes("out") == ["ok"] * 5
    assert bench.intake.settled == {of.stream: 105}
    assert (bench.loop.held, bench.intake.paused) == ({}, set())


def test_what_stayed_open_without_a_route_is_answered_when_one_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The group may not have noticed that it was gone: without an end of its stream nobody else takes it."""
    bench = Bench(monkeypatch, consecutive=3)
    held, late = chunk([GOOD] * 4), chunk([GOOD] * 2, first=104)
    bench.take(held)
    bench.end(fails=True)
    bench.loop.use([])
    bench.board.resume("digits")
    bench.turn()
    bench.loop._reading.read(None, late)
    bench.use("2")
    bench.turn()
    while bench.flying:
        bench.end()
        bench.turn()
    assert (bench.codes("out"), bench.loop.open) == (["ok"] * 6, 0)
    assert bench.intake.settled == {held.stream: 106}
    assert bench.loop.admission.rows == 0


def test_a_drain_does_not_wait_for_what_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody resumes a worker that ends: its records are given back."""
    bench = Bench(monkeypatch)
    of = chunk([GOOD] * 5)
    bench.take(of)
    bench.end(fails=True)
    began = bench.clock.monotonic()
    assert bench.loop.drain(30.0) == 5
    assert bench.clock.monotonic() == began


def test_only_what_was_told_counts_as_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that comes for a channel that is gone settles nothing when the message comes again."""
    bench = Bench(monkeypatch, source=QUEUE, results=["rabbitmq:x/y"])
    bench.outlet.at_once = False
    first = messages([GOOD], [Amqp(message_id="a")])
    bench.take(first)
    bench.end()
    bench.loop._draining = True  # then nothing is remembered of a channel that goes
    bench.loop.lost([first.stream])
    bench.loop._draining = False
    bench.outlet.refusing["rabbitmq:x/y"] = RefusalKind.LATER
    bench.outlet.confirm_all()
    bench.outlet.refusing.clear()
    again = messages([GOOD], [Amqp(message_id="a", redelivered=True)], stream=Stream("rabbitmq:q", 2))
    bench.take(again)
    assert again.open == 1
    bench.end()
    bench.outlet.confirm_all()
    assert bench.codes("rabbitmq:x/y") == ["ok"]
    assert again.open == 0


def test_a_message_that_comes_again_while_it_runs_is_acknowledged_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run, one outcome; the acknowledgement names the channel that stands."""
    bench = Bench(monkeypatch, source=QUEUE, results=["rabbitmq:x/y"])
    first = messages([GOOD] * 2, [Amqp(message_id="a"), Amqp(message_id="b")])
    bench.take(first)
    bench.loop.lost([first.stream])
    assert bench.loop.admission.rows == 0
    amqp = [Amqp(message_id=name, redelivered=True) for name in ("a", "b")]
    again = messages([GOOD] * 2, amqp, stream=Stream("rabbitmq:q", 2))
    bench.take(again)
    assert len(bench.flying) == 1
    bench.end()
    bench.turn()
    assert bench.codes("rabbitmq:x/y") == ["ok", "ok"]
    assert bench.intake.settled == {again.stream: 3}
    assert (bench.loop.open, bench.loop.admission.rows) == (0, 0)


def test_each_station_and_every_record_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunk, batch and part: where the time of requests went, whose they were, and which were too slow."""
    bench = Bench(monkeypatch, goal_p99_ms=1)
    bench.take(chunk([GOOD, GOOD, b"no"], timestamp_ms=bench.clock.utc_ms() - 5))
    bench.end()
    bench.turn()

    def value(name: str, **labels: str) -> float | None:
        return bench.metrics.registry.get_sample_value(f"inferfleet_{name}", labels)

    stages = {"take": 1, "read": 1, "gather": 1, "predict": 1, "write": 1, "hand_over": 2, "settle": 1}
    assert {stage: value("stage_seconds_count", stage=stage) for stage in stages} == stages
    assert value("records_total", route="digits") == 3
    answered = {"route": "digits", "version": "1", "variant": "stable"}
    assert value("request_seconds_count", **answered) == 2
    assert value("requests_over_goal_total", **answered) == 2
    assert value("request_seconds_count", route="digits", version="", variant="") == 1
    bench.loop.gauges()
    assert value("streams", route="digits") == 1
    assert value("route_goal_seconds", route="digits") == 0.001


def test_what_can_wait_no_longer_is_not_shown_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that has left keeps no number for ever, and a route that has gone is not shown as resumed."""
    bench = Bench(monkeypatch)

    def shown(name: str, **labels: str) -> float | None:
        return bench.metrics.registry.get_sample_value(f"inferfleet_{name}", labels)

    model = bench.use().variants[0].served.model
    bench.loop.gauges()
    assert shown("queue_rows", model=model, version="1", role="primary") == 0.0
    bench.use("2")
    bench.loop.gauges()
    assert shown("queue_rows", model=model, version="1", role="primary") is None
    assert shown("queue_rows", model=model, version="2", role="primary") == 0.0

    name = bench.use("2").name
    bench.loop.held = {name: "somebody"}
    bench.loop.use([])
    bench.metrics.routes({})
    bench.loop._hold(bench.clock.monotonic())
    assert shown("route_paused", route=name) is None
