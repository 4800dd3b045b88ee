"""A histogram for columns of values, with exemplars: its cost is by call, never by value."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class _Series(NamedTuple):
    counts: npt.NDArray[np.int64]
    total: float
    exemplars: dict[int, Exemplar]


class BulkHistogram(Collector):
    """A histogram that takes many values at once: one sort into buckets per call, none per value.

    Each bucket keeps the last exemplar that fell into it, with the time at which it was seen (``utc_s``).
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
        utc_s: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._bounds = np.array(bounds, dtype=np.float64)
        self._utc_s = utc_s
        self._names = [
            floatToGoString(bound)  # type: ignore[no-untyped-call]
            for bound in (*bounds, float("inf"))
        ]
        self._lock = threading.Lock()
        self._series: dict[Labels, _Series] = {}
        registry.register(self)

    def observe_many(
        self,
        labels: Labels,
        values: Sequence[float] | npt.NDArray[np.float64],
        trace: str | None = None,
        at: int = 0,
    ) -> None:
        """Count every value; negative ones (clocks differ between machines) count as zero.

        ``trace`` is the trace id of the value at index ``at``, which becomes the exemplar of its bucket.
        """
        if not len(values):
            return
        array = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
        size = len(self._names)
        counts = np.bincount(np.searchsorted(self._bounds, array, side="left"), minlength=size)
        total = float(array.sum())
        with self._lock:
            old = self._series.get(labels)
            if old is None:
                new = _Series(counts, total, {})
            else:
                new = _Series(old.counts + counts, old.total + total, old.exemplars)
            if trace is not None:
                value = float(array[at])
                bucket = int(np.searchsorted(self._bounds, value, side="left"))
                new.exemplars[bucket] = Exemplar({"trace_id": trace}, value, self._utc_s())
            self._series[labels] = new

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the family without samples, so that a name taken twice is noticed."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the family with the counts so far."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        with self._lock:
            series = [
                (labels, each.counts, each.total, dict(each.exemplars))
                for labels, each in self._series.items()
            ]
        for labels, counts, total, exemplars in series:
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
                (name, count, exemplars[index]) if index in exemplars else (name, count)
                for index, (name, count) in enumerate(
                    zip(self._names, np.cumsum(counts).tolist(), strict=True)
                )
            ]
            family.add_metric(labels, buckets, total)
        return [family]
