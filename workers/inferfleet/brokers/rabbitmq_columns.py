"""From messages to the columns of a chunk: keys, headers, times, and what AMQP has beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from inferfleet.brokers.rabbitmq_properties import BODY_SIZE_AT, read_properties, shared_headers
from inferfleet.brokers.rabbitmq_tables import Read, Table, read_table
from inferfleet.records import Amqp, Header, Headers
from inferfleet.wire.headers import GENERATED_ID, UNREADABLE

CUT: Header = ("inferfleet-cut", b"body")
"""Stands beside a body of which only the beginning was kept: it is far above any limit."""
_NO_TABLE = Read(None, [], None)


Message: TypeAlias = tuple[int, bool, bytes, bytes, int]
"""Delivery tag, whether it comes again, header frame, body, and when it arrived, epoch milliseconds."""


class Columns(NamedTuple):
    """One entry for each message."""

    keys: list[bytes | None]
    headers: list[Headers]
    timestamps_ms: list[int]
    amqp: list[Amqp]
    fallback_ids: list[str]


def columns(messages: Sequence[Message]) -> Columns:
    """Return the columns. Nothing that a sender can write raises here: what cannot be read is marked."""
    out = Columns([], [], [], [], [])
    keys, headers, times, amqps, ids = out
    last_table: bytes | None = None
    last_form: tuple[bytes | None, bytes | None] = (None, None)
    last_read = _NO_TABLE
    shared: Headers = None
    carried: Table | None = None
    for _, redelivered, frame, body, received_ms in messages:
        try:
            kind, encoding, table, correlation, reply, name, time_s = read_properties(frame)
            if table != last_table or (kind, encoding) != last_form or carried is None:
                read = read_table(table) if table else _NO_TABLE
                last_table, last_read, last_form = table, read, (kind, encoding)
                shared = shared_headers(kind, encoding, read.headers)
                carried = Table(table) if table else None
        except ValueError:
            kind = encoding = table = correlation = reply = name = time_s = None
            last_table, last_read, last_form = None, _NO_TABLE, (None, None)
            shared, carried = [(UNREADABLE, b"1")], None
        named = _text(name) if name else None
        correlated = _text(correlation) if correlation else None
        keys.append(last_read.key)
        headers.append(shared if len(body) == int.from_bytes(frame[BODY_SIZE_AT : BODY_SIZE_AT + 8], "big")
                       else [*(shared or ()), CUT])  # fmt: skip
        times.append(_time(received_ms, last_read.time_ms, time_s))
        amqps.append(Amqp(_text(reply) if reply else None, correlated, named, carried, redelivered))
        called = named or correlated
        ids.append(_sound(called) if called else _generated())
    return out


def _text(value: bytes) -> str:
    """Return a property as text that leads back to its bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8", "surrogateescape")


def _sound(text: str) -> str:
    """Return a property as text that can always be written."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _generated() -> str:
    return f"{GENERATED_ID}{random.getrandbits(128):032x}"


def _time(received_ms: int, broker_ms: int | None, sent_s: int | None) -> int:
    """Return when a message was sent: by the broker's own mark, by the sender's, or when it arrived.

    A sender's clock counts to the second and may be wrong; nothing was sent after it arrived.
    """
    if broker_ms is not None:
        return broker_ms
    return received_ms if sent_s is None else min(received_ms, sent_s * 1000 + 999)
