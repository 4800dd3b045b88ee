"""What the HTTP API and the leader loop need of the rest of the coordinator.

Everything here blocks within a bound and is called on threads. Errors are those of
:mod:`inferfleet.errors`; their texts go to callers as :mod:`inferfleet.coordinator.refusals` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from inferfleet.coordinator.announcing import Applied, Plan
from inferfleet.coordinator.messages import ModelView, RolloutRequest, RolloutView
from inferfleet.core.planning import RouteChange
from inferfleet.plane import AuditEntry, Lease, WorkerReport
from inferfleet.revisions import Revision, RouteLog

if TYPE_CHECKING:
    from inferfleet.coordinator.rollouts import Seen


class RouteService(Protocol):
    """Reads and changes routes. A plan says what it was computed on; announcing it elsewhere conflicts."""

    def log(self) -> RouteLog:
        """Return the log as it is kept."""

    def history(self, name: str, *, before: int, limit: int) -> list[Revision]:
        """Return a route's revisions, newest first, with numbers below ``before`` unless 0."""

    def planned(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> tuple[RouteChange, ...]:
        """Return what happens if these routes, in the words of the routes file, are to stand."""

    def removal(self, name: str) -> RouteChange:
        """Return what happens if the route is to be taken away."""

    def reversal(self, name: str, number: int) -> RouteChange:
        """Return what happens if the route is to be as revision ``number`` says."""

    def announce(
        self, changes: Sequence[RouteChange], *, author: str, reason: str, action: str
    ) -> tuple[Revision, ...]:
        """Write the changes down as a whole, without waiting for workers; the leader finishes them.

        Raises ConflictError where a route has another last revision than the one a change names.
        """

    def plan_reset(self, tree: Mapping[str, Any], origin: str) -> Plan:
        """Return what starting a new log with the routes of a document would change; all others go."""

    def reset(self, changes: Sequence[RouteChange], *, author: str, reason: str) -> Sequence[Applied]:
        """Start a new log, above every number that the store and the workers know."""


class RolloutService(Protocol):
    """Reads and steers rollouts. Unknown ids raise LookupError."""

    def list(self) -> Sequence[RolloutView]:
        """Return all rollouts, newest first."""

    def get(self, rollout: str) -> RolloutView:
        """Return one."""

    def start(self, request: RolloutRequest, *, author: str) -> RolloutView:
        """Begin a rollout."""

    def act(
        self, rollout: str, verb: str, *, author: str, reason: str, seen: Seen | None = None
    ) -> RolloutView:
        """``pause``, ``resume``, ``promote``, ``abort`` or ``approve`` it; return it as it is then.

        ``seen`` is what an approver has looked at. Raises :class:`~inferfleet.rollouts.RefusedError` for what
        cannot be done as it stands.
        """


class FleetService(Protocol):
    """Reads what workers and the audit log say; a :class:`~inferfleet.control_ports.ControlStore` does."""

    def workers(self) -> list[WorkerReport]:
        """Return the workers that have reported lately."""

    def audit(self, *, after: int = 0, limit: int = 1_000) -> list[tuple[AuditEntry, bytes]]:
        """Return audit entries with numbers above ``after``, in order, each with its document."""


class ModelService(Protocol):
    """Reads the model repository."""

    def models(self) -> Sequence[ModelView]:
        """Return all models, in order of their names."""


class Ticking(Protocol):
    """What the leader does again and again while it holds the lease."""

    def tick(self, lease: Lease, now_ms: int) -> None:
        """Take every step that is due at ``now_ms`` (epoch milliseconds), each under the lease.

        Raises FencedError where the lease is gone, ControlError while the store does not answer.
        """
