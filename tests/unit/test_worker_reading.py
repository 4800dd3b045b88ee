"""Reading: whom an answer may reach, what comes again, and what a retry topic brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.config import Config, RabbitMQ
from inferfleet.core.admission import Admission
from inferfleet.core.batcher import NEVER, Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.records import Amqp, Answer, Batch, Chunk, Headers, Requests, Signature, Stream, TensorSpec
from inferfleet.results.memory import MemoryResults
from inferfleet.routes import Destination, Variant
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.deadletter import origin_of
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.reading import Reading
from inferfleet.worker.retries import retry_headers
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.settling import Settling
from tests.support.builders import STREAM, chunk, messages, v2
from tests.support.outlets import ScriptedOutlet, delivery, route_plan

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
QUEUE = Destination("rabbitmq", "q")
DLT, REPLY, OUT = "rabbitmq:/q.inferfleet.default.dlt", "reply:", "rabbitmq:x/y"
NEXT = Stream("rabbitmq:q", 2)
MINE, HIS = "amq.gen-mine", "amq.gen-his"
GOOD = v2([1, 2, 3, 4], [1, 4])


class Bench:
    """The reading of one route, with what it hands to."""

    def __init__(self, results: Sequence[str] = ("reply",), **route: Any) -> None:
        self.clock = FakeClock()
        self.outlet = ScriptedOutlet(at_once=True)
        self.metrics = PrometheusMetrics()
        self.ledger, self.batcher = Ledger(), Batcher()
        self.admission = Admission(["digits"], 1_000, 1 << 20)
        self.store = MemoryResults()
        self.delivery = delivery(self.outlet, self.store, self.metrics, self.clock)
        self.plan: RoutePlan = route_plan(SIGNATURE, results=results, **({"source": QUEUE} | route))
        self.reading = Reading(
            self.ledger, self.batcher, self.admission, self.delivery, self.metrics, self.clock
        )
        self.settled: list[Settling] = []
        self.delivery.on_settled = self.settled.append

    def read(self, of: Chunk, plan: RoutePlan | None = None) -> None:
        self.reading.read(Schedule.always(self.plan if plan is None else plan), of)
        self.store.poll()

    def queued(self) -> Batch | None:
        return self.batcher.due("m", "1", NEVER, self.clock.utc_ms())

    def rows(self) -> list[int]:
        """The rows that wait for a batch."""
        batch = self.queued()
        return [] if batch is None else sorted(row for part in batch.parts for row in part.rows)

    def codes(self, destination: str) -> list[str]:
        return [(each.header("inferfleet-code") or b"ok").decode() for each in self.outlet.to(destination)]

    def redelivered(self) -> float:
        name = "inferfleet_redeliveries_total"
        return self.metrics.registry.get_sample_value(name, {"route": "digits"}) or 0.0


# reply_to (B23)


@pytest.mark.parametrize(
    ("results", "queue", "runs"),
    [
        (["reply"], MINE, True),
        (["reply"], "amq.rabbitmq.reply-to.g2dk", True),
        (["reply"], None, False),
        (["reply"], "", False),
        (["reply"], "orders", False),
        (["reply"], "xamq.gen-1", False),
        (["reply"], "AMQ.GEN-1", False),
        (["reply", "rabbitmq:x/y"], None, True),
        (["reply", "rabbitmq:x/y"], "orders", False),
        (["reply", "redis"], None, True),
        (["reply", "redis"], "orders", False),
        (["rabbitmq:x/y"], "orders", True),
        (["redis"], "orders", True),
        (["kafka:out"], "orders", True),
    ],
)
def test_a_request_names_a_queue_of_its_own_or_none(
    results: list[str], queue: str | None, runs: bool
) -> None:
    """Any other would let a caller write, with the worker's rights, where it must not."""
    bench = Bench(results)
    bench.read(messages([GOOD], [Amqp(queue, message_id="a")]))
    assert bench.rows() == ([0] if runs else [])
    assert bench.codes(DLT) == ([] if runs else ["E_ROUTE"])
    assert bench.codes(REPLY) == []
    assert bench.codes(OUT) == ([] if runs or OUT not in results else ["E_ROUTE"])
    assert [settling.rows for settling in bench.settled] == ([] if runs else [[0]])


def test_neighbours_of_a_forged_queue_run() -> None:
    """One refusal each, none for the others."""
    bench = Bench()
    queues = [MINE, "orders", HIS, None, MINE]
    bench.read(messages([GOOD] * 5, [Amqp(q, message_id=str(i)) for i, q in enumerate(queues)]))
    assert bench.rows() == [0, 2, 4]
    assert bench.codes(DLT) == ["E_ROUTE", "E_ROUTE"]


def test_an_error_reaches_the_queue_of_who_may_name_it() -> None:
    """What cannot be read is told to its caller, and to nobody else's queue."""
    bench = Bench()
    bench.read(messages([b"{", b"{"], [Amqp(MINE, "c-1"), Amqp("orders", "c-2")]))
    assert bench.codes(REPLY) == ["E_DECODE"]
    assert bench.codes(DLT) == ["E_DECODE", "E_DECODE"]


def test_the_patterns_are_the_operators() -> None:
    """``[rabbitmq] reply_to`` says which queues a caller may call its own."""
    bench = Bench(config=Config(rabbitmq=RabbitMQ(reply_to=("answers.*",))))
    bench.read(messages([GOOD] * 2, [Amqp("answers.me", message_id="a"), Amqp(MINE, message_id="b")]))
    assert bench.rows() == [0]


_queues = st.sampled_from([MINE, "amq.gen-", "amq.gen-*", "amq.rabbitmq.reply-to"])


@given(st.none() | st.text(max_size=30) | _queues)
def test_nothing_is_published_to_a_queue_that_no_pattern_covers(queue: str | None) -> None:
    """Answers and errors alike."""
    bench = Bench()
    bench.read(messages([GOOD, b"{"], [Amqp(queue, message_id="a"), Amqp(queue, message_id="b")]))
    allowed = (queue or "").startswith(("amq.gen-", "amq.rabbitmq.reply-to."))
    assert len(bench.outlet.to(REPLY)) == allowed
    assert bench.rows() == ([0] if allowed else [])


def test_a_message_that_nobody_can_find_the_answer_of_is_refused() -> None:
    """Redis is its only way out, and an id that was made up here is known to nobody."""
    bench = Bench(["redis"])
    bench.read(messages([GOOD, GOOD], [Amqp(), Amqp(correlation_id="c")]))
    assert bench.rows() == [1]
    assert bench.codes(DLT) == ["E_ID"]


# What comes again


def _run(bench: Bench, amqp: Amqp) -> tuple[Chunk, Requests]:
    """Read one message and take its request out to run."""
    of = messages([GOOD], [amqp])
    bench.read(of)
    batch = bench.queued()
    assert batch is not None
    return of, batch.parts[0]


def test_a_message_that_was_answered_is_settled_without_running() -> None:
    """Its acknowledgement was lost; the chunk counts as finished at once."""
    bench = Bench()
    _, part = _run(bench, Amqp(MINE, message_id="a"))
    _answer(bench, part)
    bench.reading.recent.settled(bench.settled[0])
    again = messages([GOOD, GOOD], [Amqp(MINE, None, x, None, True) for x in "ab"], stream=NEXT)
    bench.read(again)
    assert (bytes(again.settled), bench.rows()) == (b"\x01\x00", [1])
    assert bench.redelivered() == 1
    assert len(bench.outlet.to(REPLY)) == 1


def _answer(bench: Bench, part: Requests) -> None:
    variant = bench.plan.variants[0]
    bench.delivery.answer(bench.plan, variant, Answer(part, {"y": np.zeros((1, 2), np.float32)}))


def test_a_refusal_may_be_told_again() -> None:
    """An error is not remembered, so that the same request sent once more is not acknowledged without one."""
    bench = Bench()
    bench.read(messages([GOOD], [Amqp("orders", message_id="a")]))
    bench.reading.recent.settled(bench.settled[0])
    again = messages([GOOD], [Amqp("orders", None, "a", None, True)], stream=NEXT)
    bench.read(again)
    assert again.open == 1
    assert bench.codes(DLT) == ["E_ROUTE", "E_ROUTE"]


def test_a_chunk_that_was_answered_whole_is_charged_to_nobody() -> None:
    """It was taken and is done."""
    bench = Bench()
    _, part = _run(bench, Amqp(MINE, message_id="a"))
    _answer(bench, part)
    bench.reading.recent.settled(bench.settled[0])
    held = bench.admission.rows
    bench.read(messages([GOOD], [Amqp(MINE, None, "a", None, True)], stream=NEXT))
    assert bench.admission.rows == held == 1


def test_a_message_that_still_runs_waits_for_that_run() -> None:
    """It is neither run twice nor settled before its outcome is safe."""
    bench = Bench()
    first, part = _run(bench, Amqp(MINE, message_id="a"))
    bench.ledger.ended([first.stream])
    assert bench.reading.orphan(first, []) == 1
    bench.reading.release(first)
    again = messages([GOOD], [Amqp(MINE, None, "a", None, True)], stream=NEXT)
    bench.read(again)
    assert (bench.rows(), again.open, bench.redelivered()) == ([], 1, 1)
    _answer(bench, part)
    assert bench.reading.recent.settled(bench.settled[0]) == [(again, 0)]
    assert bench.codes(REPLY) == ["ok"]


def test_what_waited_for_a_batch_when_its_channel_was_lost_runs_when_it_comes_again() -> None:
    """Nothing of it was under way."""
    bench = Bench()
    of = messages([GOOD], [Amqp(MINE, message_id="a")])
    bench.read(of)
    bench.ledger.ended([of.stream])
    assert bench.reading.orphan(of, bench.batcher.drop_dead()) == 0
    bench.read(messages([GOOD], [Amqp(MINE, None, "a", None, True)], stream=NEXT))
    assert bench.rows() == [0]


def test_an_orphan_is_named_as_it_was_read() -> None:
    """Routes that changed meanwhile might read other ids, and no end would meet them."""
    bench = Bench(input="columns")
    of = messages([b'{"x": [1, 2, 3, 4]}'], [Amqp(MINE, None, "a")])
    bench.read(of)
    batch = bench.queued()
    assert batch is not None
    bench.ledger.ended([of.stream])
    other = route_plan(SIGNATURE, source=QUEUE, results=["reply"])
    assert bench.reading.orphan(of, []) == 1
    again = messages(of.values, [Amqp(MINE, None, "a", None, True)], stream=NEXT)
    bench.read(again, other)
    assert bench.codes(REPLY) == ["E_SCHEMA"], "it is answered by the routes as they are"


def test_a_chunk_that_was_never_read_is_no_orphan() -> None:
    """Nobody here could answer it."""
    bench = Bench()
    of = messages([GOOD])
    bench.reading.read(None, of)
    assert bench.reading.orphan(of, []) == 0
    assert (of.open, of.orphaned, bench.admission.rows) == (1, False, 0)


# Retry topics


def retried(bench: Bench, of: Chunk, request_id: str, attempt: int) -> Chunk:
    """Return a chunk of the route's first retry topic that holds the one record of ``of``."""
    headers = retry_headers(of, 0, request_id, attempt=attempt, not_before_ms=0)
    stream = Stream(bench.plan.retry_sources[0], 0)
    return chunk(of.values, [headers], keys=of.keys, stream=stream, timestamp_ms=bench.clock.utc_ms())


@pytest.mark.parametrize("time", ["record", "received"])
def test_a_retried_record_has_its_first_place_time_and_id(time: str) -> None:
    """Its deadline counts from its first time, whatever ``time`` says of records that come now."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source), time=time, deadline_ms=10_000)
    first = chunk([GOOD], timestamp_ms=bench.clock.utc_ms() - 9_000)
    sent_ms = first.timestamps_ms[0]
    back = retried(bench, first, "digits.requests-3-100", 2)
    bench.read(back)
    batch = bench.queued()
    assert batch is not None
    (part,) = batch.parts
    assert part.ids == ["digits.requests-3-100"]
    assert part.deadlines_ms == [sent_ms + 10_000]
    assert origin_of(part.chunk, 0) == (*STREAM, 100, sent_ms, 2)
    assert back.headers == [None]


def test_records_of_the_source_are_not_believed() -> None:
    """Whoever writes our headers into a request has made a first attempt like any other."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    forged: Headers = retry_headers(chunk([b"b"], stream=Stream("x", 9)), 0, "i", attempt=4, not_before_ms=0)
    of = chunk([GOOD], [forged])
    bench.read(of)
    assert of.origins is None
    assert origin_of(of, 0).attempt == 1
    assert of.headers == [forged]


def test_records_that_are_received_now_count_from_now() -> None:
    """``time = "received"`` on the source."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source), time="received")
    of = chunk([GOOD], timestamp_ms=5)
    bench.read(of)
    assert of.timestamps_ms == [bench.clock.utc_ms()]


# What was held back


def _held_back(bench: Bench, of: Chunk) -> Requests:
    bench.read(of)
    batch = bench.queued()
    assert batch is not None
    (part,) = batch.parts
    return part.slice(0, 1)


def test_what_was_held_back_runs_by_the_same_plan() -> None:
    """As it was read, and no second time."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    part = _held_back(bench, chunk([GOOD]))
    bench.reading.again(Schedule.always(bench.plan), [part])
    batch = bench.queued()
    assert batch is not None
    assert batch.parts == [part]


def test_what_was_held_back_runs_by_the_routes_as_they_are() -> None:
    """The version that failed it may be gone by then, with its engine: nothing would ever run there."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    of = chunk([b"{}", v2([1, 2, 3, 4], [1, 4], request_id="mine")])
    part = _held_back(bench, of)
    now = route_plan(
        SIGNATURE,
        results=["kafka:out"],
        variants=(Variant("stable", "7", 1, ((0, 10_000),)),),
        max_batch_size=3,
    )
    bench.reading.again(Schedule.always(now), [part])
    assert bench.queued() is None
    batch = bench.batcher.due("m", "7", NEVER, 0)
    assert batch is not None
    (found,) = batch.parts
    assert (found.chunk, found.rows, found.ids, found.served) == (of, [1], ["mine"], now.variants[0].served)
    assert batch.lane.max_batch_size == 3


def test_what_a_new_version_cannot_read_ends_as_an_error() -> None:
    """Its inputs are others than those that the request was read for."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    of = chunk([GOOD, GOOD])
    part = _held_back(bench, of)
    other = Signature((TensorSpec("x", "FP32", (5,)),), SIGNATURE.outputs)
    now = route_plan(other, results=["kafka:out"], variants=(Variant("stable", "7", 1, ((0, 10_000),)),))
    bench.reading.again(Schedule.always(now), [part])
    assert bench.codes("out") == ["E_SHAPE"]
    assert [(settling.chunk, settling.rows) for settling in bench.settled] == [(of, [0])]


def test_what_was_held_back_of_a_route_that_is_gone_stays_open() -> None:
    """Its stream is being taken away: somebody else answers it."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    of = chunk([GOOD])
    bench.reading.again(None, [_held_back(bench, of)])
    assert (bench.queued(), of.open) == (None, 1)


def test_what_was_held_back_of_a_route_that_went_and_came_back_runs() -> None:
    """Nothing of it was under way, so that its message must not wait for an end that never comes."""
    bench = Bench([OUT])
    of = messages([GOOD], [Amqp(message_id="a")])
    bench.reading.again(None, [_held_back(bench, of)])
    bench.ledger.ended([of.stream])
    assert bench.reading.orphan(of, bench.batcher.drop_dead()) == 0
    bench.reading.release(of)
    bench.read(messages([GOOD], [Amqp(None, None, "a", None, True)], stream=NEXT))
    assert bench.rows() == [0]


def test_requests_are_charged_by_their_rows_until_their_chunk_is_done() -> None:
    """Taken once, freed once, whoever ends them."""
    bench = Bench(["kafka:out"], source=Destination("kafka", STREAM.source))
    of = chunk([GOOD, v2([0] * 12, [3, 4]), b"{"])
    bench.read(of)
    assert bench.admission.held("digits") == (5, of.size_bytes)
    assert bench.reading.settle(of, [0, 1])
    assert not bench.reading.settle(of, [0])
    assert bench.admission.rows == 5
    assert bench.reading.settle(of, [2])
    bench.reading.release(of)
    assert bench.admission.held("digits") == (0, 0)
