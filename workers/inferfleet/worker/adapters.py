"""What a worker is joined to: ports and words, chosen by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from inferfleet.control_ports import Reporter, RouteFeed
from inferfleet.ports import Clock, CrashMarks, Intake, OutcomeFeed, Outlet, PauseBoard, ResultOutlet
from inferfleet.routes import Route
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.telemetry.traces import NO_TRACES, Traces
from inferfleet.worker.engine import News
from inferfleet.worker.versions import Models


def _opens_none(broker: str) -> bool:
    """Open no broker that was not opened at the start."""
    del broker
    return False


def _nobody_follows(routes: tuple[Route, ...]) -> None:
    """Take no notice of the routes."""
    del routes


@dataclass(frozen=True)
class Adapters:
    """Everything a worker is joined to; chosen by the command line."""

    intake: Intake
    outlet: Outlet
    results: ResultOutlet | None
    models: Models
    metrics: PrometheusMetrics
    clock: Clock
    news: SimpleQueue[News]
    feed: RouteFeed
    pauses: PauseBoard
    marks: CrashMarks
    brokers: frozenset[str]
    """Which brokers there are adapters for: ``kafka``, ``rabbitmq``."""
    reporter: Reporter | None = None
    """Whom the worker tells how it is; ``None`` where its routes come from a file."""
    follow: Callable[[tuple[Route, ...]], None] = _nobody_follows
    """Told of the pool's routes before they are taken from: how much to prefetch, where retries wait."""
    open: Callable[[str], bool] = _opens_none
    """Opens a broker that no route has named so far; returns whether routes may name it now."""
    strict: bool = True
    """Whether the start fails where a version does not load; else its route waits, and the others serve."""
    outcomes: Callable[[Route], OutcomeFeed] | None = None
    """Opens what the primary of a detached shadow answers; raises ConfigError where it cannot be read."""
    traces: Traces = NO_TRACES
    """Who records the way of sampled requests."""
    release: str = ""
    """What this worker says that it is a release of."""
