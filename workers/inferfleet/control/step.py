"""What a change makes of what stands: revisions with their numbers, audit entries, documents. No server.

Both stores commit by this, so that they number, chain and refuse alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from inferfleet.core.revisions import appended
from inferfleet.errors import ConfigError, ConflictError
from inferfleet.plane import AuditEntry, Change, Stored, seal
from inferfleet.revisions import NO_HASH, Head, Revision, RouteLog, sealed


class AuditHead(NamedTuple):
    """The end of the audit chain: how many entries there are, and the hash of the last one."""

    number: int = 0
    hash: str = NO_HASH


class Step(NamedTuple):
    """What a change comes to; ``documents`` holds what each named one is afterwards, ``None``: gone."""

    revisions: tuple[Revision, ...]
    log: RouteLog
    audit: tuple[tuple[AuditEntry, bytes], ...]
    audit_head: AuditHead
    documents: Mapping[str, Stored | None]


def step(
    change: Change,
    log: RouteLog,
    audit_head: AuditHead,
    documents: Mapping[str, Stored],
    *,
    at_ms: int,
    horizon_ms: int,
    known: Iterable[Head] = (),
) -> Step:
    """Return what a change makes of the log and the documents that stand.

    ``known`` are heads that workers hold; a reset goes above them, so that none of them is met again. Raises
    ConflictError where a last number is not the expected one, ConfigError for a reset without a route.
    """
    _check_expected(change, log, documents)
    revisions = _revisions(change, log.head, at_ms, horizon_ms, known)
    audit: list[tuple[AuditEntry, bytes]] = []
    end = audit_head
    for entry in change.audit:
        placed = msgspec.structs.replace(entry, number=end.number + 1, at_ms=at_ms, previous=end.hash)
        body, digest = seal(placed)
        audit.append((placed, body))
        end = AuditHead(placed.number, digest)
    return Step(
        revisions,
        appended(log, revisions),
        tuple(audit),
        end,
        {
            name: None if body is None else Stored(version + 1, body)
            for name, (version, body) in change.documents.items()
        },
    )


def _check_expected(change: Change, log: RouteLog, documents: Mapping[str, Stored]) -> None:
    for name, number in change.expected.items():
        found = log.latest(name)
        if found != number:
            raise ConflictError(
                f"route {name}: its last revision is {found}, not {number}: somebody changed it meanwhile"
            )
    for name, (version, _) in change.documents.items():
        stored = documents.get(name)
        found = 0 if stored is None else stored.version
        if found != version:
            raise ConflictError(
                f"rollout {name}: its version is {found}, not {version}: somebody changed it meanwhile"
            )


def _revisions(
    change: Change, head: Head, at_ms: int, horizon_ms: int, known: Iterable[Head]
) -> tuple[Revision, ...]:
    epoch, number, previous = head
    if change.reset:
        if not change.drafts:
            raise ConfigError("a reset needs at least one route: the new log starts with it")
        heads = (head, *known)
        epoch = max(each.epoch for each in heads) + 1
        number = max(change.above, *(each.number for each in heads))
    made: list[Revision] = []
    for draft in change.drafts:
        number += 1
        revision = sealed(
            Revision(
                number=number,
                epoch=epoch,
                name=draft.name,
                route=draft.route,
                effective_from_ms=draft.effective_from_ms,
                at_ms=at_ms,
                author=change.actor,
                action=draft.action,
                reason=change.reason,
                rollout=draft.rollout,
                horizon_ms=horizon_ms,
                previous=previous,
            )
        )
        previous = revision.hash
        made.append(revision)
    return tuple(made)
