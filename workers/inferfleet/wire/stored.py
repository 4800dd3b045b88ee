"""What stands in the result store: key names, the payload mark inside a body, and the write-once rule.

The mark. A result is an answer to one payload, so the same id with another payload must be noticed. The
payload's hash travels *inside* the stored body, as the response parameter ``fleet_payload`` at its very end,
spliced in as bytes. A second key beside each result was measured and left: it doubled the server's work
(8.5 us a row instead of 3.7) and took half as much memory again, and two keys can be evicted, deleted or
expire apart, while one key is always in one cluster slot, with one lifetime and one access rule.
"""

from __future__ import annotations

import re
from enum import IntEnum

import xxhash

_MARK = b',"parameters":{"fleet_payload":"%b"}}'
_TAIL_BYTES = 256
_HASH = re.compile(rb'"fleet_payload":"([^"]*)"}}$')
ERROR_PREFIX = b'{"error"'
"""How every error outcome's body starts; no prediction starts so."""


def payload_hash(body: bytes) -> str:
    """Return 32 hex digits that identify a request's bytes, for workers and clients alike."""
    return str(xxhash.xxh3_128_hexdigest(body))


def result_key(fleet: str, route: str, request_id: str) -> str:
    """Return the key of one result."""
    return f"{fleet}:result:{route}:{request_id}"


def again_key(fleet: str, route: str, request_id: str) -> str:
    """Return the key of the hash that counts what came again under a result's id.

    The braces hold the result's key, which has none itself, so both keys are in one cluster slot.
    """
    return f"{{{result_key(fleet, route, request_id)}}}:again"


def reply_key(fleet: str, name: str) -> str:
    """Return the key of a client's reply stream."""
    return f"{fleet}:reply:{name}"


def mark(body: bytes, payload: str) -> bytes:
    """Return the JSON object ``body`` with the payload's hash as its last member; ``""`` marks nothing."""
    if not payload or body[-1:] != b"}":
        return body
    return body[:-1] + _MARK % payload.encode()


def payload_of(body: bytes) -> str:
    """Return the payload hash that ``body`` was marked with, or ``""``."""
    found = _HASH.search(body, max(0, len(body) - _TAIL_BYTES))
    return found.group(1).decode() if found else ""


def is_error(body: bytes) -> bool:
    """Return whether ``body`` is an error outcome."""
    return body.startswith(ERROR_PREFIX)


class Verdict(IntEnum):
    """What became of one row; the numbers are shared with the server-side script."""

    WRITTEN = 0
    """The row's body stands now: it is the first, or an ``ok`` that replaced an error."""
    STOOD = 1
    """Another body stands, and it answers this request too."""
    OTHER_ERROR = 2
    """An error for another payload stands and stays; this row's own error answers its client."""
    OTHER_PAYLOAD = 3
    """An answer to another payload stands under this id."""


def judge(standing: bytes, body: bytes) -> Verdict:
    """Return what becomes of ``body`` where ``standing`` stands; ``results.scripts`` says the same in Lua."""
    old, new = payload_of(standing), payload_of(body)
    differs = bool(old and new and old != new)
    if is_error(standing):
        if not is_error(body):
            return Verdict.WRITTEN
        return Verdict.OTHER_ERROR if differs else Verdict.STOOD
    return Verdict.OTHER_PAYLOAD if differs else Verdict.STOOD


SAME, DIFFERS = "same", "differs"
"""The fields of a counter: how often an equal value came again, and how often another one."""


def repeats(standing: bytes, body: bytes) -> str:
    """Return which counter a ``body`` belongs to that was not written because of ``standing``.

    The marks take part: a value for another payload is another one. A body without a mark is compared bare.
    """
    old, new = payload_of(standing), payload_of(body)
    if old and new:
        return SAME if standing == body else DIFFERS
    return SAME if _bare(standing, old) == _bare(body, new) else DIFFERS


def _bare(body: bytes, payload: str) -> bytes:
    return body[: -len(_MARK % payload.encode())] + b"}" if payload else body


def duplicate_text(request_id: str) -> str:
    """Return the refusal's text for an id that was answered with another payload."""
    return f"id {request_id} was answered before with another payload; use a new id for a new request"
