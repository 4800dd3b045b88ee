"""Several intakes as one: a pool may take from Kafka, from its own retry topics, and from RabbitMQ.

Each keeps its own contract; what goes to whom is told by the address of a source. Where only one waits for
records, it waits for as long as it may; two that wait take turns, in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from inferfleet.addresses import on_rabbitmq
from inferfleet.ports import Clock, Intake, IntakeListener
from inferfleet.records import Chunk, Stream

RETRIES_EVERY_S = 0.05
"""How often retry topics are looked at: their records waited for seconds."""
SLICE_S = 0.005


class Sources:
    """An :class:`~inferfleet.ports.Intake` over others; ``is_retry`` says which topics are retry topics."""

    def __init__(
        self,
        kafka: Intake | None,
        retries: Intake | None,
        rabbitmq: Intake | None,
        is_retry: Callable[[str], bool],
        clock: Clock,
    ) -> None:
        self._kafka = kafka
        self._retries = retries
        self._rabbitmq = rabbitmq
        self._is_retry = is_retry
        self._clock = clock
        self._retries_at = 0.0
        self._all = [intake for intake in (kafka, retries, rabbitmq) if intake is not None]
        self._used: list[Intake] = []
        self._subscribed = False

    def add(
        self, *, kafka: Intake | None = None, retries: Intake | None = None, rabbitmq: Intake | None = None
    ) -> None:
        """Take from a broker too that no route has named so far; what stands is not replaced."""
        self._kafka, self._retries = self._kafka or kafka, self._retries or retries
        self._rabbitmq = self._rabbitmq or rabbitmq
        self._all = [each for each in (self._kafka, self._retries, self._rabbitmq) if each is not None]

    def __repr__(self) -> str:
        return f"Sources({self._all})"

    def _of(self, source: str) -> Intake:
        intake = (
            self._rabbitmq
            if on_rabbitmq(source)
            else self._retries
            if self._is_retry(source) and self._retries is not None
            else self._kafka
        )
        if intake is None:
            raise LookupError(f"nothing takes from {source}")
        return intake

    def _split(self, sources: Collection[str]) -> list[tuple[Intake, list[str]]]:
        found: dict[int, tuple[Intake, list[str]]] = {}
        for source in sources:
            intake = self._of(source)
            found.setdefault(id(intake), (intake, []))[1].append(source)
        return list(found.values())

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Take from exactly these sources; an intake that had some and has none now takes from nothing."""
        self._subscribed = True
        split = self._split(sources)
        chosen = [intake for intake, _ in split]
        for intake in self._used:
            if intake not in chosen:
                intake.subscribe((), listener)
        for intake, own in split:
            intake.subscribe(own, listener)
        self._used += [intake for intake in chosen if intake not in self._used]

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return what has arrived anywhere; wait up to ``max_wait_s`` for the first."""
        chunks = self._take_retries(max_records, max_bytes)
        waiting = [intake for intake in (self._rabbitmq, self._kafka) if intake in self._used]
        if len(waiting) == 1:
            (intake,) = waiting
            return chunks + intake.take(*_left(chunks, max_records, max_bytes), 0.0 if chunks else max_wait_s)
        until = self._clock.monotonic() + max_wait_s
        while waiting:
            # Half for the first, so that the one that always has more leaves room for the other.
            chunks += waiting[0].take(max(1, max_records // 2), max(1, max_bytes // 2), 0.0)
            left_s = 0.0 if chunks else max(0.0, until - self._clock.monotonic())
            chunks += waiting[1].take(*_left(chunks, max_records, max_bytes), min(left_s, SLICE_S))
            if chunks or left_s <= 0:
                break
        return chunks

    def _take_retries(self, max_records: int, max_bytes: int) -> list[Chunk]:
        now = self._clock.monotonic()
        if self._retries is None or self._retries not in self._used or now < self._retries_at:
            return []
        self._retries_at = now + RETRIES_EVERY_S
        return self._retries.take(max(1, max_records // 2), max(1, max_bytes // 2), 0.0)

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Settle each position where its stream comes from."""
        found: dict[int, tuple[Intake, dict[Stream, int]]] = {}
        for stream, position in positions.items():
            intake = self._of(stream.source)
            found.setdefault(id(intake), (intake, {}))[1][stream] = position
        for intake, own in found.values():
            intake.settle(own)

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Let the stream's own intake take nothing more of it before ``until_s``."""
        self._of(stream.source).defer(stream, position, until_s)

    def pause(self, sources: Collection[str]) -> None:
        """Stop taking from these sources."""
        for intake, own in self._split(sources):
            intake.pause(own)

    def resume(self, sources: Collection[str]) -> None:
        """Take from these sources again."""
        for intake, own in self._split(sources):
            intake.resume(own)

    def lag(self) -> dict[Stream, int]:
        """Return what is not yet taken, per stream."""
        return {stream: records for intake in self._used for stream, records in intake.lag().items()}

    def drained(self, timeout_s: float) -> bool:
        """Return whether nothing is left anywhere; each intake is asked for up to ``timeout_s``."""
        return all(intake.drained(timeout_s) for intake in self._used)

    @property
    def joined(self) -> bool:
        """Whether every intake that is used has joined; without any source there is nothing to join."""
        return self._subscribed and all(intake.joined for intake in self._used)

    @property
    def denied(self) -> str | None:
        """Why one of the brokers will not let this worker join or take."""
        return next((intake.denied for intake in self._used if intake.denied is not None), None)

    def close(self) -> None:
        """Settle what was settled, and leave everywhere."""
        for intake in self._all:
            intake.close()


def _left(chunks: Collection[Chunk], max_records: int, max_bytes: int) -> tuple[int, int]:
    records = max_records - sum(len(chunk) for chunk in chunks)
    return max(1, records), max(1, max_bytes - sum(chunk.size_bytes for chunk in chunks))
