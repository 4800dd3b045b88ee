"""Chunk to requests: columns in, columns out.

The usual forms take a fast path that does a constant handful of operations per record: a V2 JSON body with
one input of the model's fixed shape, and one raw tensor. Everything else, and everything that is wrong, is
read one request at a time by :class:`~inferfleet.wire.request.RequestReader`, which names what is at fault.
Duplicate JSON keys: the last wins.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from inferfleet.datatypes import DATATYPES
from inferfleet.errors import Code, RequestError
from inferfleet.records import (
    BINARY_ANSWER,
    JSON_ANSWER,
    AnswerForm,
    Chunk,
    Failures,
    Requests,
    Signature,
    Tensors,
)
from inferfleet.wire import headers as names
from inferfleet.wire import usual
from inferfleet.wire.headers import PLAIN, ChunkMeta, Meta, check_id, ids_are_plain, read_headers
from inferfleet.wire.request import Limits, Parsed, RequestReader, find_id


class _Group(NamedTuple):
    """Requests that may stand in one column set."""

    rows: list[int]
    ids: list[str | None]
    pieces: list[Tensors]
    counts: list[int]


class Decoded(NamedTuple):
    """What a chunk became: every row is in exactly one of them."""

    requests: list[Requests]
    rejected: Failures | None


class _Rejects:
    def __init__(self) -> None:
        self.by_row: dict[int, tuple[str | None, RequestError]] = {}

    def add(self, row: int, request_id: str | None, error: RequestError) -> None:
        self.by_row[row] = (request_id, error)


class Decoder:
    """Reads the chunks of one route.

    ``deadline_ms`` is how long after its broker timestamp a request without a deadline of its own expires;
    a record that has no timestamp does not. With ``needs_id`` a request that nobody named is refused: its
    answer could not be found.
    """

    def __init__(
        self,
        model: str,
        versions: frozenset[str],
        signature: Signature,
        limits: Limits,
        *,
        columns: bool = False,
        deadline_ms: int | None = None,
        needs_id: bool = False,
    ) -> None:
        self._needs_id = needs_id
        self._reader = RequestReader(model, versions, signature, limits)
        self._limits = limits
        self._columns = columns
        self._deadline_ms = deadline_ms
        self._signature = signature
        self._takes_id = any(spec.name == "id" for spec in signature.inputs)
        self._sort_by_cost = any(spec.datatype == "BYTES" for spec in signature.inputs)
        self._decode_fast: Any = None
        self._prepare_fast(signature)

    def _prepare_fast(self, signature: Signature) -> None:
        if len(signature.inputs) != 1:
            return
        spec = signature.inputs[0]
        if spec.datatype not in usual.FORMATS or -1 in spec.shape:
            return
        datatype = DATATYPES[spec.datatype]
        self._name, self._datatype = spec.name, spec.datatype
        self._row_shape = [1, *spec.shape]
        self._count = math.prod(spec.shape)
        self._dtype = datatype.numpy
        self._width = self._count * (datatype.width or 0)
        self._pack = struct.Struct(f"<{self._count}{usual.FORMATS[spec.datatype]}").pack
        if not self._columns:
            self._decode_fast = msgspec.json.Decoder(usual.request_type(spec.datatype)).decode

    def decode(self, chunk: Chunk) -> Decoded:
        """Return the requests of ``chunk`` and its rejected rows. Never raises for what a record holds.

        A fault of our own is kept to the record that brings it out: that one gets ``E_INTERNAL``.
        """
        try:
            return self._decode(chunk)
        except Exception:
            return self._decode_singly(chunk)

    def _decode_singly(self, chunk: Chunk) -> Decoded:
        requests: list[Requests] = []
        failures: list[Failures] = []
        for row in range(len(chunk)):
            alone = chunk.alone(row)
            try:
                decoded = self._decode(alone)
            except Exception as error:
                text = f"inferfleet could not read this request ({type(error).__name__})"
                decoded = Decoded([], Failures(alone, [0], [None], [Code.INTERNAL], [text], [None], [None]))
            for part in decoded.requests:
                part.chunk, part.rows = chunk, [row]
                requests.append(part)
            if decoded.rejected is not None:
                failures.append(decoded.rejected._replace(chunk=chunk, rows=[row]))
        return Decoded(requests, _joined(failures))

    def _decode(self, chunk: Chunk) -> Decoded:
        rejects = _Rejects()
        meta = read_headers(chunk.headers)
        for row, error in meta.rejected.items():
            rejects.add(row, self._refused_id(chunk, meta, row, error), error)
        rows = self._sized(chunk, meta, rejects)
        requests: list[Requests] = []
        json_rows, raw_rows, general = self._by_form(meta, rows)
        if json_rows and self._decode_fast is not None:
            general += self._fast_json(chunk, meta, json_rows, requests)
        else:
            general += json_rows
        if raw_rows:
            general += self._fast_raw(chunk, meta, raw_rows, requests)
        if general:
            self._general(chunk, meta, sorted(general), requests, rejects)
        requests = [part for made in requests for part in self._finish(made, meta, rejects)]
        return Decoded(requests, self._rejected(chunk, meta, rejects))

    def _sized(self, chunk: Chunk, meta: ChunkMeta, rejects: _Rejects) -> list[int]:
        """Return the rows whose bodies may be read: present, not too large, headers in order."""
        values = chunk.values
        limit = self._limits.max_bytes
        if values and not meta.rejected and None not in values:
            sizes = [len(value) for value in values]  # type: ignore[arg-type]
            if min(sizes) > 0 and max(sizes) <= limit:
                return list(range(len(values)))
        kept: list[int] = []
        for row, value in enumerate(values):
            if row in meta.rejected:
                continue
            if not value:
                what = "is a tombstone (null)" if value is None else "is empty"
                rejects.add(row, self._header_id(meta, row), RequestError(Code.EMPTY, f"the body {what}"))
            elif len(value) > limit:
                text = f"the body has {len(value)} bytes; at most {limit} are allowed"
                rejects.add(row, self._header_id(meta, row), RequestError(Code.TOO_LARGE, text))
            else:
                kept.append(row)
        return kept

    @staticmethod
    def _header_id(meta: ChunkMeta, row: int) -> str | None:
        return None if meta.metas is None else meta.metas[row].id

    def _refused_id(self, chunk: Chunk, meta: ChunkMeta, row: int, error: RequestError) -> str | None:
        """Return the id of a record whose headers were refused, from its body where no header says it."""
        request_id, body = self._header_id(meta, row), chunk.values[row]
        if request_id is not None or error.code is Code.ID or not body or len(body) > self._limits.max_bytes:
            return request_id
        return self._body_id(body, PLAIN)

    def _body_id(self, body: bytes, found: Meta) -> str | None:
        """Return the id in a body that was refused, where it can still be read."""
        if found.json_length == 0 or (self._columns and self._takes_id):
            return None
        return find_id(body[: found.json_length])

    def _by_form(self, meta: ChunkMeta, rows: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Split rows into JSON bodies, raw tensors, and those for the general reader."""
        metas = meta.metas
        if metas is None:
            return rows, [], []
        if meta.uniform is not None and meta.uniform.model is None and meta.uniform.version is None:
            length = meta.uniform.json_length
            return (rows, [], []) if length is None else ([], [], rows) if length else ([], rows, [])
        json_rows: list[int] = []
        raw_rows: list[int] = []
        general: list[int] = []
        for row in rows:
            found = metas[row]
            if found.model is not None or found.version is not None:
                general.append(row)
            elif found.json_length is None:
                json_rows.append(row)
            elif found.json_length == 0:
                raw_rows.append(row)
            else:
                general.append(row)
        return json_rows, raw_rows, general

    def _fast_json(self, chunk: Chunk, meta: ChunkMeta, rows: list[int], out: list[Requests]) -> list[int]:
        """Read the usual JSON form; return the rows that need the general reader."""
        values, decode, pack = chunk.values, self._decode_fast, self._pack
        name, datatype, shape = self._name, self._datatype, self._row_shape
        cold: list[int] = []
        good: list[int] = []
        ids: list[str | None] = []
        packed: list[bytes] = []
        for row in rows:
            try:
                request = decode(values[row])
                (tensor,) = request.inputs
                if tensor.name == name and tensor.datatype == datatype and tensor.shape == shape:
                    packed.append(pack(*tensor.data))
                    good.append(row)
                    ids.append(request.id)
                else:
                    cold.append(row)
            except (ValueError, OverflowError, RecursionError, struct.error):
                # msgspec's errors and UnicodeDecodeError are ValueErrors; the general reader says why.
                cold.append(row)
        if good:
            array = np.frombuffer(bytearray().join(packed), dtype=self._dtype)
            tensors = {name: array.reshape(len(good), *shape[1:])}
            self._add(chunk, meta, good, ids, tensors, JSON_ANSWER, out)
        return cold

    def _fast_raw(self, chunk: Chunk, meta: ChunkMeta, rows: list[int], out: list[Requests]) -> list[int]:
        """Read raw tensors of the model's fixed shape; return the rows that need the general reader."""
        if len(self._signature.inputs) != 1 or not hasattr(self, "_width") or self._datatype == "BOOL":
            return rows
        values, width = chunk.values, self._width
        good = [row for row in rows if len(values[row]) == width]  # type: ignore[arg-type]
        if not good:
            return rows
        bodies: list[bytes] = [values[row] for row in good]  # type: ignore[misc]
        array = np.frombuffer(bytearray().join(bodies), dtype=self._dtype)
        array = array.reshape(len(good), *self._row_shape[1:])
        if array.dtype.kind == "f" and not self._limits.nan_allowed and not np.isfinite(array).all():
            return rows
        ids: list[str | None] = [None] * len(good)
        self._add(chunk, meta, good, ids, {self._name: array}, BINARY_ANSWER, out)
        return [] if len(good) == len(rows) else [row for row in rows if len(values[row]) != width]  # type: ignore[arg-type]

    def _general(
        self, chunk: Chunk, meta: ChunkMeta, rows: list[int], out: list[Requests], rejects: _Rejects
    ) -> None:
        groups: dict[tuple[tuple[tuple[int, ...], ...], AnswerForm], _Group] = {}
        for row in rows:
            found = PLAIN if meta.metas is None else meta.metas[row]
            try:
                parsed = self._read_one(chunk.values[row] or b"", found)
            except RequestError as error:
                rejects.add(row, found.id or self._body_id(chunk.values[row] or b"", found), error)
                continue
            shapes = tuple(array.shape[1:] for array in parsed.tensors.values())
            group = groups.setdefault((shapes, parsed.form), _Group([], [], [], []))
            group.rows.append(row)
            group.ids.append(parsed.id)
            group.pieces.append(parsed.tensors)
            group.counts.append(parsed.rows)
        for (_, form), group in groups.items():
            tensors = {
                name: np.concatenate([piece[name] for piece in group.pieces]) for name in group.pieces[0]
            }
            counts = None if max(group.counts) == 1 else group.counts
            self._add(chunk, meta, group.rows, group.ids, tensors, form, out, counts)

    def _read_one(self, body: bytes, found: Meta) -> Parsed:
        self._reader.check_model(found.model, found.version)
        if found.json_length is None:
            return self._reader.columns(body) if self._columns else self._reader.json(body)
        if found.json_length == 0:
            return self._reader.raw(body)
        return self._reader.binary(body, found.json_length)

    def _add(
        self,
        chunk: Chunk,
        meta: ChunkMeta,
        rows: list[int],
        body_ids: Sequence[str | None],
        tensors: Tensors,
        form: AnswerForm,
        out: list[Requests],
        counts: list[int] | None = None,
    ) -> None:
        """Append one column set; the id is the header's, else the body's, else what the record is called."""
        if meta.metas is None or (meta.uniform is not None and meta.uniform.id is None):
            called = _called(chunk) if None in body_ids else []
            ids = [
                called[row] if body_id is None else body_id
                for row, body_id in zip(rows, body_ids, strict=True)
            ]
        else:
            metas = meta.metas
            ids = []
            for row, body_id in zip(rows, body_ids, strict=True):
                header_id = metas[row].id
                if header_id is not None:
                    ids.append(header_id)
                else:
                    ids.append(chunk.called(row) if body_id is None else body_id)
        costs: list[int] | None = None
        if self._sort_by_cost:
            values = chunk.values
            costs = [len(values[row] or b"") for row in rows]
        out.append(Requests(chunk, rows, ids, tensors, counts, costs=costs, form=form))

    def _finish(self, made: Requests, meta: ChunkMeta, rejects: _Rejects) -> list[Requests]:
        """Check the ids, add deadlines, reply streams and traces, and split by priority."""
        made = self._checked_ids(made, rejects)
        if not made.rows:
            return []
        if self._deadline_ms is not None:
            after, timestamps = self._deadline_ms, made.chunk.timestamps_ms
            if min(timestamps) > 0:
                made.deadlines_ms = [timestamps[row] + after for row in made.rows]
            else:  # a record without a timestamp has no age, so no deadline either
                made.deadlines_ms = [timestamps[r] + after if timestamps[r] > 0 else None for r in made.rows]
        if meta.metas is None:
            return [made]
        if meta.uniform is not None:
            _fill_alike(made, meta.uniform)
            return [made]
        metas = [meta.metas[row] for row in made.rows]
        _fill(made, metas)
        priorities = {found.priority for found in metas}
        if priorities == {names.DEFAULT_PRIORITY}:
            return [made]
        parts: list[Requests] = []
        for priority in sorted(priorities):
            part = made.pick([i for i, found in enumerate(metas) if found.priority == priority])
            part.priority = priority
            parts.append(part)
        return parts

    def _checked_ids(self, made: Requests, rejects: _Rejects) -> Requests:
        if not self._needs_id and ids_are_plain(made.ids):
            return made
        sound: list[int] = []
        for index, request_id in enumerate(made.ids):
            try:
                self._check_id(made, index, request_id)
                sound.append(index)
            except RequestError as error:
                rejects.add(made.rows[index], None, error)
        return made.pick(sound)

    def _check_id(self, made: Requests, index: int, request_id: str) -> None:
        if self._needs_id and request_id.startswith(names.GENERATED_ID):
            raise RequestError(Code.ID, "the request has no id, and its answer goes nowhere but to redis")
        # A long topic's name makes long positions; they are nobody's fault.
        if request_id != made.chunk.called(made.rows[index]):
            check_id(request_id)

    @staticmethod
    def _rejected(chunk: Chunk, meta: ChunkMeta, rejects: _Rejects) -> Failures | None:
        if not rejects.by_row:
            return None
        rows = sorted(rejects.by_row)
        found = [rejects.by_row[row] for row in rows]
        metas = [PLAIN if meta.metas is None else meta.metas[row] for row in rows]
        return Failures(
            chunk,
            rows,
            [request_id for request_id, _ in found],
            [error.code for _, error in found],
            [error.text for _, error in found],
            [found.reply for found in metas],
            [found.trace for found in metas],
        )


def _called(chunk: Chunk) -> list[str]:
    """Return what each record is called that has no id of its own."""
    if chunk.fallback_ids is not None:
        return chunk.fallback_ids
    where = f"{chunk.stream.source}-{chunk.stream.partition}-"
    return [f"{where}{position}" for position in chunk.positions]


def _joined(failures: list[Failures]) -> Failures | None:
    """Return failures of one chunk as one column set."""
    if not failures:
        return None
    return Failures(
        failures[0].chunk,
        [row for each in failures for row in each.rows],
        [request_id for each in failures for request_id in each.ids],
        [code for each in failures for code in each.codes],
        [text for each in failures for text in each.texts],
        [reply for each in failures for reply in each.replies],
        [trace for each in failures for trace in each.traces],
    )


def _fill(made: Requests, metas: list[Meta]) -> None:
    """Set the columns that headers carry, where any record carries them."""
    if any(found.deadline_ms is not None for found in metas):
        fallback = made.deadlines_ms or [None] * len(metas)
        made.deadlines_ms = [
            default if found.deadline_ms is None else found.deadline_ms
            for found, default in zip(metas, fallback, strict=True)
        ]
    if any(found.reply is not None for found in metas):
        made.replies = [found.reply for found in metas]
    if any(found.trace is not None for found in metas):
        made.traces = [found.trace for found in metas]


def _fill_alike(made: Requests, found: Meta) -> None:
    """Set the columns that headers carry, where all records carry the same."""
    count = len(made)
    made.priority = found.priority
    if found.deadline_ms is not None:
        made.deadlines_ms = [found.deadline_ms] * count
    if found.reply is not None:
        made.replies = [found.reply] * count
    if found.trace is not None:
        made.traces = [found.trace] * count
