"""A broker in this process: partitioned logs, consumer groups and failures on demand.

It keeps the rules of a Kafka cluster that the record path relies on, and nothing else: one append log with
offsets per partition, one owner per partition and group, commits by owners only. It has no thread and no
clock of its own: what takes time happens when a member takes, at the time the given clock shows. The same
contract suites run against it and against a real Kafka.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from inferfleet.brokers.memory_group import Group
from inferfleet.ports import Clock, Refusal, RefusalKind
from inferfleet.records import Header, Headers, Stream

SESSION_TIMEOUT_S = 6.0


class Record(NamedTuple):
    """One record of a partition."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    @property
    def size_bytes(self) -> int:
        """Key, value and headers."""
        headers = sum(len(name) + len(value or b"") for name, value in self.headers or ())
        return len(self.key or b"") + len(self.value or b"") + headers


class Partition:
    """An append log. Offsets ascend; those that :meth:`skip` leaves out are held by nothing."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._offsets: list[int] = []
        self.end = 0
        """The offset after the last one, given out or skipped."""

    def append(self, record: Record) -> None:
        """Add a record; its offset is :attr:`end`."""
        self.records.append(record)
        self._offsets.append(record.offset)
        self.end = record.offset + 1

    def skip(self, count: int) -> None:
        """Leave the next ``count`` offsets without a record, as compaction and transactions do."""
        self.end += count

    def first_at(self, offset: int) -> int:
        """Return the index of the first record whose offset is not below ``offset``."""
        return bisect_left(self._offsets, offset)


class Topic:
    """Partitions, and what is refused at their door."""

    def __init__(self, partitions: int, max_message_bytes: int | None) -> None:
        self.partitions = [Partition() for _ in range(partitions)]
        self.max_message_bytes = max_message_bytes
        self.rules: list[tuple[Callable[[Record], bool], Refusal]] = []
        self._next_keyless = 0

    def partition_for(self, key: bytes | None) -> int:
        """Return the partition of a key; records without one take turns."""
        if key is None:
            self._next_keyless += 1
            return self._next_keyless % len(self.partitions)
        return zlib.crc32(key) % len(self.partitions)

    def refusal(self, record: Record) -> Refusal | None:
        """Return why a record is not accepted."""
        if self.max_message_bytes is not None and record.size_bytes > self.max_message_bytes:
            return Refusal(RefusalKind.TOO_LARGE, f"the record is larger than {self.max_message_bytes} bytes")
        return next((refusal for applies, refusal in self.rules if applies(record)), None)


class MemoryBroker:
    """Topics and groups. ``wait`` is called when a take finds nothing and may wait: by default at once over.

    Give ``wait`` the clock's way of passing: ``FakeClock.advance`` in virtual time, ``time.sleep`` where a
    real worker thread runs on it.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        session_timeout_s: float = SESSION_TIMEOUT_S,
        wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.clock = clock
        self.wait = wait
        self._session_timeout_s = session_timeout_s
        self._topics: dict[str, Topic] = {}
        self._groups: dict[str, Group] = {}

    def __repr__(self) -> str:
        return f"MemoryBroker(topics={sorted(self._topics)}, groups={list(self._groups.values())})"

    # Topics

    def create_topic(self, name: str, partitions: int = 1, *, max_message_bytes: int | None = None) -> None:
        """Create a topic; groups that subscribe to it see it with their next take."""
        if name in self._topics:
            raise ValueError(f"topic {name} exists already")
        self._topics[name] = Topic(partitions, max_message_bytes)
        for group in self._groups.values():
            group.topics_changed()

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has; 0 if there is none of that name."""
        found = self._topics.get(topic)
        return 0 if found is None else len(found.partitions)

    def log(self, stream: Stream) -> Partition:
        """Return the log of one partition."""
        return self._topics[stream.source].partitions[stream.partition]

    def records(self, topic: str) -> list[Record]:
        """Return all records of a topic, partition by partition."""
        return [record for partition in self._topics[topic].partitions for record in partition.records]

    def append(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Iterable[Header] = (),
        partition: int | None = None,
    ) -> tuple[Stream, int]:
        """Add a record as a producer does and return where it stands; nothing refuses it."""
        number = self._topics[topic].partition_for(key) if partition is None else partition
        stream = Stream(topic, number)
        log = self.log(stream)
        record = Record(log.end, key, value, list(headers) or None, self.clock.utc_ms())
        log.append(record)
        return stream, record.offset

    def offer(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Iterable[Header]
    ) -> Refusal | None:
        """Add a record unless it must be refused; return why it was."""
        found = self._topics.get(topic)
        if found is None:
            return Refusal(RefusalKind.DENIED, f"topic {topic} does not exist")
        refusal = found.refusal(Record(-1, key, value, list(headers) or None, 0))
        if refusal is None:
            self.append(topic, value, key=key, headers=headers)
        return refusal

    def skip(self, stream: Stream, count: int = 1) -> None:
        """Leave a gap of ``count`` offsets at the end of a partition."""
        self.log(stream).skip(count)

    def refuse(
        self,
        topic: str,
        kind: RefusalKind = RefusalKind.LATER,
        *,
        when: Callable[[Record], bool] = lambda _: True,
    ) -> None:
        """Refuse what outlets send to ``topic`` from now on, where ``when`` says so; the oldest rule wins."""
        refusal = Refusal(kind, f"topic {topic} was told to refuse")
        self._topics[topic].rules.append((when, refusal))

    def accept(self, topic: str) -> None:
        """Forget every rule of :meth:`refuse` for ``topic``."""
        self._topics[topic].rules.clear()

    # Groups

    def group(self, name: str) -> Group:
        """Return a consumer group, an empty one if nobody has joined it yet."""
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = Group(
                name, self.partitions, self.clock.monotonic, self._session_timeout_s
            )
        return group

    def committed(self, group: str) -> Mapping[Stream, int]:
        """Return the committed positions of a group."""
        return self.group(group).committed

    def lag(self, group: str, topic: str) -> int:
        """Return how many records of ``topic`` stand at or above the group's committed positions."""
        committed = self.committed(group)
        total = 0
        for number, log in enumerate(self._topics[topic].partitions):
            total += len(log.records) - log.first_at(committed.get(Stream(topic, number), 0))
        return total
