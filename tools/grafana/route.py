"""The dashboard of one route: what its callers get, where its requests wait, what its batches are like."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import QueryVariable
from grafana_foundation_sdk.models import units

from tools.grafana.parts import (
    GREEN,
    ORANGE,
    RATE,
    RED,
    WORKER,
    Query,
    Section,
    Thing,
    label_variable,
    number,
    page,
    quantile,
    series,
    states,
)

UID = "inferfleet-route"
ROUTE = 'route="$route"'
LANE = 'model=~"$model", role="primary"'
GOAL = f"max(inferfleet_route_goal_seconds{{{ROUTE}}})"
TAKEN_FROM = {0: ("taken from", GREEN), 1: ("paused", RED)}


def route_variable() -> QueryVariable:
    """Return the variable ``route``."""
    return label_variable(
        "route", "Route", "The route to look at.", "label_values(inferfleet_in_flight_rows, route)"
    )


def model_variable() -> QueryVariable:
    """Return the variable ``model``: one of those that the fleet runs, or all of them."""
    return label_variable(
        "model",
        "Model",
        "Batches are counted by model: one may hold requests of several routes.",
        "label_values(inferfleet_batch_rows_count, model)",
        many=True,
    )


def route() -> str:
    """Return the dashboard's JSON."""
    return page(
        UID,
        "inferfleet: route",
        "One route: what its callers get, where its requests wait, and what its batches are like.",
        [route_variable(), model_variable()],
        [
            Section("Now", _now()),
            Section("What callers get", _answers()),
            Section("What went wrong", _wrong()),
            Section("What waits", _waiting()),
            Section("Stations of the record path, all routes", _stations()),
            Section("Batches of the chosen models", _batches()),
        ],
    )


def failing(matchers: str) -> str:
    """Return the expression of the share of outcomes that are errors; nothing where there are no outcomes."""
    return (
        f'(sum(rate(inferfleet_requests_total{{{matchers}, outcome!="ok"}}{RATE})) or vector(0))'
        f" / (sum(rate(inferfleet_requests_total{{{matchers}}}{RATE})) > 0)"
    )


def _now() -> list[Thing]:
    return [
        number(
            "Requests",
            "Requests that got their outcome, answers and errors, in a second.",
            units.RequestsPerSecond,
            Query(f"sum(rate(inferfleet_requests_total{{{ROUTE}}}{RATE}))"),
        ),
        number(
            "Failing",
            "Share of outcomes that are errors, callers' faults included.",
            units.PercentUnit,
            Query(failing(ROUTE)),
            limits=[(0.01, ORANGE), (0.05, RED)],
            decimals=2,
        ),
        number(
            "99th percentile",
            "From the broker's timestamp to the confirmed outcome. The goal stands beside it.",
            units.Seconds,
            Query(quantile(0.99, "inferfleet_request_seconds", ROUTE)),
        ),
        number(
            "Goal",
            "The route's goal_p99_ms; none: the route has no goal.",
            units.Seconds,
            Query(GOAL),
        ),
        number(
            "Later than the goal",
            "Share of outcomes that came later than goal_p99_ms. The goal is met while it is below 1 %.",
            units.PercentUnit,
            Query(_late()),
            limits=[(0.01, ORANGE), (0.05, RED)],
            decimals=2,
        ),
        number(
            "Not taken yet",
            "Records of the route that no worker has taken.",
            units.Short,
            Query(f"sum(inferfleet_consumer_lag{{{ROUTE}}})"),
            limits=[(1_000, ORANGE), (10_000, RED)],
        ),
        number(
            "Oldest open request",
            "Age of the oldest request that was taken and has no outcome yet.",
            units.Seconds,
            Query(f"max(inferfleet_oldest_request_seconds{{{ROUTE}}})"),
            limits=[(10, ORANGE), (60, RED)],
        ),
        number(
            "Paused on",
            "Workers that do not take from the route: an outlet of it is away, or the brake is on.",
            units.Short,
            Query(f"sum(inferfleet_route_paused{{{ROUTE}}})"),
            limits=[(1, RED)],
        ),
    ]


def _late() -> str:
    return (
        f"sum(rate(inferfleet_requests_over_goal_total{{{ROUTE}}}{RATE}))"
        f" / (sum(rate(inferfleet_request_seconds_count{{{ROUTE}}}{RATE})) > 0)"
    )


def _answers() -> list[Thing]:
    return [
        series(
            "Outcomes",
            "How requests ended: ok, or the code of their error. The reference says whose fault a code is.",
            units.RequestsPerSecond,
            Query(f"sum by (outcome) (rate(inferfleet_requests_total{{{ROUTE}}}{RATE}))", "{{outcome}}"),
            stacked=True,
        ),
        series(
            "Latency",
            "From the broker's timestamp to the confirmed outcome, and the goal for the 99th percentile.",
            units.Seconds,
            Query(quantile(0.5, "inferfleet_request_seconds", ROUTE), "half"),
            Query(quantile(0.95, "inferfleet_request_seconds", ROUTE), "95 %"),
            Query(quantile(0.99, "inferfleet_request_seconds", ROUTE), "99 %", exemplar=True),
            Query(GOAL, "goal"),
        ),
        series(
            "Later than the goal",
            "Share of outcomes that came later than goal_p99_ms; the line is the 1 % that the goal allows.",
            units.PercentUnit,
            Query(_late(), "late"),
            limits=[(0.01, RED)],
        ),
    ]


def _wrong() -> list[Thing]:
    return [
        series(
            "Dead letters",
            "Dead letters by code. `inferfleet dlt list` shows them, `redrive` sends them again.",
            units.RecordsPerSecond,
            Query(f"sum by (code) (rate(inferfleet_dead_letters_total{{{ROUTE}}}{RATE}))", "{{code}}"),
        ),
        series(
            "Further attempts",
            "Requests that get another attempt later, because their failure may pass.",
            units.RequestsPerSecond,
            Query(f"sum(rate(inferfleet_retries_total{{{ROUTE}}}{RATE}))", "further attempts"),
        ),
        series(
            "Came again, got lost",
            "Requests that were delivered again although they were answered, and results that Redis had"
            " confirmed and did not have any more.",
            units.RequestsPerSecond,
            Query(f"sum(rate(inferfleet_redeliveries_total{{{ROUTE}}}{RATE}))", "came again"),
            Query(f"sum(rate(inferfleet_results_lost_total{{{ROUTE}}}{RATE}))", "results lost"),
        ),
    ]


def _waiting() -> list[Thing]:
    return [
        series(
            "Not taken yet",
            "Records that no worker has taken, by the worker whose partitions they are in.",
            units.Short,
            Query(f"sum by (worker) (inferfleet_consumer_lag{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            stacked=True,
        ),
        series(
            "Taken and answered",
            "Records taken and outcomes confirmed in a second. Apart for long: something holds the route.",
            units.RecordsPerSecond,
            Query(f"sum(rate(inferfleet_records_total{{{ROUTE}}}{RATE}))", "taken"),
            Query(f"sum(rate(inferfleet_requests_total{{{ROUTE}}}{RATE}))", "answered"),
        ),
        series(
            "Oldest open request",
            "Age of the oldest request that was taken and has no outcome yet, by worker.",
            units.Seconds,
            Query(f"max by (worker) (inferfleet_oldest_request_seconds{{{ROUTE}}} * {WORKER})", "{{worker}}"),
        ),
        series(
            "In flight",
            "Rows that were taken and are not settled, by worker.",
            units.Short,
            Query(f"sum by (worker) (inferfleet_in_flight_rows{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            span=6,
            stacked=True,
        ),
        series(
            "Bytes in flight",
            "Bytes that were taken and are not settled, by worker.",
            units.BytesIEC,
            Query(f"sum by (worker) (inferfleet_in_flight_bytes{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            span=6,
            stacked=True,
        ),
        series(
            "Partitions or channels",
            "How many a worker takes from. A worker without any has nothing to do: more workers are no help.",
            units.Short,
            Query(f"sum by (worker) (inferfleet_streams{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            span=6,
            stacked=True,
        ),
        states(
            "Paused",
            "When which worker did not take from the route. /status of a worker says why.",
            Query(f"max by (worker) (inferfleet_route_paused{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            names=TAKEN_FROM,
            span=6,
        ),
    ]


def _stations() -> list[Thing]:
    sums = f"sum by (stage) (rate(inferfleet_stage_seconds_sum{RATE}))"
    return [
        series(
            "Time at a station",
            "95th percentile of how long a chunk or a batch is at each station on its way.",
            units.Seconds,
            Query(quantile(0.95, "inferfleet_stage_seconds", "", "stage"), "{{stage}}"),
            span=12,
        ),
        series(
            "Where time goes",
            "Mean time that a chunk or a batch is at each station.",
            units.Seconds,
            Query(f"{sums} / sum by (stage) (rate(inferfleet_stage_seconds_count{RATE}))", "{{stage}}"),
            span=12,
            stacked=True,
        ),
    ]


def _batches() -> list[Thing]:
    name = "{{model}} {{version}}"
    lanes = "sum by (model, version)"
    return [
        series(
            "Rows in a batch",
            "Mean size of batches. It grows by itself with what waits.",
            units.Short,
            Query(
                f"{lanes} (rate(inferfleet_batch_rows_sum{{{LANE}}}{RATE}))"
                f" / {lanes} (rate(inferfleet_batch_rows_count{{{LANE}}}{RATE}))",
                name,
            ),
            span=6,
        ),
        series(
            "Time in the model",
            "95th percentile of a batch's time in the model.",
            units.Seconds,
            Query(quantile(0.95, "inferfleet_batch_seconds", LANE, "model", "version"), name, exemplar=True),
            span=6,
        ),
        series(
            "Waiting for a batch",
            "Rows that were read and steered and wait for their version's next batch.",
            units.Short,
            Query(f"{lanes} (inferfleet_queue_rows{{{LANE}}})", name),
            span=6,
        ),
        series(
            "Padding",
            "Mean share of a batch that filling up to its longest request would be, for models whose batches"
            " are sorted by length (texts).",
            units.PercentUnit,
            Query(
                f"{lanes} (rate(inferfleet_padding_ratio_sum{{{LANE}}}{RATE}))"
                f" / {lanes} (rate(inferfleet_padding_ratio_count{{{LANE}}}{RATE}))",
                name,
            ),
            span=6,
            most=1,
        ),
    ]
