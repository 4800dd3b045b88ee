"""One trace from a program that asks through a worker to outcomes, log lines and metrics, on both brokers."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from inferfleet.trace_context import is_sampled
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Outcome, Reader
from tests.support.rabbitmq_fleet import Queues
from tests.support.servers import KafkaServer, RabbitServer
from tests.support.traces import Collector, Received
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PROGRAM = """
import sys
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from inferfleet import Client

config, endpoint = sys.argv[1:]
provider = TracerProvider(resource=Resource.create({"service.name": "shop"}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint + "/v1/traces")))
tracer = provider.get_tracer("shop")
with Client(config, reply=False) as client:
    with tracer.start_as_current_span("order") as span:
        for route in ("topics", "queues"):
            client.submit(route, {"x": [[1.0, 2.0, 3.0, 4.0]]}, id=f"good-{route}", key=route)
            client.submit(route, {"x": [[1.0]]}, id=f"bad-{route}", key=route)
    client.submit("topics", {"x": [[5.0, 6.0, 7.0, 8.0]]}, id="outside", key="topics")
provider.shutdown()
print(f"{span.get_span_context().trace_id:032x} {span.get_span_context().span_id:016x}")
"""
ROUTES = ("topics", "queues")


class Followed(NamedTuple):
    """What is left of one trace: ids of it and of the program's span, spans, outcomes, and the worker."""

    trace_id: str
    span_id: str
    spans: list[Received]
    outcomes: dict[str, Outcome]
    fleet: Fleet
    worker: WorkerProcess

    def span_of(self, request_id: str) -> Received:
        (found,) = [each for each in self.spans if each.attributes.get("messaging.message.id") == request_id]
        return found


@pytest.fixture(scope="module")
def followed(
    kafka: KafkaServer, rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Followed]:
    """A program asks in one span, well and badly, through Kafka and through RabbitMQ; a worker answers."""
    folder = tmp_path_factory.mktemp("traces")
    with Collector() as collector:
        settings = {"traces": {"exporter": "otlp", "endpoint": collector.url}}
        with Fleet(folder, kafka, rabbitmq=rabbitmq, settings=settings) as fleet:
            fleet.checksum("sums")
            fleet.checksum("others")  # routes of one model share batches
            fleet.route("topics", partitions=1)
            source = Queues(fleet, rabbitmq, "queues").route_keys["source"]
            results = [f"kafka:{fleet.results('queues')}"]
            fleet.route("queues", model="others", source=source, results=results)
            fleet.prepare()
            worker = fleet.worker("w-traced", OTEL_BSP_SCHEDULE_DELAY="50")
            program = _run(folder, fleet, collector)
            outcomes: dict[str, Outcome] = {}
            for route in ROUTES:
                with Reader(kafka.client_config(), fleet.results(route)) as reader:
                    wanted = [f"good-{route}", f"bad-{route}", *(["outside"] if route == "topics" else [])]
                    reader.wait_ids(wanted)
                    outcomes |= {name: reader.only(name) for name in wanted}
            wait_until(lambda: len(collector.named("process")) == 4, 30, f"spans: {collector.spans}")
            wait_until(lambda: len(collector.named("predict")) == 2, 30, f"spans: {collector.spans}")
            yield Followed(*program, list(collector.spans), outcomes, fleet, worker)
            assert worker.finish() == 0, worker.log_tail()


def _run(folder: Path, fleet: Fleet, collector: Collector) -> tuple[str, str]:
    """Run the program to its end; return the ids of its trace and its span."""
    file = folder / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(file), str(fleet.config), collector.url],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trace_id, span_id = done.stdout.split()
    return trace_id, span_id


@pytest.mark.parametrize("name", [f"{kind}-{route}" for route in ROUTES for kind in ("good", "bad")])
def test_each_request_is_a_span_below_the_programs_own(followed: Followed, name: str) -> None:
    """Two processes, one trace: who asked, which worker, what became of it."""
    (order,) = [each for each in followed.spans if each.name == "order"]
    span = followed.span_of(name)

    assert (order.trace_id, order.span_id) == (followed.trace_id, followed.span_id)
    assert (span.trace_id, span.parent_id) == (followed.trace_id, followed.span_id)
    assert (order.resource["service.name"], span.resource["service.name"]) == ("shop", "inferfleet-worker")
    assert span.resource["service.instance.id"] == "w-traced"
    assert span.kind == "SPAN_KIND_CONSUMER"
    assert span.failed is name.startswith("bad")
    assert span.attributes["inferfleet.outcome"] == ("E_SHAPE" if span.failed else "ok")
    on_kafka = name.endswith("topics")
    assert span.attributes["messaging.system"] == ("kafka" if on_kafka else "rabbitmq")


@pytest.mark.parametrize("route", ROUTES)
def test_the_batch_links_to_its_request_and_the_request_to_its_batch(followed: Followed, route: str) -> None:
    """The batch has a trace of its own, for it may serve many."""
    request = followed.span_of(f"good-{route}")
    (place,) = request.links
    (batch,) = [each for each in followed.spans if (each.trace_id, each.span_id) == place]

    assert batch.name == f"predict {'sums' if route == 'topics' else 'others'}"
    assert batch.trace_id != followed.trace_id
    assert batch.links == [(request.trace_id, request.span_id)]
    # What was asked outside of the trace may have run with it, and is not among the links.
    assert batch.attributes["messaging.batch.message_count"] in ((1, 2) if route == "topics" else (1,))
    assert followed.span_of(f"bad-{route}").links == []


@pytest.mark.parametrize("name", [f"{kind}-{route}" for route in ROUTES for kind in ("good", "bad")])
def test_the_outcome_goes_on_from_the_workers_span(followed: Followed, name: str) -> None:
    """Whoever reads it stands below the worker in the same trace."""
    span = followed.span_of(name)
    header = followed.outcomes[name].headers["traceparent"]

    assert header.decode().split("-")[:3] == ["00", followed.trace_id, span.span_id]
    assert is_sampled(header)


def test_the_log_line_of_a_failure_names_the_trace(followed: Followed) -> None:
    """One line for each of the two, with the same id."""
    lines = followed.worker.events("requests_failed")

    assert {(each["route"], each["code"], each["trace_id"]) for each in lines} == {
        (route, "E_SHAPE", followed.trace_id) for route in ROUTES
    }


def test_an_exemplar_leads_from_the_metrics_to_the_trace(followed: Followed) -> None:
    """In the OpenMetrics format, by the admin address; the plain format stays as it was."""
    asked = urllib.request.Request(
        f"http://{followed.worker.address}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        kind, text = answer.headers["Content-Type"], answer.read().decode()
    found = {
        (sample.name, sample.labels.get("route", sample.labels.get("model")))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels["trace_id"] == followed.trace_id
    }

    assert kind.startswith("application/openmetrics-text")
    assert found == {
        ("inferfleet_request_seconds_bucket", "topics"),
        ("inferfleet_request_seconds_bucket", "queues"),
        ("inferfleet_batch_seconds_bucket", "sums"),
        ("inferfleet_batch_seconds_bucket", "others"),
    }
    assert followed.trace_id not in followed.worker.ask("/metrics")[1].decode()


def test_a_request_outside_of_any_trace_stays_outside(followed: Followed) -> None:
    """Nothing is recorded of it, and its outcome carries nothing."""
    assert "traceparent" not in followed.outcomes["outside"].headers
    assert not [each for each in followed.spans if each.attributes.get("messaging.message.id") == "outside"]
