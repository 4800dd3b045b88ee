"""Metrics have the contract's names, few labels, and histograms that count every value."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from inferfleet.telemetry.metrics import REQUEST_SECONDS, BulkHistogram, PrometheusMetrics

CONTRACT = {
    "requests_total", "request_seconds", "stage_seconds", "batch_rows", "batch_seconds", "queue_rows",
    "in_flight_rows", "padding_ratio", "consumer_lag", "oldest_request_seconds", "dead_letters_total",
    "retries_total", "redeliveries_total", "results_lost_total", "shadow_requests_total", "route_revision",
    "route_revision_age_seconds",
    "model_ready", "build_info",
}  # fmt: skip
LABELS = {"route", "model", "version", "variant", "role", "outcome", "stage", "code", "le", "worker"}


def filled() -> PrometheusMetrics:
    """Metrics with every method called once."""
    metrics = PrometheusMetrics("1.2.3", "w-1")
    metrics.outcomes("r", "1", "stable", "ok", 500)
    metrics.request_seconds("r", [0.01, 0.02, 3])
    metrics.stage("take", 0.001)
    metrics.batch("m", "1", "primary", 64, 0.002, 0.1)
    metrics.queue_rows("m", "1", "primary", 7)
    metrics.in_flight("r", 12, 3400)
    metrics.consumer_lag("r", 99)
    metrics.oldest_request_seconds("r", 1.5)
    metrics.route_paused("r", True)
    metrics.dead_letters("r", "E_SHAPE", 2)
    metrics.retries("r", 1)
    metrics.redeliveries("r", 3)
    metrics.results_lost("r", 6)
    metrics.shadow_outcomes("r", "2", "ok", 4)
    metrics.shadow_shed("r", "2", 5)
    metrics.route_revision("8c946b23224b")
    metrics.route_revision_age(0.0)
    metrics.model_ready("m", "1", True)
    return metrics


def samples(metrics: PrometheusMetrics) -> dict[str, float]:
    """Return each exposed line's value by its name with labels."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_every_metric_of_the_contract_is_exposed_with_permitted_labels() -> None:
    """Names start with inferfleet_; no label could hold an id or a key."""
    families = [f for f in filled().registry.collect() if f.name.startswith("inferfleet_")]
    exposed = {s.name.removeprefix("inferfleet_") for family in families for s in family.samples}
    labels = {label for family in families for s in family.samples for label in s.labels}

    assert {name for name in CONTRACT if not any(each.startswith(name) for each in exposed)} == set()
    assert labels <= LABELS
    assert not [name for name in exposed if name.endswith("_created")]


def test_values_arrive_where_they_belong() -> None:
    """Each method moves its own series."""
    found = samples(filled())
    key = 'route="r",variant="stable",version="1"'

    assert found[f'inferfleet_requests_total{{outcome="ok",{key}}}'] == 500
    assert found['inferfleet_request_seconds_count{route="r"}'] == 3
    assert found['inferfleet_request_seconds_sum{route="r"}'] == 3.03
    assert found['inferfleet_request_seconds_bucket{le="0.01",route="r"}'] == 1
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
