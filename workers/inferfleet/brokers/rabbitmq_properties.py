"""AMQP message properties: what is read of a request's message, and what an outcome's message has."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from inferfleet.brokers.rabbitmq_tables import KEY, Encoded, joined, merged, short_string, to_bytes
from inferfleet.records import Amqp, Header, Headers
from inferfleet.wire.headers import CONTENT_ENCODING, CONTENT_TYPE, ID

JSON = b"application/json"
_U32, _I64 = struct.Struct(">I"), struct.Struct(">q")
_HAS_TYPE, _HAS_ENCODING, _HAS_TABLE, _HAS_MODE, _HAS_PRIORITY = 0x8000, 0x4000, 0x2000, 0x1000, 0x0800
_HAS_CORRELATION, _HAS_REPLY, _HAS_EXPIRATION, _HAS_ID, _HAS_TIME = 0x0400, 0x0200, 0x0100, 0x0080, 0x0040
_PERSISTENT = b"\x02"
BODY_SIZE_AT, PROPERTIES_AT = 4, 12
"""Where the body's size and the flags stand in a header frame's payload, behind class and weight."""


class Properties(NamedTuple):
    """What is read of a message's properties; ``table`` is the header table without its length."""

    content_type: bytes | None
    content_encoding: bytes | None
    table: bytes | None
    correlation_id: bytes | None
    reply_to: bytes | None
    message_id: bytes | None
    time_s: int | None


def read_properties(payload: bytes) -> Properties:
    """Return the properties of a header frame's payload. Raises ValueError for what is no such thing."""
    try:
        return _read_properties(payload)
    except (IndexError, struct.error):
        raise ValueError("a header frame ends within its properties") from None


def _read_properties(payload: bytes) -> Properties:
    flags = payload[PROPERTIES_AT] << 8 | payload[PROPERTIES_AT + 1]
    at = PROPERTIES_AT + 2
    kind = encoding = table = correlation = reply = name = time_s = None
    if flags & _HAS_TYPE:
        kind, at = _short(payload, at)
    if flags & _HAS_ENCODING:
        encoding, at = _short(payload, at)
    if flags & _HAS_TABLE:
        end = at + 4 + _U32.unpack_from(payload, at)[0]
        table, at = payload[at + 4 : end], end
    if flags & _HAS_MODE:
        at += 1
    if flags & _HAS_PRIORITY:
        at += 1
    if flags & _HAS_CORRELATION:
        correlation, at = _short(payload, at)
    if flags & _HAS_REPLY:
        reply, at = _short(payload, at)
    if flags & _HAS_EXPIRATION:
        at += 1 + payload[at]
    if flags & _HAS_ID:
        name, at = _short(payload, at)
    if flags & _HAS_TIME:
        time_s = _I64.unpack_from(payload, at)[0]
        at += 8
    if at > len(payload):
        raise IndexError
    return Properties(kind, encoding, table, correlation, reply, name, time_s)


def _short(payload: bytes, at: int) -> tuple[bytes, int]:
    end = at + 1 + payload[at]
    return payload[at + 1 : end], end


def shared_headers(kind: bytes | None, encoding: bytes | None, headers: list[Header]) -> Headers:
    """Return the headers column's entry: what stands in properties comes first."""
    if kind is None and encoding is None:
        return headers or None
    first: list[Header] = [] if kind is None else [(CONTENT_TYPE, kind)]
    if encoding is not None:
        first.append((CONTENT_ENCODING, encoding))
    return first + headers


class _Parts(NamedTuple):
    """Headers sorted out: what stands in properties of its own, and what in the table."""

    content_type: bytes
    content_encoding: bytes | None
    id: bytes | None
    entries: list[Header]


def _sorted_out(headers: Sequence[Header], key: bytes | None) -> _Parts:
    kind, encoding, name = JSON, None, None
    entries: list[Header] = []
    for header in headers:
        title, value = header
        if title == CONTENT_TYPE:
            kind = value or JSON
        elif title == CONTENT_ENCODING:
            encoding = value
        else:
            entries.append(header)
            if title == ID and name is None:
                name = value
    if key is not None:
        entries.append((KEY, key))
    return _Parts(kind, encoding, name, entries)


def write_properties(
    headers: Sequence[Header], key: bytes | None, amqp: Amqp | None, expiration_ms: int | None,
    encoded: Encoded, *, reply: bool = False,
) -> bytes:  # fmt: skip
    """Return flags and properties of a persistent message.

    Of a request's own message (``amqp``) the answer to its caller, ``reply``, repeats the correlation id and
    nothing else; all else carries its table along, without what would route a copy elsewhere. Raises
    ValueError where something does not fit into AMQP's limits.
    """
    kind, encoding, name, entries = _sorted_out(headers, key)
    table = amqp.table if amqp is not None and not reply else None
    raw = joined(entries, encoded) if table is None else merged(table, entries, encoded)
    flags = _HAS_TYPE | _HAS_TABLE | _HAS_MODE
    parts = [b"", short_string(kind), _U32.pack(len(raw)), raw, _PERSISTENT]
    if encoding:
        flags |= _HAS_ENCODING
        parts.insert(2, short_string(encoding))
    if amqp is not None:
        if amqp.correlation_id:
            flags |= _HAS_CORRELATION
            parts.append(short_string(to_bytes(amqp.correlation_id)))
        if not reply:
            name = to_bytes(amqp.message_id) if amqp.message_id else name
            if amqp.reply_to:
                flags |= _HAS_REPLY
                parts.append(short_string(to_bytes(amqp.reply_to)))
    if expiration_ms is not None:
        flags |= _HAS_EXPIRATION
        parts.append(short_string(b"%d" % max(0, expiration_ms)))
    if name and len(name) < 256:
        flags |= _HAS_ID
        parts.append(short_string(name))
    parts[0] = bytes((flags >> 8, flags & 0xFF))
    return b"".join(parts)
