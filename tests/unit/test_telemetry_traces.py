"""What is recorded of requests and batches: sampled ones only, linked both ways, within bounds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client.openmetrics import exposition as openmetrics

from inferfleet.errors import Code
from inferfleet.ports import RefusalKind
from inferfleet.records import Amqp, Batch, BatchResult, Chunk, Headers, Lane, Requests
from inferfleet.telemetry.traces import MAX_LINKS, MAX_OPEN, Context, RecordTraces, Span
from tests.support.builders import chunk, messages, v2
from tests.support.traces import TRACE, TRACE_ID
from tests.unit.test_worker_loop import DLT, GOOD, QUEUE, Bench

UNSAMPLED = TRACE[:-1] + b"0"
PARENT = Context(TRACE_ID, "00f067aa0ba902b7")
RESULTS = "out"


class Recorded:
    """A loop whose spans are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ratio: float = 0.0, **options: Any) -> None:
        self.spans: list[Span] = []
        bits = random.Random(3).getrandbits
        self.traces = RecordTraces(self.spans.append, "inferfleet.default", ratio, bits)
        self.bench = Bench(monkeypatch, traces=self.traces, **options)

    def take(self, headers: Sequence[Headers], body: bytes = GOOD) -> Chunk:
        of = chunk([body] * len(headers), headers)
        self.bench.take(of)
        return of

    def named(self, start: str) -> list[Span]:
        return [span for span in self.spans if span.name.startswith(start)]


def with_trace(trace: bytes = TRACE, *more: tuple[str, bytes]) -> Headers:
    return [("traceparent", trace), *more]


def test_a_sampled_request_is_a_span_below_its_callers_and_its_outcome_goes_on_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request of three is sampled: one span, one of its batch, and links both ways."""
    recorded = Recorded(monkeypatch)
    recorded.take([with_trace(TRACE, ("tracestate", b"rojo=1")), with_trace(UNSAMPLED), None])
    recorded.bench.end()
    recorded.bench.turn()

    (request,) = recorded.named("process")
    (batch,) = recorded.named("predict")
    assert request.name == "process digits.requests"
    assert request.parent == PARENT._replace(state="rojo=1")
    assert request.context.trace_id == TRACE_ID
    assert request.context.span_id != PARENT.span_id
    assert (request.kind, request.error) == ("consumer", "")
    assert request.attributes == {
        "messaging.system": "kafka",
        "messaging.destination.name": "digits.requests",
        "messaging.destination.partition.id": "3",
        "messaging.kafka.offset": 100,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "inferfleet.default",
        "messaging.message.id": "digits.requests-3-100",
        "inferfleet.route": "digits",
        "inferfleet.model": "m",
        "inferfleet.version": "1",
        "inferfleet.variant": "stable",
        "inferfleet.revision": "17",
        "inferfleet.outcome": "ok",
        "inferfleet.attempt": 1,
    }
    assert batch.context.trace_id != TRACE_ID
    assert batch.parent is None
    assert [link.span_id for link in batch.links] == [request.context.span_id]
    assert [link[:2] for link in request.links] == [batch.context[:2]]
    assert batch.attributes["messaging.batch.message_count"] == 3
    assert request.start_ns <= request.end_ns

    outcomes = recorded.bench.outlet.to(RESULTS)
    assert outcomes[0].header("traceparent") == b"00-%b-%b-01" % (
        TRACE_ID.encode(),
        request.context.span_id.encode(),
    )
    assert outcomes[0].header("tracestate") == b"rojo=1"
    assert outcomes[1].header("traceparent") == UNSAMPLED
    assert outcomes[2].header("traceparent") is None


def test_of_what_nobody_records_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsampled context passes through as it came, and is no exemplar."""
    recorded = Recorded(monkeypatch)
    of = recorded.take([with_trace(UNSAMPLED), None])
    batch = recorded.bench.end()
    recorded.bench.turn()

    assert recorded.spans == []
    assert batch.parts[0].traces == [UNSAMPLED, None]
    assert not of.open
    assert exemplars(recorded.bench) == []


def exemplars(bench: Bench) -> list[str]:
    lines = openmetrics.generate_latest(bench.metrics.registry).decode().splitlines()
    return [line for line in lines if "trace_id=" in line]


def test_metrics_and_spans_name_the_same_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of latencies and one of batch times lead to it."""
    recorded = Recorded(monkeypatch)
    recorded.take([None, with_trace()])
    recorded.bench.end()
    recorded.bench.turn()

    found = exemplars(recorded.bench)
    assert {line.partition("_bucket")[0] for line in found} == {
        "inferfleet_request_seconds",
        "inferfleet_batch_seconds",
    }
    assert all(f'trace_id="{TRACE_ID}"' in line for line in found)


def test_exemplars_need_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller records the trace, whether we add to it or not; its header passes through."""
    bench = Bench(monkeypatch)
    bench.take(chunk([GOOD], [with_trace()]))
    bench.end()
    bench.turn()

    assert len(exemplars(bench)) == 2
    assert bench.outlet.to(RESULTS)[0].header("traceparent") == TRACE


def test_a_request_that_cannot_be_read_and_one_that_the_model_fails_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have their span, with the code; their dead letters keep the caller's own header."""
    recorded = Recorded(monkeypatch)
    recorded.take([with_trace()], v2([1], [1, 1]))
    recorded.take([with_trace()])
    recorded.bench.end(fails=True)
    recorded.bench.turn()

    unread, failed = recorded.named("process")
    assert (unread.error, failed.error) == ("E_SHAPE", "E_MODEL")
    assert unread.attributes["error.type"] == unread.attributes["inferfleet.outcome"] == "E_SHAPE"
    assert "inferfleet.version" not in unread.attributes
    assert failed.attributes["inferfleet.version"] == "1"
    for error, span in zip(recorded.bench.outlet.to(RESULTS), (unread, failed), strict=True):
        assert error.header("traceparent") == b"00-%b-%b-01" % (
            TRACE_ID.encode(),
            span.context.span_id.encode(),
        )
    for letter in recorded.bench.outlet.to(DLT):
        assert letter.header("traceparent") == TRACE


def test_an_attempt_that_is_followed_by_another_ends_as_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry carries the caller's context, so that the next attempt stands beside this one."""
    recorded = Recorded(monkeypatch, retries=(1_000,), consecutive=5)
    recorded.take([with_trace()])
    recorded.bench.end(fails=True, retryable=True)
    recorded.bench.turn()

    (span,) = recorded.named("process")
    assert (span.attributes["inferfleet.outcome"], span.error) == ("retry", "E_MODEL")
    (retry,) = recorded.bench.outlet.to("digits.requests.inferfleet.default.retry.1000")
    assert retry.header("traceparent") == TRACE


def test_a_batch_links_to_a_bounded_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others pass through as they came, answered like any."""
    recorded = Recorded(monkeypatch, max_batch_size=500)
    recorded.take([with_trace()] * 300)
    recorded.bench.end()
    recorded.bench.turn()

    (batch,) = recorded.named("predict")
    assert len(batch.links) == len(recorded.named("process")) == MAX_LINKS
    passed = [each.header("traceparent") == TRACE for each in recorded.bench.outlet.to(RESULTS)]
    assert (len(passed), sum(passed)) == (300, 300 - MAX_LINKS)


def test_requests_that_never_end_here_are_forgotten() -> None:
    """Their partition went to another worker; what is known of them is bounded."""
    traces = RecordTraces(lambda _span: None, "g")
    for _ in range(MAX_OPEN // MAX_LINKS + 2):
        part = chunk([GOOD] * MAX_LINKS, [with_trace()] * MAX_LINKS)
        traces.batch(batch_of(part, traces.began([TRACE] * MAX_LINKS, MAX_LINKS)), 1)

    assert len(traces._batches) == MAX_OPEN


def batch_of(of: Chunk, traces: list[bytes | None] | None) -> BatchResult:
    part = Requests(of, list(range(len(of))), [""] * len(of), {}, traces=traces)
    return BatchResult(Batch(Lane("m", "1", "primary", (), 1, 0.0), [part], len(of)))


def test_a_share_of_requests_without_a_trace_begins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own ratio: a span without a parent, and an outcome that goes on with its trace."""
    recorded = Recorded(monkeypatch, ratio=0.25)
    for _ in range(8):
        recorded.take([None] * 50)
        recorded.bench.end()
    recorded.bench.turn()

    begun = recorded.named("process")
    assert 60 < len(begun) < 140
    assert all(span.parent is None for span in begun)
    assert len({span.context.trace_id for span in begun}) == len(begun)
    headers = [each.header("traceparent") for each in recorded.bench.outlet.to(RESULTS)]
    carried = {header.decode().split("-")[1] for header in headers if header is not None}
    assert carried == {span.context.trace_id for span in begun}


@pytest.mark.parametrize("ratio", [1e-9, 1e-6, 0.001, 0.25, 0.999])
def test_how_many_are_passed_over_is_right_for_small_shares_too(ratio: float) -> None:
    """On average ``1 / ratio - 1``; its deviation is about as large."""
    bits = random.Random(1)
    traces = RecordTraces(lambda _span: None, "g", ratio, bits.getrandbits)
    drawn = [traces._drawn() for _ in range(4_000)]

    mean = 1 / ratio - 1
    assert abs(sum(drawn) / len(drawn) - mean) < 5 * math.sqrt(1 - ratio) / ratio / math.sqrt(len(drawn))


def test_a_caller_who_decided_not_to_record_is_not_overruled() -> None:
    """Only what has no trace at all is drawn."""
    traces = RecordTraces(lambda _span: None, "g", ratio=1.0)

    assert traces.began([UNSAMPLED, None, UNSAMPLED], 3)[::2] == [UNSAMPLED, UNSAMPLED]  # type: ignore[index]
    assert None not in (traces.began(None, 5) or [None])


def test_a_message_of_rabbitmq_is_named_in_its_brokers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queue and delivery tag in place of topic, partition and offset."""
    recorded = Recorded(monkeypatch, source=QUEUE)
    of = messages([GOOD], [Amqp(message_id="m-1")])
    of.headers[0] = with_trace()
    recorded.bench.take(of)
    recorded.bench.end()
    recorded.bench.turn()

    (span,) = recorded.named("process")
    assert span.name == "process q"
    assert span.attributes["messaging.system"] == "rabbitmq"
    assert span.attributes["messaging.rabbitmq.message.delivery_tag"] == of.positions[0]
    assert span.attributes["messaging.message.id"] == "m-1"
    assert "messaging.kafka.offset" not in span.attributes


def test_an_answer_that_became_an_error_at_the_outlet_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome that the caller gets counts."""
    recorded = Recorded(monkeypatch)
    recorded.bench.outlet.at_once = False
    recorded.take([with_trace()])
    recorded.bench.end()
    recorded.bench.outlet.refusing[RESULTS] = RefusalKind.TOO_LARGE
    recorded.bench.outlet.confirm_some(RESULTS)
    recorded.bench.outlet.refusing.clear()
    recorded.bench.outlet.confirm_all()
    recorded.bench.turn()

    (span,) = recorded.named("process")
    assert span.attributes["inferfleet.outcome"] == Code.RESULT_TOO_LARGE.value
