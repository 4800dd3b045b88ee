"""Metrics have the contract's names, few labels, and histograms that count every value."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from inferfleet.telemetry.bulk import BulkHistogram
from inferfleet.telemetry.metrics import PREFIX, REQUEST_SECONDS, PrometheusMetrics

CONTRACT = {
    "requests_total": {"route", "version", "variant", "outcome"},
    "request_seconds": {"route", "version", "variant"},
    "stage_seconds": {"stage"},
    "batch_rows": {"model", "version", "role"},
    "batch_seconds": {"model", "version", "role"},
    "queue_rows": {"model", "version", "role"},
    "in_flight_rows": {"route"},
    "padding_ratio": {"model", "version", "role"},
    "consumer_lag": {"route"},
    "oldest_request_seconds": {"route"},
    "dead_letters_total": {"route", "code"},
    "retries_total": {"route"},
    "redeliveries_total": {"route"},
    "shadow_requests_total": {"route", "version", "outcome"},
    "shadow_shed_total": {"route", "version"},
    "shadow_rows_total": {"route", "version", "result"},
    "route_revision": set(),
    "model_ready": {"model", "version"},
    "build_info": {"version", "worker"},
}
"""Every name of the contract, and the labels under which a worker has it."""
FURTHER = {
    "records_total": {"route"},
    "requests_over_goal_total": {"route", "version", "variant"},
    "route_goal_seconds": {"route"},
    "in_flight_bytes": {"route"},
    "streams": {"route"},
    "route_paused": {"route"},
    "results_lost_total": {"route"},
    "route_revision_age_seconds": set(),
    "routes_refused": set(),
    "route_adopted": {"route"},
    "route_refused": {"route"},
    "model_refused": {"model", "version"},
    "model_loads_total": {"model", "version", "outcome"},
    "worker_ready": set(),
}
"""What rules and dashboards rely on beside them."""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def filled() -> PrometheusMetrics:
    """Metrics with every method called once."""
    metrics = PrometheusMetrics("1.2.3", "w-1")
    metrics.routes({"r": 0.5})
    metrics.readiness(lambda: True)
    metrics.records("r", 500)
    metrics.outcomes("r", "1", "stable", "ok", 500)
    metrics.request_seconds("r", [0.01, 0.02, 3], "1", "stable", trace=TRACE, at=1)
    metrics.stage("take", 0.001)
    metrics.batch("m", "1", "primary", 64, 0.002, 0.1, TRACE)
    metrics.queue_rows("m", "1", "primary", 7)
    metrics.in_flight("r", 12, 3400)
    metrics.consumer_lag("r", 99)
    metrics.oldest_request_seconds("r", 1.5)
    metrics.streams("r", 3)
    metrics.route_paused("r", True)
    metrics.dead_letters("r", "E_SHAPE", 2)
    metrics.retries("r", 1)
    metrics.redeliveries("r", 3)
    metrics.results_lost("r", 6)
    metrics.shadow_outcomes("r", "2", "ok", 4)
    metrics.shadow_shed("r", "2", 5)
    metrics.shadow_rows("r", "2", 3, 1, 0)
    metrics.route_revision("8c946b23224b")
    metrics.route_revision_age(0.0)
    metrics.routes_refused(False)
    metrics.routes_adopted({"r": 7}, ())
    metrics.model_loading("m", "1")
    metrics.model_loaded("m", "1", True)
    return metrics


def samples(metrics: PrometheusMetrics) -> dict[str, float]:
    """Return each exposed line's value by its name with labels."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def exposed(metrics: PrometheusMetrics) -> dict[str, set[str]]:
    """Return the label names of each metric of ours, under the name that it is scraped by."""
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        if family.name.startswith(PREFIX):
            name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")
            found[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return found


def test_every_metric_of_the_contract_is_exposed_with_its_labels() -> None:
    """Names and labels are the contract's and no others; none could hold an id or a key."""
    assert exposed(filled()) == CONTRACT | FURTHER


def test_nothing_but_the_contract_has_time_series_that_nobody_asked_for() -> None:
    """The library's creation times would double every counter."""
    assert not [name for name in samples(filled()) if "_created" in name]


def test_values_arrive_where_they_belong() -> None:
    """Each method moves its own series."""
    found = samples(filled())
    key = 'route="r",variant="stable",version="1"'

    assert found[f'inferfleet_requests_total{{outcome="ok",{key}}}'] == 500
    assert found[f"inferfleet_request_seconds_count{{{key}}}"] == 3
    assert found[f"inferfleet_request_seconds_sum{{{key}}}"] == 3.03
    assert found[f'inferfleet_request_seconds_bucket{{le="0.01",{key}}}'] == 1
    assert found[f"inferfleet_requests_over_goal_total{{{key}}}"] == 1
    assert found['inferfleet_route_goal_seconds{route="r"}'] == 0.5
    assert found['inferfleet_shadow_rows_total{result="close",route="r",version="2"}'] == 1
    assert found['inferfleet_model_loads_total{model="m",outcome="refused",version="1"}'] == 0
    assert found["inferfleet_worker_ready"] == 1
    assert found['inferfleet_batch_rows_count{model="m",role="primary",version="1"}'] == 1
    assert found['inferfleet_dead_letters_total{code="E_SHAPE",route="r"}'] == 2
    assert found["inferfleet_route_revision"] == 0x8C946B23224B
    assert found['inferfleet_build_info{version="1.2.3",worker="w-1"}'] == 1


def test_two_workers_in_one_process_do_not_share_series() -> None:
    """Each instance has its own registry."""
    first, second = PrometheusMetrics(), PrometheusMetrics()
    first.retries("r", 1)

    assert "inferfleet_retries_total{route" not in generate_latest(second.registry).decode()


def test_a_numeric_revision_is_its_number() -> None:
    """Revisions of the control plane count up."""
    metrics = PrometheusMetrics()
    metrics.route_revision("17")

    assert samples(metrics)["inferfleet_route_revision"] == 17


@given(st.lists(st.lists(st.floats(-1, 4000), max_size=20), max_size=5))
def test_bulk_counting_equals_counting_one_by_one(groups: list[list[float]]) -> None:
    """The same buckets, sum and count as the library's own histogram; negative spans count as zero."""
    bulk_registry, single_registry = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("h", "d", ("route",), REQUEST_SECONDS, bulk_registry)
    single = Histogram("h", "d", ("route",), registry=single_registry, buckets=REQUEST_SECONDS)
    for group in groups:
        bulk.observe_many(("r",), group)
        for value in group:
            single.labels("r").observe(max(value, 0.0))

    def read(registry: CollectorRegistry) -> dict[str, float]:
        lines = [s for family in registry.collect() for s in family.samples]
        return {f"{s.name}{s.labels.get('le', '')}": s.value for s in lines if "_created" not in s.name}

    ours, theirs = read(bulk_registry), read(single_registry)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), [theirs[name] for name in ours])


def test_a_bound_belongs_to_its_own_bucket() -> None:
    """le means less or equal."""
    registry = CollectorRegistry()
    BulkHistogram("h", "d", (), (1.0, 2.0), registry).observe_many((), [1.0, 1.5, 2.0, 9.0])
    (family,) = registry.collect()
    counts = [s.value for s in family.samples if s.name == "h_bucket"]

    assert counts == [1, 3, 4]


def exemplars(metrics: PrometheusMetrics) -> dict[str, tuple[str, float]]:
    """Return trace id and value of each exemplar, by the metric's name and the bucket's bound."""
    text = openmetrics.generate_latest(metrics.registry).decode()
    return {
        f"{sample.name} {sample.labels['le']}": (sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_a_sampled_request_is_the_exemplar_of_its_bucket() -> None:
    """In the OpenMetrics format, with its own value; the plain format stays without."""
    metrics = filled()

    assert exemplars(metrics) == {
        "inferfleet_request_seconds_bucket 0.02": (TRACE, 0.02),
        "inferfleet_batch_seconds_bucket 0.002": (TRACE, 0.002),
    }
    assert TRACE not in generate_latest(metrics.registry).decode()


def test_a_bucket_keeps_the_last_exemplar_and_others_keep_theirs() -> None:
    """So that old slow requests can still be looked at while fast ones go by."""
    metrics = PrometheusMetrics()
    for trace, seconds in (("a" * 32, 3.0), ("b" * 32, 0.01), ("c" * 32, 0.009), ("", 0.01)):
        metrics.request_seconds("r", [seconds], trace=trace or None)

    assert exemplars(metrics) == {
        "inferfleet_request_seconds_bucket 5.0": ("a" * 32, 3.0),
        "inferfleet_request_seconds_bucket 0.01": ("c" * 32, 0.009),
    }


def test_a_route_counts_from_zero_and_its_gauges_go_with_it() -> None:
    """A first event must be a rise, and what was read off last must not raise alarms for ever."""
    metrics = PrometheusMetrics()
    metrics.routes({"a": None, "b": 0.1})
    metrics.consumer_lag("a", 9)
    metrics.retries("a", 2)

    assert samples(metrics)['inferfleet_retries_total{route="b"}'] == 0
    metrics.routes({"b": None})
    assert not [name for name in samples(metrics) if "lag" in name or "goal_seconds" in name]
    assert samples(metrics)['inferfleet_retries_total{route="a"}'] == 2
    metrics.request_seconds("b", [5.0])
    assert not [name for name in samples(metrics) if name.startswith("inferfleet_requests_over_goal_total{")]


def test_a_refused_version_is_told_until_it_loads_or_nobody_wants_it() -> None:
    """A new try does not hide that the last one failed."""
    metrics = PrometheusMetrics()
    metrics.model_loading("m", "2")
    metrics.model_loaded("m", "2", False)
    metrics.model_loading("m", "2")

    version = 'model="m",version="2"'
    assert samples(metrics)[f"inferfleet_model_refused{{{version}}}"] == 1
    metrics.model_loaded("m", "2", True)
    assert samples(metrics)[f"inferfleet_model_refused{{{version}}}"] == 0
    assert samples(metrics)[f"inferfleet_model_ready{{{version}}}"] == 1
    metrics.model_gone("m", "2")
    assert f"inferfleet_model_ready{{{version}}}" not in samples(metrics)
