"""The metrics that are read off the loop's state now and then, not counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from inferfleet.core.admission import Admission
from inferfleet.core.batcher import Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.schedule import Schedule


class Gauges:
    """Where the gauges of the record path are read; owned by the worker loop's thread."""

    def __init__(
        self, ledger: Ledger, batcher: Batcher, admission: Admission, metrics: PrometheusMetrics
    ) -> None:
        self._ledger = ledger
        self._batcher = batcher
        self._admission = admission
        self._metrics = metrics
        self._queues: set[tuple[str, str, str]] = set()

    def refresh(self, schedules: Collection[Schedule], lag: Mapping[str, int], now_ms: int) -> None:
        """Read them for these routes; ``lag`` is how many records of each are not taken yet."""
        streams = self._ledger.streams
        queues: set[tuple[str, str, str]] = set()
        for schedule in schedules:
            name = schedule.name
            self._metrics.streams(name, sum(stream.source in schedule.sources for stream in streams))
            oldest = self._ledger.oldest_timestamp_ms(schedule.sources)
            self._metrics.oldest_request_seconds(
                name, 0.0 if oldest is None else max(0.0, (now_ms - oldest) / 1000)
            )
            self._metrics.consumer_lag(name, lag.get(name, 0))
            self._metrics.in_flight(name, *self._admission.held(name))
            for variant in [variant for plan in schedule.plans for variant in plan.variants]:
                served, role = variant.served, variant.role
                waiting = self._batcher.waiting(served.model, served.version, role)
                self._metrics.queue_rows(served.model, served.version, role, waiting)
                queues.add((served.model, served.version, role))
        for gone in self._queues - queues:
            self._metrics.queue_gone(*gone)
        self._queues = queues
