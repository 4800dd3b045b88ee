"""Whether the audit log is whole: each entry names the hash of the one before. Pure.

The chain shows that nothing between two entries was changed, left out or put in. That nothing was cut off at
its end shows only a hash that was noted elsewhere: the last one of an earlier export, for example.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from inferfleet.plane import AuditEntry
from inferfleet.revisions import NO_HASH


class Chain(NamedTuple):
    """What has been walked so far: how many entries, the first and last number, the hash of the last."""

    entries: int = 0
    first: int = 0
    last: int = 0
    hash: str = NO_HASH


def digest(body: bytes) -> str:
    """Return the hash of an entry's document, as hexadecimal digits."""
    return hashlib.sha256(body).hexdigest()


def follow(chain: Chain, entry: AuditEntry, body: bytes) -> Chain | str:
    """Return the chain with one entry more, or what is wrong with that entry.

    The first entry that is kept may continue what is kept no longer; number 1 continues nothing.
    """
    if chain.entries and entry.number != chain.last + 1:
        return f"entry {entry.number} follows entry {chain.last}: something between them is missing"
    if chain.entries and entry.previous != chain.hash:
        return f"entry {entry.number} does not continue entry {chain.last}: one of them was changed"
    if entry.number == 1 and entry.previous != NO_HASH:
        return "entry 1 names an entry before it"
    if entry.number < 1:
        return f"entry {entry.number} cannot be read"
    first = chain.first if chain.entries else entry.number
    return Chain(chain.entries + 1, first, entry.number, digest(body))
