"""How the route log lies in Redis: its head document, and each route's kept revisions in one field.

``run`` runs one command and returns redis-py's answer; what it raises passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from inferfleet.control.keys import Keys
from inferfleet.control.step import AuditHead
from inferfleet.errors import ControlError
from inferfleet.revisions import Head, Revision, parse_revision

Run = Callable[..., Any]
Parser = Callable[[bytes], Revision]
PARSED = 4_096


class HeadRecord(NamedTuple):
    """The ends of both chains, and the number of changes, which every change raises."""

    head: Head = Head()
    audit: AuditHead = AuditHead()
    changes: int = 0


class _HeadDocument(msgspec.Struct, kw_only=True):
    epoch: int
    number: int
    hash: str
    audit_number: int
    audit_hash: str
    changes: int


def encode_head(record: HeadRecord) -> bytes:
    """Return the head document."""
    return msgspec.json.encode(
        _HeadDocument(
            epoch=record.head.epoch,
            number=record.head.number,
            hash=record.head.hash,
            audit_number=record.audit.number,
            audit_hash=record.audit.hash,
            changes=record.changes,
        )
    )


def decode_head(body: bytes) -> HeadRecord:
    """Return what a head document says; raises ControlError where it is none."""
    try:
        found = msgspec.json.decode(body, type=_HeadDocument)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ControlError(f"the head of the route log cannot be read: {error}") from None
    return HeadRecord(
        Head(found.epoch, found.number, found.hash),
        AuditHead(found.audit_number, found.audit_hash),
        found.changes,
    )


def join_bodies(revisions: Iterable[Revision]) -> bytes:
    """Return a route's kept revisions as one value: documents of one line each."""
    return b"\n".join(each.body for each in revisions)


def split_bodies(value: bytes) -> list[bytes]:
    """Return the documents of a route's value."""
    return value.split(b"\n")


@lru_cache(8)
def parser(fleet: str) -> Parser:
    """Return a function that parses a revision's document, and knows those that it parsed lately.

    All of a process share it; any thread may call it. It raises ConfigError for what cannot be understood.
    """
    return lru_cache(PARSED)(lambda body: parse_revision(body, fleet))


def read_head(run: Run, keys: Keys) -> tuple[HeadRecord, bytes]:
    """Return the head and its document; where the key is gone, what the ends of the streams say, and ``b""``.

    Raises ControlError for what is no head.
    """
    body = run("GET", keys.head)
    if body is not None:
        return decode_head(body), body
    revisions, audit = last_entry(run, keys.revisions), last_entry(run, keys.audit)
    record = HeadRecord()
    if revisions is not None:
        number, digest, document = revisions
        record = record._replace(head=Head(_epoch_of(document), number, digest))
    if audit is not None:
        record = record._replace(audit=AuditHead(audit[0], audit[1]))
    return record, b""


class _Epoch(msgspec.Struct):
    epoch: int = 0


def _epoch_of(document: bytes) -> int:
    try:
        return msgspec.json.decode(document, type=_Epoch).epoch
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ControlError(f"the last revision of the route log cannot be read: {error}") from None


def last_entry(run: Run, stream: str) -> tuple[int, str, bytes] | None:
    """Return number, hash and document of a stream's last entry; ``None`` where it has none."""
    found = run("XREVRANGE", stream, "+", "-", "COUNT", 1)
    return chain_entry(*found[0]) if found else None


def chain_entry(entry: bytes, fields: Mapping[bytes, bytes]) -> tuple[int, str, bytes]:
    """Return number, hash and document of an entry of a chain's stream."""
    number = int(entry.partition(b"-")[0])
    return number, fields.get(b"hash", b"").decode(errors="replace"), fields.get(b"body", b"")


def read_link(run: Run, keys: Keys, number: int) -> str | None:
    """Return the hash of a revision by its number; ``None`` where the stream keeps it no longer."""
    found = run("XRANGE", keys.revisions, f"{number}-0", f"{number}-0")
    return chain_entry(*found[0])[1] if found else None
