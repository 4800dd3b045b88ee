"""Message headers of a chunk, read once into columns.

Names are compared in lower case; of a repeated header the first value wins. Headers that are not ours are
ignored, whatever they hold. Limits are checked before anything else is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from inferfleet.errors import Code, RequestError
from inferfleet.records import Header, Headers
from inferfleet.trace_context import TRACEPARENT as TRACEPARENT
from inferfleet.trace_context import TRACESTATE as TRACESTATE
from inferfleet.trace_context import trace_of

MAX_HEADERS = 128
MAX_HEADER_BYTES = 32_768
MAX_ID_BYTES = 128
DEFAULT_PRIORITY = 5
GENERATED_ID = "amqp-"
"""How an id starts that was made for a message without one."""
FAR_DEADLINE_MS = 253_402_300_799_000
"""The last millisecond of the year 9999; later deadlines mean this one."""

ID = "inferfleet-id"
STATUS = "inferfleet-status"
CODE = "inferfleet-code"
SERVED = "inferfleet-served"
DEADLINE = "inferfleet-deadline-ms"
PRIORITY = "inferfleet-priority"
REPLY = "inferfleet-reply"
NOT_BEFORE = "inferfleet-not-before-ms"
PROTOCOL = "inferfleet-protocol"
CONTENT_TYPE = "content-type"
CONTENT_ENCODING = "content-encoding"
JSON_LENGTH = "inference-header-content-length"
UNREADABLE = "inferfleet-unreadable"
"""Set by an intake in place of headers that the client library could not decode."""

_ID_FORBIDDEN = re.compile(r"[\x00-\x20\x7f{}]")
_REPLY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_JSON_TYPES = (b"application/json", b"text/json", b"")
_BINARY_TYPE = b"application/octet-stream"


class Meta(NamedTuple):
    """What the headers of one record say. ``json_length`` is ``None`` for a JSON body."""

    id: str | None = None
    json_length: int | None = None
    deadline_ms: int | None = None
    priority: int = DEFAULT_PRIORITY
    reply: str | None = None
    trace: bytes | None = None
    model: str | None = None
    version: str | None = None


PLAIN = Meta()


@dataclass(slots=True)
class ChunkMeta:
    """Header columns of a chunk; a column is ``None`` when no record sets it."""

    metas: list[Meta] | None = None
    rejected: dict[int, RequestError] = field(default_factory=dict)
    uniform: Meta | None = None
    """What all records say, where their headers are equal to the letter."""


def check_id(request_id: str) -> str:
    """Return ``request_id`` if it may name a result, else raise ``E_ID``."""
    if not request_id:
        raise RequestError(Code.ID, "the request id is empty")
    if len(request_id) > MAX_ID_BYTES or (
        not request_id.isascii() and len(request_id.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES
    ):
        raise RequestError(Code.ID, f"the request id is longer than {MAX_ID_BYTES} bytes")
    if _ID_FORBIDDEN.search(request_id) or not (request_id.isascii() or request_id.isprintable()):
        raise RequestError(Code.ID, "the request id holds a control character, a space or a brace")
    return request_id


def ids_are_plain(ids: list[str]) -> bool:
    """Return whether every id is surely valid; ``False`` means: check them one by one."""
    joined = "".join(ids)
    return (
        joined.isascii()
        and joined.isprintable()  # no control character, DEL included
        and " " not in joined
        and "{" not in joined
        and "}" not in joined
        and min(map(len, ids), default=1) > 0
        and max(map(len, ids), default=0) <= MAX_ID_BYTES
    )


def read_headers(headers: list[Headers]) -> ChunkMeta:
    """Return the header columns of a chunk, and what must be rejected for its headers alone."""
    if headers.count(None) == len(headers):
        return ChunkMeta()
    first = headers[0]
    if first is not None and headers.count(first) == len(headers):
        try:
            uniform = _read(first)
            return ChunkMeta([uniform] * len(headers), {}, uniform)
        except RequestError as error:
            metas = [_salvage(first)] * len(headers)
            return ChunkMeta(metas, dict.fromkeys(range(len(headers)), error))
    metas = []
    rejected: dict[int, RequestError] = {}
    last: Headers = None
    last_meta = PLAIN
    for row, record in enumerate(headers):
        if record is None:
            metas.append(PLAIN)
        elif record == last:
            metas.append(last_meta)
        else:
            try:
                last_meta = _read_like(record, last, last_meta)
                last = record
                metas.append(last_meta)
            except RequestError as error:
                rejected[row] = error
                metas.append(_salvage(record))
    return ChunkMeta(metas, rejected)


def _read_like(record: list[Header], last: Headers, last_meta: Meta) -> Meta:
    """Read a record's headers; where only a leading id differs from the record before, only that is read."""
    if last and record and record[0][0] == last[0][0] == ID and record[1:] == last[1:]:
        value = record[0][1]
        if value is not None and len(value) <= MAX_ID_BYTES:
            return Meta(_id({ID: value}), *last_meta[1:])
    return _read(record)


def _read(record: list[Header]) -> Meta:
    if len(record) > MAX_HEADERS:
        raise RequestError(Code.HEADER, f"{len(record)} headers; at most {MAX_HEADERS} are allowed")
    found: dict[str, bytes | None] = {}
    size = 0
    for name, value in reversed(record):
        size += len(name) + (len(value) if value is not None else 0)
        found[name.lower()] = value
    if size > MAX_HEADER_BYTES:
        raise RequestError(Code.HEADER, f"headers of {size} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if UNREADABLE in found:
        raise RequestError(Code.HEADER, "a header name is not UTF-8")
    _check_protocol(found)
    return Meta(
        _id(found),
        _json_length(found),
        _deadline(found),
        _priority(found),
        _reply(found),
        trace_of(found.get(TRACEPARENT), found.get(TRACESTATE)) if TRACEPARENT in found else None,
        _text(found, "mlserver-model") if "mlserver-model" in found else None,
        _text(found, "mlserver-version") if "mlserver-version" in found else None,
    )


def _salvage(record: list[Header]) -> Meta:
    """Return the id, reply stream and trace of a record whose headers were refused, where they are sound."""
    found: dict[str, bytes | None] = {}
    for name, value in reversed(record[:MAX_HEADERS]):
        if value is not None and len(value) <= MAX_HEADER_BYTES:
            found[name.lower()] = value
    try:
        request_id = _id(found)
    except RequestError:
        request_id = None
    try:
        reply = _reply(found)
    except RequestError:
        reply = None
    return Meta(id=request_id, reply=reply, trace=trace_of(found.get(TRACEPARENT), found.get(TRACESTATE)))


def _text(found: dict[str, bytes | None], name: str) -> str:
    value = found[name]
    if value is None:
        raise RequestError(Code.HEADER, f"header {name} is null")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(Code.HEADER, f"header {name} is not UTF-8") from None


def _integer(found: dict[str, bytes | None], name: str) -> int:
    text = _text(found, name).strip()
    if len(text) > 20 or not (text[1:] if text[:1] == "-" else text).isdecimal():
        raise RequestError(Code.HEADER, f"header {name} is not an integer")
    return int(text)


def _id(found: dict[str, bytes | None]) -> str | None:
    for name in (ID, "ce_id", "ce-id"):
        if name in found:
            value = found[name]
            if value is None:
                raise RequestError(Code.ID, f"header {name} is null")
            try:
                return check_id(value.decode())
            except UnicodeDecodeError:
                raise RequestError(Code.ID, f"header {name} is not UTF-8") from None
    return None


def _check_protocol(found: dict[str, bytes | None]) -> None:
    protocol = found.get(PROTOCOL)
    if PROTOCOL in found and protocol not in (b"v2", b"2"):
        raise RequestError(Code.PROTOCOL, f"header {PROTOCOL} names a protocol other than v2")
    if "ce_specversion" in found and found["ce_specversion"] not in (b"1.0", b"0.3"):
        raise RequestError(Code.PROTOCOL, "header ce_specversion names an unknown CloudEvents version")
    encoding = found.get(CONTENT_ENCODING)
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        raise RequestError(Code.CONTENT_TYPE, "compressed bodies are not accepted (content-encoding)")


def _json_length(found: dict[str, bytes | None]) -> int | None:
    declared = found.get(CONTENT_TYPE)
    kind = b"" if declared is None else declared.split(b";", 1)[0].strip().lower()
    if kind not in _JSON_TYPES and kind != _BINARY_TYPE:
        shown = kind[:60].decode("ascii", "replace")
        raise RequestError(
            Code.CONTENT_TYPE,
            f"content type {shown!r} is not application/json or application/octet-stream",
        )
    if JSON_LENGTH in found:
        length = _integer(found, JSON_LENGTH)
        if length < 0:
            raise RequestError(Code.HEADER, f"header {JSON_LENGTH} is negative")
        return length
    if kind == _BINARY_TYPE:
        raise RequestError(
            Code.CONTENT_TYPE,
            f"application/octet-stream needs the header {JSON_LENGTH} (0 for one raw tensor)",
        )
    return None


def _deadline(found: dict[str, bytes | None]) -> int | None:
    return min(_integer(found, DEADLINE), FAR_DEADLINE_MS) if DEADLINE in found else None


def _priority(found: dict[str, bytes | None]) -> int:
    if PRIORITY not in found:
        return DEFAULT_PRIORITY
    priority = _integer(found, PRIORITY)
    if not 1 <= priority <= 9:
        raise RequestError(Code.HEADER, f"header {PRIORITY} is not from 1 to 9")
    return priority


def _reply(found: dict[str, bytes | None]) -> str | None:
    if REPLY not in found:
        return None
    text = _text(found, REPLY)
    if not _REPLY.fullmatch(text):
        raise RequestError(Code.HEADER, f"header {REPLY} is not 1 to 64 letters, digits, '_', '.' or '-'")
    return text
