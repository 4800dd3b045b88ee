"""Takes from topics whose records say when they may be taken: delayed retries on Kafka."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from inferfleet.ports import Clock, Intake, IntakeListener
from inferfleet.records import Chunk, Headers, Stream
from inferfleet.wire.headers import NOT_BEFORE

LEAST_S = 0.1
"""A stream is held back for this long at least: going back throws away what the client has fetched ahead."""
MOST_S = 60.0
"""After this long its first record is looked at again, so that a calendar that was set right counts."""
MAX_DIGITS = 15


class DelayedIntake:
    """Implements :class:`~inferfleet.ports.Intake` over another one; nothing is taken before its time.

    Records of a stream come in their order, so one that must wait holds up those behind it: their times
    differ by no more than the jitter of the delay. A record that does not say when is due, and so is one that
    claims to wait for longer than ``longest_ms``: nobody here wrote that.
    """

    def __init__(self, inner: Intake, clock: Clock, *, longest_ms: int | None = None) -> None:
        self._inner = inner
        self._clock = clock
        self._longest_ms = longest_ms

    def __repr__(self) -> str:
        return f"DelayedIntake({self._inner!r})"

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return what has arrived and is due; a wait may end early for what is not."""
        found = (self._due(chunk) for chunk in self._inner.take(max_records, max_bytes, max_wait_s))
        return [chunk for chunk in found if chunk is not None]

    def _due(self, chunk: Chunk) -> Chunk | None:
        """Return the records up to the first that must wait; the stream goes on there when its time comes."""
        now_ms = self._clock.utc_ms()
        for row, headers in enumerate(chunk.headers):
            wait_ms = _not_before_ms(headers) - now_ms
            if wait_ms > 0 and (self._longest_ms is None or wait_ms <= self._longest_ms):
                wait_s = min(MOST_S, max(LEAST_S, wait_ms / 1000))
                self._inner.defer(chunk.stream, chunk.positions[row], self._clock.monotonic() + wait_s)
                return chunk.head(row) if row else None
        return chunk

    # All else is the inner one's.

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Take from exactly these topics."""
        self._inner.subscribe(sources, listener)

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Commit what is finished."""
        self._inner.settle(positions)

    def pause(self, sources: Collection[str]) -> None:
        """Stop taking from these topics, whatever is due."""
        self._inner.pause(sources)

    def resume(self, sources: Collection[str]) -> None:
        """Take from these topics again what is due."""
        self._inner.resume(sources)

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Take nothing more of this stream before ``until_s``, due or not."""
        self._inner.defer(stream, position, until_s)

    def lag(self) -> dict[Stream, int]:
        """Return what is not taken, due or not."""
        return self._inner.lag()

    def drained(self, timeout_s: float) -> bool:
        """Return whether nothing is left, due or not."""
        return self._inner.drained(timeout_s)

    @property
    def joined(self) -> bool:
        """Whether the inner one has joined."""
        return self._inner.joined

    @property
    def denied(self) -> str | None:
        """Why the inner one may not join or take."""
        return self._inner.denied

    def close(self) -> None:
        """Commit what was settled, and leave."""
        self._inner.close()


def _not_before_ms(headers: Headers) -> int:
    """Return when a record is due; 0 where it does not say. The last header counts: ours stand last."""
    for name, value in reversed(headers or ()):
        if name == NOT_BEFORE:
            return int(value) if value and len(value) <= MAX_DIGITS and value.isdigit() else 0
    return 0
