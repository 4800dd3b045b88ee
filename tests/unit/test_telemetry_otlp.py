"""Spans as they arrive at a collector, by the real exporter; and what a collector that is away costs."""

from __future__ import annotations

import socket
import sys
import threading

import pytest

from inferfleet.cli.tracing import open_traces
from inferfleet.config import Config, Fleet, Traces, Worker
from inferfleet.errors import ConfigError
from inferfleet.telemetry.otlp import OtlpExport
from inferfleet.telemetry.traces import NO_TRACES, Context, Span
from tests.support.traces import TRACE_ID, Collector

SPAN = Span(
    "process q",
    "consumer",
    Context(TRACE_ID, "00000000000000ab", "rojo=1"),
    Context(TRACE_ID, "00f067aa0ba902b7", "rojo=1"),
    1_700_000_000_000_000_000,
    1_700_000_000_002_000_000,
    {"messaging.system": "kafka", "messaging.kafka.offset": 7},
    [Context("a" * 32, "b" * 16)],
    "E_SHAPE",
)


def test_a_span_arrives_as_it_was_recorded() -> None:
    """Ids, times, links, state and status; and who sent it."""
    with Collector() as collector:
        export = OtlpExport(collector.url + "/", {"service.name": "w", "service.version": "1.2"})
        export.export(SPAN)
        export.close(20.0)

        (found,) = collector.spans
    assert found[:6] == (
        "process q",
        "SPAN_KIND_CONSUMER",
        TRACE_ID,
        "00000000000000ab",
        "00f067aa0ba902b7",
        "rojo=1",
    )
    assert found.attributes == {"messaging.system": "kafka", "messaging.kafka.offset": 7}
    assert found.links == [("a" * 32, "b" * 16)]
    assert found.failed
    assert (found.start_ns, found.end_ns) == (SPAN.start_ns, SPAN.end_ns)
    assert found.resource["service.name"] == "w"
    assert found.resource["service.version"] == "1.2"


def test_a_worker_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleet and worker from the settings; the usual variable overrules the service's name."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "digits-workers")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        config = Config(fleet=Fleet(name="shop"), worker=Worker(id="w-1"), traces=Traces(exporter="otlp"))
        traces, close = open_traces(config)
        assert traces.on
        traces._export(SPAN)  # type: ignore[attr-defined]
        close()

        (found,) = collector.spans
    assert found.resource["service.name"] == "digits-workers"
    assert found.resource["service.namespace"] == "shop"
    assert found.resource["service.instance.id"] == "w-1"


def test_without_an_exporter_nothing_of_the_sdk_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with one, its absence is told by the name of the extra."""
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    traces, close = open_traces(Config())
    close()
    assert traces is NO_TRACES
    with pytest.raises(ConfigError, match=r"pip install '\.\[otlp\]'"):
        open_traces(Config(traces=Traces(exporter="otlp")))


def test_a_span_that_cannot_be_made_ends_nobody() -> None:
    """The record path is never told of trouble with traces."""
    with Collector() as collector:
        export = OtlpExport(collector.url, {"service.name": "w"})
        export.export(SPAN._replace(context=Context("no hexadecimal", "")))
        export.export(SPAN)
        export.close(20.0)

        assert len(collector.spans) == 1


def test_a_collector_that_is_away_holds_up_no_end(caplog: pytest.LogCaptureFixture) -> None:
    """It takes the connection and says nothing: the worker leaves while its last span still waits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        export = OtlpExport(f"http://127.0.0.1:{silent.getsockname()[1]}", {"service.name": "w"})
        export.export(SPAN)
        export.close(0.2)

        (ending,) = (thread for thread in threading.enumerate() if thread.name == "traces-end")
    # its listener is gone: the one attempt fails, and no other follows
    ending.join(30.0)
    assert not ending.is_alive()
    assert "shutdown" in caplog.text
    assert "retrying" not in caplog.text
