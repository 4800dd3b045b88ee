"""What the control plane keeps beside the route log: who works, who changed what, who leads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from inferfleet.revisions import NO_HASH, Head
from inferfleet.routes import Route


class WorkerReport(msgspec.Struct, kw_only=True):
    """What a worker says of itself every few seconds; it expires when the worker is silent.

    Versions are written ``model:version``. ``adopted`` is each route's newest revision that this worker
    steers by or has announced versions loaded of; ``refused`` says which version cannot be served and why.
    ``stale`` says why the routes may be old, and is empty while they are followed. Times are epoch
    milliseconds, ``rows_per_s`` is over the last seconds, ``lag`` counts records not taken yet.
    """

    worker: str
    pool: str
    group: str = ""
    release: str = ""
    device: str = "cpu"
    started_ms: int = 0
    at_ms: int = 0
    head: Head = Head()
    adopted: dict[str, int] = {}
    ready: list[str] = []
    loading: list[str] = []
    refused: dict[str, str] = {}
    digests: dict[str, str] = {}
    unloaded: list[str] = []
    lag: dict[str, int] = {}
    rows_per_s: dict[str, float] = {}
    paused: dict[str, str] = {}
    memory_bytes: int = 0
    stale: str = ""
    draining: bool = False


class Draft(NamedTuple):
    """A revision that is to be appended; the store gives it its number, time and place in the chain."""

    name: str
    route: Route | None
    effective_from_ms: int | None
    action: str
    rollout: str = ""


class Lease(NamedTuple):
    """The right to step rollouts. ``token`` rises with each change of hands and fences the one before."""

    holder: str
    token: int


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change and who made it; ``before`` and ``after`` are plain values of what was changed.

    ``subject`` is what was changed, such as ``route digits``. Entries are a chain like the route log's.
    """

    number: int = 0
    at_ms: int = 0
    actor: str
    action: str
    subject: str
    reason: str = ""
    before: Any = None
    after: Any = None
    previous: str = NO_HASH


class Stored(NamedTuple):
    """A named document of the control plane and its version, which every change raises by one; 0: none."""

    version: int
    body: bytes


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one step changes; it happens as a whole or not at all.

    ``expected`` says, for each route that matters, the number of its last revision (0: none) that the
    change was decided on. ``documents`` maps a rollout's id to the version it was read at and its new body
    (``None`` removes it). With ``lease`` the change is refused unless that lease still stands. ``reset``
    starts a new epoch, numbered above ``above``, that holds only what is drafted here.
    """

    actor: str
    audit: tuple[AuditEntry, ...]
    expected: Mapping[str, int] = {}
    drafts: tuple[Draft, ...] = ()
    documents: Mapping[str, tuple[int, bytes | None]] = {}
    reason: str = ""
    lease: Lease | None = None
    reset: bool = False
    above: int = 0


def seal(entry: AuditEntry) -> tuple[bytes, str]:
    """Return the entry as it is stored, and its hash."""
    body = msgspec.json.encode(entry, order="sorted")
    return body, hashlib.sha256(body).hexdigest()


def version_name(model: str, version: str) -> str:
    """Return how a version is written in reports: ``model:version``."""
    return f"{model}:{version}"


def braked(version: str, reason: str) -> str:
    """Return the reason of a pause that a version's brake sets; without a version the reason alone."""
    return f"version {version}: {reason}" if version else reason


def braked_version(reason: str) -> str:
    """Return the version whose brake has set a pause, from the pause's reason; empty where none has."""
    word, _, rest = reason.partition(" ")
    version, colon, _ = rest.partition(":")
    return version if word == "version" and colon and version.isdigit() else ""
