"""One suite for every intake: the memory broker, and a real Kafka by both of its group protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from inferfleet.errors import BrokerError
from inferfleet.records import Chunk, Stream
from tests.contract.intake_bench import PATIENCE_S, Bench, KafkaBench, MemoryBench, Sent
from tests.support.kafka_server import KafkaServer
from tests.support.waiting import wait_until

BENCHES = [
    "memory",
    pytest.param("classic", marks=pytest.mark.service),
    pytest.param("consumer", marks=pytest.mark.service),
]


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every broker in turn, with a group of its own."""
    if request.param == "memory":
        made: Bench = MemoryBench()
    else:
        made = KafkaBench(request.getfixturevalue("kafka"), request.param)
    yield made
    made.close()


def numbered(count: int, stem: str = "v") -> list[Sent]:
    return [Sent(f"{stem}{n}".encode()) for n in range(count)]


def streams(topic: str, *partitions: int) -> set[Stream]:
    return {Stream(topic, number) for number in partitions}


# Taking


def test_records_arrive_in_order_one_chunk_per_partition(bench: Bench) -> None:
    """Positions of a partition ascend over all chunks, and one take has at most one chunk of each."""
    topic = bench.topic(3)
    for number in range(3):
        bench.send(topic, number, *numbered(40, f"p{number}."))
    reader = bench.join(topic)
    takes: list[list[Chunk]] = []

    def all_taken() -> bool:
        takes.append(reader.turn(max_records=30))
        return len(reader.values()) >= 120

    wait_until(all_taken, PATIENCE_S, "120 records are taken", every_s=0.001)
    assert reader.positions() == {number: list(range(40)) for number in range(3)}
    assert sorted(v or b"" for v in reader.values()) == sorted(
        f"p{p}.v{n}".replace(".v", ".").encode() for p in range(3) for n in range(40)
    )
    for chunks in takes:
        assert len({chunk.stream for chunk in chunks}) == len(chunks)
        assert sum(len(chunk) for chunk in chunks) <= 30


def test_columns_are_complete(bench: Bench) -> None:
    """Keys, values and headers arrive as sent: none, empty, null, repeated; the timestamp is the broker's."""
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
    assert rows == sent
    timestamps = [t for c in reader.chunks for t in c.timestamps_ms]
    assert len(timestamps) == len(sent)
    assert all(1_600_000_000_000 < t < 4_000_000_000_000 for t in timestamps)
    for chunk in reader.chunks:
        assert chunk.stream == Stream(topic, 0)
        assert chunk.open == len(chunk)
        assert chunk.live


def test_a_gap_between_offsets_is_no_record(bench: Bench) -> None:
    """Offsets that hold nothing are passed over, and a gap at the end leaves nothing to take."""
    topic = bench.topic()
    bench.send(topic, 0, Sent(b"one"))
    bench.leave_a_gap(topic, 0)
    bench.send(topic, 0, Sent(b"two"))
    bench.leave_a_gap(topic, 0)
    reader = bench.join(topic)
    bench.until_taken(reader, 2)
    assert reader.values() == [b"one", b"two"]
    positions = reader.positions()[0]
    assert positions[1] - positions[0] > 1
    bench.until(lambda: reader.intake.drained(5.0), "it is drained although offsets follow", reader)


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


def test_the_start_is_for_partitions_without_a_commit(bench: Bench) -> None:
    """``latest`` skips what was there before the join; a committed position wins over it."""
    topic = bench.topic()
    bench.send(topic, 0, Sent(b"old"))
    late = bench.join(topic, start="latest")
    bench.until(lambda: late.owned, "the partition is assigned", late)

    def something_new_arrives() -> bool:
        bench.send(topic, 0, Sent(b"new"))  # again and again: where the end was is asked behind the scenes
        return bool(late.turn())

    wait_until(something_new_arrives, PATIENCE_S, "a new record is taken")
    assert set(late.values()) == {b"new"}
    late.to_settle = {Stream(topic, 0): 1}
    late.close()
    second = bench.join(topic, start="latest")
    bench.until_taken(second, 1)
    assert second.chunks[0].positions[0] == 1


# Settling


def test_a_new_member_starts_at_the_settled_position(bench: Bench) -> None:
    """What lies below a settled position is never taken again; what does not, is."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(10))
    first = bench.join(topic)
    bench.until_taken(first, 10)
    first.intake.settle({Stream(topic, 0): 4})
    bench.until_committed(topic, 4, first)
    first.close()
    second = bench.join(topic)
    bench.until_taken(second, 6)
    assert second.positions() == {0: [4, 5, 6, 7, 8, 9]}


def test_settling_what_is_not_owned_is_harmless(bench: Bench) -> None:
    """A position of somebody else's partition is not committed, and breaks nothing."""
    topic, other = bench.topic(), bench.topic()
    bench.send(topic, 0, *numbered(3))
    reader = bench.join(topic)
    bench.until_taken(reader, 3)
    reader.intake.settle({Stream(other, 0): 7, Stream(topic, 5): 1})
    reader.intake.settle({Stream(topic, 0): 2, Stream(other, 0): 7})
    bench.until_committed(topic, 2, reader)
    assert bench.committed(other) is None
    reader.intake.settle({})


def test_close_settles_what_the_listener_returns_and_leaves_at_once(bench: Bench) -> None:
    """A closing member is asked for its positions; its partitions are free long before a session ends."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(5))
    first, second = bench.join(topic), bench.join(topic)
    bench.until(lambda: first.intake.joined and second.intake.joined, "both are members")
    bench.until(lambda: first.owned or second.owned, "one of them has the partition")
    owner, waiting = (first, second) if first.owned else (second, first)
    bench.until(lambda: len(owner.values()) == 5, "the owner has taken all")
    owner.to_settle = {Stream(topic, 0): 3}
    owner.close()
    assert owner.heard("revoked") == streams(topic, 0)
    bench.until(lambda: len(waiting.values()) >= 2, "the other one goes on", waiting)
    assert waiting.positions() == {0: [3, 4]}
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
    topic, marker = bench.topic(2), bench.topic()
    bench.send(topic, 0, *numbered(3))
    reader = bench.join(topic, marker)
    reader.intake.pause([topic])
    bench.until(lambda: len(reader.owned) == 3, "all is assigned", reader)
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
    assert reader.positions() == {0: list(range(20))}


# Rebalancing


def test_a_second_member_gets_its_share(bench: Bench) -> None:
    """Partitions move one by one: revoked from the first, then assigned to the second, never owned twice."""
    topic = bench.topic(4)
    first = bench.join(topic)
    bench.until(lambda: len(first.owned) == 4, "the first has all", first)
    second = bench.join(topic)
    bench.until(lambda: len(first.owned) == len(second.owned) == 2, "both have their share")
    assert first.owned | second.owned == streams(topic, 0, 1, 2, 3)
    assert first.heard("revoked") == second.owned
    assert not first.heard("lost")


def test_positions_returned_at_a_revoke_are_committed_before_the_stream_moves(bench: Bench) -> None:
    """The next owner starts exactly where the last one said, although nothing was settled before."""
    topic = bench.topic(2)
    bench.send(topic, 0, *numbered(10))
    bench.send(topic, 1, *numbered(10))
    first = bench.join(topic)
    bench.until_taken(first, 20)
    first.to_settle = {Stream(topic, 0): 6, Stream(topic, 1): 7}
    second = bench.join(topic)
    bench.until(lambda: len(second.owned) == 1, "one partition moves")
    (moved,) = second.owned
    expected = list(range(first.to_settle[moved], 10))
    bench.until(lambda: len(second.values()) >= len(expected), "the rest of it is taken")
    assert second.positions() == {moved.partition: expected}


def test_an_epoch_ends_when_a_stream_goes_and_another_begins_when_it_comes_back(bench: Bench) -> None:
    """Chunks of one stream before and after it was away carry different epochs."""
    topic = bench.topic(2)
    for number in range(2):
        bench.send(topic, number, *numbered(2))
    first = bench.join(topic)
    bench.until_taken(first, 4)
    second = bench.join(topic)
    bench.until(lambda: len(second.owned) == 1, "one partition moves")
    (moved,) = second.owned
    before = {chunk.epoch for chunk in first.chunks if chunk.stream == moved}
    taken = len(first.chunks)
    second.close()
    bench.until(lambda: moved in first.owned, "it comes back", first)
    bench.until(lambda: len(first.chunks) > taken, "what was not settled is taken again", first)
    again = {chunk.epoch for chunk in first.chunks[taken:] if chunk.stream == moved}
    assert again
    assert not before & again


def test_a_member_without_a_partition_has_joined(bench: Bench) -> None:
    """With more members than partitions the assignment of one is empty, and it is a member all the same."""
    topic = bench.topic(1)
    first = bench.join(topic)
    assert not first.intake.joined
    bench.until(lambda: first.owned, "the first has it", first)
    second = bench.join(topic)
    bench.until(lambda: second.intake.joined, "the second has joined")
    assert first.intake.joined
    assert not second.owned
    assert second.intake.drained(5.0)
    assert second.intake.lag() == {}


def test_a_member_that_was_away_for_too_long_has_lost_its_streams(bench: Bench) -> None:
    """It is told so in its next take, may settle nothing of the old epoch, and joins again."""
    topic = bench.topic(2)
    bench.send(topic, 0, *numbered(3))
    bench.send(topic, 1, *numbered(3))
    first = bench.join(topic)
    bench.until_taken(first, 6)
    second = bench.join(topic)
    bench.until(lambda: len(second.owned) == 1, "both have their share")
    (kept,) = first.owned
    bench.stall(first)
    bench.until(lambda: len(second.owned) == 2, "the other one has all", second)
    first.to_settle = {kept: 3}
    first.intake.settle({kept: 3})
    bench.until(lambda: kept in first.heard("lost"), "the loss is told")
    bench.until(lambda: len(first.owned) == len(second.owned) == 1, "both have their share again")
    assert bench.committed(topic, kept.partition) in (None, 0)
    assert first.intake.joined


def test_the_subscription_may_change(bench: Bench) -> None:
    """Sources no longer wanted are revoked or lost, new ones are assigned, and those that stay go on."""
    gone, stays, new = bench.topic(), bench.topic(), bench.topic()
    for topic in (gone, stays, new):
        bench.send(topic, 0, *numbered(2))
    reader = bench.join(gone, stays)
    bench.until_taken(reader, 4)
    reader.intake.settle({Stream(gone, 0): 2})
    reader.intake.subscribe([stays, new], reader)
    bench.until(lambda: reader.owned == streams(stays, 0) | streams(new, 0), "the assignment follows", reader)
    bench.until(lambda: len(reader.values(new)) == 2, "the new source is taken from", reader)
    # librdkafka's classic member calls a partition lost whose topic it no longer wants.
    assert reader.heard("revoked") | reader.heard("lost") == streams(gone, 0)
    assert bench.committed(gone) == 2, "what was settled before is committed all the same"
    bench.send(gone, 0, Sent(b"ignored"))
    bench.send(stays, 0, Sent(b"last"))
    bench.until(lambda: b"last" in reader.values(stays), "the source that stayed goes on", reader)
    assert reader.values(gone) == [b"v0", b"v1"]


# Asking


def test_lag_and_drained_say_what_is_left_to_take(bench: Bench) -> None:
    """Drained means that every assigned partition was taken to its end, settled or not."""
    topic = bench.topic(2)
    bench.send(topic, 0, *numbered(10))
    reader = bench.join(topic)
    wait_until(lambda: reader.turn(max_records=4), PATIENCE_S, "some records are taken")
    taken = len(reader.values())
    assert not reader.intake.drained(5.0)
    assert reader.intake.lag()[Stream(topic, 0)] == 10 - taken
    bench.until_taken(reader, 10)
    bench.until(lambda: len(reader.owned) == 2, "all is assigned", reader)
    assert reader.intake.drained(5.0)
    assert sum(reader.intake.lag().values()) == 0
    bench.send(topic, 1, Sent(b"more"))
    assert not reader.intake.drained(5.0)


def test_a_member_that_starts_behind_a_commit_is_drained_without_taking(bench: Bench) -> None:
    """Where everything was settled before, there is nothing left although nothing was taken."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(3))
    first = bench.join(topic)
    bench.until_taken(first, 3)
    first.to_settle = {Stream(topic, 0): 3}
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
