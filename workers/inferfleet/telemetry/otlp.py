"""Spans to an OpenTelemetry collector: OTLP over HTTP, from a thread of the SDK's own.

The SDK belongs to the extra ``otlp`` and is imported when traces are exported, not before. Where to, with
which headers, how much at once and how often are the SDK's own variables (``OTEL_EXPORTER_OTLP_*``,
``OTEL_BSP_*``, ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``). What the collector does not take in time
is dropped: the record path never waits for it.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import structlog

from inferfleet.errors import ConfigError
from inferfleet.telemetry.traces import Context, Span

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

log = structlog.get_logger(__name__)

TRACES_PATH = "/v1/traces"
SCOPE = "inferfleet"


class OtlpExport:
    """Takes spans that have ended; :meth:`export` returns at once.

    ``endpoint`` is the collector's address, such as ``http://collector:4318``; empty: the SDK's variables,
    else ``http://localhost:4318``. ``resource`` says who exports. Raises ConfigError without the extra, or
    for an address that is none.
    """

    def __init__(self, endpoint: str, resource: dict[str, str]) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError:
            raise ConfigError(
                "[traces] exporter = \"otlp\" needs the SDK: pip install '.[otlp]' in a checkout"
            ) from None
        named = os.environ.get("OTEL_SERVICE_NAME")
        if named:
            resource = {**resource, "service.name": named}
        self._resource = Resource.create(resource)
        self._scope = InstrumentationScope(SCOPE, resource.get("service.version"))
        address = endpoint.rstrip("/") + TRACES_PATH if endpoint else None
        self._exporter = OTLPSpanExporter(endpoint=address)
        self._processor = BatchSpanProcessor(self._exporter)

    def export(self, span: Span) -> None:
        """Queue a span; the oldest is dropped where there are too many. Raises nothing."""
        try:
            self._queue(span)
        except Exception:  # no span may end a worker
            log.exception("span_not_exported")

    def _queue(self, span: Span) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Link, SpanKind, Status, StatusCode

        self._processor.on_end(
            ReadableSpan(
                span.name,
                context=_named(span.context, remote=False),
                parent=None if span.parent is None else _named(span.parent, remote=True),
                resource=self._resource,
                attributes=dict(span.attributes),
                links=[Link(_named(link, remote=True)) for link in span.links],
                kind=SpanKind.CONSUMER if span.kind == "consumer" else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=self._scope,
            )
        )

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for so long at most: a collector that is away must hold up nobody's end.

        What is under way then is not tried again: the SDK alone would go on for its own 30 s.
        """
        ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(timeout_s)
        if ending.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK has no types here


def _named(context: Context, *, remote: bool) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    state: Any = TraceState.from_header([context.state]) if context.state else None
    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), remote, flags, state)
