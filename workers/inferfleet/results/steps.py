"""What is written to Redis together: published groups, cut and joined into steps of bounded size.

A step remembers what is done of it, so that a new try repeats no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from inferfleet.ports import Receipt
from inferfleet.records import Results
from inferfleet.results.servers import Call
from inferfleet.wire.stored import Verdict, is_error, mark, reply_key, result_key


class Group(NamedTuple):
    """Results as they were published."""

    results: Results
    receipt: Receipt


class Slice(NamedTuple):
    """Rows ``low`` to ``high`` (exclusive) of one published group."""

    results: Results
    receipt: Receipt
    low: int
    high: int


class Write(NamedTuple):
    """One atomic write: rows of a step, by number, and the call that writes them."""

    rows: Sequence[int]
    call: Call


class _Columns(NamedTuple):
    keys: list[str]
    bodies: list[bytes]
    wanted: str


class _Reply(NamedTuple):
    """One entry of a client's reply stream."""

    fields: tuple[str, str, str, bytes]
    ttl_s: int


class Step:
    """Slices that are written together, equal in lifetime and kind."""

    def __init__(self, slices: list[Slice]) -> None:
        self.slices = slices
        self.verdicts: dict[int, tuple[Verdict, bytes]] = {}
        """What became of the rows that were not written, and the body that stands where a reply needs it."""
        self._columns: _Columns | None = None
        self._unwritten: Sequence[int] = range(0 if self._first.reply_only else self._rows)
        self._owed: dict[str, list[_Reply]] | None = None

    @property
    def _first(self) -> Results:
        return self.slices[0].results

    @property
    def _rows(self) -> int:
        return sum(high - low for _, _, low, high in self.slices)

    @property
    def stores(self) -> bool:
        """Whether the rows are kept; false where only replies are owed."""
        return not self._first.reply_only

    def verdict_of(self, row: int) -> Verdict:
        """Return what became of a row."""
        return self.verdicts[row][0] if row in self.verdicts else Verdict.WRITTEN

    def writes(self, fleet: str, *, joined: bool) -> list[Write]:
        """Return the writes that are still to be done: one for all rows, or one for each."""
        if not self._unwritten:
            return []
        if self._columns is None:
            self._columns = self._build(fleet)
        if joined:
            return [self._write_of(self._columns, self._unwritten)]
        return [self._write_of(self._columns, (row,)) for row in self._unwritten]

    def _write_of(self, columns: _Columns, rows: Sequence[int]) -> Write:
        keys, bodies, wanted = columns
        ttl_ms = self._first.ttl_s * 1000
        if len(rows) == len(keys):
            return Write(rows, Call(keys, [ttl_ms, wanted, *bodies]))
        flags = "".join([wanted[row] for row in rows])
        return Write(rows, Call([keys[row] for row in rows], [ttl_ms, flags, *[bodies[row] for row in rows]]))

    def written(self, writes: Sequence[Write], replies: Sequence[Any]) -> None:
        """Take the replies to ``writes``; rows whose reply is an error stay to be done."""
        unwritten: list[int] = []
        for (rows, _), news in zip(writes, replies, strict=True):
            if isinstance(news, Exception):
                unwritten += rows
                continue
            for at in range(0, len(news), 3):
                self.verdicts[rows[news[at] - 1]] = (Verdict(news[at + 1]), news[at + 2])
        self._unwritten = unwritten
        if not unwritten:
            self._columns = None

    def replies(self, fleet: str, max_len: int) -> dict[str, Call]:
        """Return the replies that are still owed, by stream. Everything must be written before."""
        if self._owed is None:
            self._owed = self._build_replies(fleet)
        calls = {}
        for stream, replies in self._owed.items():
            ttl_ms = max(reply.ttl_s for reply in replies) * 1000
            fields = [value for reply in replies for value in reply.fields]
            calls[stream] = Call([stream], [max_len, ttl_ms, *fields])
        return calls

    def replied(self, stream: str) -> None:
        """Owe ``stream`` nothing more."""
        if self._owed is not None:
            del self._owed[stream]

    def _build(self, fleet: str) -> _Columns:
        keys: list[str] = []
        bodies: list[bytes] = []
        wanted = ""
        for results, _, low, high in self.slices:
            prefix = result_key(fleet, results.route, "")
            keys += [prefix + request_id for request_id in results.ids[low:high]]
            bodies += map(mark, results.bodies[low:high], results.payload_hashes[low:high])
            replies = results.replies
            wanted += (
                "0" * (high - low)
                if replies is None
                else "".join(["1" if reply else "0" for reply in replies[low:high]])
            )
        return _Columns(keys, bodies, wanted)

    def _build_replies(self, fleet: str) -> dict[str, list[_Reply]]:
        """The value that stands is sent, not the one that came second."""
        owed: dict[str, list[_Reply]] = {}
        if all(part.results.replies is None for part in self.slices):
            return owed
        for row, (results, index) in enumerate(self._each_row()):
            name = results.replies[index] if results.replies is not None else None
            verdict, standing = self.verdicts.get(row, (Verdict.WRITTEN, b""))
            if not name or verdict is Verdict.OTHER_PAYLOAD:
                continue
            body = standing or mark(results.bodies[index], results.payload_hashes[index])
            status = "error" if is_error(body) else "ok"
            entry = _Reply((results.ids[index], results.route, status, body), results.ttl_s)
            owed.setdefault(reply_key(fleet, name), []).append(entry)
        return owed

    def _each_row(self) -> Iterator[tuple[Results, int]]:
        """Yield each row's group and index, in order."""
        for results, _, low, high in self.slices:
            for index in range(low, high):
                yield results, index


def steps_of(groups: Sequence[Group], max_rows: int, max_bytes: int) -> Iterator[Step]:
    """Cut and join groups into steps of bounded rows and bytes."""
    slices: list[Slice] = []
    rows = size = 0
    for results, receipt in groups:
        if slices and (results.ttl_s, results.reply_only) != (
            slices[0].results.ttl_s,
            slices[0].results.reply_only,
        ):
            yield Step(slices)
            slices, rows, size = [], 0, 0
        low = 0
        for index, body in enumerate(results.bodies):
            if rows and (rows == max_rows or size + len(body) > max_bytes):
                if low < index:
                    slices.append(Slice(results, receipt, low, index))
                yield Step(slices)
                slices, rows, size, low = [], 0, 0, index
            rows += 1
            size += len(body)
        if low < len(results):
            slices.append(Slice(results, receipt, low, len(results)))
    if slices:
        yield Step(slices)
