"""Several intakes as one: each is told what is its own, and none waits long for another."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.records import Chunk, Stream
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.sources import RETRIES_EVERY_S, SLICE_S, Sources
from tests.support.builders import chunk

TOPIC, RETRY, QUEUE = "orders", "orders.g.retry.5000", "rabbitmq:q"
NOBODY: Any = object()


class ScriptedIntake:
    """Implements :class:`~inferfleet.ports.Intake`: gives out what a test put in, and notes what it hears.

    A take that finds nothing waits as long as it may, on the clock.
    """

    def __init__(self, name: str, source: str, clock: FakeClock) -> None:
        self.name = name
        self.source = source
        self.clock = clock
        self.records: deque[int] = deque()
        self.takes: list[tuple[int, int, float]] = []
        self.heard: list[tuple[str, Any]] = []
        self.joined = True
        self.denied: str | None = None
        self.is_drained = True
        self.closed = 0
        self.arrives_at = float("inf")

    def put(self, count: int) -> None:
        self.records.extend(range(len(self.records), len(self.records) + count))

    def subscribe(self, sources: Collection[str], listener: Any) -> None:
        assert listener is NOBODY
        self.heard.append(("subscribe", list(sources)))

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        assert max_records >= 1
        assert max_bytes >= 1
        self.takes.append((max_records, max_bytes, max_wait_s))
        if not self.records and max_wait_s > 0:
            self.clock.advance(max(0.0, min(max_wait_s, self.arrives_at - self.clock.monotonic())))
        if self.clock.monotonic() >= self.arrives_at:
            self.put(1)
            self.arrives_at = float("inf")
        taken = [self.records.popleft() for _ in range(min(max_records, len(self.records)))]
        if not taken:
            return []
        return [chunk([b"0123456789"] * len(taken), first=taken[0], stream=Stream(self.source, 1))]

    def settle(self, positions: Mapping[Stream, int]) -> None:
        self.heard.append(("settle", dict(positions)))

    def pause(self, sources: Collection[str]) -> None:
        self.heard.append(("pause", list(sources)))

    def resume(self, sources: Collection[str]) -> None:
        self.heard.append(("resume", list(sources)))

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        self.heard.append(("defer", (stream, position, until_s)))

    def lag(self) -> dict[Stream, int]:
        return {Stream(self.source, 1): len(self.records)}

    def drained(self, timeout_s: float) -> bool:
        return self.is_drained

    def close(self) -> None:
        self.closed += 1


class Bench:
    """Sources over three scripted intakes; each may be left out."""

    def __init__(self, *used: str) -> None:
        self.clock = FakeClock()
        self.kafka = ScriptedIntake("kafka", TOPIC, self.clock)
        self.retries = ScriptedIntake("retries", RETRY, self.clock)
        self.rabbitmq = ScriptedIntake("rabbitmq", QUEUE, self.clock)
        chosen = used or ("kafka", "retries", "rabbitmq")
        self.sources = Sources(
            self.kafka if "kafka" in chosen else None,
            self.retries if "retries" in chosen else None,
            self.rabbitmq if "rabbitmq" in chosen else None,
            lambda source: ".retry." in source and not source.startswith("rabbitmq:"),
            self.clock,
        )
        self.all = [each for each in (self.kafka, self.retries, self.rabbitmq) if each.name in chosen]
        self.sources.subscribe([each.source for each in self.all], NOBODY)

    def take(
        self, max_records: int = 100, max_bytes: int = 1 << 20, max_wait_s: float = 0.0
    ) -> dict[str, int]:
        """Return how many records of each source a take brings."""
        found: dict[str, int] = {}
        for each in self.sources.take(max_records, max_bytes, max_wait_s):
            found[each.stream.source] = found.get(each.stream.source, 0) + len(each)
        return found


def test_each_is_told_what_is_its_own() -> None:
    """By the address of a source: topics, the pool's own retry topics, queues."""
    bench = Bench()
    ready = "rabbitmq:q.g.retry.ready"
    sources = bench.sources
    sources.subscribe([TOPIC, "other", RETRY, QUEUE, ready], NOBODY)
    assert bench.kafka.heard[-1] == ("subscribe", [TOPIC, "other"])
    assert bench.retries.heard[-1] == ("subscribe", [RETRY])
    assert bench.rabbitmq.heard[-1] == ("subscribe", [QUEUE, ready])
    sources.pause([RETRY, QUEUE])
    sources.resume([TOPIC])
    assert bench.retries.heard[-1] == ("pause", [RETRY])
    assert bench.rabbitmq.heard[-1] == ("pause", [QUEUE])
    assert bench.kafka.heard[-1] == ("resume", [TOPIC])
    positions = {Stream(TOPIC, 0): 5, Stream(RETRY, 2): 6, Stream(ready, 9): 7, Stream(TOPIC, 1): 8}
    sources.settle(positions)
    assert bench.kafka.heard[-1] == ("settle", {Stream(TOPIC, 0): 5, Stream(TOPIC, 1): 8})
    assert bench.retries.heard[-1] == ("settle", {Stream(RETRY, 2): 6})
    assert bench.rabbitmq.heard[-1] == ("settle", {Stream(ready, 9): 7})
    sources.defer(Stream(RETRY, 0), 3, 1.0)
    assert bench.retries.heard[-1] == ("defer", (Stream(RETRY, 0), 3, 1.0))
    assert sources.lag() == {Stream(TOPIC, 1): 0, Stream(RETRY, 1): 0, Stream(QUEUE, 1): 0}


def test_who_has_lost_all_sources_takes_from_nothing() -> None:
    """It is told so; one that never had any is left alone."""
    bench = Bench("kafka", "rabbitmq")
    bench.sources.subscribe([TOPIC], NOBODY)
    assert bench.rabbitmq.heard[-1] == ("subscribe", [])
    bench.sources.subscribe([TOPIC, QUEUE], NOBODY)
    assert bench.rabbitmq.heard[-1] == ("subscribe", [QUEUE])
    never = Bench("kafka", "rabbitmq", "retries")
    never.sources = Sources(never.kafka, None, never.rabbitmq, lambda _: False, never.clock)
    never.rabbitmq.heard.clear()
    never.sources.subscribe([TOPIC], NOBODY)
    never.take()
    assert (never.rabbitmq.heard, never.rabbitmq.takes) == ([], [])


def test_a_source_that_nobody_takes_from_is_a_fault() -> None:
    """Whoever chose the adapters did not look at the routes."""
    with pytest.raises(LookupError, match="nothing takes from rabbitmq:q"):
        Bench("kafka").sources.pause([QUEUE])


def test_without_an_intake_of_their_own_retry_topics_are_topics() -> None:
    """Another pool's, for instance, that somebody reads on purpose."""
    bench = Bench("kafka")
    bench.sources.subscribe([RETRY], NOBODY)
    assert bench.kafka.heard[-1] == ("subscribe", [RETRY])


@pytest.mark.parametrize("name", ["kafka", "rabbitmq"])
def test_one_that_is_alone_waits_as_long_as_it_may(name: str) -> None:
    """And gets all the room."""
    bench = Bench(name)
    assert bench.take(50, 500, 0.05) == {}
    assert bench.all[0].takes == [(50, 500, 0.05)]
    bench.all[0].put(80)
    assert list(bench.take(50, 500, 0.05).values()) == [50]


def test_retries_are_looked_at_now_and_then() -> None:
    """Nobody waits for what has waited for seconds, and what they bring is not kept waiting."""
    bench = Bench("kafka", "retries")
    for _ in range(3):
        bench.take(max_wait_s=0.0)
    assert len(bench.retries.takes) == 1
    bench.clock.advance(RETRIES_EVERY_S)
    bench.retries.put(10)
    bench.kafka.put(200)
    assert bench.take(100) == {RETRY: 10, TOPIC: 90}
    assert bench.retries.takes[-1] == (50, 1 << 19, 0.0)
    bench.clock.advance(RETRIES_EVERY_S)
    bench.kafka.records.clear()
    bench.retries.put(1)
    assert bench.take(100, max_wait_s=0.05) == {RETRY: 1}
    assert bench.kafka.takes[-1][2] == 0.0


def test_two_that_wait_take_turns_until_one_has_something() -> None:
    """In slices, and no longer than the whole wait and a slice."""
    bench = Bench("kafka", "rabbitmq")
    began = bench.clock.monotonic()
    assert bench.take(max_wait_s=0.05) == {}
    assert 0.05 <= bench.clock.monotonic() - began <= 0.05 + SLICE_S
    assert max(wait_s for *_, wait_s in bench.kafka.takes) <= SLICE_S
    assert {wait_s for *_, wait_s in bench.rabbitmq.takes} == {0.0}
    began = bench.clock.monotonic()
    bench.rabbitmq.arrives_at = began + 0.012
    assert bench.take(max_wait_s=0.05) == {QUEUE: 1}
    assert bench.clock.monotonic() - began <= 0.012 + SLICE_S
    bench.kafka.arrives_at = bench.clock.monotonic() + 0.012
    assert bench.take(max_wait_s=0.05) == {TOPIC: 1}


def test_a_flood_on_one_leaves_room_for_the_other() -> None:
    """Half for the first, the rest for the second, in every take."""
    bench = Bench("kafka", "rabbitmq")
    bench.kafka.put(1_000)
    bench.rabbitmq.put(1_000)
    assert bench.take(100) == {QUEUE: 50, TOPIC: 50}
    bench.rabbitmq.records.clear()
    assert bench.take(100) == {TOPIC: 100}
    bench.kafka.records.clear()
    bench.rabbitmq.put(1_000)
    assert bench.take(100) == {QUEUE: 50}


@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.lists(st.integers(0, 60), min_size=3, max_size=3),
)
def test_a_take_brings_no_more_than_asked_for_and_one_of_each(
    max_records: int, max_bytes: int, waiting: list[int]
) -> None:
    """An intake has to be asked to stay alive, and is asked for one record at least."""
    bench = Bench()
    for intake, count in zip(bench.all, waiting, strict=True):
        intake.put(count)
    found = bench.take(max_records, max_bytes)
    assert sum(found.values()) <= max(max_records, len(bench.all)) + 1
    assert all(len(intake.takes) == 1 for intake in bench.all)
    assert bool(found) == any(waiting)


def test_it_has_joined_when_all_have_that_are_used() -> None:
    """And none before there are sources."""
    bench = Bench()
    assert bench.sources.joined
    bench.retries.joined = False
    assert not bench.sources.joined
    alone = Sources(bench.kafka, bench.retries, None, lambda _: False, bench.clock)
    assert not alone.joined
    alone.subscribe([TOPIC], NOBODY)
    assert alone.joined


def test_it_is_denied_where_one_is() -> None:
    """The first reason is told."""
    bench = Bench()
    assert bench.sources.denied is None
    bench.rabbitmq.denied = "no right"
    assert bench.sources.denied == "no right"


def test_it_is_drained_when_all_are() -> None:
    """Retries that wait count as well."""
    bench = Bench()
    assert bench.sources.drained(1.0)
    bench.retries.is_drained = False
    assert not bench.sources.drained(1.0)


def test_all_are_closed() -> None:
    """Also one that was never used."""
    bench = Bench()
    bench.sources.close()
    assert [intake.closed for intake in bench.all] == [1, 1, 1]
    assert repr(bench.sources).startswith("Sources([")
