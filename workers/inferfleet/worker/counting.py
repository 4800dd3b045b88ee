"""What is measured where a batch has run and where records are settled: by batch and by part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inferfleet.core.cost import padding
from inferfleet.errors import Code
from inferfleet.ports import Clock
from inferfleet.records import Batch, BatchResult
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.telemetry.traces import Ended, Traces
from inferfleet.trace_context import first_sampled, is_sampled, trace_id
from inferfleet.worker.settling import Settling


class Counting:
    """Tells metrics and traces of batches and outcomes; owned by the worker loop's thread."""

    def __init__(self, metrics: PrometheusMetrics, traces: Traces, clock: Clock) -> None:
        self._metrics = metrics
        self._traces = traces
        self._clock = clock
        self._confirmed_at: float | None = None
        """When the first outcome since the last commit was confirmed, in monotonic seconds."""

    def batch(self, result: BatchResult) -> float:
        """Count a batch that has run; return the monotonic time at which that was heard of."""
        now = self._clock.monotonic()
        batch, lane = result.batch, result.batch.lane
        filling = padding(batch.parts) if batch.parts[0].costs is not None else None
        named = (lane.model, lane.version, lane.role)
        self._metrics.batch(*named, batch.rows, result.seconds, filling, _sampled_in(batch))
        if self._traces.on:
            self._traces.batch(result, self._clock.utc_ms() * 1_000_000)
        if batch.since:
            self._metrics.stage("gather", max(0.0, now - result.seconds - batch.since))
        self._metrics.stage("predict", result.seconds)
        return now

    def written(self, since: float) -> None:
        """The outcomes of a batch are handed over; its end was heard of at ``since``."""
        self._metrics.stage("write", self._clock.monotonic() - since)

    def outcomes(self, settling: Settling) -> None:
        """Count outcomes, or the records of further attempts, that every outlet has confirmed."""
        if self._confirmed_at is None:
            self._confirmed_at = self._clock.monotonic()
        if self._traces.on and settling.traces is not None:
            self._traces.ended(*self._ended(settling, settling.traces))
        for (version, variant, outcome), count in settling.outcomes.items():
            self._metrics.outcomes(settling.plan.name, version, variant, outcome, count)

    def committed(self) -> None:
        """What was confirmed has gone to the broker as positions."""
        if self._confirmed_at is not None:
            self._metrics.stage("settle", self._clock.monotonic() - self._confirmed_at)
            self._confirmed_at = None

    def latencies(self, settling: Settling, now_ms: int) -> npt.NDArray[np.float64]:
        """Count how long the requests took, from their timestamps to now; return it, in seconds."""
        timestamps = settling.chunk.timestamps_ms
        if len(settling.rows) < len(timestamps):
            timestamps = [timestamps[row] for row in settling.rows]
        seconds: npt.NDArray[np.float64] = (now_ms - np.array(timestamps)) / 1000
        served = settling.served
        named = ("", "") if served is None else (served.version, served.variant)
        trace, at = (None, 0) if settling.traces is None else exemplar_of(settling.traces, seconds)
        self._metrics.request_seconds(settling.plan.name, seconds, *named, trace=trace, at=at)
        if settling.given_at:
            self._metrics.stage("hand_over", self._clock.monotonic() - settling.given_at)
        return seconds

    def _ended(self, settling: Settling, traces: Sequence[bytes | None]) -> tuple[Ended, int, int]:
        """Return requests for their traces, and the epoch nanoseconds from when to when they were here."""
        codes: Sequence[Code | None] | None = settling.codes
        if settling.replaced:
            codes = [settling.replaced.get(row) for row in settling.rows]
        end_ns = self._clock.utc_ms() * 1_000_000
        here_ns = round((self._clock.monotonic() - settling.chunk.taken_at) * 1e9)
        ended = Ended(
            settling.chunk,
            settling.rows,
            settling.ids,
            traces,
            settling.plan.name,
            settling.served,
            codes,
            again=not settling.outcomes,
        )
        return ended, end_ns - max(0, here_ns), end_ns


def _sampled_in(batch: Batch) -> str | None:
    """Return the id of a trace that its caller records and that has a request in this batch, if any has."""
    for part in batch.parts:
        if part.traces is not None:
            index = first_sampled(part.traces)
            trace = None if index is None else part.traces[index]
            if trace is not None:
                return trace_id(trace)
    return None


def exemplar_of(traces: Sequence[bytes | None], seconds: npt.NDArray[np.float64]) -> tuple[str | None, int]:
    """Return the trace to show for these spans, and its index: the slowest's if it is recorded, else any."""
    index: int | None = int(seconds.argmax())
    slowest = traces[index or 0]
    if slowest is None or not is_sampled(slowest):
        index = first_sampled(traces)
    found = None if index is None else traces[index]
    return (None, 0) if index is None or found is None else (trace_id(found), index)
