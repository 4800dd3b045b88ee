"""Brokers as the intake suite sees them: fed, looked into, and read by members with a diary."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition

from inferfleet.brokers.kafka_intake import KafkaIntake, KafkaIntakeOptions
from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_intake import MemoryIntake
from inferfleet.records import Chunk, Headers, Stream
from inferfleet.testing.clock import FakeClock
from tests.support.kafka_server import KafkaServer
from tests.support.waiting import wait_until

PATIENCE_S = 30.0
PLENTY = 1 << 30
Place = tuple[str, int]
"""Where records stand in an order of their own: a topic's partition, or a queue, whose number is 0."""


class Sent(NamedTuple):
    """A record as a producer sends it."""

    value: bytes | None = b"v"
    key: bytes | None = None
    headers: Headers = None


class Reader:
    """A member with a diary: what was taken, which news came and whether it came inside a take."""

    def __init__(self) -> None:
        self.intake: Any = None
        self.chunks: list[Chunk] = []
        self.news: list[tuple[str, frozenset[Stream]]] = []
        self.owned: set[Stream] = set()
        self.to_settle: dict[Stream, int] = {}
        self.refused: list[Stream] = []
        self._taking = False

    def assigned(self, streams: Collection[Stream]) -> None:
        self._heard("assigned", streams)
        assert not self.owned & set(streams)
        self.owned |= set(streams)

    def revoked(self, streams: Collection[Stream], grace_s: float) -> Mapping[Stream, int]:
        self._heard("revoked", streams)
        assert grace_s > 0
        assert set(streams) <= self.owned
        self.owned -= set(streams)
        return {stream: self.to_settle[stream] for stream in streams if stream in self.to_settle}

    def lost(self, streams: Collection[Stream]) -> None:
        self._heard("lost", streams)
        assert set(streams) <= self.owned
        self.owned -= set(streams)

    def settle_refused(self, streams: Collection[Stream]) -> None:
        assert self._taking
        self.refused += streams

    def _heard(self, what: str, streams: Collection[Stream]) -> None:
        assert self._taking, f"{what} was told outside take"
        if streams:
            self.news.append((what, frozenset(streams)))

    def turn(self, max_records: int = 500, max_bytes: int = PLENTY, max_wait_s: float = 0.02) -> list[Chunk]:
        self._taking = True
        try:
            chunks: list[Chunk] = self.intake.take(max_records, max_bytes, max_wait_s)
        finally:
            self._taking = False
        self.chunks += chunks
        return chunks

    def close(self) -> None:
        self._taking = True
        self.intake.close()
        self._taking = False

    def heard(self, what: str) -> set[Stream]:
        return {stream for name, streams in self.news if name == what for stream in streams}

    def values(self, topic: str | None = None) -> list[bytes | None]:
        return [v for c in self.chunks if topic in (None, c.stream.source) for v in c.values]

    def positions(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for chunk in self.chunks:
            found.setdefault(chunk.stream.partition, []).extend(chunk.positions)
        return found


class Bench(ABC):
    """A broker with ways to feed it and to look into it.

    ``first_position`` is the position of the first record that a member takes from a place.
    """

    first_position = 0

    def __init__(self) -> None:
        self.group = f"group.{secrets.token_hex(4)}"
        self.readers: list[Reader] = []

    @abstractmethod
    def topic(self, partitions: int = 1) -> str: ...

    @abstractmethod
    def send(self, topic: str, partition: int, *records: Sent) -> None: ...

    @abstractmethod
    def leave_a_gap(self, topic: str, partition: int) -> None: ...

    @abstractmethod
    def intake(self, start: str) -> Any: ...

    @abstractmethod
    def stall(self, reader: Reader) -> None:
        """Let the broker take the reader's streams away without asking it."""

    @abstractmethod
    def committed(self, topic: str, partition: int = 0) -> int | None: ...

    def bring_back(self, reader: Reader, other: Reader) -> None:
        """Let something that the reader had come back to it; it went when ``other`` joined."""
        other.close()

    def places(self, count: int) -> list[Place]:
        """Make places that one member may have all of, or several some each."""
        topic = self.topic(count)
        return [(topic, number) for number in range(count)]

    def place_of(self, stream: Stream) -> Place:
        """Return the place that a member reads by this stream."""
        return (stream.source, stream.partition)

    def kept(self, sent: Sent) -> Sent:
        """Return a record as this broker hands it out."""
        return sent

    def settled(self, topic: str, partition: int = 0) -> int:
        """Return how many records of a place nobody will take again."""
        return self.committed(topic, partition) or 0

    def owned(self, reader: Reader) -> set[Place]:
        """Return the places that the reader has."""
        return {self.place_of(stream) for stream in reader.owned}

    def taken(self, reader: Reader) -> dict[Place, list[int]]:
        """Return what the reader has taken of each place, counted from 0."""
        found: dict[Place, list[int]] = {}
        for chunk in reader.chunks:
            rows = [position - self.first_position for position in chunk.positions]
            found.setdefault(self.place_of(chunk.stream), []).extend(rows)
        return found

    def first(self, count: int, reader: Reader, topic: str, partition: int = 0) -> dict[Stream, int]:
        """Return the position behind the first ``count`` records that the reader took of a place."""
        (stream,) = [s for s in reader.owned if self.place_of(s) == (topic, partition)]
        return {stream: self.first_position + count}

    def join(self, *topics: str, start: str = "earliest") -> Reader:
        reader = Reader()
        reader.intake = self.intake(start)
        reader.intake.subscribe(topics, reader)
        self.readers.append(reader)
        return reader

    def until(self, condition: Callable[[], Any], what: str, *readers: Reader) -> None:
        """Let the readers take until the condition holds."""

        def turn() -> Any:
            for reader in readers or self.readers:
                reader.turn()
            return condition()

        wait_until(turn, PATIENCE_S, what, every_s=0.001)

    def until_taken(self, reader: Reader, count: int) -> None:
        self.until(lambda: len(reader.values()) >= count, f"{count} records are taken", reader)

    def until_committed(self, topic: str, position: int, reader: Reader) -> None:
        self.until(lambda: self.committed(topic) == position, f"{position} is committed", reader)

    def until_settled(self, topic: str, count: int, reader: Reader) -> None:
        self.until(lambda: self.settled(topic) == count, f"{count} records are settled", reader)

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


class MemoryBench(Bench):
    """The memory broker in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, wait=self.clock.advance)

    def topic(self, partitions: int = 1) -> str:
        name = f"topic.{secrets.token_hex(4)}"
        self.broker.create_topic(name, partitions)
        return name

    def send(self, topic: str, partition: int, *records: Sent) -> None:
        for value, key, headers in records:
            self.broker.append(topic, value, key=key, headers=headers or (), partition=partition)

    def leave_a_gap(self, topic: str, partition: int) -> None:
        self.broker.skip(Stream(topic, partition))

    def intake(self, start: str) -> MemoryIntake:
        return MemoryIntake(self.broker, self.group, start=start)

    def stall(self, reader: Reader) -> None:
        reader.intake.expel()

    def committed(self, topic: str, partition: int = 0) -> int | None:
        return self.broker.committed(self.group).get(Stream(topic, partition))


class KafkaBench(Bench):
    """A real broker, by one of the group protocols."""

    def __init__(self, server: KafkaServer, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self.instance_id: str | None = None
        self._server = server
        self._config = {**server.client_config(), "log_level": 0}
        self._admin = server.admin()
        # Idempotent, so that what a fresh topic refuses at first is not sent again behind what came later.
        self._producer = Producer({**self._config, "linger.ms": 0, "enable.idempotence": True})

    def topic(self, partitions: int = 1) -> str:
        name = f"intake.{secrets.token_hex(4)}"
        self._server.create_topics({name: partitions})
        return name

    def send(self, topic: str, partition: int, *records: Sent) -> None:
        for value, key, headers in records:
            self._producer.produce(topic, value, key, partition, headers=headers)
        assert self._producer.flush(20) == 0

    def leave_a_gap(self, topic: str, partition: int) -> None:
        """Write a transaction without a record that can be read: its marker takes an offset."""
        producer = Producer({**self._config, "transactional.id": secrets.token_hex(4), "linger.ms": 0})
        producer.init_transactions(20)
        producer.begin_transaction()
        producer.produce(topic, b"aborted", partition=partition)
        producer.flush(20)
        producer.abort_transaction(20)

    def intake(self, start: str) -> KafkaIntake:
        overrides = {"log_level": 0, "max.poll.interval.ms": 6000, "metadata.max.age.ms": 2000}
        options = KafkaIntakeOptions(
            self.group,
            self._config,
            start,
            self.protocol,
            session_timeout_ms=6000,
            instance_id=self.instance_id,
            overrides=overrides,
        )
        return KafkaIntake(options)

    def stall(self, reader: Reader) -> None:
        """A reader that does not take for longer than ``max.poll.interval.ms`` is out: let the others."""
        others = [each for each in self.readers if each is not reader]
        lost = set(reader.owned)
        if others:
            self.until(lambda: lost <= {s for o in others for s in o.owned}, "the others have all", *others)

    def committed(self, topic: str, partition: int = 0) -> int | None:
        asked = ConsumerGroupTopicPartitions(self.group, [TopicPartition(topic, partition)])
        (future,) = self._admin.list_consumer_group_offsets([asked]).values()
        offset: int = future.result(10).topic_partitions[0].offset
        return offset if offset >= 0 else None
