"""A trace context for tests, and a receiver of spans that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""A sampled trace, as its header says it."""


class Received(NamedTuple):
    """A span as it came over the wire; ``links`` are pairs of trace and span, ids in hexadecimal."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    failed: bool
    start_ns: int
    end_ns: int
    resource: dict[str, Any]


class Collector:
    """Keeps the spans that are sent to it; usable as a context manager."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                good = self.path == "/v1/traces"
                if good:
                    spans.extend(_read(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200 if good else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Tests look at the spans."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Where spans are to be sent, without the path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def named(self, start: str) -> list[Received]:
        """Return the spans whose name begins so."""
        return [span for span in list(self.spans) if span.name.startswith(start)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _read(body: bytes) -> list[Received]:
    found = []
    for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _plain(resource_spans.resource.attributes)
        for scope in resource_spans.scope_spans:
            found += [_span(span, resource) for span in scope.spans]
    return found


def _span(span: SpanMessage, resource: dict[str, Any]) -> Received:
    return Received(
        span.name,
        SpanMessage.SpanKind.Name(span.kind),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        _plain(span.attributes),
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        span.status.code == Status.STATUS_CODE_ERROR,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        resource,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
