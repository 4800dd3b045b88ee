"""What the coordinator's HTTP API reads and writes; the OpenAPI description is made from these types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from inferfleet.config import Name
from inferfleet.plane import AuditEntry, WorkerReport
from inferfleet.policies import Kind
from inferfleet.revisions import Head, Revision
from inferfleet.rollouts import Approval, Decision, Phase, Rollout
from inferfleet.routes import plain_route

MAX_PAGE = 500
MAX_REASON = 500
MAX_DECISIONS = 50

Reason = Annotated[str, Meta(max_length=MAX_REASON)]
Number = Annotated[int, Meta(ge=0, le=2**53 - 1)]
PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
PlainRoute = Annotated[dict[str, Any], Meta(description="A route in the words of the routes file.")]


class ErrorBody(msgspec.Struct, frozen=True):
    """Why a request was refused. ``retryable`` says whether the same request may succeed later."""

    error: str
    code: str
    retryable: bool


class HeadView(msgspec.Struct, frozen=True):
    """The end of the route log."""

    epoch: int
    number: int
    hash: str

    @classmethod
    def of(cls, head: Head) -> HeadView:
        """Return the view of a head."""
        return cls(head.epoch, head.number, head.hash)


class RevisionView(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one route; without ``route`` it takes the route away.

    Without ``effective_from_ms`` it announces what is to be loaded, and routes nothing yet.
    """

    number: int
    epoch: int
    name: str
    route: PlainRoute | None
    effective_from_ms: int | None
    at_ms: int
    author: str
    action: str
    reason: str
    rollout: str
    hash: str

    @classmethod
    def of(cls, revision: Revision) -> RevisionView:
        """Return the view of a revision."""
        copied = ("number", "epoch", "name", "effective_from_ms", "at_ms", "author", "action", "reason")
        return cls(
            route=None if revision.route is None else plain_route(revision.route),
            rollout=revision.rollout,
            hash=revision.hash,
            **{key: getattr(revision, key) for key in copied},
        )


class RouteView(msgspec.Struct, frozen=True, kw_only=True):
    """A route as it is: its newest revision with a time, and the announcement that waits behind it.

    ``revision`` is the number of the last of both: what a change must name in ``If-Match``.
    """

    name: str
    revision: int
    standing: RevisionView | None
    pending: RevisionView | None


class RoutesPage(msgspec.Struct, frozen=True, kw_only=True):
    """Routes in order of their names; ``next`` is what ``after`` must be for more, empty at the end."""

    head: HeadView
    routes: list[RouteView]
    next: str = ""


class RevisionsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Revisions of a route, newest first; ``next`` is what ``before`` must be for more, 0 at the end."""

    revisions: list[RevisionView]
    next: int = 0


class ApplyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A whole table of routes; those that are not in it are taken away only with ``prune``."""

    routes: Annotated[list[PlainRoute], Meta(max_length=1_000)]
    prune: bool = False
    reason: Reason = ""


class ResetRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """All routes that there are to be afterwards."""

    routes: Annotated[list[PlainRoute], Meta(min_length=1, max_length=1_000)]
    reason: Reason = ""


class RouteChange(msgspec.Struct, frozen=True, kw_only=True):
    """What an apply does to one route; ``before`` is ``null`` for a new one, ``after`` for one taken away."""

    name: str
    before: PlainRoute | None
    after: PlainRoute | None


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What was changed, or would be, and the revisions that say so; announcements wait for the workers."""

    dry_run: bool
    changes: list[RouteChange]
    revisions: list[RevisionView]


class RouteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One route; its name must be that of the path, or be left out."""

    route: PlainRoute
    reason: Reason = ""


class RevertRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Back to what an older revision says, as a new revision."""

    revision: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    reason: Reason = ""


class ReasonRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Why."""

    reason: Reason = ""


class ApproveRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What was looked at before approving; with other bytes or another policy it is refused."""

    digest: Annotated[str, Meta(max_length=128)] = ""
    policy: Annotated[str, Meta(max_length=128)] = ""
    reason: Reason = ""


class RolloutRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A rollout of a version on a route. ``policy`` has the keys of a policy file; left out: the default."""

    route: Name
    version: Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,17}$")]
    kind: Kind = "canary"
    policy: Annotated[dict[str, Any], Meta(description="The keys of a policy file.")] = {}
    reason: Reason = ""


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as it is. ``evidence`` holds what the last decision was made on, in the policy's own words.

    ``digest`` stands for the new version's bytes; approvals are bound to it and to ``policy_hash``.
    ``percent`` is the new version's share of the keys in force. ``waits_for`` says what must happen before
    it goes on, one line each, and is empty where only time and evidence do. ``version`` rises with every
    change of the rollout. ``history`` holds its last decisions, oldest first.
    """

    id: str
    version: int
    route: str
    kind: Kind
    model: str
    from_version: str
    to_version: str
    digest: str
    phase: Phase
    step: int
    percent: float
    next_percent: float
    begun_ms: int
    since_ms: int
    actor: str
    reason: str
    ended: bool
    waits_for: list[str]
    outcome: str
    approvals: list[Approval]
    history: list[Decision]
    policy: dict[str, Any]
    policy_hash: str
    evidence: dict[str, Any]

    @classmethod
    def of(cls, rollout: Rollout, version: int, evidence: Mapping[str, Any] | None = None) -> RolloutView:
        """Return the view of a stored rollout."""
        waits = [f"{each.kind}: {each.reason}" for each in rollout.holds]
        if rollout.paused is not None:
            waits.append(f"paused by {rollout.paused.actor or 'the coordinator'}: {rollout.paused.reason}")
        made = {"version", "waits_for", "approvals", "history", "policy", "evidence"}
        copied = [key for key in cls.__struct_fields__ if key not in made]
        return cls(
            version=version,
            waits_for=waits,
            approvals=list(rollout.approvals),
            history=list(rollout.history[-MAX_DECISIONS:]),
            policy=msgspec.to_builtins(rollout.policy),
            evidence=dict(evidence or {}),
            **{key: getattr(rollout, key) for key in copied},
        )


class RolloutsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Rollouts, newest first; ``next`` is what ``after`` must be for more, empty at the end."""

    rollouts: list[RolloutView]
    next: str = ""


class WorkersPage(msgspec.Struct, frozen=True, kw_only=True):
    """Workers that have reported lately, in order of pool and id; ``now_ms`` is the coordinator's clock."""

    workers: list[WorkerReport]
    now_ms: int
    next: str = ""


class VersionView(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a model; ``problem`` says why it cannot be served, where that is known."""

    version: str
    runtime: str = ""
    digest: str = ""
    size_bytes: int = 0
    problem: str = ""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model with its versions in order of their numbers."""

    name: str
    versions: list[VersionView]


class ModelsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Models in order of their names; ``next`` is what ``after`` must be for more, empty at the end."""

    models: list[ModelView]
    next: str = ""


class AuditView(msgspec.Struct, frozen=True, kw_only=True):
    """One change and who made it; ``hash`` is that of the entry as it is stored."""

    number: int
    at_ms: int
    actor: str
    action: str
    subject: str
    reason: str
    before: Any
    after: Any
    previous: str
    hash: str

    @classmethod
    def of(cls, entry: AuditEntry, digest: str) -> AuditView:
        """Return the view of an entry."""
        return cls(hash=digest, **msgspec.structs.asdict(entry))


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """Audit entries in order; ``next`` is what ``after`` must be for more, 0 at the end."""

    entries: list[AuditView]
    next: int = 0


class PageQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of a list, in order of names."""

    after: Annotated[str, Meta(max_length=200)] = ""
    limit: PageSize = MAX_PAGE


class RevisionsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of a history, newest first; ``before`` 0 starts at the newest."""

    before: Number = 0
    limit: PageSize = 100


class AuditQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of the audit log; ``newest`` leaves ``after`` out of account and asks for its end."""

    after: Number = 0
    limit: PageSize = 100
    newest: bool = False


class ApplyQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Whether to say only what would be changed."""

    dry_run: bool = False


class DeleteQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Why a route is taken away."""

    reason: Reason = ""


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""
