"""The trace that a request goes on with: the calling program's current one, where it traces at all."""

from __future__ import annotations

import sys

from inferfleet.trace_context import TRACEPARENT, TRACESTATE


def current_trace() -> dict[str, bytes]:
    """Return the headers of the current OpenTelemetry context; empty where there is none.

    A program that has not imported OpenTelemetry has no context, so nothing is imported here for it.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {name: carrier[name].encode() for name in (TRACEPARENT, TRACESTATE) if name in carrier}
