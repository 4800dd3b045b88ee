"""How a request that fails ends: another attempt, its error and its letter, or held back; one, and once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from inferfleet.config import Config, Retry, Worker
from inferfleet.control.pauses import LocalPauses
from inferfleet.errors import RULES, Code
from inferfleet.ports import Receipt, RefusalKind
from inferfleet.records import (
    Amqp,
    Chunk,
    Envelopes,
    Failures,
    Headers,
    Origin,
    RowFailure,
    Signature,
    TensorSpec,
)
from inferfleet.results.memory import MemoryResults
from inferfleet.routes import Destination
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.retries import OURS
from inferfleet.worker.settling import Settling
from tests.support.builders import chunk, messages, requests
from tests.support.outlets import Published, ScriptedOutlet, delivery, route_plan
from tests.support.traces import TRACE

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
DELAYS = (1_000, 10_000)
DLT = "digits.requests.inferfleet.default.dlt"
RETRIES = [f"digits.requests.inferfleet.default.retry.{delay}" for delay in DELAYS]
QUEUE = Destination("rabbitmq", "q")
RABBIT_DLT = "rabbitmq:/q.inferfleet.default.dlt"
MINE = "amq.gen-mine"


class Bench:
    """The delivery of one route with two delays, and the settlings it completes."""

    def __init__(
        self,
        results: Sequence[str] = ("kafka:out",),
        *,
        delays_ms: Sequence[int] = DELAYS,
        at_once: bool = True,
        **route: Any,
    ) -> None:
        self.clock = FakeClock()
        self.outlet = ScriptedOutlet(at_once=at_once)
        self.store = MemoryResults()
        self.metrics = PrometheusMetrics()
        self.board = LocalPauses()
        self.board.watch(["digits"])
        config = Config(worker=Worker(id="w-3"), retry=Retry(delays_ms=tuple(delays_ms)))
        self.plan = route_plan(SIGNATURE, results=results, config=config, **route)
        self.delivery = delivery(
            self.outlet,
            self.store,
            self.metrics,
            self.clock,
            delays_ms=delays_ms,
            brakes=Brakes(self.board, 1_000, 1.0),
        )
        self.settled: list[Settling] = []
        self.delivery.on_settled = self.settled.append

    def fail(
        self,
        code: Code = Code.MODEL,
        *,
        retryable: bool = True,
        of: Chunk | None = None,
        **columns: Any,
    ) -> None:
        """Let a model fail each request of ``of`` alone, and hear what outlets say."""
        made = chunk([b"body"]) if of is None else of
        part = requests(made, range(len(made)), **columns)
        self.plan.steer(part)
        failures = [RowFailure(part.slice(i, i + 1), code, "no", retryable) for i in range(len(part))]
        self.delivery.row_failures(self.plan, failures)
        self.finish()

    def watch(self, patch: pytest.MonkeyPatch) -> list[Envelopes]:
        """Return a list that fills with what is published, with all its columns."""
        kept: list[Envelopes] = []
        publish = self.outlet.publish

        def watched(envelopes: Envelopes, receipt: Receipt) -> None:
            kept.append(envelopes)
            publish(envelopes, receipt)

        patch.setattr(self.outlet, "publish", watched)
        return kept

    def finish(self) -> None:
        for _ in range(5):
            self.outlet.confirm_all()
            self.store.poll()

    def only(self, destination: str) -> Published:
        (found,) = self.outlet.to(destination)
        return found

    @property
    def everywhere(self) -> list[str]:
        return [each.destination for each in self.outlet.kept]

    @property
    def outcomes(self) -> list[dict[str, int]]:
        """How each settling is counted."""
        return [{code: n for (_, _, code), n in s.outcomes.items() if n} for s in self.settled]


def tried(of: Chunk, attempt: int) -> Chunk:
    """Say that the records of ``of`` come for their n-th attempt."""
    of.origins = [Origin("digits.requests", 3, position, 5, attempt) for position in of.positions]
    return of


# Which failure ends how


@pytest.mark.parametrize("order", ["none", "key"])
@pytest.mark.parametrize("attempt", [1, 2, 3, 9])
@pytest.mark.parametrize("retryable", [False, True])
@pytest.mark.parametrize("code", list(Code))
def test_each_failure_has_the_end_that_the_contract_gives_it(
    code: Code, retryable: bool, attempt: int, order: str
) -> None:
    """Another attempt only for a fault of ours, or of the model where its handler says that it may pass."""
    bench = Bench(order=order)
    bench.fail(code, retryable=retryable, of=tried(chunk([b"body"]), attempt))
    may_pass = code is Code.INTERNAL or (code is Code.MODEL and retryable)
    if may_pass and attempt <= len(DELAYS) and order == "none":
        assert bench.everywhere == [RETRIES[attempt - 1]]
        assert bench.outcomes == [{}]
        assert bench.only(RETRIES[attempt - 1]).header("inferfleet-attempt") == b"%d" % (attempt + 1)
    else:
        assert bench.everywhere == ["out", *([DLT] if RULES[code].dead_letter else [])]
        assert bench.outcomes == [{code.value: 1}]
        assert json.loads(bench.only("out").value or b"")["code"] == code.value
        if RULES[code].dead_letter:
            assert bench.only(DLT).header("inferfleet-attempt") == b"%d" % attempt
    assert [settling.rows for settling in bench.settled] == [[0]]


def test_a_failure_is_told_with_what_it_concerns_and_not_in_its_own_words() -> None:
    """Route, version, batch and trace stand in the line; a handler's text may hold what a caller sent."""
    bench = Bench(delays_ms=())
    part = requests(chunk([b"a", b"b"]), range(2), traces=[None, TRACE])
    bench.plan.steer(part)
    codes = (Code.MODEL, Code.SCHEMA)
    failures = [RowFailure(part.slice(i, i + 1), codes[i], "canary", False, 7) for i in range(2)]
    with capture_logs() as logs:
        bench.delivery.row_failures(bench.plan, failures)
    told = {each["code"]: each for each in logs if each["event"] == "requests_failed"}

    assert "canary" not in str(logs)
    assert {code: (each["log_level"], each["fault"]) for code, each in told.items()} == {
        "E_MODEL": ("error", "model"),
        "E_SCHEMA": ("warning", "caller"),
    }
    assert [(each["route"], each["batch"], each["requests"]) for each in logs] == [("digits", 7, 1)] * 2
    assert ("trace_id" in told["E_MODEL"], told["E_SCHEMA"]["trace_id"]) == (False, TRACE[3:35].decode())


@pytest.mark.parametrize(
    ("left_ms", "again"), [(None, True), (5_000, True), (1_201, True), (799, False), (-5, False)]
)
def test_an_attempt_that_would_come_too_late_is_not_worth_a_delay(left_ms: int | None, again: bool) -> None:
    """The deadline stands before the delay's end: its error comes now."""
    bench = Bench()
    deadline = None if left_ms is None else bench.clock.utc_ms() + left_ms
    bench.fail(deadlines_ms=[deadline])
    assert bench.everywhere == ([RETRIES[0]] if again else ["out", DLT])


def test_without_delays_there_is_one_attempt() -> None:
    """``delays_ms = []``."""
    bench = Bench(delays_ms=())
    bench.fail(Code.INTERNAL)
    assert bench.everywhere == ["out", DLT]


def test_what_could_not_be_read_for_a_fault_of_ours_comes_again() -> None:
    """It may have no body and no id, and its name is where it stands."""
    bench = Bench()
    of = chunk([None], [[("x", None)]])
    bench.delivery.fail(bench.plan, Failures(of, [0], [None], [Code.INTERNAL], ["no"], [None], [None]))
    sent = bench.only(RETRIES[0])
    assert (sent.key, sent.value) == (b"key-0", None)
    assert sent.headers[:2] == [("inferfleet-id", b"digits.requests-3-100"), ("x", None)]


@given(st.lists(st.tuples(st.sampled_from(list(Code)), st.integers(1, 4)), min_size=1, max_size=12))
def test_of_many_each_has_one_end(failed: list[tuple[Code, int]]) -> None:
    """Whatever fails beside it: every row is settled once, told once or moved once, buried where it must."""
    bench = Bench()
    of = chunk([b"%d" % i for i in range(len(failed))])
    of.origins = [Origin("s", 0, i, 5, attempt) for i, (_, attempt) in enumerate(failed)]
    count = len(failed)
    none: list[None] = [None] * count
    found = Failures(
        of,
        list(range(count)),
        [f"id-{i}" for i in range(count)],
        [code for code, _ in failed],
        ["no"] * count,
        list(none),
        list(none),
    )
    bench.delivery.fail(bench.plan, found)
    moved = [i for i, (code, attempt) in enumerate(failed) if code is Code.INTERNAL and attempt <= 2]
    ended = [i for i in range(count) if i not in moved]
    assert sorted(row for s in bench.settled for row in s.rows) == list(range(count))
    assert sorted(int(each.value or b"") for topic in RETRIES for each in bench.outlet.to(topic)) == moved
    assert [each.header("inferfleet-id") for each in bench.outlet.to("out")] == [b"id-%d" % i for i in ended]
    assert [int(each.value or b"") for each in bench.outlet.to(DLT)] == [
        i for i in ended if RULES[failed[i][0]].dead_letter
    ]


# What another attempt carries


def test_another_attempt_carries_all_that_was_sent() -> None:
    """Key, body and headers as they were, and behind them where it stood and when it may come."""
    bench = Bench()
    sent: Headers = [("a", b"1"), ("inferfleet-attempt", b"forged"), ("a", None)]
    of = chunk([b"body"], [sent], keys=[b"k"], timestamp_ms=77)
    bench.fail(of=of)
    found = bench.only(RETRIES[0])
    assert (found.key, found.value) == (b"k", b"body")
    assert found.headers[:3] == sent
    assert [name for name, _ in found.headers[3:]] == list(OURS)
    assert found.header("inferfleet-origin-topic") == b"digits.requests"
    assert found.header("inferfleet-origin-partition") == b"3"
    assert found.header("inferfleet-origin-offset") == b"100"
    assert found.header("inferfleet-origin-timestamp") == b"77"
    wait_ms = int(found.header("inferfleet-not-before-ms") or b"") - bench.clock.utc_ms()
    assert abs(wait_ms - DELAYS[0]) * 5 <= DELAYS[0]
    assert bench.metrics.registry.get_sample_value("inferfleet_retries_total", {"route": "digits"}) == 1


def test_another_attempt_on_rabbitmq_carries_its_message_and_its_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asked, what it was called, its table; and how long it waits in the queue."""
    bench = Bench(("reply",), source=QUEUE)
    amqp = Amqp(MINE, "c", "m", {"x": 1})
    kept = bench.watch(monkeypatch)
    bench.fail(of=messages([b"body"], [amqp]))
    (envelopes,) = kept
    assert envelopes.destination == "rabbitmq:/q.inferfleet.default.retry.1000"
    assert envelopes.amqp == [amqp]
    (wait_ms,) = envelopes.expirations_ms or ()
    assert abs(wait_ms - DELAYS[0]) * 5 <= DELAYS[0]
    named = dict(envelopes.headers[0])
    assert named["inferfleet-not-before-ms"] == b"%d" % (bench.clock.utc_ms() + wait_ms)
    assert named["inferfleet-origin-topic"] == b"q"


# When its record is settled


def test_a_record_is_settled_when_its_next_attempt_is_safe_and_not_before() -> None:
    """Else a crash between the two would lose it."""
    bench = Bench(at_once=False)
    part = requests(chunk([b"body"]), [0])
    bench.plan.steer(part)
    bench.delivery.row_failures(bench.plan, [RowFailure(part, Code.MODEL, "no", True)])
    assert bench.settled == []
    bench.finish()
    assert [settling.ids for settling in bench.settled] == [["id-100"]]


@pytest.mark.parametrize("kind", [RefusalKind.LATER, RefusalKind.DENIED])
def test_an_attempt_that_is_refused_for_now_holds_its_route(kind: RefusalKind) -> None:
    """Nothing is skipped and nothing ends as an error because a topic is away."""
    bench = Bench()
    bench.outlet.refusing[RETRIES[0]] = kind
    bench.fail()
    assert (bench.settled, bench.everywhere) == ([], [])
    assert bench.delivery.held() == {"digits": f"{RETRIES[0]} refuses: told to refuse"}
    bench.outlet.refusing.clear()
    bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
    bench.finish()
    assert bench.everywhere == [RETRIES[0]]
    assert (bench.outcomes, bench.delivery.held()) == ([{}], {})


@pytest.mark.parametrize("code", [Code.MODEL, Code.INTERNAL])
@pytest.mark.parametrize("parked_first", [False, True])
def test_an_attempt_that_is_too_large_for_its_topic_ends_as_the_failure_it_was(
    code: Code, parked_first: bool
) -> None:
    """Under its own code, id and version, told wherever an error is told, its waiting client included."""
    bench = Bench(("kafka:out", "redis"))
    bench.outlet.refusing[RETRIES[0]] = RefusalKind.LATER if parked_first else RefusalKind.TOO_LARGE
    of = chunk([b"body"], [[("Traceparent", TRACE)]])
    bench.fail(code, of=of, replies=["me"], traces=[TRACE])
    if parked_first:
        bench.outlet.refusing[RETRIES[0]] = RefusalKind.TOO_LARGE
        bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
        bench.finish()
    assert sorted(bench.everywhere) == [DLT, "out"]
    error = bench.only("out")
    body = json.loads(error.value or b"")
    assert (body["id"], body["code"]) == ("id-100", code.value)
    assert body["error"] == "no; it is too large for another attempt"
    assert error.header("inferfleet-id") == b"id-100"
    assert error.header("traceparent") == TRACE
    assert b"version=1" in (error.header("inferfleet-served") or b"")
    assert bench.only(DLT).header("inferfleet-attempt") == b"1"
    (reply,) = bench.store.replies["me"]
    assert (reply.id, json.loads(reply.body)["code"]) == ("id-100", code.value)
    assert json.loads(bench.store.results["digits", "id-100"].body)["code"] == code.value
    assert bench.outcomes == [{code.value: 1}]
    bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
    assert bench.delivery.held() == {}


def test_an_error_in_place_of_an_attempt_that_is_too_large_itself_is_cut() -> None:
    """Not answered with another error, which would be no smaller."""
    bench = Bench()
    bench.outlet.refusing = {RETRIES[0]: RefusalKind.TOO_LARGE, "out": RefusalKind.TOO_LARGE}
    bench.fail(of=chunk([b"body"], keys=[b"k" * 2_000]))
    bench.outlet.refusing.clear()
    bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
    bench.finish()
    assert bench.only("out").key is None
    assert bench.outcomes == [{"E_MODEL": 1}]


# Streams that are gone, routes that are paused


@pytest.mark.parametrize("orphaned", [False, True])
def test_a_stream_that_is_gone_publishes_nothing_unless_its_records_come_again_here(orphaned: bool) -> None:
    """The next owner runs them; what a lost channel left running ends as it began."""
    bench = Bench()
    for retryable in (False, True):
        of = chunk([b"body"])
        of.live, of.orphaned = False, orphaned
        bench.fail(retryable=retryable, of=of)
    assert bench.everywhere == (["out", DLT, RETRIES[0]] if orphaned else [])


def test_a_paused_route_holds_back_attempts_too() -> None:
    """Nothing of a model that fails is moved anywhere, neither to its letters nor to its retries."""
    bench = Bench()
    bench.board.pause("digits", "told to")
    bench.fail(retryable=True)
    bench.fail(retryable=False)
    bench.fail(Code.INTERNAL, of=tried(chunk([b"body"]), 3))
    bench.fail(Code.DEADLINE)
    assert bench.everywhere == ["out"]
    assert bench.outcomes == [{"E_DEADLINE": 1}]


# Whom an error reaches


@pytest.mark.parametrize("queue", [MINE, "orders", "", None])
@pytest.mark.parametrize("results", [("reply",), ("reply", "rabbitmq:x/y"), ("rabbitmq:x/y",)])
def test_an_error_goes_to_every_destination_and_to_queues_that_may_be_named(
    results: Sequence[str], queue: str | None
) -> None:
    """The answer's way exactly; the letter stays the operator's."""
    bench = Bench(results, source=QUEUE)
    bench.fail(retryable=False, of=messages([b"body"], [Amqp(queue, "c")]))
    expected = [RABBIT_DLT]
    if "rabbitmq:x/y" in results:
        expected.append("rabbitmq:x/y")
    if "reply" in results and queue == MINE:
        expected.append("reply:")
    assert sorted(bench.everywhere) == sorted(expected)
    assert bench.outcomes == [{"E_MODEL": 1}]


def test_an_error_that_is_cut_still_finds_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its large key, and without the table that came with the request, but to the same queue."""
    bench = Bench(("reply",), source=QUEUE)
    kept = bench.watch(monkeypatch)
    bench.outlet.refusing["reply:"] = RefusalKind.TOO_LARGE
    of = messages([b"body"], [Amqp(MINE, "c", "m", {"large": "x"})])
    of.keys = [b"k" * 2_000]
    bench.fail(retryable=False, of=of)
    cut = [each for each in kept if each.destination == "reply:"][-1]
    assert (cut.keys, cut.amqp) == ([None], [Amqp(MINE, "c", "m")])
