"""What the leader's metrics say of rollouts, derived anew in each turn from what the turn has read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Protocol

from inferfleet.plane import WorkerReport
from inferfleet.rollouts import Rollout
from inferfleet.telemetry.rollouts import Picture, RolloutState


class Shown(Protocol):
    """Who exposes it."""

    def show(self, picture: Picture) -> None:
        """Expose this from now on."""

    def ended(self, route: str, outcome: str) -> None:
        """Count a rollout that has ended."""


class Watching:
    """Tells rollouts that end from those that had ended before this replica led; for one thread.

    A rollout may end by a person's word through another replica, so that an end is found, not heard of.
    """

    def __init__(self, shown: Shown | None = None) -> None:
        self._shown = shown
        self._since_ms: int | None = None
        self._known: set[str] = set()

    def begin(self) -> None:
        """A lease begins: what ended before the next look was counted by others, or by nobody."""
        self._since_ms = None

    def look(
        self,
        live: Iterable[Rollout],
        ended: Collection[Rollout],
        workers: Iterable[WorkerReport],
        now_ms: int,
    ) -> None:
        """Show the rollouts that go on and when others ended, and count those that are new among these."""
        if self._shown is None:
            return
        self._since_ms = now_ms if self._since_ms is None else self._since_ms
        for each in ended:
            if each.since_ms >= self._since_ms and each.id not in self._known:
                self._shown.ended(each.route, each.phase)
        self._known = {each.id for each in ended}
        ended_s: dict[tuple[str, str], float] = {}
        for each in ended:
            place = (each.route, each.phase)
            ended_s[place] = max(each.since_ms / 1000, ended_s.get(place, 0.0))
        pools = Counter(each.pool for each in workers)
        self._shown.show(Picture(tuple(_state(each, now_ms) for each in live), pools, ended_s))


def _state(rollout: Rollout, now_ms: int) -> RolloutState:
    since_ms = min((hold.since_ms for hold in rollout.holds), default=now_ms)
    return RolloutState(
        rollout.route,
        rollout.phase,
        rollout.percent,
        [hold.kind for hold in rollout.holds],
        max(0.0, (now_ms - since_ms) / 1000),
        rollout.paused is not None,
    )
