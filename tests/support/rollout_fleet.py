"""A fleet in virtual time for tests of rollouts: workers that follow the log and report what they answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from inferfleet.catalogue import VersionFacts
from inferfleet.control.memory import MemoryControlStore
from inferfleet.control_ports import ControlStore, LabelFeed
from inferfleet.coordinator.announcing import Timing
from inferfleet.coordinator.leading import Leader, Pace
from inferfleet.coordinator.messages import RolloutRequest, RolloutView
from inferfleet.coordinator.rollouts import RolloutControl
from inferfleet.core.revisions import in_force
from inferfleet.errors import ConfigError, ModelRepositoryError
from inferfleet.feedback import Answered, Feedback, Label, Sought
from inferfleet.plane import AuditEntry, Change, Draft, Lease, WorkerReport, version_name
from inferfleet.revisions import Revision
from inferfleet.rollouts import Rollout, decode_rollout
from inferfleet.routes import Route, route_of
from inferfleet.summaries import Comparison, Window
from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.testing.clock import FakeClock

ROUTE = "digits"
FAST: dict[str, object] = {
    "step_limit_s": 600,
    "bake_s": 20,
    "step": [
        {"percent": 5, "dwell_s": 10, "minimum": 50},
        {"percent": 50, "dwell_s": 10, "minimum": 200},
    ],
    "shadow": {"duration_s": 10, "minimum_pairs": 50},
}
"""A canary that is through in about two minutes of a fleet that answers 100 requests a second."""


class Version(NamedTuple):
    """How a version behaves: shares of failed and of invalid answers, and seconds of model time for each.

    ``accuracy`` is the share of its answers that are right, ``different`` the share of pairs in which it
    differs from the primary; ``loads`` says why workers refuse it.
    """

    failed: float = 0.0
    invalid: float = 0.0
    compute_s: float = 0.002
    different: float = 0.0
    accuracy: float = 0.9
    loads: str = ""
    crash: bool = False


class Shelf:
    """A model repository with versions 1 to 9 of every model."""

    def latest(self, model: str) -> str:
        """Return the highest version."""
        return "9"

    def version(self, model: str, version: str) -> VersionFacts:
        """Return what a version is."""
        if int(version) > 9:
            raise ModelRepositoryError(f"model {model} has no version {version}; there is: 1, …, 9")
        return VersionFacts(model, version, digest_of(version), None)


class LabelsFeed:
    """The labels of what a fleet answered since a rollout began.

    Implements :class:`~inferfleet.control_ports.LabelFeed`.
    """

    def __init__(self, fleet: RolloutFleet, sought: Sought) -> None:
        self._fleet = fleet
        self._since_ms = sought.since_ms
        self._read = 0

    @property
    def stale(self) -> str:
        """Why nothing can be read now."""
        return self._fleet.labels_stale

    def poll(self, most: int = 20_000) -> Feedback:
        """Return what has come."""
        if self.stale:
            return Feedback([], [], caught_up=False)
        fresh = self._fleet.labels[self._read :][:most]
        self._read += len(fresh)
        behind = self._read < len(self._fleet.labels)
        fresh = [each for each in fresh if each[0].at_ms >= self._since_ms]
        return Feedback([each for each, _ in fresh], [each for _, each in fresh], not behind)

    def close(self) -> None:
        """Do nothing."""


def digest_of(version: str) -> str:
    """Return the digest of a version's bytes."""
    return f"{int(version):064x}"


class RolloutFleet:
    """One route, ``workers`` workers, and whoever leads; :meth:`run` lets virtual time pass.

    ``store`` is what coordinators see: the memory store, or something before it. Each second every worker
    reports, and answers ``rate`` requests as the revision in force says. ``behaviour`` maps versions to how
    they behave.
    """

    def __init__(
        self,
        behaviour: Mapping[str, Version] | None = None,
        *,
        workers: int = 2,
        rate: int = 100,
        results: str = "kafka:digits.results",
    ) -> None:
        self.clock = FakeClock()
        self.plane = MemoryControlStore(self.clock)
        self.store: ControlStore = self.plane
        self.behaviour = dict(behaviour or {})
        self.rate = rate
        self.names = [f"w-{i}" for i in range(workers)]
        self.random = random.Random(7)
        self.sought: list[Sought] = []
        self.labels_stale = ""
        self.broken_feeds = ""
        self.timing = Timing(lead_ms=2_000)
        self.pace = Pace(store_s=5.0, settle_s=3.0)
        self.control = RolloutControl(self.plane, Shelf(), self.clock)
        self.holder = 0
        self.leader: Leader | None = None
        self.metrics = CoordinatorMetrics("test")
        self.answered: dict[str, int] = {}
        self.labels: list[tuple[Answered, Label]] = []
        self.plane.commit(
            Change(
                actor="test",
                audit=(AuditEntry(actor="test", action="apply", subject="route digits"),),
                drafts=(Draft(ROUTE, self.route(results), self.clock.utc_ms(), "apply"),),
                expected={ROUTE: 0},
            )
        )

    @staticmethod
    def route(results: str) -> Route:
        """Return the route as it stands before any rollout."""
        plain = {
            "name": ROUTE,
            "source": "kafka:digits.requests",
            "results": [results],
            "model": "digits",
            "version": "1",
        }
        return route_of(plain, "fleet", "test")

    def feeds(self, sought: Sought) -> LabelFeed:
        """Open the labels of every answer that counts."""
        self.sought.append(sought)
        if self.broken_feeds:
            raise ConfigError(self.broken_feeds)
        return LabelsFeed(self, sought)

    # Steering

    def start(self, version: str = "2", policy: Mapping[str, object] | None = None, **keys: object) -> str:
        """Start a rollout and return its id."""
        request = RolloutRequest(route=ROUTE, version=version, policy=dict(policy or FAST), **keys)  # type: ignore[arg-type]
        return self.control.start(request, author="ann").id

    def view(self, rollout: str) -> RolloutView:
        """Return a rollout as the API shows it."""
        return self.control.get(rollout)

    def rollout(self, name: str) -> Rollout:
        """Return a rollout as it is stored."""
        return decode_rollout(self.plane.documents()[name].body)

    def standing(self) -> Route:
        """Return the route that answers now."""
        found = in_force(self.plane.load().kept[ROUTE], self.clock.utc_ms())
        assert found is not None
        assert found.route is not None
        return found.route

    def actions(self) -> list[str]:
        """Return what was done to the route, in order."""
        return [each.action for each in reversed(self.plane.history(ROUTE))]

    # Time

    def lease(self) -> Lease:
        """Return the lease of who leads; a new holder waits for the old one's to end."""
        while True:
            lease = self.store.lead(f"c-{self.holder}", 6_000)
            if lease is not None:
                return lease
            self.second()

    def tick(self) -> None:
        """Let whoever leads take one turn; a leader that there is not yet begins."""
        if self.leader is None:
            self.leader = Leader(
                self.store, self.clock, self.timing, self.feeds, self.pace, self.metrics.rollouts
            )
        self.leader.tick(self.lease(), self.clock.utc_ms())

    def second(self) -> None:
        """Let the workers live for a second."""
        self.clock.advance(1.0)
        log, now = self.plane.load(), self.clock.utc_ms()
        revisions = log.kept[ROUTE]
        found = in_force(revisions, now)
        wanted = {
            version_name(each.route.model, version): version
            for each in revisions
            if each.route is not None
            for version in each.route.versions
        }
        refused = {name: self._version(v).loads for name, v in wanted.items() if self._version(v).loads}
        for name in self.names:
            self.plane.report(
                WorkerReport(
                    worker=name,
                    pool="default",
                    at_ms=now,
                    head=log.head,
                    adopted={ROUTE: revisions[-1].number},
                    ready=sorted(set(wanted) - set(refused)),
                    refused=refused,
                    digests={each: digest_of(version) for each, version in wanted.items()},
                    lag={ROUTE: 0},
                ),
                6_000,
            )
            if found is not None and found.route is not None and self.rate:
                self.plane.add(self._windows(name, found, found.route, now))

    def run(self, seconds: int, until: Callable[[], bool] | None = None) -> bool:
        """Let seconds pass, each with a turn of the leader, until something holds; say whether it does."""
        for _ in range(seconds):
            self.second()
            self.tick()
            if until is not None and until():
                return True
        return False

    def ended(self, rollout: str) -> Callable[[], bool]:
        """Return whether a rollout has ended."""
        return lambda: self.rollout(rollout).ended

    # What versions answer

    def _version(self, version: str) -> Version:
        return self.behaviour.get(version, Version())

    def _windows(self, worker: str, revision: Revision, route: Route, now: int) -> list[Window]:
        found = []
        share = self.rate // len(self.names)
        for variant in route.variants:
            count = sum(self.random.random() * 10_000 < variant.buckets for _ in range(share))
            window = self._window(worker, revision, route, variant.name, variant.version, now)
            self._answer(window, count)
            self.answered[variant.version] = self.answered.get(variant.version, 0) + count
            self._label(variant.name, variant.version, count, now)
            found.append(window)
        for shadow in route.shadows:
            window = self._window(worker, revision, route, shadow.name, shadow.version, now)
            window.role = "shadow"
            self._answer(window, share)
            window.seen = share
            different = round(share * self._version(shadow.version).different)
            window.comparison = Comparison(
                kind="labels",
                pairs=share,
                identical=share - different,
                different=different,
                label_changes=different,
            )
            window.secondary = Comparison(kind="labels", pairs=share, identical=share)
            found.append(window)
        return [each for each in found if each.requests]

    def _label(self, variant: str, version: str, count: int, now: int) -> None:
        """Let somebody find out what was right, of every answer."""
        for _ in range(count):
            name = f"r-{len(self.labels)}"
            right = self.random.random() < self._version(version).accuracy
            answered = Answered(name, version, variant, name.encode(), now, (3,))
            self.labels.append((answered, Label(name, now, {}, (3 if right else 4,))))

    @staticmethod
    def _window(
        worker: str, revision: Revision, route: Route, variant: str, version: str, now: int
    ) -> Window:
        return Window(
            worker=worker,
            route=route.name,
            model=route.model,
            version=version,
            variant=variant,
            revision=revision.number,
            start_ms=now - 1_000,
            end_ms=now,
        )

    def _answer(self, window: Window, count: int) -> None:
        behaves = self._version(window.version)
        failed = sum(self.random.random() < behaves.failed for _ in range(count))
        window.requests = window.rows = window.batches = window.first_seen = count
        window.invalid = sum(self.random.random() < behaves.invalid for _ in range(count))
        window.compute_s = behaves.compute_s * count
        window.crash = behaves.crash
        for i in range(count):
            window.failures.add(1, 1 if i < failed else 0)
        noise = np.array([self.random.lognormvariate(0, 0.2) for _ in range(count)])
        window.compute.add(noise * behaves.compute_s)
        window.latency.add(noise * (behaves.compute_s + 0.01))
