"""Reads dead-letter topics without leaving a trace: no group is joined, nothing is committed.

What was redriven is written down in the topic itself, as *marks*: records that name offsets of their own
partition. They lie behind the letters that they name, so they are kept for longer. No caller can write one,
because a dead letter carries more headers than a mark.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from confluent_kafka import KafkaError, Message, TopicPartition

from inferfleet.cli.kafka import Cluster, explained
from inferfleet.cli.letters import EVERYTHING, Choice, DeadLetter, Wanted, failed_at
from inferfleet.errors import BrokerError

__all__ = ["MARK", "DeadLetter", "DeadLetters", "failed_at", "mark"]

MARK = "inferfleet-redriven"
"""The one header of a mark; a dead letter has nine of ours behind its own."""
_CHUNK = 500
_SPARE = 100
"""How many records more than were asked for are looked at first: marks and gaps lie between letters."""
_PATIENCE_S = 30.0

Place = tuple[int, int]
"""Partition and offset."""


class Record(NamedTuple):
    """A record of a dead-letter topic: a letter, or a mark over the ``redriven`` offsets."""

    written_ms: int
    letter: DeadLetter
    redriven: tuple[int, ...] | None = None


def mark(offsets: Sequence[int]) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return value and headers of a mark."""
    return msgspec.json.encode({"offsets": list(offsets)}), [(MARK, b"%d" % len(offsets))]


class _Mark(msgspec.Struct):
    offsets: tuple[int, ...]


_MARK_DECODER = msgspec.json.Decoder(_Mark)


class Found(NamedTuple):
    """What a look at the whole topic chose, how far it went in each partition, and how many it saw."""

    places: list[Place]
    ends: dict[int, int]
    letters: int = 0


class DeadLetters:
    """The dead-letter topic of one route."""

    def __init__(self, cluster: Cluster, group: str, topic: str) -> None:
        self._cluster = cluster
        self._group = group
        self.topic = topic

    def newest(self, limit: int, wanted: Wanted = EVERYTHING) -> list[DeadLetter]:
        """Return the ``limit`` newest dead letters that are wanted, oldest first."""
        spans = self._spans()
        window = limit + _SPARE if wanted == EVERYTHING else None
        while True:
            starts = {n: low if window is None else max(low, end - window) for n, (low, end) in spans.items()}
            kept: dict[int, deque[Record]] = defaultdict(lambda: deque(maxlen=limit))
            redriven: set[Place] = set()
            for record in self._read(starts, {n: end for n, (_, end) in spans.items()}):
                number = record.letter.partition
                if record.redriven is not None:
                    redriven.update((number, offset) for offset in record.redriven)
                elif wanted.fits(record.letter):
                    kept[number].append(record)
            if window is None or all(len(kept[n]) == limit or starts[n] == spans[n][0] for n in spans):
                break
            window *= 8
        records = sorted(
            (each for part in kept.values() for each in part),
            key=lambda each: (each.written_ms, each.letter.partition, each.letter.offset),
        )
        return [_told(each.letter, redriven) for each in records[-limit:]]

    @property
    def seen(self) -> str:
        """What a look sees, in words."""
        return self.topic

    def named(self, place: str) -> DeadLetter:
        """Return the dead letter at ``PARTITION:OFFSET``; raises BrokerError when there is none."""
        partition, offset = (int(number) for number in place.split(":"))
        spans = self._spans()
        if partition not in spans:
            raise BrokerError(f"{self.topic} has the partitions 0 to {len(spans) - 1}, not {partition}")
        low, end = spans[partition]
        if not low <= offset < end:
            held = f"holds the offsets {low} to {end - 1}" if end > low else "is empty"
            raise BrokerError(f"{self.topic} partition {partition} {held}, not {offset}")
        for record in self._read({partition: offset}, {partition: offset + 1}):
            if record.letter.offset == offset and record.redriven is None:
                return record.letter
        raise BrokerError(f"{self.topic} has no dead letter at {partition}:{offset}")

    def choose(self, choice: Choice, now_ms: int) -> Found:
        """Look at the whole topic and return the places of what ``choice`` takes, oldest first."""
        spans = self._spans()
        starts = {number: low for number, (low, _) in spans.items()}
        ends = {number: end for number, (_, end) in spans.items()}
        # Marks lie behind their letters, so they must all be known before the first letter is judged.
        redriven = self._marks(starts, ends)
        places: list[Place] = []
        count = 0
        for record in self._read(starts, ends):
            letter = record.letter
            if record.redriven is None:
                count += 1
                if choice.takes(_told(letter, redriven), now_ms):
                    places.append((letter.partition, letter.offset))
        return Found(places, ends, count)

    def redriven_since(self, ends: dict[int, int]) -> set[Place]:
        """Return the places that were marked behind ``ends``."""
        return self._marks(ends, {number: end for number, (_, end) in self._spans().items()})

    def letters(self, places: Sequence[Place]) -> Iterator[DeadLetter]:
        """Yield the letters at these places, partition by partition, oldest first."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for number, offset in places:
            wanted[number].add(offset)
        for number in sorted(wanted):
            offsets = wanted[number]
            for record in self._read({number: min(offsets)}, {number: max(offsets) + 1}):
                if record.letter.offset in offsets:
                    yield record.letter

    def _marks(self, starts: dict[int, int], ends: dict[int, int]) -> set[Place]:
        found: set[Place] = set()
        for record in self._read(starts, ends):
            found.update((record.letter.partition, offset) for offset in record.redriven or ())
        return found

    def _spans(self) -> dict[int, tuple[int, int]]:
        """Return for each partition the first offset that is there and the one after the last."""
        count = self._cluster.topics().get(self.topic)
        if count is None:
            raise BrokerError(
                f"topic {self.topic} does not exist or may not be seen by this user; "
                "`inferfleet topics plan` prints how to create it and who needs which right"
            )
        return {number: self._cluster.ends(self._group, self.topic, number) for number in range(count)}

    def _read(self, starts: dict[int, int], ends: dict[int, int]) -> Iterator[Record]:
        """Yield each record from its start up to the end that was known before."""
        open_partitions = {number for number, start in starts.items() if start < ends[number]}
        if not open_partitions:
            return
        consumer = self._cluster.consumer(self._group)
        consumer.assign([TopicPartition(self.topic, number, starts[number]) for number in open_partitions])
        until = time.monotonic() + _PATIENCE_S
        try:
            while open_partitions:
                # Alone, consume would wait for a full chunk, or for the whole of its time.
                first = consumer.poll(0.5)
                if first is not None:
                    until = time.monotonic() + _PATIENCE_S
                elif time.monotonic() > until:
                    raise BrokerError(f"{self.topic}: no answer for {_PATIENCE_S:g} s while reading")
                for message in [] if first is None else [first, *consumer.consume(_CHUNK, 0)]:
                    number, offset = int(message.partition() or 0), int(message.offset() or 0)
                    if self._ended(message) or offset >= ends[number]:
                        open_partitions.discard(number)
                        continue
                    if number in open_partitions:
                        yield _record(message)
                    if offset + 1 >= ends[number]:
                        open_partitions.discard(number)
        finally:
            consumer.unassign()

    def _ended(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.code() == KafkaError._PARTITION_EOF:
            return True
        raise explained(self._cluster.address, error)


def _told(letter: DeadLetter, redriven: set[Place]) -> DeadLetter:
    """Return a letter that knows whether it was redriven."""
    if (letter.partition, letter.offset) not in redriven:
        return letter
    return msgspec.structs.replace(letter, redriven=True)


def _record(message: Message) -> Record:
    headers: Sequence[tuple[str, bytes | None]] = message.headers() or ()
    letter = DeadLetter(
        str(message.topic()),
        int(message.partition() or 0),
        int(message.offset() or 0),
        message.key(),
        message.value() or b"",
        tuple(headers),
    )
    offsets: tuple[int, ...] | None = None
    if len(headers) == 1 and headers[0][0] == MARK:
        try:
            offsets = _MARK_DECODER.decode(letter.body).offsets
        except msgspec.MsgspecError:
            offsets = ()
    return Record(message.timestamp()[1], letter, offsets)
