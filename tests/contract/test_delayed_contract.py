"""Delayed retries, on the memory broker and Kafka: nothing comes before its time, and everything comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferfleet.brokers.delayed import LEAST_S, MOST_S, DelayedIntake
from inferfleet.ports import Clock
from inferfleet.records import Headers, Stream
from inferfleet.worker.clock import SystemClock
from tests.contract.intake_bench import PATIENCE_S, Bench, KafkaBench, MemoryBench, Reader, Sent
from tests.support.waiting import wait_until

BENCHES = [
    "memory",
    pytest.param("classic", marks=pytest.mark.service),
    pytest.param("consumer", marks=pytest.mark.service),
]
NOT_BEFORE = "inferfleet-not-before-ms"
FAR_MS = 3_600_000


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


def join(bench: Bench, clock: Clock, *topics: str, longest_ms: int | None = None) -> Reader:
    """Return a member that takes what is due."""
    reader = Reader()
    reader.intake = DelayedIntake(bench.intake("earliest"), clock, longest_ms=longest_ms)
    reader.intake.subscribe(topics, reader)
    bench.readers.append(reader)
    return reader


def due_at(at_ms: int, value: bytes = b"v") -> Sent:
    return Sent(value, None, [("inferfleet-id", b"x"), (NOT_BEFORE, b"%d" % at_ms)])


def test_everything_is_taken_once_in_order_and_nothing_before_its_time(bench: Bench, clock: Clock) -> None:
    """Records wait for their own time and for those before them, as jitter has it, and for no more."""
    topic = bench.topic(2)
    now_ms = clock.utc_ms()
    delays = [-50, 300, 250, 600, 0, 550, 900, 700, 800, 850]
    for number in range(2):
        bench.send(topic, number, *[due_at(now_ms + delay, b"%d" % delay) for delay in delays])
    reader = join(bench, clock, topic)
    late: list[int] = []

    def all_taken() -> bool:
        before_ms = clock.utc_ms()
        for chunk in reader.turn():
            for value, position in zip(chunk.values, chunk.positions, strict=True):
                own_ms = now_ms + int(value or b"")
                assert own_ms <= clock.utc_ms(), "it is taken before its time"
                late.append(before_ms - now_ms - max(delays[: position + 1]))
        return len(reader.values()) >= 2 * len(delays)

    wait_until(all_taken, PATIENCE_S, "all records are taken", every_s=0.001)
    assert reader.positions() == {number: list(range(len(delays))) for number in range(2)}
    if isinstance(bench, MemoryBench):
        assert max(late) <= LEAST_S * 1000 + 20


def test_a_record_that_does_not_say_when_is_due(bench: Bench, clock: Clock) -> None:
    """No header, or one that is no time: waiting for it would hold up all behind it for ever."""
    said: list[Headers] = [
        None,
        [("other", b"1")],
        *[[(NOT_BEFORE, value)] for value in (None, b"", b"soon", b"-5", b"1e15", b"9" * 30, b"\xb2")],
    ]
    topic = bench.topic()
    bench.send(topic, 0, *[Sent(b"%d" % n, None, headers) for n, headers in enumerate(said)])
    reader = join(bench, clock, topic)
    bench.until_taken(reader, len(said))
    assert reader.values() == [b"%d" % n for n in range(len(said))]


def test_the_last_header_counts(bench: Bench, clock: Clock) -> None:
    """Ours stands behind whatever the caller sent under its name."""
    now_ms = clock.utc_ms()
    past, far = (NOT_BEFORE, b"1"), (NOT_BEFORE, b"%d" % (now_ms + FAR_MS))
    topic, other = bench.topic(), bench.topic()
    bench.send(topic, 0, Sent(b"due", None, [far, past]))
    bench.send(other, 0, Sent(b"waits", None, [past, far]))
    reader = join(bench, clock, topic, other)
    bench.until(lambda: len(reader.owned) == 2, "both are assigned", reader)
    bench.until_taken(reader, 1)
    for _ in range(20):
        reader.turn()
    assert reader.values() == [b"due"]


def test_a_stream_that_waits_does_not_hold_up_another(bench: Bench, clock: Clock) -> None:
    """Each delay has its own topic, and each partition its own front."""
    topic, other = bench.topic(2), bench.topic()
    now_ms = clock.utc_ms()
    bench.send(topic, 0, due_at(now_ms + FAR_MS, b"far"), due_at(now_ms, b"behind it"))
    bench.send(topic, 1, due_at(now_ms, b"beside it"))
    bench.send(other, 0, *[due_at(now_ms, b"%d" % n) for n in range(3)])
    reader = join(bench, clock, topic, other)
    bench.until_taken(reader, 4)
    for _ in range(20):
        reader.turn()
    assert sorted(map(bytes, filter(None, reader.values()))) == [b"0", b"1", b"2", b"beside it"]


def test_what_waits_is_left_to_take(bench: Bench, clock: Clock) -> None:
    """A worker that goes on until nothing is left waits for its own retries."""
    topic = bench.topic()
    now_ms = clock.utc_ms()
    bench.send(topic, 0, due_at(now_ms, b"due"), due_at(now_ms + 900, b"later"))
    reader = join(bench, clock, topic)
    bench.until_taken(reader, 1)
    if clock.utc_ms() < now_ms + 900:
        assert not reader.intake.drained(5.0)
        assert reader.intake.lag() == {Stream(topic, 0): 1}
    bench.until_taken(reader, 2)
    bench.until(lambda: reader.intake.drained(5.0), "it is drained", reader)
    assert clock.utc_ms() >= now_ms + 900
    assert reader.values() == [b"due", b"later"]


def test_a_paused_topic_brings_nothing_that_is_due(bench: Bench, clock: Clock) -> None:
    """A route that is held is held for its retries too; what came due meanwhile comes when it goes on."""
    topic = bench.topic()
    now_ms = clock.utc_ms()
    bench.send(topic, 0, due_at(now_ms, b"first"), due_at(now_ms + 300, b"a"), due_at(now_ms + 350, b"b"))
    reader = join(bench, clock, topic)
    bench.until_taken(reader, 1)
    reader.intake.pause([topic])
    taken = len(reader.values())
    bench.until(lambda: clock.utc_ms() > now_ms + 600, "all is due", reader)
    for _ in range(10):
        assert reader.turn() == []
    assert len(reader.values()) == taken
    reader.intake.resume([topic])
    bench.until_taken(reader, 3)
    assert reader.values() == [b"first", b"a", b"b"]


def test_a_rebalance_while_records_wait_loses_nothing(bench: Bench, clock: Clock) -> None:
    """Whoever has the partition when the time comes takes them: none early, none missing."""
    topic = bench.topic(2)
    now_ms = clock.utc_ms()
    delay_ms = 2_500
    for number in range(2):
        waiting = [due_at(now_ms + delay_ms + n, b"%d.%d" % (number, n)) for n in range(20)]
        bench.send(topic, number, due_at(now_ms, b"first"), *waiting)
    first = join(bench, clock, topic)
    bench.until_taken(first, 2)
    first.to_settle = {Stream(topic, number): 1 for number in range(2)}
    second = join(bench, clock, topic)
    bench.until(lambda: len(first.owned) == len(second.owned) == 1, "each has one partition")
    if clock.utc_ms() < now_ms + delay_ms:
        assert first.values() == [b"first", b"first"]
        assert second.values() == []
    expected = {b"first", *(b"%d.%d" % (number, n) for number in range(2) for n in range(20))}
    bench.until(lambda: {*first.values(), *second.values()} == expected, "all is taken")
    assert clock.utc_ms() >= now_ms + delay_ms


def test_a_claim_beyond_the_longest_delay_is_not_believed(bench: Bench, clock: Clock) -> None:
    """A time in the wrong unit would hold up its partition for ever."""
    topic = bench.topic()
    now_ms = clock.utc_ms()
    bench.send(topic, 0, due_at(now_ms * 100, b"odd"), due_at(now_ms + FAR_MS // 2, b"waits"))
    reader = join(bench, clock, topic, longest_ms=FAR_MS)
    bench.until_taken(reader, 1)
    for _ in range(20):
        reader.turn()
    assert reader.values() == [b"odd"]


def test_a_calendar_that_is_set_right_counts_within_a_minute() -> None:
    """A worker whose clock was behind does not let records wait for the whole difference."""
    bench = MemoryBench()
    topic = bench.topic()
    bench.send(topic, 0, due_at(bench.clock.utc_ms() + FAR_MS))
    reader = join(bench, bench.clock, topic)
    reader.turn()
    bench.clock.step_utc(FAR_MS / 1000)
    assert reader.turn() == []
    bench.clock.advance(MOST_S)
    assert len(reader.turn()) == 1


def test_records_that_come_due_one_by_one_are_taken_together() -> None:
    """Going back costs what the client fetched ahead, so it does so a few times a second at most."""
    bench = MemoryBench()
    topic = bench.topic()
    now_ms = bench.clock.utc_ms()
    bench.send(topic, 0, *[due_at(now_ms + n) for n in range(1, 1_001)])
    reader = join(bench, bench.clock, topic)
    while len(reader.values()) < 1_000:
        reader.turn(max_wait_s=0.001)
    assert reader.positions() == {0: list(range(1_000))}
    assert len(reader.chunks) <= 1 / LEAST_S + 2
