"""A coordinator that steps no rollouts: there are none to be seen, and none can be started."""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.coordinator.messages import RolloutRequest, RolloutView
from inferfleet.coordinator.routes import RouteControl
from inferfleet.errors import ConfigError
from inferfleet.plane import Lease


class NoRollouts:
    """Implements :class:`~inferfleet.coordinator.services.RolloutService` without any."""

    def list(self) -> Sequence[RolloutView]:
        """Return none."""
        return ()

    def get(self, rollout: str) -> RolloutView:
        """Raise LookupError."""
        raise LookupError(rollout)

    def start(self, request: RolloutRequest, *, author: str) -> RolloutView:  # noqa: ARG002
        """Raise ConfigError."""
        raise ConfigError("this coordinator runs no rollouts")

    def act(self, rollout: str, verb: str, *, author: str, reason: str) -> RolloutView:  # noqa: ARG002
        """Raise LookupError."""
        raise LookupError(rollout)


class FinishRoutes:
    """Implements :class:`~inferfleet.coordinator.services.Ticking`: announcements get their time."""

    def __init__(self, routes: RouteControl) -> None:
        self._routes = routes

    def tick(self, lease: Lease, now_ms: int) -> None:  # noqa: ARG002
        """Finish what is ready."""
        self._routes.finish(author="coordinator", lease=lease)
