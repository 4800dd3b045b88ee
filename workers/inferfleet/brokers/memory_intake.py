"""Taking chunks from the memory broker: one member of one of its groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from inferfleet.brokers.memory import MemoryBroker, Record
from inferfleet.brokers.memory_group import Member
from inferfleet.ports import IntakeListener
from inferfleet.records import Chunk, Stream

REVOKE_GRACE_S = 0.5


class MemoryIntake:
    """Implements :class:`~inferfleet.ports.Intake` on a :class:`~inferfleet.brokers.memory.MemoryBroker`.

    A settled position is committed at once; its refusal is told inside the next take, as all other news.
    ``start`` is ``earliest`` or ``latest``, for partitions without a commit.
    """

    def __init__(self, broker: MemoryBroker, group: str, *, start: str = "earliest") -> None:
        self._broker = broker
        self._group = broker.group(group)
        self._start = start
        self._member = Member()
        self._sources: tuple[str, ...] = ()
        self._listener: IntakeListener | None = None
        self._positions: dict[Stream, int] = {}
        self._epochs: dict[Stream, int] = {}
        self._paused: set[str] = set()
        self._deferred: dict[Stream, float] = {}
        self._refused: list[Stream] = []
        self._turn = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"MemoryIntake(group={self._group.name}, partitions={len(self._positions)})"

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Take from exactly these topics; the member joins, tells the group, or leaves, in the next take."""
        self._listener = listener
        self._sources = tuple(sorted(sources))

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return one chunk per partition that had records; rebalance news is told in here."""
        if self._closed:
            raise RuntimeError("the intake is closed")
        chunks = self._take_once(max_records, max_bytes)
        if not chunks and max_wait_s > 0:
            self._broker.wait(self._next_due(max_wait_s))
            chunks = self._take_once(max_records, max_bytes)
        return chunks

    def _take_once(self, max_records: int, max_bytes: int) -> list[Chunk]:
        self._hear()
        fetched: dict[Stream, list[Record]] = {}
        records_left, bytes_left = max(1, max_records), max_bytes
        for stream in self._fetchable():
            log = self._broker.log(stream)
            at = log.first_at(self._positions[stream])
            for record in log.records[at : at + records_left]:
                size = len(record.value or b"")
                if fetched and size > bytes_left:
                    break
                fetched.setdefault(stream, []).append(record)
                records_left -= 1
                bytes_left -= size
        return [self._chunk(stream, records) for stream, records in fetched.items()]

    def _fetchable(self) -> list[Stream]:
        """Return the streams to fetch from, another one first each time."""
        now = self._broker.clock.monotonic()
        self._deferred = {stream: until_s for stream, until_s in self._deferred.items() if until_s > now}
        streams = [
            stream
            for stream in self._positions
            if stream.source not in self._paused and stream not in self._deferred
        ]
        if not streams:
            return []
        self._turn = (self._turn + 1) % len(streams)
        return streams[self._turn :] + streams[: self._turn]

    def _chunk(self, stream: Stream, records: list[Record]) -> Chunk:
        self._positions[stream] = records[-1].offset + 1
        return Chunk(
            stream,
            self._epochs[stream],
            [record.offset for record in records],
            [record.key for record in records],
            [record.value for record in records],
            [record.headers for record in records],
            [record.timestamp_ms for record in records],
            self._broker.clock.monotonic(),
        )

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Commit what is owned; a refusal reaches the listener in the next take."""
        self._refused += self._commit(positions)

    def _commit(self, positions: Mapping[Stream, int]) -> list[Stream]:
        owned = {stream: position for stream, position in positions.items() if stream in self._positions}
        return self._group.commit(self._member, owned)

    def pause(self, sources: Collection[str]) -> None:
        """Take nothing from these topics until they are resumed."""
        self._paused |= set(sources)

    def resume(self, sources: Collection[str]) -> None:
        """Take from these topics again."""
        self._paused -= set(sources)

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Take nothing more of this partition until ``until_s``, then from ``position``."""
        if stream in self._positions:
            self._positions[stream] = position
            self._deferred[stream] = until_s

    def _next_due(self, max_wait_s: float) -> float:
        """Return how long to wait: until the next deferred partition is due at most."""
        now = self._broker.clock.monotonic()
        return min([max_wait_s, *(until_s - now for until_s in self._deferred.values())])

    def lag(self) -> dict[Stream, int]:
        """Return how many records of each owned partition are not taken yet."""
        return {stream: self._left(stream) for stream in self._positions}

    def _left(self, stream: Stream) -> int:
        log = self._broker.log(stream)
        position = self._positions.get(stream)
        return len(log.records) - log.first_at(self._start_of(stream) if position is None else position)

    def _start_of(self, stream: Stream) -> int:
        start = 0 if self._start == "earliest" else self._broker.log(stream).end
        return self._group.committed.get(stream, start)

    def drained(self, timeout_s: float) -> bool:  # noqa: ARG002 - the answer is here
        """Return whether every partition of its sources is taken to its end, or settled to it elsewhere."""
        return not any(
            self._left(Stream(source, number))
            for source in self._sources
            for number in range(self._broker.partitions(source))
        )

    @property
    def joined(self) -> bool:
        """Whether this is a member of its group; who wants nothing need not be."""
        return self._is_member or (self._listener is not None and not self._sources)

    @property
    def _is_member(self) -> bool:
        return self._member in self._group

    @property
    def denied(self) -> str | None:
        """Why nobody may join the group, if so it was told."""
        return self._group.denied

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Return the owned partitions."""
        return tuple(self._positions)

    def close(self) -> None:
        """Let the listener settle what is left, and leave the group at once."""
        if self._closed:
            return
        self._closed = True
        self._tell_refused()
        self._leave()

    def _leave(self) -> None:
        if self._is_member:
            self._revoke(list(self._positions))
            self._group.leave(self._member)

    def vanish(self) -> None:
        """End as a killed process does: nothing is told or committed; the group notices in its own time."""
        self._closed = True
        self._group.vanish(self._member)

    def expel(self) -> None:
        """Lose the membership without being told, as a process that was frozen for too long."""
        self._group.expel(self._member)

    # News: told inside take, on the owner's thread.

    def _hear(self) -> None:
        """Tell the listener what has happened since the last take, and join where that is due."""
        self._group.tick()
        self._tell_refused()
        if not self._is_member and self._positions:
            self._lose()
        if not self._sources:
            self._leave()
        if self._sources and self._group.denied is None:
            self._group.join(self._member, self._sources)
        self._revoke(self._group.to_give_up(self._member))
        self._assign(self._group.claim(self._member))

    def _tell_refused(self) -> None:
        refused, self._refused = self._refused, []
        if refused and self._listener is not None:
            self._listener.settle_refused(refused)

    def _assign(self, streams: list[Stream]) -> None:
        for stream in streams:
            self._positions[stream] = self._start_of(stream)
            self._epochs[stream] = self._epochs.get(stream, 0) + 1
        if streams and self._listener is not None:
            self._listener.assigned(streams)

    def _revoke(self, streams: list[Stream]) -> None:
        if not streams:
            return
        if self._listener is not None:
            # A refusal here is nobody's to mend: the next owner repeats what was not committed.
            self._commit(self._listener.revoked(streams, REVOKE_GRACE_S))
        self._forget(streams)
        self._group.give_up(self._member, streams)

    def _lose(self) -> None:
        streams = list(self._positions)
        if self._listener is not None:
            self._listener.lost(streams)
        self._forget(streams)

    def _forget(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            del self._positions[stream]
            self._deferred.pop(stream, None)
