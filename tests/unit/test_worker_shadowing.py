"""Shadows inside a worker: what is seen, shed, compared, and not touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.summaries import Comparison
from inferfleet.worker.shadow_plan import USUAL_GOAL_MS
from tests.support.builders import chunk, v2
from tests.support.outlets import route_plan
from tests.unit.shaded import GOOD, NEXT, Shaded
from tests.unit.test_worker_loop import SIGNATURE


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
    value = bench.metrics.registry.get_sample_value
    apart = {"route": "digits", "version": "2", "result": "different"}
    assert value("inferfleet_shadow_rows_total", apart) == 6
    assert value("inferfleet_shadow_rows_total", {**apart, "result": "identical"}) == 0
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
