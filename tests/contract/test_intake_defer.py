"""Deferring one stream: the same suite for the memory broker and for Kafka by both group protocols."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferfleet.ports import Clock
from inferfleet.records import Stream
from inferfleet.worker.clock import SystemClock
from tests.contract.intake_bench import PATIENCE_S, Bench, KafkaBench, MemoryBench, Reader, Sent
from tests.support.waiting import wait_until

BENCHES = [
    "memory",
    pytest.param("classic", marks=pytest.mark.service),
    pytest.param("consumer", marks=pytest.mark.service),
]
A_WHILE_S = 0.8
FAR_S = 3_600.0


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every broker in turn, with a group of its own."""
    if request.param == "memory":
        made: Bench = MemoryBench()
    else:
        made = KafkaBench(request.getfixturevalue("kafka"), request.param)
    yield made
    made.close()


@pytest.fixture
def clock(bench: Bench) -> Clock:
    """The clock that the bench's members live by."""
    return bench.clock if isinstance(bench, MemoryBench) else SystemClock()


def numbered(count: int, stem: str = "v") -> list[Sent]:
    return [Sent(f"{stem}{n}".encode()) for n in range(count)]


def taken_all(bench: Bench, topic: str, count: int) -> Reader:
    """Return a member that has taken ``count`` records of one partition."""
    bench.send(topic, 0, *numbered(count))
    reader = bench.join(topic)
    bench.until_taken(reader, count)
    return reader


def until_after(bench: Bench, clock: Clock, instant: float, reader: Reader) -> None:
    """Let the reader take until ``instant`` is past, and some turns more."""
    bench.until(lambda: clock.monotonic() > instant, "the time is past", reader)
    for _ in range(20):
        reader.turn()


def test_a_deferred_stream_brings_nothing_until_its_time_and_goes_on_at_its_position(
    bench: Bench, clock: Clock
) -> None:
    """What was taken from the position on comes again, in order; the other streams go on meanwhile."""
    topic = bench.topic(2)
    bench.send(topic, 0, *numbered(10))
    reader = bench.join(topic)
    bench.until_taken(reader, 10)
    until_s = clock.monotonic() + A_WHILE_S
    reader.intake.defer(Stream(topic, 0), 4, until_s)
    bench.send(topic, 0, *numbered(2, "later"))
    bench.send(topic, 1, Sent(b"other"))
    bench.until(lambda: b"other" in reader.values(), "the other stream goes on", reader)
    early: list[float] = []

    def all_taken() -> bool:
        if any(chunk.stream.partition == 0 for chunk in reader.turn()):
            early.append(clock.monotonic())
        return len(reader.positions()[0]) == 10 + 8

    wait_until(all_taken, PATIENCE_S, "the rest is taken", every_s=0.001)
    assert min(early) >= until_s
    assert reader.positions()[0] == [*range(10), *range(4, 12)]
    assert not reader.heard("revoked")
    assert not reader.heard("lost")


def test_deferring_again_counts_from_the_last(bench: Bench, clock: Clock) -> None:
    """A second call replaces time and position of the first, also when it comes before anything was taken."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    reader.intake.defer(Stream(topic, 0), 2, clock.monotonic() + FAR_S)
    reader.intake.defer(Stream(topic, 0), 7, clock.monotonic() - 1)
    bench.until_taken(reader, 13)
    assert reader.positions()[0] == [*range(10), 7, 8, 9]
    reader.intake.defer(Stream(topic, 0), 9, clock.monotonic() - 1)
    bench.until_taken(reader, 14)
    assert reader.positions()[0][-1] == 9


def test_a_pause_of_the_source_outlasts_a_deferral(bench: Bench, clock: Clock) -> None:
    """When the time comes during a pause nothing is taken; the resumed source goes on at the position."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    until_s = clock.monotonic() + A_WHILE_S / 4
    reader.intake.defer(Stream(topic, 0), 4, until_s)
    reader.intake.pause([topic])
    until_after(bench, clock, until_s, reader)
    assert len(reader.values()) == 10
    reader.intake.resume([topic])
    bench.until_taken(reader, 16)
    assert reader.positions()[0] == [*range(10), *range(4, 10)]


def test_a_deferral_outlasts_a_pause_of_the_source(bench: Bench, clock: Clock) -> None:
    """Pausing and resuming the source does not bring a deferred stream back before its time."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    until_s = clock.monotonic() + A_WHILE_S
    reader.intake.pause([topic])
    reader.intake.defer(Stream(topic, 0), 4, until_s)
    reader.intake.resume([topic])
    seen_at: list[float] = []

    def all_taken() -> bool:
        if reader.turn():
            seen_at.append(clock.monotonic())
        return len(reader.values()) == 16

    wait_until(all_taken, PATIENCE_S, "the rest is taken", every_s=0.001)
    assert min(seen_at) >= until_s
    assert reader.positions()[0] == [*range(10), *range(4, 10)]


def test_a_pause_between_the_end_of_a_deferral_and_the_next_record_skips_nothing(
    bench: Bench, clock: Clock
) -> None:
    """The stream goes on at its position, not where it was before it went back."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    reader.intake.pause([topic])
    reader.intake.defer(Stream(topic, 0), 4, clock.monotonic() - 1)
    assert reader.turn(max_wait_s=0.0) == []
    for _ in range(3):
        reader.intake.resume([topic])
        reader.intake.pause([topic])
    assert reader.turn() == []
    reader.intake.resume([topic])
    bench.until_taken(reader, 16)
    assert reader.positions()[0] == [*range(10), *range(4, 10)]


def test_a_deferral_ends_with_the_ownership(bench: Bench, clock: Clock) -> None:
    """The next owner starts at the commit, and so does this one when the stream comes back."""
    topic = bench.topic(2)
    for number in range(2):
        bench.send(topic, number, *numbered(4))
    first = bench.join(topic)
    bench.until_taken(first, 8)
    for number in range(2):
        first.intake.defer(Stream(topic, number), 3, clock.monotonic() + FAR_S)
        first.to_settle[Stream(topic, number)] = 2
    second = bench.join(topic)
    bench.until(lambda: len(second.owned) == 1, "one partition moves")
    (moved,) = second.owned
    bench.until(lambda: len(second.values()) == 2, "the next owner takes what is not settled")
    assert second.positions() == {moved.partition: [2, 3]}
    second.close()
    bench.until(lambda: len(first.positions()[moved.partition]) > 4, "it comes back and is taken", first)
    assert first.positions()[moved.partition] == [0, 1, 2, 3, 2, 3]
    kept = 1 - moved.partition
    assert first.positions()[kept] == [0, 1, 2, 3], "what stayed is deferred still"


def test_a_source_that_was_resumed_while_it_was_away_is_taken_when_it_comes_back(bench: Bench) -> None:
    """A partition that left while its source was paused does not come back paused for ever."""
    topic = bench.topic(2)
    first = bench.join(topic)
    bench.until(lambda: len(first.owned) == 2, "the first has all", first)
    first.intake.pause([topic])
    second = bench.join(topic)
    bench.until(lambda: len(second.owned) == 1, "one partition moves")
    (moved,) = second.owned
    first.intake.resume([topic])
    second.close()
    bench.until(lambda: moved in first.owned, "it comes back", first)
    bench.send(topic, moved.partition, *numbered(2))
    bench.until_taken(first, 2)


def test_a_deferred_stream_is_not_drained_and_counts_as_lag(bench: Bench, clock: Clock) -> None:
    """Whoever waits for the end of the work waits for deferred records too."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    bench.until(lambda: reader.intake.drained(5.0), "it is drained", reader)
    until_s = clock.monotonic() + A_WHILE_S / 4
    reader.intake.defer(Stream(topic, 0), 4, until_s)
    assert not reader.intake.drained(5.0)
    assert reader.intake.lag() == {Stream(topic, 0): 6}
    bench.until_taken(reader, 16)
    assert clock.monotonic() >= until_s
    bench.until(lambda: reader.intake.drained(5.0), "it is drained again", reader)
    assert reader.intake.lag() == {Stream(topic, 0): 0}


def test_deferring_what_is_not_owned_is_harmless(bench: Bench, clock: Clock) -> None:
    """A stream that has just gone is left alone, and nothing is remembered of it."""
    topic, other = bench.topic(), bench.topic()
    reader = taken_all(bench, topic, 3)
    reader.intake.defer(Stream(other, 0), 0, clock.monotonic() + FAR_S)
    reader.intake.defer(Stream(topic, 7), 0, clock.monotonic() + FAR_S)
    bench.until(lambda: reader.intake.drained(5.0), "it is drained", reader)
    bench.send(topic, 0, Sent(b"more"))
    bench.until_taken(reader, 4)


def test_what_is_settled_stays_settled(bench: Bench, clock: Clock) -> None:
    """Going back does not take a commit back, and positions below it may be committed meanwhile."""
    topic = bench.topic()
    reader = taken_all(bench, topic, 10)
    reader.intake.defer(Stream(topic, 0), 4, clock.monotonic() + FAR_S)
    reader.intake.settle({Stream(topic, 0): 4})
    bench.until_committed(topic, 4, reader)
    reader.close()
    second = bench.join(topic)
    bench.until_taken(second, 6)
    assert second.positions()[0] == list(range(4, 10))
