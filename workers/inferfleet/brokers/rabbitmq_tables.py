"""AMQP header tables, as far as requests and outcomes need them.

A value is read where a request's header may stand: text, bytes, numbers, booleans, nothing. Tables, arrays,
decimals and times are stepped over by their length and carried along as bytes, so no depth of nesting costs
more than its bytes, and what leaves is what came, to the letter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from inferfleet.records import Header

KEY = "inferfleet-key"
TIMESTAMP_MS = "timestamp_in_ms"
UNREADABLE_VALUE = b"\xff"
"""Stands for a table or array under a name of ours: not UTF-8, so whoever reads it refuses it."""
_READ_BY_US = frozenset(
    ("content-type", "content-encoding", "inference-header-content-length", "traceparent", "tracestate")
)
_READ_BY_US_PREFIXES = ("inferfleet-", "ce_", "ce-", "mlserver-")
DELIVERY_COUNT = "x-delivery-count"
_NOT_CARRIED = frozenset((b"CC", b"BCC", DELIVERY_COUNT.encode()))
"""RabbitMQ sends a copy to every queue that the first two name: a caller's must not leave with our rights.
The last is its own mark of a message that comes again."""

_SIZES = {kind: size for size, kinds in {0: b"V", 1: b"tbB", 2: b"su", 4: b"Iif", 5: b"D", 8: b"lLdT"}.items()
          for kind in kinds}  # fmt: skip
_LONG = frozenset(b"SxFA")
_UNREAD = frozenset(b"FAD")
_NUMBERS: dict[int, struct.Struct] = {
    ord(kind): struct.Struct(f">{code}") for kind, code in zip("bBsuIilLfdT", "bBhHiIqqfdq", strict=True)
}
_WHOLE = frozenset(b"bBsuIilL")
_U32 = struct.Struct(">I")
_S, _X, _V, _BOOL, _TIME = b"SxVtT"
_TEXT, _BYTES, _NOTHING = b"S", b"x", b"V"


class Opaque(NamedTuple):
    """A header value that is carried along unread: its type and its encoding."""

    raw: bytes


class Field(NamedTuple):
    """One entry of a table: its name, its type, and where its value begins and ends."""

    name: bytes
    kind: int
    start: int
    end: int


def fields(table: bytes) -> list[Field]:
    """Return the entries of a table's bytes, nested values unread. Raises ValueError if it is none."""
    found: list[Field] = []
    at, end = 0, len(table)
    while at < end:
        found.append(_field(table, at))
        at = found[-1].end
    return found


def _field(table: bytes, at: int) -> Field:
    """Return the entry that begins at ``at``."""
    try:
        start = at + 1 + table[at]
        name, kind = table[at + 1 : start], table[start]
        start += 1
        if kind in _LONG:
            end = start + 4 + _U32.unpack_from(table, start)[0]
            start += 4
        else:
            end = start + _SIZES[kind]
    except (IndexError, KeyError, struct.error):
        raise ValueError("a header table holds a value of no known type") from None
    if end > len(table):
        raise ValueError("a header table does not fit its length")
    return Field(name, kind, start, end)


def header_value(table: bytes, field: Field) -> bytes | Opaque | None:
    """Return an entry's value as the wire reads headers: bytes, or nothing; else its raw form."""
    _, kind, start, end = field
    if kind in (_S, _X):
        return table[start:end]
    if kind == _V:
        return None
    if kind in _UNREAD:
        return Opaque(_encoded(table, field))
    if kind == _BOOL:
        return b"true" if table[start] else b"false"
    number = _NUMBERS[kind].unpack_from(table, start)[0]
    return str(number).encode()


def _encoded(table: bytes, field: Field) -> bytes:
    """Return type and value as they stand in the table."""
    _, kind, start, end = field
    return table[start - 5 if kind in _LONG else start - 1 : end]


class Table(Mapping[str, Any]):
    """A message's header table: read when somebody asks, carried along as the bytes that came."""

    __slots__ = ("_values", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._values: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Table({len(self.raw)} bytes)"

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, Any]:
        if self._values is None:
            self._values = {_text(field.name): _value(self.raw, field) for field in fields(self.raw)}
        return self._values


def _value(table: bytes, field: Field) -> Any:
    """Return an entry as Python has it; what is not read stays as it is."""
    _, kind, start, end = field
    if kind == _S:
        try:
            return table[start:end].decode()
        except UnicodeDecodeError:
            return table[start:end]
    if kind == _X:
        return table[start:end]
    if kind == _V:
        return None
    if kind == _BOOL:
        return bool(table[start])
    if kind in _UNREAD or kind == _TIME:
        return Opaque(_encoded(table, field))
    return _NUMBERS[kind].unpack_from(table, start)[0]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# Reading: what a chunk's columns need


class Read(NamedTuple):
    """What a header table says to us: the key, the headers, and the broker's own time in milliseconds."""

    key: bytes | None
    headers: list[Header]
    time_ms: int | None


def read_table(table: bytes) -> Read:
    """Return key, headers (names in lower case) and time of a table. Raises ValueError if it is none."""
    key: bytes | None = None
    time_ms: int | None = None
    headers: list[Header] = []
    at, end, names = 0, len(table), _NAMES
    value: bytes | None
    while at < end:
        start = at + 1 + table[at]
        raw = table[at + 1 : start]
        name = names.get(raw) or _name(raw)
        if start + 5 <= end and table[start] == _S:  # nearly all are text: read without an object
            start += 5
            at = start + _U32.unpack_from(table, start - 4)[0]
            if at > end:
                raise ValueError("a header table does not fit its length")
            value = table[start:at]
        else:
            field = _field(table, at)
            at = field.end
            found = header_value(table, field)
            if isinstance(found, Opaque) and not _ours(name):
                continue
            value = UNREADABLE_VALUE if isinstance(found, Opaque) else found
            if name == TIMESTAMP_MS and field.kind in _WHOLE:
                time_ms = _NUMBERS[field.kind].unpack_from(table, field.start)[0]
        if name == KEY:
            key = value
        elif name != DELIVERY_COUNT:
            headers.append((name, value))
    return Read(key, headers, time_ms)


_NAMES: dict[bytes, str] = {}
_MAX_NAMES = 512


def _name(raw: bytes) -> str:
    """Return a header's name in lower case, always encodable; names that many messages share are kept."""
    name = raw.decode("utf-8", "replace").lower()
    if len(_NAMES) < _MAX_NAMES:
        _NAMES[raw] = name
    return name


def _ours(name: str) -> bool:
    return name in _READ_BY_US or name.startswith(_READ_BY_US_PREFIXES)


# Writing: what an outcome carries

Encoded = dict[Header, bytes]
"""Table entries of headers that were encoded before: the headers of one column set repeat."""


def to_bytes(text: str) -> bytes:
    """Return the bytes that a property was read from."""
    return text.encode("utf-8", "surrogateescape")


def short_string(value: bytes) -> bytes:
    """Return a name as AMQP has it. Raises ValueError for one that is too long."""
    if len(value) > 255:
        raise ValueError(f"a property of {len(value)} bytes; AMQP has room for 255")
    return bytes((len(value),)) + value


def joined(entries: list[Header], encoded: Encoded) -> bytes:
    """Return the entries as a table; of equal names the last one stays, as readers' dictionaries have it."""
    names = {header[0]: header for header in entries}
    if len(names) < len(entries):
        entries = list(names.values())
    return b"".join([encoded.get(header) or _entry(header, encoded) for header in entries])


def _entry(header: Header, encoded: Encoded) -> bytes:
    name, value = header
    found = encoded[header] = short_string(to_bytes(name)) + _typed(value)
    return found


def _typed(value: bytes | None) -> bytes:
    if value is None:
        return _NOTHING
    return (_TEXT if _is_text(value) else _BYTES) + _U32.pack(len(value)) + value


def _is_text(value: bytes) -> bool:
    if value.isascii():
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def merged(table: Mapping[str, Any], entries: list[Header], encoded: Encoded) -> bytes:
    """Return the request's table with ours over it.

    A header that the request's own table holds, name and value, stays there as it came: the headers column
    has it with a name in lower case and a value as text.
    """
    ours = {name.lower(): value for name, value in entries}
    kept: list[bytes] = []
    for name, value, raw in _raw_entries(table):
        lower = _NAMES.get(name) or _name(name)
        if name in _NOT_CARRIED:
            continue
        if lower not in ours:
            kept.append(raw)
        elif ours[lower] == value:
            kept.append(raw)
            del ours[lower]
    return b"".join(kept) + joined(list(ours.items()), encoded)


def _raw_entries(table: Mapping[str, Any]) -> Iterator[tuple[bytes, bytes | None, bytes]]:
    """Yield name, value as headers have it, and encoding of each entry."""
    raw = table.raw if isinstance(table, Table) else write_table(table)
    for field in fields(raw):
        value = header_value(raw, field)
        shown = UNREADABLE_VALUE if isinstance(value, Opaque) else value
        yield field.name, shown, bytes((len(field.name),)) + field.name + _encoded(raw, field)


def write_table(table: Mapping[str, Any]) -> bytes:
    """Return a table without its length; nested mappings and sequences are not written."""
    out = []
    for name, value in table.items():
        out.append(short_string(to_bytes(name)))
        if isinstance(value, Opaque):
            out.append(value.raw)
        elif isinstance(value, bool):
            out.append(b"t\x01" if value else b"t\x00")
        elif isinstance(value, int):
            out.append(b"l" + _NUMBERS[ord("l")].pack(value))
        elif isinstance(value, float):
            out.append(b"d" + _NUMBERS[ord("d")].pack(value))
        elif isinstance(value, str):
            out.append(_typed(to_bytes(value)))
        else:
            out.append(_typed(None if value is None else bytes(value)))
    return b"".join(out)
