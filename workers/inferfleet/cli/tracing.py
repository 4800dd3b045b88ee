"""Chooses where a worker's traces go."""

from __future__ import annotations

from collections.abc import Callable

from inferfleet import __version__
from inferfleet.config import Config
from inferfleet.telemetry.traces import NO_TRACES, RecordTraces, Traces

FLUSH_S = 2.0
"""How long the end of a worker waits for its last spans to be taken."""


def open_traces(config: Config) -> tuple[Traces, Callable[[], None]]:
    """Return what records this worker's traces, and what ends it within a bound; raises ConfigError."""
    if config.traces.exporter == "off":
        return NO_TRACES, _nothing
    from inferfleet.telemetry.otlp import OtlpExport

    export = OtlpExport(
        config.traces.endpoint,
        {
            "service.name": "inferfleet-worker",
            "service.namespace": config.fleet.name,
            "service.instance.id": config.worker_id,
            "service.version": __version__,
        },
    )
    return RecordTraces(export.export, config.group, config.traces.sample_ratio), lambda: export.close(
        FLUSH_S
    )


def _nothing() -> None:
    """Nothing was opened."""
