"""One suite for every intake: the memory broker, a real Kafka by both of its group protocols, RabbitMQ.

A *place* is where records stand in an order of their own: a partition, or a queue. What only a broker with
partitions promises is tested with ``partitioned``: a queue belongs to nobody, its members take turns, so
nothing of it is assigned to one, moves to another or has a start; a delivery tag has no gaps. What RabbitMQ
promises in its place is in ``test_rabbitmq_adapters.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from inferfleet.errors import BrokerError
from inferfleet.records import Chunk, Stream
from tests.contract.intake_bench import PATIENCE_S, Bench, KafkaBench, MemoryBench, Reader, Sent
from tests.contract.rabbitmq_bench import RabbitBench
from tests.support.kafka_server import KafkaServer
from tests.support.waiting import wait_until

PARTITIONED = [
    "memory",
    pytest.param("classic", marks=pytest.mark.service),
    pytest.param("consumer", marks=pytest.mark.service),
]
BENCHES = [*PARTITIONED, pytest.param("rabbitmq", marks=pytest.mark.service)]


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every broker in turn, with a group of its own."""
    made = new_bench(request)
    yield made
    made.close()


@pytest.fixture(params=PARTITIONED)
def partitioned(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every broker whose topics have partitions with offsets."""
    made = new_bench(request)
    yield made
    made.close()


def new_bench(request: pytest.FixtureRequest) -> Bench:
    if request.param == "memory":
        return MemoryBench()
    if request.param == "rabbitmq":
        return RabbitBench(request.getfixturevalue("rabbitmq"))
    return KafkaBench(request.getfixturevalue("kafka"), request.param)


def numbered(count: int, stem: str = "v") -> list[Sent]:
    return [Sent(f"{stem}{n}".encode()) for n in range(count)]


def sorted_values(*readers: Reader) -> list[bytes]:
    return sorted(value or b"" for reader in readers for value in reader.values())


class _Idle(Reader):
    """Lets the time pass."""

    def turn(self, *bounds: Any) -> list[Chunk]:
        return []


IDLE = _Idle()


def streams(topic: str, *partitions: int) -> set[Stream]:
    return {Stream(topic, number) for number in partitions}


# Taking


def test_records_arrive_in_order_one_chunk_per_place(bench: Bench) -> None:
    """Positions of a place ascend over all chunks, and one take has at most one chunk of each."""
    places = bench.places(3)
    for number, (topic, partition) in enumerate(places):
        bench.send(topic, partition, *numbered(40, f"p{number}."))
    reader = bench.join(*{topic for topic, _ in places})
    takes: list[list[Chunk]] = []

    def all_taken() -> bool:
        takes.append(reader.turn(max_records=30))
        return len(reader.values()) >= 120

    wait_until(all_taken, PATIENCE_S, "120 records are taken", every_s=0.001)
    assert bench.taken(reader) == {place: list(range(40)) for place in places}
    for number, place in enumerate(places):
        chunks = [chunk for chunk in reader.chunks if bench.place_of(chunk.stream) == place]
        assert [v for chunk in chunks for v in chunk.values] == [b"p%d.%d" % (number, n) for n in range(40)]
    for chunks in takes:
        assert len({chunk.stream for chunk in chunks}) == len(chunks)
        assert sum(len(chunk) for chunk in chunks) <= 30


def test_columns_are_complete(bench: Bench) -> None:
    """Keys, values and headers arrive as sent: none, empty, null, repeated; the timestamp is the broker's.

    What RabbitMQ cannot carry comes as it can: a body that is nothing as an empty one, names in lower case,
    of a repeated name the last.
    """
    sent = [
        Sent(b"plain"),
        Sent(None, b"tombstone"),
        Sent(b"", b""),
        Sent(b"h", b"k", [("a", b"1"), ("a", b"2"), ("null", None), ("Upper", b"")]),
        Sent(b"\x00\xff", b"\xff"),
    ]
    topic = bench.topic()
    bench.send(topic, 0, *sent)
    reader = bench.join(topic)
    bench.until_taken(reader, len(sent))
    rows = [Sent(*row) for c in reader.chunks for row in zip(c.values, c.keys, c.headers, strict=True)]
    assert rows == [bench.kept(each) for each in sent]
    timestamps = [t for c in reader.chunks for t in c.timestamps_ms]
    assert len(timestamps) == len(sent)
    assert all(1_600_000_000_000 < t < 4_000_000_000_000 for t in timestamps)
    for chunk in reader.chunks:
        assert bench.place_of(chunk.stream) == (topic, 0)
        assert chunk.stream in reader.owned
        assert chunk.open == len(chunk)
        assert chunk.live


def test_a_gap_between_offsets_is_no_record(partitioned: Bench) -> None:
    """Offsets that hold nothing are passed over, and a gap at the end leaves nothing to take."""
    topic = partitioned.topic()
    partitioned.send(topic, 0, Sent(b"one"))
    partitioned.leave_a_gap(topic, 0)
    partitioned.send(topic, 0, Sent(b"two"))
    partitioned.leave_a_gap(topic, 0)
    reader = partitioned.join(topic)
    partitioned.until_taken(reader, 2)
    assert reader.values() == [b"one", b"two"]
    positions = reader.positions()[0]
    assert positions[1] - positions[0] > 1
    partitioned.until(lambda: reader.intake.drained(5.0), "it is drained although offsets follow", reader)


def test_a_take_keeps_its_bounds(bench: Bench) -> None:
    """At most ``max_records``, and about ``max_bytes``: what a take brings too much is one record's worth."""
    topic = bench.topic()
    bench.send(topic, 0, *[Sent(b"x" * 1000) for _ in range(100)])
    reader = bench.join(topic)
    wait_until(lambda: reader.turn(max_records=1), PATIENCE_S, "a first record shows what size they have")
    takes: list[int] = []

    def all_taken() -> bool:
        takes.append(sum(chunk.size_bytes for chunk in reader.turn(500, 10_000, 0.02)))
        return len(reader.values()) >= 100

    wait_until(all_taken, PATIENCE_S, "100 records are taken", every_s=0.001)
    assert max(takes) <= 11_000
    assert len(takes) >= 9


def test_a_record_larger_than_the_bound_is_taken_alone(bench: Bench) -> None:
    """The byte bound never stops a record from being taken."""
    topic = bench.topic()
    bench.send(topic, 0, Sent(b"x" * 5000), Sent(b"y" * 5000))
    reader = bench.join(topic)

    def both_taken() -> bool:
        reader.turn(500, 1, 0.02)
        return len(reader.values()) == 2

    wait_until(both_taken, PATIENCE_S, "both records are taken", every_s=0.001)
    assert [len(chunk) for chunk in reader.chunks] == [1, 1]


def test_the_start_is_for_partitions_without_a_commit(partitioned: Bench) -> None:
    """``latest`` skips what was there before the join; a committed position wins over it."""
    topic = partitioned.topic()
    partitioned.send(topic, 0, Sent(b"old"))
    late = partitioned.join(topic, start="latest")
    partitioned.until(lambda: late.owned, "the partition is assigned", late)

    def something_new_arrives() -> bool:
        partitioned.send(
            topic, 0, Sent(b"new")
        )  # again and again: where the end was is asked behind the scenes
        return bool(late.turn())

    wait_until(something_new_arrives, PATIENCE_S, "a new record is taken")
    assert set(late.values()) == {b"new"}
    late.to_settle = {Stream(topic, 0): 1}
    late.close()
    second = partitioned.join(topic, start="latest")
    partitioned.until_taken(second, 1)
    assert second.chunks[0].positions[0] == 1


# Settling


def test_a_new_member_starts_at_the_settled_position(bench: Bench) -> None:
    """What lies below a settled position is never taken again; what does not, is."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(10))
    first = bench.join(topic)
    bench.until_taken(first, 10)
    first.intake.settle(bench.first(4, first, topic))
    bench.until_settled(topic, 4, first)
    first.close()
    second = bench.join(topic)
    bench.until_taken(second, 6)
    assert sorted_values(second) == [b"v4", b"v5", b"v6", b"v7", b"v8", b"v9"]


def test_settling_what_is_not_owned_is_harmless(bench: Bench) -> None:
    """A position of somebody else's stream settles nothing, and breaks nothing."""
    topic, other = bench.topic(), bench.topic()
    bench.send(topic, 0, *numbered(3))
    bench.send(other, 0, *numbered(3))
    reader = bench.join(topic)
    bench.until_taken(reader, 3)
    reader.intake.settle({Stream(other, 0): 7, Stream(topic, 5): 1})
    reader.intake.settle({**bench.first(2, reader, topic), Stream(other, 0): 7})
    bench.until_settled(topic, 2, reader)
    assert bench.settled(other) == 0
    reader.intake.settle({})


def test_close_settles_what_the_listener_returns_and_leaves_at_once(bench: Bench) -> None:
    """A closing member is asked for its positions; its records are free long before a session ends."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(5))
    owner = bench.join(topic)
    bench.until_taken(owner, 5)
    waiting = bench.join(topic)
    bench.until(lambda: waiting.intake.joined, "both are members")
    assert not waiting.values()
    owner.to_settle = bench.first(3, owner, topic)
    owned = set(owner.owned)
    owner.close()
    assert owner.heard("revoked") == owned
    bench.until(lambda: len(waiting.values()) >= 2, "the other one goes on", waiting)
    assert sorted_values(waiting) == [b"v3", b"v4"]
    owner.intake.close()


# Pausing


def test_a_paused_source_brings_nothing_until_it_is_resumed(bench: Bench) -> None:
    """Pausing is per source: the others go on, membership stays, and nothing is skipped."""
    quiet, busy = bench.topic(), bench.topic()
    reader = bench.join(quiet, busy)
    bench.until(lambda: len(reader.owned) == 2, "both topics are assigned", reader)
    reader.intake.pause([quiet])
    bench.send(quiet, 0, *numbered(3, "q"))
    bench.send(busy, 0, *numbered(3, "b"))
    bench.until(lambda: len(reader.values(busy)) == 3, "the other source goes on", reader)
    assert reader.values(quiet) == []
    reader.intake.resume([quiet])
    bench.until(lambda: len(reader.values(quiet)) == 3, "the source goes on", reader)
    assert reader.values(quiet) == [b"q0", b"q1", b"q2"]


def test_a_paused_source_stays_paused_when_it_is_assigned_later(bench: Bench) -> None:
    """A pause that was asked for before the assignment holds afterwards."""
    topic, marker = bench.topic(), bench.topic()
    bench.send(topic, 0, *numbered(3))
    reader = bench.join(topic, marker)
    reader.intake.pause([topic])
    bench.until(lambda: len(reader.owned) == 2, "all is assigned", reader)
    bench.send(marker, 0, Sent(b"m"))
    bench.until(lambda: reader.values(marker), "the other source brings its record", reader)
    assert reader.values(topic) == []
    reader.intake.resume([topic])
    bench.until(lambda: len(reader.values(topic)) == 3, "the source goes on", reader)


def test_a_resumed_source_goes_on_where_it_was_taken_not_where_it_was_settled(bench: Bench) -> None:
    """Pausing and resuming repeats nothing that was taken before."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(20))
    reader = bench.join(topic)
    wait_until(lambda: reader.turn(max_records=5), PATIENCE_S, "some records are taken")
    taken = len(reader.values())
    assert taken < 20
    reader.intake.pause([topic])
    for _ in range(3):
        assert reader.turn() == []
    reader.intake.resume([topic])
    bench.until_taken(reader, 20)
    assert bench.taken(reader) == {(topic, 0): list(range(20))}


# Sharing


def test_two_members_take_every_record_once(bench: Bench) -> None:
    """However the work is shared, both take part, and nothing is taken by both."""
    places = bench.places(4)
    sources = {topic for topic, _ in places}
    first = bench.join(*sources)
    bench.until(lambda: len(bench.owned(first)) == 4, "the first has all", first)
    second = bench.join(*sources)
    bench.until(lambda: len(second.owned) >= 2, "the second takes part")
    bench.until(lambda: bench.owned(first) | bench.owned(second) == set(places), "nothing is left out")
    for number, (topic, partition) in enumerate(places):
        bench.send(topic, partition, *numbered(50, f"p{number}."))
    bench.until(lambda: len(sorted_values(first, second)) >= 200, "all is taken")
    assert first.values()
    assert second.values()
    assert sorted_values(first, second) == sorted(
        f"p{number}.{n}".encode() for number in range(4) for n in range(50)
    )


def test_a_second_member_gets_its_share(partitioned: Bench) -> None:
    """Partitions move one by one: revoked from the first, then assigned to the second, never owned twice."""
    topic = partitioned.topic(4)
    first = partitioned.join(topic)
    partitioned.until(lambda: len(first.owned) == 4, "the first has all", first)
    second = partitioned.join(topic)
    partitioned.until(lambda: len(first.owned) == len(second.owned) == 2, "both have their share")
    assert first.owned | second.owned == streams(topic, 0, 1, 2, 3)
    assert first.heard("revoked") == second.owned
    assert not first.heard("lost")


def test_positions_returned_at_a_revoke_are_committed_before_the_stream_moves(partitioned: Bench) -> None:
    """The next owner starts exactly where the last one said, although nothing was settled before."""
    topic = partitioned.topic(2)
    partitioned.send(topic, 0, *numbered(10))
    partitioned.send(topic, 1, *numbered(10))
    first = partitioned.join(topic)
    partitioned.until_taken(first, 20)
    first.to_settle = {Stream(topic, 0): 6, Stream(topic, 1): 7}
    second = partitioned.join(topic)
    partitioned.until(lambda: len(second.owned) == 1, "one partition moves")
    (moved,) = second.owned
    expected = list(range(first.to_settle[moved], 10))
    partitioned.until(lambda: len(second.values()) >= len(expected), "the rest of it is taken")
    assert second.positions() == {moved.partition: expected}


def test_a_stream_that_went_and_came_back_is_not_what_it_was(bench: Bench) -> None:
    """What is taken again after it was away has another stream or another epoch than before."""
    places = bench.places(2)
    for topic, partition in places:
        bench.send(topic, partition, *numbered(2))
    first = bench.join(*{topic for topic, _ in places})
    bench.until_taken(first, 4)
    second = bench.join(*{topic for topic, _ in places})
    bench.until(lambda: second.owned, "the second takes part")
    before = {(chunk.stream, chunk.epoch) for chunk in first.chunks}
    taken = len(first.chunks)
    bench.bring_back(first, second)
    bench.until(lambda: len(first.chunks) > taken, "what was not settled is taken again", first)
    again = {(chunk.stream, chunk.epoch) for chunk in first.chunks[taken:]}
    assert again
    assert not before & again


def test_a_member_without_a_partition_has_joined(partitioned: Bench) -> None:
    """With more members than partitions the assignment of one is empty, and it is a member all the same."""
    topic = partitioned.topic(1)
    first = partitioned.join(topic)
    assert not first.intake.joined
    partitioned.until(lambda: first.owned, "the first has it", first)
    second = partitioned.join(topic)
    partitioned.until(lambda: second.intake.joined, "the second has joined")
    assert first.intake.joined
    assert not second.owned
    assert second.intake.drained(5.0)
    assert second.intake.lag() == {}


def test_a_member_with_nothing_to_take_has_joined(bench: Bench) -> None:
    """Being a member does not wait for records."""
    topic = bench.topic()
    reader = bench.join(topic)
    assert not reader.intake.joined
    bench.until(lambda: reader.intake.joined and reader.owned, "it has joined", reader)
    assert reader.intake.denied is None
    assert reader.intake.drained(5.0)
    assert sum(reader.intake.lag().values()) == 0


def test_a_member_that_was_away_for_too_long_has_lost_its_streams(bench: Bench) -> None:
    """It is told so in its next take, may settle nothing of what was, and joins again."""
    places = bench.places(2)
    for topic, partition in places:
        bench.send(topic, partition, *numbered(3))
    first = bench.join(*{topic for topic, _ in places})
    bench.until_taken(first, 6)
    second = bench.join(*{topic for topic, _ in places})
    bench.until(lambda: first.owned and second.owned, "both have their share")
    held = min(first.owned)
    topic, partition = bench.place_of(held)
    late = bench.first(3, first, topic, partition)
    bench.stall(first)
    first.to_settle = late
    bench.until(lambda: held in first.heard("lost"), "the loss is told")
    first.intake.settle(late)
    bench.until(lambda: first.owned and second.owned, "both have their share again")
    bench.until(lambda: len(first.values() + second.values()) > 6, "what was not settled is taken again")
    bench.until(lambda: first.intake.joined, "it is a member again")
    assert bench.settled(topic, partition) == 0


def test_the_subscription_may_change(bench: Bench) -> None:
    """Sources no longer wanted are revoked or lost, new ones are assigned, and those that stay go on."""
    gone, stays, new = bench.topic(), bench.topic(), bench.topic()
    for topic in (gone, stays, new):
        bench.send(topic, 0, *numbered(2))
    reader = bench.join(gone, stays)
    bench.until_taken(reader, 4)
    was = {stream for stream in reader.owned if stream.source == gone}
    reader.intake.settle(bench.first(2, reader, gone))
    reader.intake.subscribe([stays, new], reader)
    bench.until(
        lambda: bench.owned(reader) == {(stays, 0), (new, 0)}, "the assignment follows the wish", reader
    )
    bench.until(lambda: len(reader.values(new)) == 2, "the new source is taken from", reader)
    # librdkafka's classic member calls a partition lost whose topic it no longer wants.
    assert reader.heard("revoked") | reader.heard("lost") == was
    bench.until_settled(gone, 2, reader)
    bench.send(gone, 0, Sent(b"ignored"))
    bench.send(stays, 0, Sent(b"last"))
    bench.until(lambda: b"last" in reader.values(stays), "the source that stayed goes on", reader)
    assert reader.values(gone) == [b"v0", b"v1"]


# Asking


def test_lag_and_drained_say_what_is_left_to_take(bench: Bench) -> None:
    """Drained means that every place was taken to its end; on RabbitMQ that it was settled, too."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(10))
    reader = bench.join(topic)
    wait_until(lambda: reader.turn(max_records=4), PATIENCE_S, "some records are taken")
    taken = len(reader.values())
    assert not reader.intake.drained(5.0)
    bench.until(lambda: sum(reader.intake.lag().values()) == 10 - taken, "the rest is counted", IDLE)
    bench.until_taken(reader, 10)
    reader.intake.settle(bench.first(10, reader, topic))
    assert reader.intake.drained(5.0)
    assert sum(reader.intake.lag().values()) == 0
    reader.intake.pause([topic])
    bench.send(topic, 0, Sent(b"more"))
    assert not reader.intake.drained(5.0)


def test_a_member_that_starts_behind_a_commit_is_drained_without_taking(bench: Bench) -> None:
    """Where everything was settled before, there is nothing left although nothing was taken."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(3))
    first = bench.join(topic)
    bench.until_taken(first, 3)
    first.to_settle = bench.first(3, first, topic)
    first.close()
    second = bench.join(topic)
    bench.until(lambda: second.owned, "the partition is assigned", second)
    assert second.intake.drained(5.0)
    assert second.values() == []


def test_taking_without_waiting_returns_what_is_there(bench: Bench) -> None:
    """With ``max_wait_s`` 0 a take never waits for records, and still brings them."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(3))
    reader = bench.join(topic)

    def taken() -> Sequence[Any]:
        reader.turn(max_wait_s=0.0)
        return reader.values()

    wait_until(lambda: len(taken()) == 3, PATIENCE_S, "three records are taken")
    assert reader.turn(max_wait_s=0.0) == []


@pytest.mark.service
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_what_ends_a_transaction_is_no_record_that_waits(kafka: KafkaServer, protocol: str) -> None:
    """Its marker has an offset, which nobody takes; records behind it count and come."""
    bench = KafkaBench(kafka, protocol)
    topic = bench.topic()
    bench.send(topic, 0, Sent(b"first"))
    reader = bench.join(topic)
    bench.until_taken(reader, 1)
    bench.leave_a_gap(topic, 0)
    watermarks = reader.intake._consumer.get_watermark_offsets
    bench.until(lambda: watermarks(TopicPartition(topic, 0), cached=True)[1] == 3, "it is known", reader)
    bench.until(lambda: reader.intake.lag() == {Stream(topic, 0): 0}, "nothing waits", reader)
    bench.send(topic, 0, Sent(b"second"))
    bench.until_taken(reader, 2)
    bench.until(lambda: reader.intake.lag() == {Stream(topic, 0): 0}, "nothing waits again", reader)
    bench.close()


@pytest.mark.service
def test_a_member_whose_place_was_taken_ends_with_an_error(kafka: KafkaServer) -> None:
    """Two static members of one name: the first has lost its streams and says so, it does not sit there."""
    bench = KafkaBench(kafka, "classic")
    bench.instance_id = "same"
    topic = bench.topic(2)
    first = bench.join(topic)
    bench.until(lambda: first.heard("assigned") == streams(topic, 0, 1), "the first has both", first)
    second = bench.join(topic)
    bench.until(lambda: second.heard("assigned") == streams(topic, 0, 1), "the second has both", second)

    def ended() -> bool:
        try:
            first.turn()
        except BrokerError as error:
            return "fenced" in str(error)
        return False

    wait_until(ended, PATIENCE_S, "the first hears that it was replaced")
    assert first.heard("lost") == streams(topic, 0, 1)
    assert first.turn() == []
    bench.close()
