"""Taking chunks from Kafka: one consumer-group member, owned by one thread for life."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import structlog
from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from inferfleet.brokers.kafka_holds import Holds
from inferfleet.brokers.kafka_leaving import leave
from inferfleet.brokers.kafka_problems import Problems, silent_logger
from inferfleet.brokers.kafka_rest import Rest
from inferfleet.errors import BrokerError
from inferfleet.ports import IntakeListener
from inferfleet.records import Chunk, Headers, Stream

log = structlog.get_logger(__name__)

REVOKE_GRACE_S = 0.5
COMMIT_TIMEOUT_S = 5.0
_DENIED = {
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_SECOND = itemgetter(1)
UNREADABLE_HEADERS: Headers = [("inferfleet-unreadable", b"1")]


@dataclass(frozen=True)
class KafkaIntakeOptions:
    """How to join: ``client`` holds librdkafka properties, the rest is what inferfleet owns.

    ``start`` is ``earliest``, ``latest``, or epoch milliseconds for partitions without a commit.
    """

    group: str
    client: Mapping[str, Any]
    start: str | int = "earliest"
    protocol: str = "classic"
    session_timeout_ms: int = 6000
    instance_id: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def properties(self) -> dict[str, Any]:
        """Return the consumer's librdkafka properties."""
        properties: dict[str, Any] = {
            **self.client,
            "fetch.queue.backoff.ms": 2,
            "queued.min.messages": 200_000,
            "queued.max.messages.kbytes": 65_536,
            "fetch.max.bytes": 16_777_216,
            "max.partition.fetch.bytes": 4_194_304,
            "fetch.wait.max.ms": 100,
            "reconnect.backoff.max.ms": 1_000,
            "topic.metadata.refresh.interval.ms": 30_000,
            **self.overrides,
            "group.id": self.group,
            "group.protocol": self.protocol,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": False,
            "auto.offset.reset": self.start if isinstance(self.start, str) else "earliest",
        }
        if self.protocol == "classic":
            properties["partition.assignment.strategy"] = "cooperative-sticky"
            properties["session.timeout.ms"] = self.session_timeout_ms
            properties.setdefault("heartbeat.interval.ms", min(1_000, self.session_timeout_ms // 3))
            if self.instance_id is not None:
                properties["group.instance.id"] = self.instance_id
        return properties


class KafkaIntake:
    """Implements :class:`~inferfleet.ports.Intake` on a confluent-kafka consumer."""

    def __init__(self, options: KafkaIntakeOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        properties = options.properties()
        properties["on_commit"] = self._on_commit
        properties["error_cb"] = self._on_error
        self._consumer = Consumer(properties, logger=silent_logger())
        self._rest = Rest(self._consumer, options.properties(), options.start == "earliest", clock)
        self._listener: IntakeListener | None = None
        self._sources: list[str] = []
        self._assigned: dict[tuple[str, int], Stream] = {}
        self._epochs: dict[Stream, int] = {}
        self._holds = Holds(self._consumer, self._assigned)
        self._peak_bytes = 1
        self._was_assigned = False
        self._closed = False
        self._told = 0
        """How often the group has told of partitions."""
        self._owed: list[TopicPartition] = []
        """What could not be committed before the close: it is tried again from the revoke."""
        self._problems = Problems(clock)
        self._denied: str | None = None
        self._fatal: KafkaError | None = None

    def __repr__(self) -> str:
        return f"KafkaIntake(group={self._options.group}, partitions={len(self._assigned)})"

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Subscribe to exactly these topics; the member joins during the following takes."""
        self._listener = listener
        self._sources = sorted(sources)
        if not self._sources:  # the client has another word for an empty subscription
            self._consumer.unsubscribe()
            return
        self._consumer.subscribe(
            self._sources, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return one chunk per partition that had records; rebalance callbacks run in here.

        The byte bound is kept by the size of the largest recent record: a take may pass it by at most
        one record's worth when sizes jump.
        """
        wanted = max(1, min(max_records, max_bytes // self._peak_bytes))
        if self._holds.deferred:
            now = self._clock()
            next_s = self._holds.due(now)
            max_wait_s = max_wait_s if next_s is None else min(max_wait_s, next_s - now)
        try:
            messages = self._consume(wanted, max_wait_s)
        except KafkaException as error:
            raise BrokerError(self._ended(error)) from error
        chunks = self._chunks(messages) if messages else []
        if self._fatal is not None:
            fatal, self._fatal = KafkaException(self._fatal), None
            self._on_lost(self._consumer, [TopicPartition(*where) for where in self._assigned])
            raise BrokerError(self._ended(fatal))
        return chunks

    def _ended(self, error: KafkaException) -> str:
        reason = error.args[0].str() if isinstance(error.args[0], KafkaError) else error
        return f"kafka ends the membership in group {self._options.group}: {reason}"

    def _consume(self, wanted: int, max_wait_s: float) -> list[Message]:
        consumer = self._consumer
        if max_wait_s <= 0:
            messages: list[Message] = consumer.consume(wanted, 0)
            return messages
        first = consumer.poll(max_wait_s)
        if first is None:
            return []
        return [first, *consumer.consume(wanted - 1, 0)] if wanted > 1 else [first]

    def _chunks(self, messages: list[Message]) -> list[Chunk]:
        now = self._clock()
        by_partition: dict[tuple[str, int], list[Message]] = {}
        for message in messages:
            if message.error() is not None:
                self._problem(message.error())
                continue
            where = (message.topic(), message.partition())
            try:
                by_partition[where].append(message)
            except KeyError:
                by_partition[where] = [message]
        chunks: list[Chunk] = []
        for where, records in by_partition.items():
            stream = self._assigned.get(where)
            if stream is None:  # revoked by a callback that ran in the same call
                continue
            chunk = Chunk(
                stream,
                self._epochs[stream],
                _positions(records),
                list(map(Message.key, records)),
                list(map(Message.value, records)),
                _headers(records),
                list(map(_SECOND, map(Message.timestamp, records))),
                now,
            )
            self._peak_bytes = max(chunk.size_bytes // len(chunk) * 2, int(self._peak_bytes * 0.9), 1)
            chunks.append(chunk)
        if chunks:
            self._problems.over()
        return chunks

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Commit in the background; a refusal reaches the listener."""
        offsets = self._owned(positions)
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._refused(offsets, error.args[0])

    def _owned(self, positions: Mapping[Stream, int]) -> list[TopicPartition]:
        return [
            TopicPartition(stream.source, stream.partition, position)
            for stream, position in positions.items()
            if (stream.source, stream.partition) in self._assigned
        ]

    def pause(self, sources: Collection[str]) -> None:
        """Stop fetching from these topics."""
        self._holds.pause(sources)

    def resume(self, sources: Collection[str]) -> None:
        """Fetch from these topics again."""
        self._holds.resume(sources)

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Fetch nothing from this partition until ``until_s``, then from ``position``.

        Raises :class:`~inferfleet.errors.BrokerError` where the client will not go back: nothing may be
        settled past records that were never taken.
        """
        where = (stream.source, stream.partition)
        if where not in self._assigned:
            return
        try:
            self._holds.defer(where, position, until_s)
        except KafkaException as error:
            raise BrokerError(
                f"kafka does not go back to {position} in {_shown([stream])}: {error.args[0].str()}"
            ) from error

    def lag(self) -> dict[Stream, int]:
        """Return high watermark minus position, for partitions that were fetched from."""
        out: dict[Stream, int] = {}
        for (topic, number), stream in self._assigned.items():
            partition = TopicPartition(topic, number)
            try:
                high = self._consumer.get_watermark_offsets(partition, cached=True)[1]
                position = self._consumer.position([partition])[0].offset
            except KafkaException:
                continue
            if position < 0:
                position = self._holds.sought((topic, number))
            if high >= 0 and position >= 0:
                out[stream] = max(0, high - position)
        return out

    def drained(self, timeout_s: float) -> bool:
        """Ask the broker whether the topics are taken to their end here, and settled to it elsewhere."""
        if self._holds.deferred:
            return False
        try:
            return self._rest.empty(self._sources, self._assigned, timeout_s)
        except KafkaException as error:
            self._problem(error.args[0])
            return False

    @property
    def joined(self) -> bool:
        """Whether the group has answered this member's join; who wants nothing need not join."""
        wants_nothing = self._listener is not None and not self._sources
        return self._was_assigned or wants_nothing or _generation(self._consumer) > 0

    @property
    def denied(self) -> str | None:
        """Return why the broker refused this member, by authentication or authorisation."""
        return self._denied

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Return the assigned partitions."""
        return tuple(self._assigned.values())

    def close(self) -> None:
        """Commit what the listener settles, and leave the group."""
        if not self._closed:
            self._closed = True
            # Where news of a rebalance is still to be told, librdkafka leaves before it tells of the revoke:
            # a commit from there would come from a member that nobody knows.
            try:
                self._give_up(list(self._assigned.values()))
                leave(self._consumer, lambda: self._told, stays=self._options.instance_id is not None)
            finally:
                self._consumer.close()

    # Callbacks: they run inside poll, consume and close, on the owner's thread.

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._told += 1
        if isinstance(self._options.start, int):
            partitions = self._start_at(partitions, self._options.start)
        consumer.incremental_assign(partitions)
        self._was_assigned = True
        streams: list[Stream] = []
        for partition in partitions:
            stream = Stream(partition.topic, partition.partition)
            self._assigned[partition.topic, partition.partition] = stream
            self._epochs[stream] = self._epochs.get(stream, 0) + 1
            streams.append(stream)
        self._holds.assigned([(p.topic, p.partition) for p in partitions])
        log.info("partitions_assigned", partitions=_shown(streams), owned=len(self._assigned))
        if self._listener is not None:
            self._listener.assigned(streams)

    def _start_at(self, partitions: list[TopicPartition], timestamp_ms: int) -> list[TopicPartition]:
        committed = self._consumer.committed(partitions, timeout=COMMIT_TIMEOUT_S)
        fresh = [
            TopicPartition(p.topic, p.partition, timestamp_ms)
            for p in committed
            if p.offset == OFFSET_INVALID
        ]
        found = self._consumer.offsets_for_times(fresh, timeout=COMMIT_TIMEOUT_S) if fresh else []
        return [p for p in committed if p.offset != OFFSET_INVALID] + found

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        del consumer
        self._told += 1
        here = [(p.topic, p.partition) for p in partitions]
        self._give_up([self._assigned[where] for where in here if where in self._assigned])

    def _give_up(self, streams: list[Stream]) -> None:
        offsets, self._owed = self._owed, []
        if not streams and not offsets:
            return
        positions = {} if self._listener is None else self._listener.revoked(streams, REVOKE_GRACE_S)
        offsets += self._owned(positions)
        if offsets:
            self._commit_now(offsets)
        self._forget(streams)
        log.info("partitions_revoked", partitions=_shown(streams), owned=len(self._assigned))

    def _commit_now(self, offsets: list[TopicPartition]) -> None:
        try:
            done = self._consumer.commit(offsets=offsets, asynchronous=False)
            error = next((each.error for each in done if each.error is not None), None)
        except KafkaException as raised:
            error = raised.args[0]
        if error is not None:
            # The new owner starts from the last commit: it repeats what was answered since.
            log.warning("commit_at_revoke_failed", error=error.str())
            self._owed = offsets if self._closed else []

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        del consumer
        self._told += 1
        self._owed = []
        streams = [Stream(p.topic, p.partition) for p in partitions]
        if self._listener is not None:
            self._listener.lost(streams)
        self._forget(streams)
        log.warning("partitions_lost", partitions=_shown(streams), owned=len(self._assigned))

    def _forget(self, streams: Iterable[Stream]) -> None:
        gone = [(stream.source, stream.partition) for stream in streams]
        for where in gone:
            self._assigned.pop(where, None)
        self._holds.forgotten(gone)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        refused = partitions if error is not None else [p for p in partitions if p.error is not None]
        if refused:
            self._refused(refused, error or refused[0].error)

    def _refused(self, partitions: list[TopicPartition], error: KafkaError) -> None:
        if error.code() == KafkaError._NO_OFFSET:
            return
        log.warning("commit_refused", error=error.str(), partition_count=len(partitions))
        if self._listener is not None:
            self._listener.settle_refused([Stream(p.topic, p.partition) for p in partitions])

    def _on_error(self, error: KafkaError) -> None:
        self._problem(error)

    def _problem(self, error: KafkaError) -> None:
        if error.code() in _DENIED:
            said = f"{error.str()} ({error.name()})"
            self._denied = f"kafka refuses group {self._options.group}: {said}"
        if error.code() == KafkaError._FATAL:
            # The member would sit there for ever: it takes nothing, and its group may have replaced it.
            self._fatal = error
        self._problems.tell(error)


def _generation(consumer: Consumer) -> int:
    """Return the generation (or member epoch) that the group gave this consumer; -1 before it joined.

    A member without a partition hears of no assignment, and a KIP-848 member has an id before it joins:
    only librdkafka's group metadata (``CGMDv2:``, then the generation as a little-endian int32) tells.
    """
    metadata: bytes = consumer.consumer_group_metadata()
    return int.from_bytes(metadata[7:11], "little", signed=True) if metadata[:7] == b"CGMDv2:" else -1


def _positions(records: list[Message]) -> Sequence[int]:
    """Return the offsets; they ascend, so without gaps they are a range."""
    first, last = records[0].offset(), records[-1].offset()
    if last - first == len(records) - 1:
        return range(first, last + 1)
    return list(map(Message.offset, records))


def _headers(records: list[Message]) -> list[Headers]:
    try:
        return list(map(Message.headers, records))
    except UnicodeDecodeError:
        return [_guarded(m) for m in records]


def _guarded(message: Message) -> Headers:
    """Return the headers, or a mark in their place when a name is not UTF-8."""
    try:
        headers: Headers = message.headers()
        return headers
    except UnicodeDecodeError:
        return UNREADABLE_HEADERS


def _shown(streams: Iterable[Stream]) -> str:
    return " ".join(f"{stream.source}[{stream.partition}]" for stream in streams)
