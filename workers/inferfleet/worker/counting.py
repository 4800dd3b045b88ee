"""What is measured where a batch has run and where records are settled: by batch and by part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from inferfleet.core.cost import padding
from inferfleet.ports import Clock
from inferfleet.records import BatchResult
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.settling import Settling


class Counting:
    """Tells the metrics of batches and outcomes; owned by the worker loop's thread."""

    def __init__(self, metrics: PrometheusMetrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock

    def batch(self, result: BatchResult) -> float:
        """Count a batch that has run; return the monotonic time at which that was heard of."""
        now = self._clock.monotonic()
        batch, lane = result.batch, result.batch.lane
        filling = padding(batch.parts) if batch.parts[0].costs is not None else None
        self._metrics.batch(lane.model, lane.version, lane.role, batch.rows, result.seconds, filling)
        if batch.since:
            self._metrics.stage("gather", max(0.0, now - result.seconds - batch.since))
        self._metrics.stage("predict", result.seconds)
        return now

    def written(self, since: float) -> None:
        """The outcomes of a batch are handed over; its end was heard of at ``since``."""
        self._metrics.stage("write", self._clock.monotonic() - since)

    def outcomes(self, settling: Settling) -> None:
        """Count outcomes that every outlet has confirmed."""
        for (version, variant, outcome), count in settling.outcomes.items():
            self._metrics.outcomes(settling.plan.name, version, variant, outcome, count)

    def latencies(self, settling: Settling, now_ms: int) -> npt.NDArray[np.float64]:
        """Count how long the requests took, from their timestamps to now; return it, in seconds."""
        timestamps = settling.chunk.timestamps_ms
        if len(settling.rows) < len(timestamps):
            timestamps = [timestamps[row] for row in settling.rows]
        seconds: npt.NDArray[np.float64] = (now_ms - np.array(timestamps)) / 1000
        served = settling.served
        named = ("", "") if served is None else (served.version, served.variant)
        self._metrics.request_seconds(settling.plan.name, seconds, *named)
        if settling.given_at:
            self._metrics.stage("hand_over", self._clock.monotonic() - settling.given_at)
        return seconds
