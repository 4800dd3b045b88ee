"""A worker that measures less of itself: ``python -m loadtest.mutedworker exemplars|metrics ARGUMENTS…``.

The comparison for ``python -m loadtest telemetry``: all else is the worker's own.
"""

from __future__ import annotations

import sys
from typing import Any

from inferfleet.cli import main
from inferfleet.cli import worker as command
from inferfleet.telemetry.metrics import PrometheusMetrics


class WithoutExemplars(PrometheusMetrics):
    """Counts everything, and shows no trace beside it."""

    def request_seconds(self, *values: Any, **_: Any) -> None:
        """Count without an exemplar."""
        super().request_seconds(*values)

    def batch(self, *values: Any) -> None:
        """Count without an exemplar: the last value is the trace."""
        super().batch(*values[:6])


def _nothing(*_: Any, **__: Any) -> None:
    """Measure nothing."""


class WithoutMetrics(PrometheusMetrics):
    """Counts nothing on the record path; gauges that are read once a second stay."""


for _name in ("outcomes", "request_seconds", "records", "stage", "batch", "route_paused"):
    setattr(WithoutMetrics, _name, _nothing)

MUTED: dict[str, type[PrometheusMetrics]] = {"exemplars": WithoutExemplars, "metrics": WithoutMetrics}

if __name__ == "__main__":
    what, *sys.argv[1:] = sys.argv[1:]
    command.PrometheusMetrics = MUTED[what]  # type: ignore[misc]
    main()
