"""Reads dead-letter topics without leaving a trace: no group is joined, nothing is committed."""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message, TopicPartition

from inferfleet.cli.kafka import Cluster, explained
from inferfleet.errors import BrokerError

_CHUNK = 500


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead letter. ``body`` is the request's, untouched; ``headers`` are in order, repeated ones too."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    body: bytes
    headers: tuple[tuple[str, bytes | None], ...]

    def header(self, name: str) -> str:
        """Return a header's text, ``""`` where it is absent; names are compared in lower case.

        The last of that name is taken: inferfleet's own stand behind the caller's.
        """
        for key, value in reversed(self.headers):
            if key.lower() == name:
                return "" if value is None else value.decode(errors="replace")
        return ""

    @property
    def id(self) -> str:
        """The request's id as its headers say it; without one, the id that its place gives."""
        named = next((value for name, value in self.headers if name.lower() == "inferfleet-id"), None)
        if named:
            return named.decode(errors="replace")
        names = ("topic", "partition", "offset")
        return "-".join(filter(None, (self.header(f"inferfleet-origin-{name}") for name in names)))

    @property
    def place(self) -> str:
        """Partition and offset as ``dlt show`` takes them."""
        return f"{self.partition}:{self.offset}"

    @property
    def origin(self) -> str:
        """Where the request came from, ``topic[partition]@offset``."""
        names = ("topic", "partition", "offset")
        topic, partition, offset = (self.header(f"inferfleet-origin-{name}") for name in names)
        return f"{topic}[{partition}]@{offset}" if topic else ""

    def as_plain(self) -> dict[str, Any]:
        """Return what JSON can carry: bytes that are not UTF-8 stand in base64 under a name that says so."""
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "failed_at": failed_at(self),
            **_plain_bytes("key", self.key),
            "headers": [{"name": name, **_plain_bytes("value", value)} for name, value in self.headers],
            **_plain_bytes("body", self.body),
        }


def _plain_bytes(name: str, value: bytes | None) -> dict[str, str | None]:
    try:
        return {name: None if value is None else value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value or b"").decode()}


def failed_at(letter: DeadLetter) -> str:
    """Return when the request failed, ISO 8601; a header of epoch milliseconds is translated."""
    text = letter.header("inferfleet-failed-at")
    if not text.isdecimal():
        return text
    try:
        return datetime.fromtimestamp(int(text) / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return text


class DeadLetters:
    """The dead-letter topic of one route."""

    def __init__(self, cluster: Cluster, group: str, topic: str) -> None:
        self._cluster = cluster
        self._group = group
        self.topic = topic

    def newest(self, limit: int, code: str | None, max_wait_s: float = 30.0) -> list[DeadLetter]:
        """Return the ``limit`` newest dead letters, oldest first, of one code if it is given."""
        count = self._partitions()
        spans = {number: self._cluster.ends(self._group, self.topic, number) for number in range(count)}
        starts = {
            number: low if code else max(low, end - limit)
            for number, (low, end) in spans.items()
            if end > low
        }
        kept: deque[tuple[int, DeadLetter]] = deque(maxlen=limit if count == 1 else None)
        for written_ms, letter in self._read(starts, {n: end for n, (_, end) in spans.items()}, max_wait_s):
            if code is None or letter.header("inferfleet-code") == code:
                kept.append((written_ms, letter))
        ordered = sorted(kept, key=lambda pair: (pair[0], pair[1].partition, pair[1].offset))
        return [letter for _, letter in ordered[-limit:]]

    def at(self, partition: int, offset: int) -> DeadLetter:
        """Return one dead letter; raises BrokerError when there is none at that place."""
        count = self._partitions()
        if partition >= count:
            raise BrokerError(f"{self.topic} has the partitions 0 to {count - 1}, not {partition}")
        low, end = self._cluster.ends(self._group, self.topic, partition)
        if not low <= offset < end:
            held = f"holds the offsets {low} to {end - 1}" if end > low else "is empty"
            raise BrokerError(f"{self.topic} partition {partition} {held}, not {offset}")
        for _, letter in self._read({partition: offset}, {partition: offset + 1}, 10.0):
            if letter.offset == offset:
                return letter
        raise BrokerError(f"{self.topic} has no record at {partition}:{offset}; it was compacted or aborted")

    def _partitions(self) -> int:
        count = self._cluster.topics().get(self.topic)
        if count is None:
            raise BrokerError(
                f"topic {self.topic} does not exist or may not be seen by this user; "
                "`inferfleet topics plan` prints how to create it and who needs which right"
            )
        return count

    def _read(
        self, starts: dict[int, int], ends: dict[int, int], max_wait_s: float
    ) -> Iterator[tuple[int, DeadLetter]]:
        """Yield each record from its start up to the end that was known before, with its timestamp."""
        if not starts:
            return
        consumer = self._cluster.consumer(self._group)
        consumer.assign([TopicPartition(self.topic, number, start) for number, start in starts.items()])
        open_partitions = set(starts)
        until = time.monotonic() + max_wait_s
        while open_partitions:
            messages = consumer.consume(_CHUNK, 0.5)
            if not messages and time.monotonic() > until:
                raise BrokerError(f"{self.topic}: no answer for {max_wait_s:g} s while reading")
            for message in messages:
                number = int(message.partition() or 0)
                if self._ended(message) or int(message.offset() or 0) >= ends[number]:
                    open_partitions.discard(number)
                    continue
                if number in open_partitions:
                    yield message.timestamp()[1], _letter(message)
                if int(message.offset() or 0) + 1 >= ends[number]:
                    open_partitions.discard(number)
        consumer.unassign()

    def _ended(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.code() == KafkaError._PARTITION_EOF:
            return True
        raise explained(self._cluster.address, error)


def _letter(message: Message) -> DeadLetter:
    headers: Sequence[tuple[str, bytes | None]] = message.headers() or ()
    return DeadLetter(
        str(message.topic()),
        int(message.partition() or 0),
        int(message.offset() or 0),
        message.key(),
        message.value() or b"",
        tuple(headers),
    )
