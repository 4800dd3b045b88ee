"""Shadows inside a worker and the windows that tell of them: what is seen, shed, compared, not touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.config import Config, Retry, Worker
from inferfleet.errors import Code
from inferfleet.plane import WorkerReport
from inferfleet.records import Answer, Array, Batch, BatchResult, Chunk, Origin, Requests, RowFailure, Served
from inferfleet.routes import Shadow, Variant
from inferfleet.summaries import Comparison, Window, decode_window, encode_window
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.engine import Engine, Finished
from inferfleet.worker.observing import FirstSeen, Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.shadow_plan import USUAL_GOAL_MS
from tests.support.builders import chunk, v2
from tests.support.outlets import route_plan
from tests.unit.test_worker_loop import SIGNATURE, Bench

NEXT = Shadow("next", "2", 1.0, 0.0)
VARIANTS = (Variant("stable", "1", 50, ((0, 5_000),)), Variant("canary", "3", 50, ((5_000, 10_000),)))
GOOD = v2([1, 2, 3, 4], [1, 4])


class Told:
    """A reporter that keeps what it was told, as it would be stored."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.dropped = 0

    def heartbeat(self, report: WorkerReport) -> None:
        """Nobody asks here."""

    def append(self, windows: Sequence[Window]) -> None:
        self.windows += [decode_window(encode_window(window)) for window in windows]

    def close(self) -> None:
        """Nothing is open."""

    def of(self, role: str, version: str) -> Window:
        (window,) = [each for each in self.windows if (each.role, each.version) == (role, version)]
        return window


class Shaded(Bench):
    """A loop whose route has a shadow; answers of versions come from a table."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *shadows: Shadow,
        reports: bool = True,
        crashed: bool = False,
        every_s: float = 1e9,
        **route: Any,
    ) -> None:
        self.shadows = shadows or (NEXT,)
        self.told = Told()
        self._reports, self._crashed, self._every_s = reports, crashed, every_s
        super().__init__(monkeypatch, **route)

    def use(self, version: str = "1", **route: Any) -> RoutePlan:
        config = Config(worker=Worker(id="w"), retry=Retry(delays_ms=()))
        variants = route.pop("variants", (Variant("stable", version, 100, ((0, 10_000),)),))
        plan = route_plan(SIGNATURE, variants=variants, config=config, shadows=self.shadows, **route)
        if self._reports:
            observing = Observing("w", self.told, self.clock, self._every_s, crashed=self._crashed)
            self.loop.observing = self.loop.shadowing.observing = observing
        self.loop.use([Schedule.always(plan)])
        for engine in {each.engine for each in (*plan.variants, *plan.shadows)}:
            self.loop.engines.watch(engine)
        self.plan = plan
        return plan

    def take(self, of: Chunk) -> None:
        """Let a further chunk of a stream arrive, and its requests be given to an engine."""
        if of.stream not in self.loop.ledger.streams:
            self.loop.assigned([of.stream])
        self.intake.chunks.append(of)
        for _ in range(3):
            self.clock.advance(0.6)
            self.loop.turn(0.0)

    def finish(
        self, value: float | Array = 0.0, *, fails: bool = False, seconds: float = 0.01, width: int = 2
    ) -> Batch:
        """Let the oldest batch end, as the device thread would tell it."""
        engine, batch = self.flying.pop(0)
        result = BatchResult(batch, seconds=seconds)
        at = 0
        for part in batch.parts:
            if fails:
                singles = [part.slice(i, i + 1) for i in range(len(part))]
                result.failures += [RowFailure(each, Code.MODEL, "no") for each in singles]
                continue
            outputs = np.broadcast_to(np.asarray(value, np.float32), (batch.rows, width))
            result.answers.append(Answer(part, {"y": outputs[at : at + part.total_rows].copy()}))
            at += part.total_rows
        self.loop._news.put(Finished(engine, result))
        self.loop.turn(0.0)
        return batch

    def close(self) -> None:
        assert self.loop.observing is not None
        self.loop.observing.close()

    def rest(self, value: float = 0.0) -> None:
        """Let everything run to its end."""
        for _ in range(10_000):
            if not self.flying and not self.loop.shadowing.ready:
                return
            self.turn()
            if self.flying:
                self.finish(value)
        raise AssertionError("it does not come to rest")


def test_what_was_answered_runs_again_as_a_shadow_and_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD] * 6))
    assert [batch.lane.role for _, batch in bench.flying] == ["primary"]
    bench.finish([1.0, 3.0])
    assert len(bench.outlet.to("out")) == 6
    roles = set()
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        roles.add(bench.finish([1.0, 9.0]).lane.role)
    assert roles == {"shadow"}
    bench.close()
    shadow = bench.told.of("shadow", "2")
    assert (shadow.variant, shadow.seen, shadow.shed, shadow.requests) == ("next", 6, 0, 6)
    assert shadow.comparison is not None
    assert (shadow.comparison.pairs, shadow.comparison.different) == (6, 6)
    assert len(bench.outlet.sent) == 6
    assert bench.told.of("primary", "1").codes == {"ok": 6}


def test_a_shadow_waits_while_any_request_waits_or_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD] * 2))
    bench.take(chunk([GOOD] * 2, first=10))
    bench.finish()
    bench.loop.turn(0.0)
    assert [batch.lane.role for _, batch in bench.flying] == ["primary"]
    bench.finish()
    assert [batch.lane.role for _, batch in bench.flying] == ["shadow"]


def test_a_request_that_comes_meanwhile_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shadow that never ends is given nothing more, and holds up nobody and no drain."""
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD]))
    bench.finish()
    bench.turn()
    hung = bench.flying.pop()
    assert hung[1].lane.role == "shadow"
    for first in range(10, 2_000, 10):
        bench.take(chunk([GOOD] * 10, first=first))
        assert [batch.lane.role for _, batch in bench.flying] == ["primary"]
        bench.finish()
    assert len(bench.outlet.to("out")) == 1 + 1_990
    assert not bench.loop.shadowing.busy(bench.clock.monotonic())
    assert bench.loop.drain(5.0) == 0


def test_a_shadow_that_fails_is_counted_and_that_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    for first in range(0, 100, 10):
        bench.take(chunk([GOOD] * 10, first=first))
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        bench.finish(fails=bench.flying[0][1].lane.role == "shadow")
    bench.close()
    shadow = bench.told.of("shadow", "2")
    assert shadow.codes == {"E_MODEL": 100}
    assert shadow.failures.events == 100
    assert shadow.comparison is not None
    assert shadow.comparison.pairs == 0
    assert bench.loop.held == {}
    assert {each.destination for each in bench.outlet.sent} == {"out"}
    value = bench.metrics.registry.get_sample_value
    labels = {"route": "digits", "version": "2", "outcome": "E_MODEL"}
    assert value("inferfleet_shadow_requests_total", labels) == 100


def test_its_batches_grow_to_a_tenth_of_the_goal_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """One millisecond a row, and a goal of 200 ms: 20 rows."""
    bench = Shaded(monkeypatch, goal_p99_ms=200.0, max_batch_size=500)
    bench.take(chunk([GOOD] * 500))
    bench.finish()
    sizes = []
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        sizes.append(bench.finish(seconds=bench.flying[0][1].rows / 1_000).rows)
    assert sizes[:4] == [1, 2, 4, 8]
    assert max(sizes) <= 20
    assert sum(sizes) == 500
    assert sum(sizes[:10]) > 90


def test_one_that_is_slower_than_its_share_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    assert bench.plan.shadows[0].cap_s == pytest.approx(USUAL_GOAL_MS / 10_000)
    bench.take(chunk([GOOD] * 5))
    bench.finish()
    sizes = []
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        sizes.append(bench.finish(seconds=0.5).rows)
    assert sizes == [1] * 5


def test_what_finds_no_room_is_shed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.loop.shadowing._max_rows = 8
    bench.take(chunk([GOOD] * 5))
    bench.take(chunk([GOOD] * 5, first=10))
    bench.take(chunk([GOOD] * 5, first=20))
    for _ in range(3):
        bench.finish()
        if bench.flying and bench.flying[0][1].lane.role == "shadow":
            bench.flying.append(bench.flying.pop(0))
    bench.rest()
    bench.close()
    shadow = bench.told.of("shadow", "2")
    assert (shadow.seen, shadow.requests + shadow.shed) == (15, 15)
    assert shadow.shed >= 6


def test_a_sample_is_by_key_and_its_own_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.25))
    keys: list[bytes | None] = [b"k%d" % i for i in range(400)]
    bench.take(chunk([GOOD] * 400, keys=keys))
    bench.rest()
    bench.close()
    shadow = bench.told.of("shadow", "2")
    assert shadow.seen == len(bench.plan.shadows[0].sample([key or b"" for key in keys]))
    assert 60 < shadow.seen < 140


def test_a_share_runs_again_on_the_version_that_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """So its own noise is known, and McNemar's counts have something to stand for the label."""
    bench = Shaded(monkeypatch, NEXT._replace(secondary=0.5))
    bench.take(chunk([GOOD] * 20))
    bench.finish([1.0, 0.0])
    seen: dict[str, int] = {}
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        lane = bench.flying[0][1].lane
        seen[lane.role] = seen.get(lane.role, 0) + bench.flying[0][1].rows
        assert lane.version == ("2" if lane.role == "shadow" else "1")
        bench.finish([0.0, 1.0] if lane.role == "shadow" else [1.0, 0.0])
    bench.close()
    window = bench.told.of("shadow", "2")
    assert seen == {"shadow": 20, "secondary": 10}
    assert window.secondary is not None
    assert window.comparison is not None
    assert (window.secondary.pairs, window.secondary.identical) == (10, 10)
    assert (window.comparison.pairs, window.comparison.hard_flips) == (20, 20)
    assert (window.comparison.right_wrong, window.comparison.wrong_right) == (10, 0)


def test_requests_whose_own_answer_was_refused_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD] * 4))
    values = np.zeros((4, 2), np.float32)
    values[1] = np.nan
    bench.finish(values)
    bench.rest()
    bench.close()
    assert bench.told.of("shadow", "2").seen == 3


def test_a_chunk_that_was_taken_away_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    of = chunk([GOOD] * 4)
    bench.take(of)
    bench.loop.lost([of.stream])
    bench.finish()
    assert not bench.loop.shadowing.ready


def test_what_waits_for_a_shadow_keeps_nothing_else_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of four rows would hold on to the chunk's other ninety-six, which no bound counts."""
    bench = Shaded(monkeypatch, max_batch_size=4)
    bench.loop.shadowing._max_rows = 4
    bench.take(chunk([GOOD] * 100))
    bench.finish()
    (waiting,) = bench.loop.shadowing._queues.values()
    arrays = [*waiting[0].part.tensors.values(), *waiting[0].outputs.values()]
    assert [(len(array), array.base) for array in arrays] == [(4, None), (4, None)]


def test_a_shadow_whose_answers_change_their_shape_ends_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(secondary=1.0))
    bench.take(chunk([GOOD] * 40))
    bench.finish()
    widths = [2, 3, 0] * 40
    while bench.flying or bench.loop.shadowing.ready:
        bench.turn()
        batch = bench.flying[0][1]
        if batch.lane.role == "shadow":
            bench.finish(width=widths.pop(), seconds=0.0001)
        else:  # slower, so that its batches span several of the shadow's
            bench.finish(seconds=0.003 * batch.rows)
    bench.close()
    window = bench.told.of("shadow", "2")
    assert window.comparison is not None
    assert window.secondary is not None
    assert (window.requests, window.comparison.pairs, window.secondary.pairs) == (40, 40, 40)


def test_a_comparison_that_fails_ends_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a shadow answers: the next batch of the primary is answered."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("no such shape")

    bench = Shaded(monkeypatch)
    monkeypatch.setattr(bench.plan.shadows[0].comparer, "compare", fails)
    bench.take(chunk([GOOD] * 4))
    bench.rest()
    bench.take(chunk([GOOD] * 4, first=200))
    bench.rest()
    bench.close()
    assert bench.codes("out") == ["ok"] * 8
    assert bench.told.of("shadow", "2").requests == 8


def test_a_version_that_was_unloaded_meanwhile_sees_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD] * 4))
    bench.loop.engines.forget(bench.plan.shadows[0].engine)
    bench.finish()
    bench.turn()
    bench.close()
    assert bench.flying == []
    assert bench.told.of("shadow", "2").shed == 4


def test_a_drain_waits_for_no_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD] * 4))
    bench.finish()
    began = bench.clock.monotonic()
    assert bench.loop.drain(30.0) == 0
    assert bench.clock.monotonic() == began
    shadow = bench.told.of("shadow", "2")
    assert shadow.seen == 4
    assert shadow.shed >= 3


def test_without_a_reporter_shadows_run_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, reports=False)
    bench.take(chunk([GOOD] * 4))
    bench.rest()
    labels = {"route": "digits", "version": "2", "outcome": "ok"}
    assert bench.metrics.registry.get_sample_value("inferfleet_shadow_requests_total", labels) == 4
    assert bench.told.windows == []


def test_a_shadow_of_other_inputs_is_left_out_and_its_route_is_served() -> None:
    inputs = (SIGNATURE.inputs[0]._replace(shape=(5,)),)
    signatures = {"2": type(SIGNATURE)(inputs, SIGNATURE.outputs)}
    plan = route_plan(SIGNATURE, shadows=(NEXT,), signatures=signatures)
    assert plan.shadows == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 20), st.data())
def test_every_request_is_seen_once_and_compared_with_its_own_answer(
    sizes: list[int], room: int, data: st.DataObject
) -> None:
    """Whatever the sizes of chunks and of batches: nothing is lost, nothing shifts."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Shaded(patch, NEXT._replace(secondary=0.3), max_batch_size=data.draw(st.integers(1, 9)))
        bench.loop.shadowing._max_rows = room
        first = 0
        for size in sizes:
            bodies = [v2([float(first + i), 0, 0, 0], [1, 4]) for i in range(size)]
            bench.take(chunk(bodies, first=first))
            first += size
        while bench.flying or bench.loop.shadowing.ready:
            if not bench.flying:
                bench.turn()
                continue
            which = data.draw(st.integers(0, len(bench.flying) - 1))
            bench.flying.insert(0, bench.flying.pop(which))
            numbers = bench.flying[0][1].tensors()["x"][:, :1]
            bench.finish(np.concatenate([numbers, numbers + 1], axis=1))
        bench.close()
        shadow = bench.told.of("shadow", "2")
        found = shadow.comparison or Comparison()
        assert shadow.seen == sum(sizes) == shadow.shed + shadow.requests
        assert found.pairs == found.identical == shadow.requests
        if shadow.secondary is not None:
            assert shadow.secondary.identical == shadow.secondary.pairs
        assert len(bench.outlet.to("out")) == sum(sizes)
        assert bench.loop.shadowing._rows == bench.loop.shadowing._bytes == 0


# Windows of those that answer


def test_a_window_counts_what_became_of_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001))
    bench.take(chunk([GOOD] * 8 + [b"{"]))
    engine, batch = bench.flying.pop(0)
    (part,) = batch.parts
    values = np.zeros((6, 2), np.float32)
    values[0] = np.inf
    answered = [Answer(part.slice(0, 6), {"y": values})]
    failed = [RowFailure(part.slice(i, i + 1), Code.MODEL, "no") for i in (6, 7)]
    bench.loop._news.put(Finished(engine, BatchResult(batch, answered, failed, seconds=0.8)))
    bench.turn()
    bench.close()
    window = bench.told.of("primary", "1")
    assert window.codes == {"ok": 5, "E_MODEL_OUTPUT": 1, "E_MODEL": 2}
    assert (window.requests, window.dead_letters, window.invalid) == (8, 3, 1)
    assert (window.batches, window.rows, window.compute_s) == (1, 8, pytest.approx(0.8))
    assert (window.failures.clusters, window.failures.trials, window.failures.events) == (1, 8, 3)
    assert len(window.compute) == len(window.latency) == 8
    assert window.compute.quantile(0.5) == pytest.approx(0.1, rel=0.05)
    assert window.bad_ms is not None
    assert (window.worker, window.route, window.variant, window.revision) == ("w", "digits", "stable", 17)
    unread = bench.told.of("primary", "")
    assert unread.codes == {"E_DECODE": 1}


def test_a_request_that_fails_again_and_again_has_failed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its delayed attempts would else be one more failure, and a few such requests a bad version."""
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    bench.take(chunk([GOOD] * 4))
    again = chunk([GOOD] * 4, first=200)
    again.origins = [Origin("digits.requests", 0, 100 + i, 0, 2) for i in range(4)]
    bench.take(again)
    while bench.flying:
        bench.finish(fails=True)
    bench.close()
    arms = [each for each in bench.told.windows if each.role == "primary"]
    assert sum(each.failures.trials for each in arms) == sum(each.failures.events for each in arms) == 4
    assert sum(bad for each in arms for _, bad in each.key_groups.values()) == 4
    assert sum(each.rows for each in arms) == 8


def test_windows_are_handed_on_when_their_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), every_s=5.0)
    bench.take(chunk([GOOD]))
    bench.finish()
    assert bench.told.windows == []
    bench.clock.advance(5.0)
    bench.loop.turn(0.0)
    assert [each.requests for each in bench.told.windows] == [1]
    first = bench.told.windows[0]
    assert first.start_ms < first.end_ms
    bench.clock.advance(5.0)
    bench.loop.turn(0.0)
    assert len(bench.told.windows) == 1


def test_after_a_crash_every_version_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, crashed=True, variants=VARIANTS)
    found = {(each.version, each.role, each.crash) for each in bench.told.windows}
    assert found == {("1", "primary", True), ("3", "primary", True), ("2", "shadow", True)}
    bench.take(chunk([GOOD] * 4))
    while bench.flying:
        bench.finish()
    bench.close()
    assert not any(each.crash for each in bench.told.windows[3:])


def test_keys_count_once_for_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    keys: list[bytes | None] = [b"k%d" % (i % 50) for i in range(200)]
    for first in (0, 1_000):
        bench.take(chunk([GOOD] * 200, keys=keys, first=first))
        while bench.flying:
            bench.finish()
    bench.close()
    seen = [each for each in bench.told.windows if each.role == "primary"]
    assert sum(each.first_seen for each in seen) == 50
    assert {each.variant for each in seen} == {"stable", "canary"}
    assert sum(each.requests for each in seen) == 400
    assert all(sum(n for n, _ in each.key_groups.values()) == each.requests for each in seen)
    assert {bad for each in seen for _, bad in each.key_groups.values()} == {0}


def test_keys_count_when_they_are_taken_and_not_when_they_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches are of one version each: half-way through a burst one arm would look larger than its share."""
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    keys: list[bytes | None] = [b"k%d" % i for i in range(200)]
    bench.take(chunk([GOOD] * 200, keys=keys))
    bench.close()
    early = list(bench.told.windows)
    assert sum(each.first_seen for each in early) == 200
    assert sum(each.requests for each in early) == 0
    while bench.flying:
        bench.finish()
    bench.close()
    assert sum(each.first_seen for each in bench.told.windows) == 200
    assert sum(each.requests for each in bench.told.windows if each.role == "primary") == 200


def test_late_records_of_old_revisions_make_no_new_keys_of_the_newest() -> None:
    """Else what is split as planned looks as if it were not: the same keys count again and again."""
    told = Told()
    observing = Observing("w", told, FakeClock(), 1e9)
    plan = route_plan(SIGNATURE, variants=VARIANTS)
    of = chunk([GOOD] * 20)
    tensors = {"x": np.zeros((1, 4), np.float32)}
    for _ in range(3):
        for revision in ("9", "5", "6", "7", "8"):
            served = plan.variants[0].served._replace(revision=revision)
            parts = [Requests(of, [row], [f"r{row}"], tensors, served=served) for row in range(20)]
            batch = Batch(plan.variants[0].lane(parts[0]), parts, 20)
            for part in parts:
                observing.came(plan, part)
            observing.batch(BatchResult(batch), (), lambda _part: (plan, plan.variants[0]))
    observing.close()
    assert {each.revision: each.first_seen for each in told.windows if each.revision > 6} == {
        7: 20,
        8: 20,
        9: 20,
    }
    assert all(sum(n for n, _ in each.key_groups.values()) == 60 for each in told.windows)


def test_all_arms_stop_counting_keys_at_once() -> None:
    """One that went on would look larger than its share."""
    seen = FirstSeen(bound=10)
    stable, canary = (Served("r", "m", version, "v", "1") for version in ("1", "2"))
    assert seen.met(stable, range(9)) == 9
    assert seen.met(canary, [1, 2, 1]) == 2
    assert seen.full
    assert seen.met(canary, [3]) == seen.met(stable, [99]) == 0


def test_engines_know_which_batches_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD]))
    bench.finish()
    bench.turn()
    engine: Engine = bench.flying[0][0]
    assert (engine.in_flight, engine.aside, bench.loop.engines.running) == (1, 1, False)
    bench.finish()
    assert (engine.in_flight, engine.aside) == (0, 0)
