"""Every metric of a coordinator, defined once; labels come from the table of endpoints or a closed list."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from inferfleet.telemetry.metrics import BATCH_SECONDS, PREFIX
from inferfleet.telemetry.rollouts import NOTHING, RolloutMetrics


class CoordinatorMetrics:
    """What a coordinator reports, on a registry of its own; any thread may call."""

    def __init__(self, version: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            f"{PREFIX}coordinator_requests",
            "Requests to the API, by the path's template.",
            ("method", "path", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            f"{PREFIX}coordinator_request_seconds",
            "Time of one request to the API.",
            ("path",),
            buckets=BATCH_SECONDS,
            registry=self.registry,
        )
        self._leading = Gauge(
            f"{PREFIX}coordinator_leading",
            "Whether this replica holds the lease and steps rollouts.",
            registry=self.registry,
        )
        self._ticks = Counter(
            f"{PREFIX}coordinator_ticks",
            "Steps of the leader, by how they ended.",
            ("outcome",),
            registry=self.registry,
        )
        self._tick_seconds = Histogram(
            f"{PREFIX}coordinator_tick_seconds",
            "Time of one step of the leader.",
            buckets=BATCH_SECONDS,
            registry=self.registry,
        )
        self._store_up = Gauge(
            f"{PREFIX}coordinator_store_up",
            "Whether the control plane's Redis answered when it was last asked for the lease.",
            registry=self.registry,
        )
        self.rollouts = RolloutMetrics(self.registry)
        """What the leader sees of rollouts; empty while another leads."""
        build = Gauge(f"{PREFIX}build_info", "Which release this is.", ("version",), registry=self.registry)
        build.labels(version).set(1)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request; ``path`` is the table's, or ``other``."""
        self._requests.labels(method, path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def leading(self, leads: bool) -> None:
        """Say whether this replica leads."""
        self._leading.set(leads)
        if not leads:
            self.rollouts.show(NOTHING)

    def tick(self, outcome: str, seconds: float) -> None:
        """Count a step of the leader."""
        self._ticks.labels(outcome).inc()
        self._tick_seconds.observe(seconds)

    def store(self, answers: bool) -> None:
        """Say whether the store answers."""
        self._store_up.set(answers)
