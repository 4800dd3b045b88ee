"""A detached shadow: joined with the primary by id, in whatever order, and invisible to everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.errors import Code, ConfigError
from inferfleet.ports import Heard, OutcomeFeed
from inferfleet.records import Answer, BatchResult, Requests, RowFailure
from inferfleet.routes import Variant
from inferfleet.summaries import Comparison
from inferfleet.wire.encode import AnswerWriter, error_body
from inferfleet.worker.detached import Detached
from inferfleet.worker.engine import Finished
from inferfleet.worker.observing import Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.settling import Settling
from tests.support.builders import chunk, v2
from tests.support.outlets import route_plan
from tests.unit.shaded import Shaded
from tests.unit.test_worker_loop import GOOD, SIGNATURE, Bench

WRITER = AnswerWriter("m", "1", SIGNATURE)


class Feed:
    """Outcomes that come when a test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.coming: list[Heard] = []
        self.closed = False
        self.waited = True

    def ask(self, ids: Sequence[str]) -> None:
        self.asked += ids

    def poll(self) -> list[Heard]:
        found, self.coming = self.coming, []
        return found

    def close(self, *, wait: bool = True) -> None:
        self.closed = True
        self.waited = wait

    def tell(self, *answers: tuple[str, float]) -> None:
        """Let the primary have answered these with these values."""
        for request_id, value in answers:
            part = Requests(chunk([b"{}"]), [0], [request_id], {})
            (body,) = WRITER.json_bodies(Answer(part, {"y": np.full((1, 2), value, np.float32)}))
            self.coming.append(Heard([request_id], [body], [None]))


class Apart(Shaded):
    """A worker of the shadow's pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 1_000, **route: Any) -> None:
        self.feed = Feed()
        self.opened: list[str] = []
        self.place = "topic"
        self._most = most
        super().__init__(monkeypatch, **route)

    def use(self, version: str = "1", **route: Any) -> RoutePlan:
        variants = (Variant("stable", "2", 100, ((0, 10_000),)),)
        plan = route_plan(SIGNATURE, variants=variants, results=(), shadow_of="primary", **route)
        detached = self.delivery.detached = Detached(
            self._open, self.metrics, self.clock, place=lambda _: self.place, most=self._most
        )
        observing = Observing("w", self.told, self.clock, 1e9)
        self.loop.observing = detached.observing = observing
        self.loop.use([Schedule.always(plan)])
        self.loop.engines.watch(plan.variants[0].engine)
        detached.serve([plan])
        self.detached = detached
        self.plan = plan
        return plan

    def _open(self, name: str) -> OutcomeFeed:
        self.opened.append(name)
        return self.feed


def test_pairs_are_joined_by_id_and_their_records_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Apart(monkeypatch)
    of = chunk([v2([1, 2, 3, 4], [1, 4])] * 3)
    bench.take(of)
    bench.finish(1.0)
    ids = [bench.detached._joins["digits"].mine[0].answer.part.ids[i] for i in range(3)]
    assert bench.opened == ["primary"]
    assert set(bench.feed.asked) == set(ids)
    assert of.open == 3
    bench.feed.tell((ids[0], 1.0), (ids[2], 2.0))
    bench.turn()
    assert of.open == 3
    bench.feed.tell((ids[1], 1.0))
    bench.turn()
    assert of.open == 0
    bench.close()
    window = bench.told.of("shadow", "2")
    assert (window.route, window.variant, window.seen, window.unmatched) == ("primary", "digits", 3, 0)
    assert window.comparison is not None
    assert (window.comparison.pairs, window.comparison.identical, window.comparison.different) == (3, 2, 1)
    value = bench.metrics.registry.get_sample_value
    labels = {"route": "primary", "version": "2", "result": "different"}
    assert value("inferfleet_shadow_rows_total", labels) == 1
    assert window.codes == {"ok": 3}
    assert (window.batches, window.failures.trials) == (1, 3)
    assert bench.outlet.sent == []
    assert len(bench.told.windows) == 1


def test_whose_partner_does_not_come_is_counted_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Apart(monkeypatch)
    of = chunk([v2([1, 2, 3, 4], [1, 4])] * 2)
    bench.take(of)
    bench.finish()
    for _ in range(40):
        bench.turn()
    assert of.open == 0
    bench.close()
    assert bench.told.of("shadow", "2").unmatched == 2
    labels = {"route": "primary", "version": "2", "outcome": "unmatched"}
    assert bench.metrics.registry.get_sample_value("inferfleet_shadow_requests_total", labels) == 2


def test_an_error_of_the_primary_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Apart(monkeypatch)
    of = chunk([v2([1, 2, 3, 4], [1, 4])])
    bench.take(of)
    bench.finish()
    (request_id,) = bench.detached._joins["digits"].by_id
    bench.feed.coming.append(Heard([request_id], [error_body("no", Code.MODEL, request_id)], [None]))
    bench.turn()
    bench.close()
    window = bench.told.of("shadow", "2")
    assert (window.primary_errors, window.unmatched) == (1, 0)
    assert window.comparison is not None
    assert window.comparison.pairs == 0
    assert of.open == 0


def test_failures_of_the_shadow_are_counted_and_told_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dead letter, no retry, no brake: also what cannot be read is the primary's to refuse."""
    bench = Apart(monkeypatch)
    for first in range(0, 60, 20):
        of = chunk([v2([1, 2, 3, 4], [1, 4])] * 19 + [b"{"], first=first)
        bench.take(of)
        engine, batch = bench.flying.pop(0)
        singles = [part.slice(i, i + 1) for part in batch.parts for i in range(len(part))]
        failures = [RowFailure(each, Code.MODEL, "no", retryable=True) for each in singles]
        bench.loop._news.put(Finished(engine, BatchResult(batch, [], failures)))
        bench.turn()
        assert of.open == 0
    bench.close()
    assert bench.outlet.sent == []
    assert bench.loop.held == {}
    window = bench.told.of("shadow", "2")
    assert window.codes == {"E_MODEL": 57}
    assert window.failures.events == 57


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are given up for the newer, so that a primary that is away stops no shadow."""
    bench = Apart(monkeypatch, most=10)
    chunks = [chunk([v2([1, 2, 3, 4], [1, 4])] * 5, first=first) for first in range(0, 50, 5)]
    for of in chunks:
        bench.take(of)
        bench.finish()
        bench.turn()
    assert [of.open for of in chunks] == [0] * 8 + [5] * 2


def test_partners_that_do_not_come_keep_no_worker_from_taking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shadow that lags by more than outcomes are kept would else take one fill of its memory a minute."""
    bench = Apart(monkeypatch)
    large = chunk([GOOD + b" " * 200_000] * 6)
    bench.take(large)
    bench.finish(1.0)
    assert (bench.loop.admission.full, large.open) == (True, 6)
    until = bench.clock.monotonic() + 10
    while bench.loop.admission.full and bench.clock.monotonic() < until:
        bench.turn()
    assert large.open < 6
    bench.take(chunk([GOOD], first=200))
    assert len(bench.flying) == 1


def test_a_drain_waits_for_no_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Apart(monkeypatch)
    bench.take(chunk([v2([1, 2, 3, 4], [1, 4])] * 5))
    bench.finish()
    began = bench.clock.monotonic()
    assert bench.loop.drain(30.0) == 0
    assert bench.clock.monotonic() == began


def test_a_primary_that_cannot_be_followed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> OutcomeFeed:
        bench_opened.append(name)
        raise ConfigError("no route is named so")

    bench_opened: list[str] = []
    bench = Bench(monkeypatch)
    detached = Detached(refuse, bench.metrics, bench.clock)
    plan = route_plan(SIGNATURE, results=(), shadow_of="primary")
    detached.serve([plan])
    for _ in range(12):
        bench.clock.advance(1.0)
        detached.poll(bench.clock.monotonic())
    assert len(bench_opened) == 3


def test_two_shadows_of_one_primary_take_nothing_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On RabbitMQ one pool may hold both, each with a queue of its own: the same ids come to either."""
    bench = Bench(monkeypatch)
    feeds: list[Feed] = []

    def follow(_name: str) -> OutcomeFeed:
        feeds.append(Feed())
        return feeds[-1]

    detached = Detached(follow, bench.metrics, bench.clock)
    plan = route_plan(SIGNATURE, results=(), shadow_of="primary")
    other = route_plan(SIGNATURE, results=(), shadow_of="primary")
    other.name = "other"
    ended: list[Settling] = []
    bench.delivery.on_settled = ended.append
    for each in (plan, other):
        of = chunk([GOOD])
        part = Requests(of, [0], ["same"], {}, served=each.variants[0].served)
        answer = Answer(part, {"y": np.ones((1, 2), np.float32)})
        settling = Settling(bench.delivery, each, of, [0], {}, ["same"], part.served)
        detached.answered(each, answer, settling)
    for feed in feeds:
        feed.tell(("same", 1.0))
    detached.poll(bench.clock.monotonic())
    assert {settling.plan.name for settling in ended} == {"digits", "other"}


def test_a_shadow_that_goes_hears_nobody_and_keeps_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Apart(monkeypatch)
    of = chunk([GOOD])
    bench.take(of)
    bench.finish(1.0)
    assert of.open == 1
    bench.detached.serve([])
    assert (of.open, bench.feed.closed, bench.detached._joins) == (0, True, {})


def test_answers_that_go_elsewhere_from_now_on_are_heard_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary's results were changed; the shadow's own route was not."""
    bench = Apart(monkeypatch)
    before = bench.feed
    bench.detached.serve([bench.plan])
    assert bench.opened == ["primary"]
    bench.place, bench.feed = "redis", Feed()
    bench.detached.serve([bench.plan])
    assert (bench.opened, before.closed, bench.feed.closed) == (["primary"] * 2, True, False)
    assert not before.waited
    bench.take(chunk([GOOD]))
    batch = bench.finish(1.0)
    bench.feed.tell((batch.parts[0].ids[0], 1.0))
    bench.clock.advance(1.0)
    bench.detached.poll(bench.clock.monotonic())
    assert [join.requests for join in bench.detached._joins.values()] == [0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_every_request_ends_once_whoever_comes_first(sizes: list[int], data: st.DataObject) -> None:
    """The primary before the shadow, after it, twice, or never: all are counted, and none shifts."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Apart(patch)
        total = sum(sizes)
        ids = [str(i) for i in range(total)]
        chunks = []
        first = 0
        for size in sizes:
            headers: Any = [[("inferfleet-id", ids[first + i].encode())] for i in range(size)]
            bodies = [v2([float(first + i), 0, 0, 0], [1, 4]) for i in range(size)]
            chunks.append(chunk(bodies, headers=headers, first=first))
            first += size
        told = data.draw(st.lists(st.sampled_from(ids), max_size=2 * total))
        steps = data.draw(st.permutations(["take"] * len(chunks) + ["tell"] * len(told)))
        coming, known = iter(chunks), iter(told)
        for step in steps:
            if step == "tell":
                request_id = next(known)
                bench.feed.tell((request_id, float(request_id)))
                bench.loop.turn(0.0)
                continue
            bench.take(next(coming))
            numbers = bench.flying[0][1].tensors()["x"][:, :1]
            bench.finish(np.repeat(numbers, 2, axis=1))
        for _ in range(40):
            bench.turn()
        bench.close()
        window = bench.told.of("shadow", "2")
        found = window.comparison or Comparison()
        assert window.seen == total
        assert found.pairs == found.identical == len(set(told))
        assert window.unmatched == total - len(set(told))
        assert all(of.open == 0 for of in chunks)
        join = bench.detached._joins["digits"]
        assert (join.requests, len(join.by_id), len(join.mine)) == (0, 0, 0)
        assert join.bytes == sum(len(body) for (body, _), _ in join.theirs.values())
        assert bench.outlet.sent == []
