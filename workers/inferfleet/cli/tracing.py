"""Chooses where a worker's traces go."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from inferfleet import __version__
from inferfleet.config import Config
from inferfleet.telemetry.traces import NO_TRACES, RecordTraces, Traces

SHORTEST = 4
"""A shorter text would be masked inside of ordinary words."""
FLUSH_S = 2.0
"""How long the end of a worker waits for its last spans to be taken."""


def open_traces(config: Config) -> tuple[Traces, Callable[[], None]]:
    """Return what records this worker's traces, and what ends it within a bound; raises ConfigError."""
    if config.traces.exporter == "off":
        return NO_TRACES, _nothing
    from inferfleet.telemetry.otlp import OtlpExport

    # Before the SDK reads them: it quotes what it cannot read.
    for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
        config.known_secrets.update(secrets_of(os.environ.get(name, "")))
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


def secrets_of(headers: str) -> set[str]:
    """Return all that may be a secret in a list such as ``name=value,name=value``, ``:`` for ``=`` too."""
    pairs = [each.strip() for each in headers.split(",")]
    values = [re.split("[=:]", each, maxsplit=1)[-1].strip() for each in pairs]
    return {each for each in (headers, *pairs, *values) if len(each) >= SHORTEST}


def _nothing() -> None:
    """Nothing was opened."""
