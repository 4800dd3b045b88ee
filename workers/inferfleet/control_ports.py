"""The contracts of the control plane: what workers follow and report, what coordinators read and change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from inferfleet.feedback import Feedback
from inferfleet.plane import AuditEntry, Change, Lease, Stored, WorkerReport
from inferfleet.revisions import Head, Revision, RouteLog
from inferfleet.summaries import Window


class RouteFeed(Protocol):
    """Where a worker's routes come from. Nothing here waits for a server."""

    def log(self) -> RouteLog:
        """Return the newest log that may be adopted.

        Raises :class:`~inferfleet.errors.ConfigError` where there is one that cannot be understood; the
        worker goes on with what it has.
        """

    @property
    def stale(self) -> str:
        """Why the log may be old (the store does not answer, or offers an older one); empty if it is not."""

    @property
    def refused(self) -> str:
        """Why what the source offers now is not adopted; empty if it is, or if the source does not answer."""

    def close(self) -> None:
        """Stop following."""


class Reporter(Protocol):
    """What a worker says to the control plane. Nothing waits or raises; what is over a bound is dropped."""

    def heartbeat(self, report: WorkerReport) -> None:
        """Say how this worker is; the last word counts, and expires."""

    def append(self, windows: Sequence[Window]) -> None:
        """Add summaries; each is kept until it is stored or the bound drops the oldest."""

    @property
    def dropped(self) -> int:
        """Summaries that were dropped since the start."""

    def close(self) -> None:
        """Send what waits, within a bound, and take the registration away."""


class ControlStore(Protocol):
    """What coordinators and the command line share. Every call waits within a bound.

    Each raises :class:`~inferfleet.errors.ControlError` while the store does not answer.
    """

    def load(self) -> RouteLog:
        """Return the log as it is kept."""

    def history(self, name: str | None = None, *, before: int = 0, limit: int = 100) -> list[Revision]:
        """Return revisions of a route (or of all), newest first, with numbers below ``before`` unless 0."""

    def commit(self, change: Change) -> tuple[Revision, ...]:
        """Do everything that ``change`` says at once, and return its revisions.

        Raises :class:`~inferfleet.errors.ConflictError` where a route's or document's last number is not the
        expected one, :class:`~inferfleet.errors.FencedError` where the lease is gone.
        """

    def documents(self) -> Mapping[str, Stored]:
        """Return all rollouts by their ids."""

    def workers(self) -> list[WorkerReport]:
        """Return the workers that have reported lately."""

    def windows(self, route: str, after: str = "", *, limit: int = 1_000) -> tuple[list[Window], str]:
        """Return summaries of a route in the order they came, after a place, and the place of the last."""

    def audit(self, *, after: int = 0, limit: int = 1_000) -> list[tuple[AuditEntry, bytes]]:
        """Return audit entries with numbers above ``after``, in order, each with its document as stored."""

    def head(self) -> Head:
        """Return the log's head."""

    def lead(self, holder: str, ttl_ms: int) -> Lease | None:
        """Take the lease, or hold it for another ``ttl_ms``; ``None`` while another holds it."""

    def resign(self, lease: Lease) -> None:
        """Give the lease back, if it is still ours."""

    def leader(self) -> Lease | None:
        """Return the lease that stands, whoever holds it; ``None`` while nobody leads."""

    def paused(self, route: str) -> str:
        """Return why a route is paused for its pool; empty where it is not."""

    def resume(self, route: str, reason: str) -> None:
        """Take a route's pause away, if it is for this reason."""

    def close(self) -> None:
        """Let go of the connection."""


class LabelFeed(Protocol):
    """Where a rollout hears which variant answered a request, and how good that was."""

    def poll(self, most: int = 20_000) -> Feedback:
        """Return what has come since the last call, at most ``most`` messages; does not wait for more.

        The first call of a new feed starts at the rollout's start.
        """

    @property
    def stale(self) -> str:
        """Why nothing can be read now; empty while it can."""

    def close(self) -> None:
        """Stop reading."""
