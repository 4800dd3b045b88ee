"""What no topic has room for must not stop a route: anybody who may send could."""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.brokers.memory import MemoryBroker, Record
from inferfleet.brokers.memory_outlet import MemoryOutlet
from inferfleet.errors import Code
from inferfleet.ports import RefusalKind
from inferfleet.records import Chunk, Failures, Headers, Signature, Stream, TensorSpec
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.wire.messages import DEAD_LETTER_HEADERS
from inferfleet.worker.delivery import Settling
from tests.support.builders import chunk
from tests.support.outlets import delivery, route_plan

LIMIT = 4_000
DLT = "digits.requests.inferfleet.default.dlt"
SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))


class Bench:
    """A delivery on topics that take records of ``LIMIT`` bytes at most."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.broker = MemoryBroker(clock)
        for topic in ("out", DLT):
            self.broker.create_topic(topic, max_message_bytes=LIMIT)
        self.outlet = MemoryOutlet(self.broker)
        self.plan = route_plan(SIGNATURE, results=("kafka:out",))
        self.delivery = delivery(self.outlet, None, PrometheusMetrics(), clock)
        self.settled: list[Settling] = []
        self.delivery.on_settled = self.settled.append

    def fail(self, of: Chunk) -> None:
        """Refuse the one request of ``of`` as too large, and hear what the topics say."""
        text = "the body is too large"
        self.delivery.fail(self.plan, Failures(of, [0], ["a"], [Code.TOO_LARGE], [text], [None], [None]))
        for _ in range(5):
            self.outlet.poll()

    def kept(self, topic: str) -> Sequence[Record]:
        """What a topic holds."""
        return self.broker.log(Stream(topic, 0)).records


def _record(value: bytes, key: bytes = b"k", headers: Headers = None) -> Chunk:
    return chunk([value], [headers], keys=[key])


def test_a_dead_letter_that_its_topic_has_no_room_for_goes_without_the_body() -> None:
    """It names the place where the request still stands, and its record is settled."""
    bench = Bench()
    bench.fail(_record(b"x" * LIMIT, headers=[("mine", b"1")]))
    assert len(bench.settled) == 1
    assert bench.delivery.held() == {}
    (letter,) = bench.kept(DLT)
    headers = dict(letter.headers or ())
    assert (letter.key, letter.value) == (b"k", None)
    assert headers["inferfleet-origin-topic"] == b"digits.requests"
    assert headers["inferfleet-origin-offset"] == b"100"
    assert headers["inferfleet-code"] == b"E_TOO_LARGE"
    assert headers["inferfleet-cut"] == b"body headers"
    assert headers.keys() == {rule.name for rule in DEAD_LETTER_HEADERS}


def test_an_outcome_that_its_topic_has_no_room_for_goes_without_the_key() -> None:
    """A key may be as large as a record; the error is found by its id."""
    bench = Bench()
    bench.fail(_record(b"{}", key=b"k" * (LIMIT - 10)))
    assert len(bench.settled) == 1
    assert bench.delivery.held() == {}
    (outcome,), (letter,) = bench.kept("out"), bench.kept(DLT)
    assert (outcome.key, letter.key) == (None, None)
    assert dict(outcome.headers or ())["inferfleet-id"] == b"a"
    assert dict(letter.headers or ())["inferfleet-cut"] == b"body headers key"


def test_what_is_refused_without_all_that_is_parked() -> None:
    """A topic that takes nothing at all is a person's to mend."""
    bench = Bench()
    bench.broker.refuse(DLT, RefusalKind.TOO_LARGE)
    bench.fail(_record(b"x"))
    assert bench.settled == []
    assert list(bench.delivery.held()) == ["digits"]
