"""Every metric of inferfleet, defined once.

Names carry base units; labels come from configuration only (route, model, version, variant, role) or from
a closed list (outcome, stage, code), never from a request. Methods are called per batch or per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
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
from prometheus_client.metrics import MetricWrapperBase

from inferfleet.telemetry.bulk import BulkHistogram

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

    def forget(self, *labels: str) -> None:
        """Expose nothing under these labels any longer."""
        if self.pop(labels, None) is not None:
            self._metric.remove(*labels)

    def only(self, firsts: Container[str]) -> None:
        """Expose nothing any longer whose first label is not among ``firsts``."""
        for labels in [labels for labels in self if labels[0] not in firsts]:
            self.forget(*labels)


class PrometheusMetrics:
    """What a worker reports, on a registry of its own."""

    def __init__(self, version: str = "", worker: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._goals: dict[str, float] = {}
        self._define_requests()
        self._define_batches()
        self._define_states()
        self._define_versions()
        build = Gauge(f"{PREFIX}build_info", "Always 1.", ("version", "worker"), registry=self.registry)
        build.labels(version, worker).set(1)

    def _define_requests(self) -> None:
        self._requests = self._counter(
            "requests", "Requests that have their outcome.", "route", "version", "variant", "outcome"
        )
        variant = ("route", "version", "variant")
        self._request_seconds = BulkHistogram(
            f"{PREFIX}request_seconds",
            "From the broker's timestamp to the confirmed outcome.",
            variant,
            REQUEST_SECONDS,
            self.registry,
        )
        self._over_goal = self._counter(
            "requests_over_goal", "Requests whose outcome came later than goal_p99_ms.", *variant
        )
        self._goal = self._gauge("route_goal_seconds", "The route's goal_p99_ms in seconds.", "route")
        self._records = self._counter("records", "Records taken.", "route")
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
        self._shadow_rows = self._counter(
            "shadow_rows",
            "Rows that both have answered, by how far the answers differ.",
            *("route", "version", "result"),
        )

    def _define_batches(self) -> None:
        self._stage_seconds = self._histogram(
            "stage_seconds", "Time that a chunk or a batch spent at a station.", BATCH_SECONDS, "stage"
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

    def _define_states(self) -> None:
        self._in_flight_rows = self._gauge("in_flight_rows", "Rows taken and not settled.", "route")
        self._in_flight_bytes = self._gauge("in_flight_bytes", "Bytes taken and not settled.", "route")
        self._lag = self._gauge(
            "consumer_lag", "Records not taken yet, over this worker's partitions.", "route"
        )
        self._oldest = self._gauge("oldest_request_seconds", "Age of the oldest open request.", "route")
        self._paused = self._gauge("route_paused", "1 while the route is not taken from.", "route")
        self._streams = self._gauge("streams", "Partitions or channels that this worker takes from.", "route")
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
        self._routes_refused = Gauge(
            f"{PREFIX}routes_refused",
            "1 while the newest routes as a whole cannot be read or served.",
            registry=self.registry,
        )
        self._adopted = self._gauge("route_adopted", "The route's revision that is served.", "route")
        self._refused = self._gauge(
            "route_refused", "1 while the route's newest revision cannot be served.", "route"
        )

    def _define_versions(self) -> None:
        self._model_ready = self._gauge("model_ready", "1 when loaded, checked and warm.", "model", "version")
        self._model_refused = self._gauge(
            "model_refused", "1 from a load that failed until one succeeds.", "model", "version"
        )
        self._model_loads = self._counter(
            "model_loads", "Loads of versions that ended.", "model", "version", "outcome"
        )
        self._ready = Gauge(
            f"{PREFIX}worker_ready",
            "1 while the worker is ready: versions warm, and a member of its group.",
            registry=self.registry,
        )

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

    def request_seconds(
        self,
        route: str,
        seconds: Sequence[float] | npt.NDArray[np.float64],
        version: str = "",
        variant: str = "",
        *,
        trace: str | None = None,
        at: int = 0,
    ) -> None:
        """Spans from the broker's timestamp to the confirmed outcome; a list or an array, any length.

        Version and variant are empty where none had a part in it. ``trace`` is the trace id of the span at
        index ``at``, which becomes an exemplar.
        """
        labels = (route, version, variant)
        self._request_seconds.observe_many(labels, seconds, trace, at)
        goal = self._goals.get(route)
        if goal is not None:
            self._over_goal[labels].inc(int(np.count_nonzero(np.asarray(seconds) > goal)))

    def routes(self, goals: Mapping[str, float | None]) -> None:
        """These routes are served from now on, each with its latency goal in seconds, if it has one.

        What is counted by route stands at 0 from the start, so that the first event is a rise; what is
        read off is no longer shown for a route that has gone.
        """
        gauges = (
            self._goal, self._in_flight_rows, self._in_flight_bytes, self._lag, self._oldest, self._paused,
            self._streams,
        )  # fmt: skip
        for gauge in gauges:
            gauge.only(goals)
        self._goals = {route: goal for route, goal in goals.items() if goal is not None}
        for route in goals:
            for counter in (self._records, self._retries, self._redeliveries, self._results_lost):
                counter[(route,)].inc(0)
            self._paused[(route,)].inc(0)
            goal = self._goals.get(route)
            if goal is None:
                self._goal.forget(route)
            else:
                self._goal[(route,)].set(goal)

    def records(self, route: str, count: int) -> None:
        """``count`` records of a route were taken."""
        self._records[(route,)].inc(count)

    def stage(self, stage: str, seconds: float) -> None:
        """A chunk or batch spent so long at a station.

        ``take``: a chunk from the broker until it is read; ``read``: until its requests wait; ``gather``:
        from there until a batch's model began, for its first; ``predict``; ``write``: from there until all
        its outcomes are handed over; ``hand_over``: until the outlets have confirmed those of one chunk's
        part; ``settle``: the first that was confirmed since a commit, until the next one.
        """
        self._stage_seconds[(stage,)].observe(seconds)

    def batch(
        self,
        model: str,
        version: str,
        role: str,
        rows: int,
        seconds: float,
        padding: float | None = None,
        trace: str | None = None,
    ) -> None:
        """One batch ran; ``padding`` is the share of it that was filling, ``None`` without padding.

        ``trace`` is the id of a trace that the batch had a part in, which becomes an exemplar.
        """
        lane = (model, version, role)
        self._batch_rows[lane].observe(rows)
        self._batch_seconds[lane].observe(seconds, None if trace is None else {"trace_id": trace})
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

    def streams(self, route: str, count: int) -> None:
        """This worker takes from so many partitions or channels of a route."""
        self._streams[(route,)].set(count)

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

    def shadow_rows(self, route: str, version: str, identical: int, close: int, different: int) -> None:
        """So many rows were compared with the answering version's."""
        for result, count in (("identical", identical), ("close", close), ("different", different)):
            self._shadow_rows[route, version, result].inc(count)

    def route_revision(self, revision: str) -> None:
        """This revision is in force: a number, or a hexadecimal hash of 12 digits."""
        number = revision.isdecimal() and len(revision) < 12
        self._revision.set(int(revision or "0") if number or not revision else int(revision, 16))

    def route_revision_age(self, seconds: float) -> None:
        """For so long the routes could not be followed; 0 while they are."""
        self._revision_age.set(seconds)

    def routes_refused(self, refused: bool) -> None:
        """Whether the newest routes as a whole cannot be read or served; those before go on."""
        self._routes_refused.set(refused)

    def queue_gone(self, model: str, version: str, role: str) -> None:
        """Nothing can wait for this version in this role any longer."""
        self._queue_rows.forget(model, version, role)

    def routes_adopted(self, revisions: Mapping[str, int], refused: Collection[str]) -> None:
        """These revisions of routes are served, or could be at once; 0 is one from a file.

        Of ``refused`` routes the newest revision cannot be served here; what was served before goes on.
        """
        self._adopted.only(revisions)
        self._refused.only({*revisions, *refused})
        for route, number in revisions.items():
            self._adopted[(route,)].set(number)
        for route in {*revisions, *refused}:
            self._refused[(route,)].set(route in refused)

    def model_loading(self, model: str, version: str) -> None:
        """A version begins to load."""
        self._model_ready[model, version].set(0)
        self._model_refused[model, version].inc(0)
        for outcome in ("ok", "refused"):
            self._model_loads[model, version, outcome].inc(0)

    def model_loaded(self, model: str, version: str, ready: bool) -> None:
        """A version is loaded, checked and warm, or could not be."""
        self._model_ready[model, version].set(ready)
        self._model_refused[model, version].set(not ready)
        self._model_loads[model, version, "ok" if ready else "refused"].inc()

    def model_gone(self, model: str, version: str) -> None:
        """Nobody wants a version any longer."""
        self._model_ready.forget(model, version)
        self._model_refused.forget(model, version)

    def readiness(self, ready: Callable[[], bool]) -> None:
        """Ask ``ready`` whenever the metrics are read; it is called on any thread."""
        self._ready.set_function(lambda: float(ready()))
