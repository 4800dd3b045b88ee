"""Who steps rollouts: the one replica that holds the lease, and only while it is sure that it does.

One thread renews the lease and takes the steps in turn, so that a replica whose steps hang does not keep the
lease. What a stopped process may still do when it goes on, the store refuses: every step carries the lease.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

from inferfleet.control_ports import ControlStore
from inferfleet.coordinator.services import Ticking
from inferfleet.errors import ControlError, FencedError
from inferfleet.plane import Lease
from inferfleet.ports import Clock

log = structlog.get_logger(__name__)

LEASE_S = 6.0
TICK_S = 0.5
STEP_BACK_S = 10.0
"""How long a fenced replica leaves the lease to others."""
NOT_ASKED = "the control plane's Redis was not asked yet"


class LeaderMetrics(Protocol):
    """Who counts what the leader loop does."""

    def leading(self, leads: bool) -> None:
        """Say whether this replica leads."""

    def tick(self, outcome: str, seconds: float) -> None:
        """Count a step of the leader: ``done``, ``fenced``, ``away`` or ``failed``."""

    def store(self, answers: bool) -> None:
        """Say whether the store answers."""


class Standing(NamedTuple):
    """How a replica stands: the lease if it leads, and what keeps the store from answering, if anything."""

    lease: Lease | None = None
    trouble: str = NOT_ASKED


class Leadership:
    """Holds the lease while it can, and ticks while it holds it. :meth:`run` is the body of one thread."""

    def __init__(
        self,
        store: ControlStore,
        holder: str,
        clock: Clock,
        metrics: LeaderMetrics,
        leader: Ticking | None = None,
        *,
        lease_s: float = LEASE_S,
        tick_s: float = TICK_S,
        step_back_s: float = STEP_BACK_S,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._store = store
        self._holder = holder
        self._clock = clock
        self._metrics = metrics
        self._leader = leader
        self._lease_s = lease_s
        self._tick_s = tick_s
        self._step_back_s = step_back_s
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._standing = Standing()
        self._sure_until = 0.0
        self._renew_at = 0.0

    @property
    def standing(self) -> Standing:
        """How this replica stands; any thread may ask."""
        return self._standing

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Let :meth:`run` end after what it does now; any thread may ask."""
        self._stopping.set()

    def run(self) -> None:
        """Lead whenever the lease can be had, until :meth:`stop`; then give it back."""
        self._metrics.leading(False)
        while not self._stopping.is_set():
            self.turn()
            self._wait(self._tick_s)
        self._resign()

    def turn(self) -> None:
        """Renew what is due, then take the steps that are due."""
        now = self._clock.monotonic()
        lease = self._standing.lease
        if lease is not None and now >= self._sure_until:
            # Stopped, or cut off, for too long: another may lead by now.
            self._lose("the lease ran out before it was renewed", 0.0)
        if now >= self._renew_at:
            self._renew(now)
        lease = self._standing.lease
        if lease is not None and self._leader is not None and self._clock.monotonic() < self._sure_until:
            self._tick(self._leader, lease)

    def _renew(self, now: float) -> None:
        self._renew_at = now + self._lease_s / 3
        before = self._standing.lease
        try:
            lease = self._store.lead(self._holder, int(self._lease_s * 1000))
        except ControlError as error:
            self._away(error)
            return
        self._answered()
        # Counted from before the store was asked: it cannot have granted more.
        self._sure_until = now + self._lease_s if lease is not None else 0.0
        if lease is None and before is not None:
            self._lose("another coordinator has taken it", 0.0)
        elif lease is not None and lease != before:
            self._standing = Standing(lease, "")
            self._metrics.leading(True)
            log.info("leading_begins", holder=self._holder, term=lease.token)

    def _tick(self, leader: Ticking, lease: Lease) -> None:
        began = self._clock.monotonic()
        outcome = "done"
        try:
            leader.tick(lease, self._clock.utc_ms())
        except FencedError as error:
            outcome = "fenced"
            self._lose(str(error), self._step_back_s)
        except ControlError as error:
            outcome = "away"
            self._away(error)
        except Exception:
            # One rollout that cannot be stepped must not end the process that others are served by.
            outcome = "failed"
            log.exception("leader_tick_failed")
        self._metrics.tick(outcome, self._clock.monotonic() - began)

    def _lose(self, why: str, pause_s: float) -> None:
        self._standing = Standing(None, self._standing.trouble)
        self._sure_until = 0.0
        self._metrics.leading(False)
        if pause_s:
            self._renew_at = self._clock.monotonic() + pause_s
        log.warning("leading_ends", holder=self._holder, reason=why, pause_s=pause_s)

    def _away(self, error: ControlError) -> None:
        if self._standing.trouble in ("", NOT_ASKED):
            log.warning("control_store_away", error=str(error))
        self._standing = Standing(self._standing.lease, str(error))
        self._metrics.store(False)

    def _answered(self) -> None:
        if self._standing.trouble not in ("", NOT_ASKED):
            log.info("control_store_answers")
        self._standing = Standing(self._standing.lease, "")
        self._metrics.store(True)

    def _resign(self) -> None:
        lease = self._standing.lease
        if lease is None:
            return
        self._lose("this replica stops", 0.0)
        try:
            self._store.resign(lease)
        except ControlError as error:
            log.warning("lease_not_given_back", error=str(error))
