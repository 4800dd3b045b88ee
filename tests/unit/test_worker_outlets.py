"""Two outlets as one: what goes to whom, and how long they may take together."""

from __future__ import annotations

import pytest

from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Envelopes
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.outlets import Outlets
from tests.support.outlets import ScriptedOutlet


class SlowOutlet(ScriptedOutlet):
    """Its polls and its end take time."""

    def __init__(self, clock: FakeClock, needs_s: float) -> None:
        super().__init__()
        self.clock = clock
        self.needs_s = needs_s
        self.polls: list[float] = []
        self.given_s: list[float] = []

    def poll(self, max_wait_s: float = 0.0) -> None:
        self.polls.append(max_wait_s)

    def close(self, timeout_s: float) -> int:
        self.given_s.append(timeout_s)
        self.clock.advance(min(timeout_s, self.needs_s))
        if timeout_s >= self.needs_s:
            self.confirm_all()
        return self.pending()


class Heard:
    """A receipt that remembers what it was told."""

    def __init__(self) -> None:
        self.count = 0
        self.refusals: list[tuple[int, RefusalKind]] = []

    def confirmed(self, count: int) -> None:
        self.count += count

    def refused(self, index: int, refusal: Refusal) -> None:
        self.refusals.append((index, refusal.kind))


class Bench:
    """Two slow outlets behind one."""

    def __init__(self, kafka_s: float = 0.0, rabbitmq_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.kafka = SlowOutlet(self.clock, kafka_s)
        self.rabbitmq = SlowOutlet(self.clock, rabbitmq_s)
        self.outlets = Outlets(self.kafka, self.rabbitmq, self.clock)

    def publish(self, destination: str, count: int = 1) -> Heard:
        heard = Heard()
        envelopes = Envelopes(destination, [None] * count, [b"v"] * count, [[] for _ in range(count)])
        self.outlets.publish(envelopes, heard)
        return heard


@pytest.mark.parametrize(
    ("destination", "on_rabbitmq"),
    [
        ("results", False),
        ("orders.g.dlt", False),
        ("rabbitmq.results", False),
        ("rabbitmq:/q", True),
        ("rabbitmq:x/y", True),
        ("reply:", True),
    ],
)
def test_an_envelope_goes_where_its_destination_is(destination: str, on_rabbitmq: bool) -> None:
    """A topic's name holds no colon, so nothing can be meant for both."""
    bench = Bench()
    bench.publish(destination)
    assert (len(bench.kafka.sent), len(bench.rabbitmq.sent)) == (not on_rabbitmq, on_rabbitmq)


def test_what_both_say_reaches_the_receipts() -> None:
    """Confirmed or refused, by whom it was given to."""
    bench = Bench()
    bench.rabbitmq.refusing["rabbitmq:/q"] = RefusalKind.DENIED
    topic, queue = bench.publish("results", 3), bench.publish("rabbitmq:/q", 2)
    assert bench.outlets.pending() == 5
    bench.kafka.confirm_all()
    assert bench.outlets.pending() == 2
    bench.rabbitmq.confirm_all()
    assert (topic.count, topic.refusals) == (3, [])
    assert (queue.count, queue.refusals) == (0, [(0, RefusalKind.DENIED), (1, RefusalKind.DENIED)])
    assert bench.outlets.pending() == 0


def test_both_are_polled_and_one_waits() -> None:
    """A wait of both would be twice as long."""
    bench = Bench()
    bench.outlets.poll(0.5)
    bench.outlets.poll()
    assert sum(bench.kafka.polls) + sum(bench.rabbitmq.polls) == 0.5
    assert len(bench.kafka.polls) == len(bench.rabbitmq.polls) == 2


@pytest.mark.parametrize(("kafka_s", "rabbitmq_s", "left"), [(0, 0, 0), (3, 3, 0), (9, 1, 3), (1, 9, 1)])
def test_they_end_together_within_the_bound(kafka_s: float, rabbitmq_s: float, left: int) -> None:
    """What is not confirmed by then is counted, wherever it was given."""
    bench = Bench(kafka_s, rabbitmq_s)
    bench.publish("results", 2)
    bench.publish("reply:", 1)
    began = bench.clock.monotonic()
    assert bench.outlets.close(7.0) == left
    assert bench.clock.monotonic() - began <= 7.0
    assert repr(bench.outlets).startswith("Outlets(")
