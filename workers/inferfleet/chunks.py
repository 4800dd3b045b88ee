"""Records as they come from a broker: one object for many, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Header: TypeAlias = tuple[str, bytes | None]
Headers: TypeAlias = list[Header] | None


class Stream(NamedTuple):
    """An ordered source of records: one Kafka partition, or one RabbitMQ channel carrying one queue.

    ``source`` is an address (:mod:`inferfleet.addresses`). Channels are numbered, and no number comes twice,
    so a delivery tag of a channel that is gone names a stream that is gone.
    """

    source: str
    partition: int


class Amqp(NamedTuple):
    """What a RabbitMQ message has beside key, headers and body; ``table`` is its header table as it came."""

    reply_to: str | None = None
    correlation_id: str | None = None
    message_id: str | None = None
    table: Mapping[str, Any] | None = None
    redelivered: bool = False


class Origin(NamedTuple):
    """Where a record that comes for another attempt stood first, and which attempt this is, from 1."""

    source: str
    partition: int
    position: int
    timestamp_ms: int
    attempt: int


def _header_bytes(headers: list[Headers]) -> int:
    """Return the size of a chunk's headers; equal ones, as one producer sends them, are measured once."""
    if not headers or headers.count(headers[0]) == len(headers):
        return len(headers) * _record_header_bytes(headers[0]) if headers else 0
    return sum(map(_record_header_bytes, headers))


def _record_header_bytes(headers: Headers) -> int:
    return 0 if headers is None else sum([len(name) + len(value or b"") for name, value in headers])


class Chunk:
    """Records of one stream that arrived together, as columns; the unit of taking and settling.

    ``settled`` holds one byte per record: 0 while its outcome is unconfirmed, 1 afterwards. Settling a
    record twice changes nothing. ``live`` turns false when the stream is taken away (its epoch ended):
    whatever still finishes for such a chunk is dropped at hand-over, unless it is ``orphaned``: then it is
    published and remembered, because the same records come again to answer.

    Three columns may stand beside them: ``amqp``, what RabbitMQ messages carry; ``fallback_ids``, what
    records without an id of their own are called where not by their position; ``origins``, where records that
    came through a retry topic stood first.
    """

    __slots__ = (
        "amqp",
        "epoch",
        "fallback_ids",
        "headers",
        "keys",
        "live",
        "open",
        "origins",
        "orphaned",
        "positions",
        "settled",
        "size_bytes",
        "stream",
        "taken_at",
        "timestamps_ms",
        "values",
    )

    def __init__(
        self,
        stream: Stream,
        epoch: int,
        positions: Sequence[int],
        keys: list[bytes | None],
        values: list[bytes | None],
        headers: list[Headers],
        timestamps_ms: list[int],
        taken_at: float,
        *,
        amqp: list[Amqp] | None = None,
        fallback_ids: list[str] | None = None,
        origins: list[Origin] | None = None,
    ) -> None:
        self.stream = stream
        self.epoch = epoch
        self.positions = positions
        self.keys = keys
        self.values = values
        self.headers = headers
        self.timestamps_ms = timestamps_ms
        self.taken_at = taken_at
        self.size_bytes = sum([len(value) for value in values if value is not None]) + _header_bytes(headers)
        self.settled = bytearray(len(positions))
        self.open = len(positions)
        self.live = True
        self.orphaned = False
        self.amqp = amqp
        self.fallback_ids = fallback_ids
        self.origins = origins

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.positions)

    def __repr__(self) -> str:
        source, partition = self.stream
        return f"Chunk({source}[{partition}]@{self.positions[0]}..{self.positions[-1]}, open={self.open})"

    def alone(self, row: int) -> Chunk:
        """Return a chunk of just this record, for reading it apart from its neighbours."""
        return self._cut(row, row + 1)

    def head(self, count: int) -> Chunk:
        """Return a chunk of the first ``count`` records, in place of this one."""
        return self._cut(0, count)

    def _cut(self, low: int, high: int) -> Chunk:
        return Chunk(
            self.stream,
            self.epoch,
            self.positions[low:high],
            self.keys[low:high],
            self.values[low:high],
            self.headers[low:high],
            self.timestamps_ms[low:high],
            self.taken_at,
            amqp=None if self.amqp is None else self.amqp[low:high],
            fallback_ids=None if self.fallback_ids is None else self.fallback_ids[low:high],
            origins=None if self.origins is None else self.origins[low:high],
        )

    def called(self, row: int) -> str:
        """Return what a record without an id of its own is called: where it stands, or its message's name."""
        if self.fallback_ids is not None:
            return self.fallback_ids[row]
        return f"{self.stream.source}-{self.stream.partition}-{self.positions[row]}"

    @property
    def wanted(self) -> bool:
        """Whether outcomes of these records are still to be published."""
        return self.live or self.orphaned

    def settle(self, rows: Sequence[int]) -> int:
        """Mark ``rows`` as settled and return how many of them were open until now."""
        settled = self.settled
        count = len(rows)
        if count and rows[-1] - rows[0] + 1 == count and not settled.count(1, rows[0], rows[-1] + 1):
            # One run of open rows (rows are ascending): a slice instead of a loop.
            settled[rows[0] : rows[-1] + 1] = b"\x01" * count
            newly = count
        else:
            newly = 0
            for row in rows:
                if not settled[row]:
                    settled[row] = 1
                    newly += 1
        self.open -= newly
        return newly

    def settled_prefix(self) -> int:
        """Return how many records from the front are settled without a gap."""
        first_open = self.settled.find(0)
        return len(self.settled) if first_open < 0 else first_open
