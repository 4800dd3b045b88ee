"""The metrics of rollouts: what the leading coordinator saw when it last looked, and nothing elsewhere.

Which phase a rollout is in, what holds it and when the last one ended are states, not counts, so they are
read off one immutable picture that each turn of the leader replaces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from inferfleet.telemetry.metrics import PREFIX

OUTCOMES = ("done", "aborted", "inconclusive")


class RolloutState(NamedTuple):
    """A rollout that goes on. ``holds`` are the kinds of those that stand, ``held_s`` the age of the oldest.

    ``paused`` says that only a person ends the halt.
    """

    route: str
    phase: str
    percent: float
    holds: Collection[str]
    held_s: float
    paused: bool


class Picture(NamedTuple):
    """What one turn of the leader saw; ``ended_s`` maps route and outcome to when the last one ended so."""

    rollouts: tuple[RolloutState, ...] = ()
    workers: Mapping[str, int] = {}
    ended_s: Mapping[tuple[str, str], float] = {}


NOTHING = Picture()


class RolloutMetrics(Collector):
    """Exposes the last picture; any thread may read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._picture = NOTHING
        self._ended = Counter(
            f"{PREFIX}rollouts_ended",
            "Rollouts that ended while this replica led.",
            ("route", "outcome"),
            registry=registry,
        )
        registry.register(self)

    def show(self, picture: Picture) -> None:
        """Expose this from now on."""
        self._picture = picture
        for rollout in picture.rollouts:
            for outcome in OUTCOMES:
                self._ended.labels(rollout.route, outcome).inc(0)

    def ended(self, route: str, outcome: str) -> None:
        """Count a rollout that has ended as ``done``, ``aborted`` or ``inconclusive``."""
        self._ended.labels(route, outcome).inc()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return the families without samples."""
        return self._families(NOTHING)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the families of the last picture."""
        return self._families(self._picture)

    @staticmethod
    def _families(picture: Picture) -> list[GaugeMetricFamily]:
        def family(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, documentation, labels=labels)

        phase = family("rollout_phase", "1 for the phase that a route's rollout is in.", "route", "phase")
        percent = family("rollout_percent", "Share of keys that the new version answers.", "route")
        hold = family("rollout_hold", "1 while this holds a route's rollout.", "route", "kind")
        held = family("rollout_held_seconds", "Age of the oldest hold that stands, 0 without.", "route")
        paused = family("rollout_paused", "1 while only a person lets the rollout go on.", "route")
        ended = family(
            "rollout_ended_timestamp_seconds", "When a route's last rollout ended so.", "route", "outcome"
        )
        workers = family("coordinator_workers", "Workers that report to the control plane.", "pool")
        for each in picture.rollouts:
            phase.add_metric([each.route, each.phase], 1)
            percent.add_metric([each.route], each.percent)
            held.add_metric([each.route], each.held_s)
            paused.add_metric([each.route], each.paused)
            for kind in sorted(set(each.holds)):
                hold.add_metric([each.route, kind], 1)
        for (route, outcome), at_s in sorted(picture.ended_s.items()):
            ended.add_metric([route, outcome], at_s)
        for pool, count in sorted(picture.workers.items()):
            workers.add_metric([pool], count)
        return [phase, percent, hold, held, paused, ended, workers]
