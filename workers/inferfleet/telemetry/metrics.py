"""Every metric of inferfleet, defined once.

Names carry base units; labels come from configuration only (route, model, version, variant, role) or from
a closed list (outcome, stage, code), never from a request. Methods are called per batch or per chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

PREFIX = "inferfleet_"

REQUEST_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
)  # fmt: skip
BATCH_SECONDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
    5.0, 10.0,
)  # fmt: skip
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PADDING_RATIO = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


Metric = TypeVar("Metric", bound=MetricWrapperBase)


class _Children(dict[tuple[str, ...], Metric], Generic[Metric]):
    """The children of one metric by label values: a dictionary look-up instead of ``labels()``."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: tuple[str, ...]) -> Metric:
        child = self._metric.labels(*labels)
        self[labels] = child
        return child


class BulkHistogram(Collector):
    """A histogram that takes many values at once: one sort into buckets per call, none per value."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._bounds = np.array(bounds, dtype=np.float64)
        self._names = [
            floatToGoString(bound)  # type: ignore[no-untyped-call]
            for bound in (*bounds, float("inf"))
        ]
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], tuple[npt.NDArray[np.int64], float]] = {}
        registry.register(self)

    def observe_many(
        self, labels: tuple[str, ...], values: Sequence[float] | npt.NDArray[np.float64]
    ) -> None:
        """Count every value; negative ones (clocks differ between machines) count as zero."""
        if not len(values):
            return
        array = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
        size = len(self._names)
        counts = np.bincount(np.searchsorted(self._bounds, array, side="left"), minlength=size)
        total = float(array.sum())
        with self._lock:
            old = self._series.get(labels)
            self._series[labels] = (counts, total) if old is None else (old[0] + counts, old[1] + total)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the family without samples, so that a name taken twice is noticed."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the family with the counts so far."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        with self._lock:
            series = list(self._series.items())
        for labels, (counts, total) in series:
            cumulated = np.cumsum(counts).tolist()
            family.add_metric(labels, list(zip(self._names, cumulated, strict=True)), total)
        return [family]


class PrometheusMetrics:
    """What a worker reports, on a registry of its own."""

    def __init__(self, version: str = "", worker: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = self._counter(
            "requests", "Requests that have their outcome.", "route", "version", "variant", "outcome"
        )
        self._request_seconds = BulkHistogram(
            f"{PREFIX}request_seconds",
            "From the broker's timestamp to the confirmed outcome.",
            ("route",),
            REQUEST_SECONDS,
            self.registry,
        )
        self._stage_seconds = self._histogram(
            "stage_seconds", "Time of one call of a station of the record path.", BATCH_SECONDS, "stage"
        )
        lane = ("model", "version", "role")
        self._batch_rows = self._histogram("batch_rows", "Rows of a batch.", BATCH_ROWS, *lane)
        self._batch_seconds = self._histogram(
            "batch_seconds", "Time of a batch in the model.", BATCH_SECONDS, *lane
        )
        self._padding = self._histogram(
            "padding_ratio", "Share of a batch that is padding.", PADDING_RATIO, *lane
        )
        self._queue_rows = self._gauge("queue_rows", "Rows waiting for a batch.", *lane)
        self._in_flight_rows = self._gauge("in_flight_rows", "Rows taken and not settled.", "route")
        self._in_flight_bytes = self._gauge("in_flight_bytes", "Bytes taken and not settled.", "route")
        self._lag = self._gauge(
            "consumer_lag", "Records not taken yet, over this worker's partitions.", "route"
        )
        self._oldest = self._gauge("oldest_request_seconds", "Age of the oldest open request.", "route")
        self._paused = self._gauge("route_paused", "1 while the route is not taken from.", "route")
        self._dead_letters = self._counter("dead_letters", "Dead letters written.", "route", "code")
        self._retries = self._counter("retries", "Further attempts.", "route")
        self._redeliveries = self._counter("redeliveries", "Records that were delivered before.", "route")
        self._results_lost = self._counter(
            "results_lost", "Results that Redis confirmed and did not have any more.", "route"
        )
        self._shadow_requests = self._counter(
            "shadow_requests", "Requests answered by a shadow.", "route", "version", "outcome"
        )
        self._shadow_shed = self._counter("shadow_shed", "Shadow rows dropped for load.", "route", "version")
        self._revision = Gauge(
            f"{PREFIX}route_revision",
            "The route revision in force as a number; hashes are read as hexadecimal.",
            registry=self.registry,
        )
        self._revision_age = Gauge(
            f"{PREFIX}route_revision_age_seconds",
            "For how long the routes could not be followed; 0 while they are.",
            registry=self.registry,
        )
        self._model_ready = self._gauge("model_ready", "1 when loaded, checked and warm.", "model", "version")
        build = Gauge(f"{PREFIX}build_info", "Always 1.", ("version", "worker"), registry=self.registry)
        build.labels(version, worker).set(1)

    def _counter(self, name: str, documentation: str, *labels: str) -> _Children[Counter]:
        return _Children(Counter(PREFIX + name, documentation, labels, registry=self.registry))

    def _gauge(self, name: str, documentation: str, *labels: str) -> _Children[Gauge]:
        return _Children(Gauge(PREFIX + name, documentation, labels, registry=self.registry))

    def _histogram(
        self, name: str, documentation: str, bounds: Sequence[float], *labels: str
    ) -> _Children[Histogram]:
        return _Children(
            Histogram(PREFIX + name, documentation, labels, registry=self.registry, buckets=bounds)
        )

    def outcomes(self, route: str, version: str, variant: str, outcome: str, count: int) -> None:
        """``count`` requests ended as ``ok`` or with a code."""
        self._requests[route, version, variant, outcome].inc(count)

    def request_seconds(self, route: str, seconds: Sequence[float] | npt.NDArray[np.float64]) -> None:
        """Spans from the broker's timestamp to the confirmed outcome; a list or an array, any length."""
        self._request_seconds.observe_many((route,), seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """One call of a station (take, read, gather, predict, write, hand_over, settle) took so long."""
        self._stage_seconds[(stage,)].observe(seconds)

    def batch(
        self, model: str, version: str, role: str, rows: int, seconds: float, padding: float | None = None
    ) -> None:
        """One batch ran; ``padding`` is the share of it that was filling, ``None`` without padding."""
        lane = (model, version, role)
        self._batch_rows[lane].observe(rows)
        self._batch_seconds[lane].observe(seconds)
        if padding is not None:
            self._padding[lane].observe(padding)

    def queue_rows(self, model: str, version: str, role: str, rows: int) -> None:
        """So many rows wait in the lanes of a version."""
        self._queue_rows[model, version, role].set(rows)

    def in_flight(self, route: str, rows: int, size_bytes: int) -> None:
        """So much of a route is taken and not settled."""
        self._in_flight_rows[(route,)].set(rows)
        self._in_flight_bytes[(route,)].set(size_bytes)

    def consumer_lag(self, route: str, records: int) -> None:
        """So many records of a route's assigned partitions are not taken yet."""
        self._lag[(route,)].set(records)

    def oldest_request_seconds(self, route: str, seconds: float) -> None:
        """The oldest open request of a route has this age; 0 when none is open."""
        self._oldest[(route,)].set(seconds)

    def route_paused(self, route: str, paused: bool) -> None:
        """Whether a route is not taken from because something of its own is down."""
        self._paused[(route,)].set(paused)

    def dead_letters(self, route: str, code: str, count: int) -> None:
        """``count`` dead letters were confirmed."""
        self._dead_letters[route, code].inc(count)

    def retries(self, route: str, count: int) -> None:
        """``count`` requests get a further attempt."""
        self._retries[(route,)].inc(count)

    def redeliveries(self, route: str, count: int) -> None:
        """``count`` records had been delivered before."""
        self._redeliveries[(route,)].inc(count)

    def results_lost(self, route: str, count: int) -> None:
        """``count`` results had been confirmed by Redis and were gone when it was connected anew."""
        self._results_lost[(route,)].inc(count)

    def shadow_outcomes(self, route: str, version: str, outcome: str, count: int) -> None:
        """``count`` requests were answered by a shadow."""
        self._shadow_requests[route, version, outcome].inc(count)

    def shadow_shed(self, route: str, version: str, count: int) -> None:
        """``count`` shadow rows were dropped to leave room."""
        self._shadow_shed[route, version].inc(count)

    def route_revision(self, revision: str) -> None:
        """This revision is in force: a number, or a hexadecimal hash of 12 digits."""
        number = revision.isdecimal() and len(revision) < 12
        self._revision.set(int(revision or "0") if number or not revision else int(revision, 16))

    def route_revision_age(self, seconds: float) -> None:
        """For so long the routes could not be followed; 0 while they are."""
        self._revision_age.set(seconds)

    def model_ready(self, model: str, version: str, ready: bool) -> None:
        """Whether a version is loaded, checked and warm."""
        self._model_ready[model, version].set(ready)
