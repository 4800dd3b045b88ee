"""Which records have their outcome, and how far each stream may be committed.

Rules kept here and nowhere else:

* A stream is settled up to the end of the prefix of its chunks whose records all have outcomes; a
  position never passes an open record and never goes back inside an epoch.
* A stream that is taken away ends its epoch: its chunks are forgotten, and settling one of their records
  afterwards changes nothing.
* Gaps between positions are not records: a compacted topic or a transaction marker leaves none behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from inferfleet.records import Chunk, Stream


class Ledger:
    """Open chunks per stream, in the order they were taken."""

    def __init__(self) -> None:
        self._open: dict[Stream, deque[Chunk]] = {}
        self._settled_to: dict[Stream, int] = {}
        self._changed: set[Stream] = set()
        self._refused: set[Stream] = set()

    def __repr__(self) -> str:
        chunks = sum(len(chunks) for chunks in self._open.values())
        return f"Ledger(streams={len(self._open)}, open_chunks={chunks})"

    def assigned(self, streams: Iterable[Stream]) -> None:
        """Start an epoch for each stream with nothing open."""
        for stream in streams:
            self.ended((stream,))
            self._open[stream] = deque()

    def began(self, chunk: Chunk) -> None:
        """Add a chunk behind the ones taken before it from the same stream."""
        self._open.setdefault(chunk.stream, deque()).append(chunk)

    def settle(self, chunk: Chunk, rows: Sequence[int]) -> int:
        """Give ``rows`` (ascending) of ``chunk`` their outcome; return how many had none until now."""
        if not chunk.live:
            return 0
        newly = chunk.settle(rows)
        if newly:
            self._changed.add(chunk.stream)
        return newly

    def ended(self, streams: Iterable[Stream]) -> list[Chunk]:
        """End the epoch of each stream and return the chunks that were still open."""
        forgotten: list[Chunk] = []
        for stream in streams:
            for chunk in self._open.pop(stream, ()):
                chunk.live = False
                forgotten.append(chunk)
            self._settled_to.pop(stream, None)
            self._changed.discard(stream)
            self._refused.discard(stream)
        return forgotten

    def positions(self, streams: Collection[Stream] | None = None) -> dict[Stream, int]:
        """Return the position each stream may be committed to, for those that moved since last asked.

        A position is the first one *not* settled: the offset that a restarted reader starts from.
        """
        moved: dict[Stream, int] = {}
        for stream in [s for s in self._changed if streams is None or s in streams]:
            self._changed.discard(stream)
            position = self._advance(stream)
            known = self._settled_to.get(stream)
            if position is not None and (position != known or stream in self._refused):
                self._settled_to[stream] = position
                self._refused.discard(stream)
                moved[stream] = position
        return moved

    def repeat(self, streams: Iterable[Stream]) -> None:
        """Report these streams' positions again: a commit of theirs was refused."""
        for stream in streams:
            if stream in self._settled_to:
                self._refused.add(stream)
                self._changed.add(stream)

    def _advance(self, stream: Stream) -> int | None:
        chunks = self._open[stream]
        position: int | None = self._settled_to.get(stream)
        while chunks:
            chunk = chunks[0]
            prefix = chunk.settled_prefix()
            if prefix:
                position = chunk.positions[prefix - 1] + 1
            if prefix < len(chunk):
                break
            chunks.popleft()
        return position

    def open_records(self, streams: Collection[Stream] | None = None) -> int:
        """Return how many taken records have no outcome yet."""
        return sum(
            chunk.open
            for stream, chunks in self._open.items()
            if streams is None or stream in streams
            for chunk in chunks
        )

    def oldest_timestamp_ms(self, sources: Collection[str] | None = None) -> int | None:
        """Return the broker timestamp of the oldest record without an outcome, epoch milliseconds."""
        oldest: int | None = None
        for stream, chunks in self._open.items():
            if sources is not None and stream.source not in sources:
                continue
            for chunk in chunks:
                first_open = chunk.settled.find(0)
                if first_open >= 0:
                    timestamp = chunk.timestamps_ms[first_open]
                    oldest = timestamp if oldest is None or timestamp < oldest else oldest
                    break
        return oldest

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Return the streams of the running epochs."""
        return tuple(self._open)
