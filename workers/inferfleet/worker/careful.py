"""Finding the request that kills the process, after a start that follows an unclean end.

:mod:`inferfleet.core.quarantine` decides; here batches are cut by what it says, and its marks are written
where the next life of the process finds them.
"""

from __future__ import annotations

from typing import NamedTuple

import structlog

from inferfleet.core.quarantine import Quarantine
from inferfleet.ports import CrashMarks
from inferfleet.records import Batch, Chunk, Requests
from inferfleet.wire.headers import GENERATED_ID
from inferfleet.wire.stored import payload_hash

log = structlog.get_logger(__name__)


class Screened(NamedTuple):
    """A batch as it may run: requests never to run again, requests to run alone, and the rest."""

    condemned: list[Requests]
    alone: list[Batch]
    rest: Batch | None


class Careful:
    """The quarantine of one process and its marks; owned by the worker loop's thread."""

    def __init__(self, marks: CrashMarks) -> None:
        self._marks = marks
        left_over = marks.load()
        self._quarantine = Quarantine(left_over is not None, left_over or {})
        if left_over is not None:
            log.warning("unclean_end_before", suspects=len(left_over))
        marks.running()

    @property
    def active(self) -> bool:
        """Whether batches are to be screened."""
        return self._quarantine.active

    def screen(self, batch: Batch) -> Screened:
        """Cut a batch by what earlier lives say of its requests."""
        sorted_ = self._quarantine.sort(_fingerprints(batch))
        if not sorted_.condemned and not sorted_.suspects:
            return Screened([], [], batch)
        singles = [part.slice(i, i + 1) for part in batch.parts for i in range(len(part))]
        rest = [singles[i] for i in sorted_.clean]
        return Screened(
            [singles[i] for i in sorted_.condemned],
            [Batch(batch.lane, [singles[i]], singles[i].total_rows) for i in sorted_.suspects],
            Batch(batch.lane, rest, sum(part.total_rows for part in rest)) if rest else None,
        )

    def began(self, batch: Batch) -> None:
        """Note what is about to run."""
        self._save(self._quarantine.began(id(batch), _fingerprints(batch)))

    def ended(self, batch: Batch) -> None:
        """Note that a batch has ended."""
        was_active = self.active
        self._save(self._quarantine.ended(id(batch)))
        if was_active and not self.active:
            log.info("careful_no_longer")

    def close(self, *, clean: bool) -> None:
        """Note how the process ends; after an error, what is not found out yet is left to the next one."""
        if clean or not self.active:
            self._marks.ended()

    def _save(self, mark: dict[str, int] | None) -> None:
        if mark is not None:
            self._marks.save(mark)


def _fingerprints(batch: Batch) -> list[str]:
    return [
        _fingerprint(part.chunk, row, request_id)
        for part in batch.parts
        for row, request_id in zip(part.rows, part.ids, strict=True)
    ]


def _fingerprint(chunk: Chunk, row: int, request_id: str) -> str:
    """Return what names one request whenever it comes: its place, or where that changes its id and bytes."""
    if chunk.amqp is None:
        source, partition = chunk.stream
        return f"{source}-{partition}-{chunk.positions[row]}"
    named = "" if request_id.startswith(GENERATED_ID) else request_id
    return f"{chunk.stream.source} {named} {payload_hash(chunk.values[row] or b'')}"
