"""The dashboard that sets the versions of a route side by side."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from tools.grafana.parts import ORANGE, RATE, RED, Query, Section, Thing, page, quantile, series
from tools.grafana.route import GOAL, ROUTE, model_variable, route_variable

UID = "inferfleet-versions"
ARM = "version, variant"
NAME = "{{version}} {{variant}}"
ANSWERED = f'{ROUTE}, version!=""'
"""Without what was refused before a version had a part in it."""
LANE = 'model=~"$model"'


def versions() -> str:
    """Return the dashboard's JSON."""
    return page(
        UID,
        "inferfleet: versions side by side",
        "The versions of a route beside each other: its share, its answers, and what its shadow says.",
        [route_variable(), model_variable()],
        [
            Section("Share and errors", _errors()),
            Section("Latency", _latency()),
            Section("Model time", _batches()),
            Section("Shadows", _shadows()),
            Section("Loaded where", _loaded()),
        ],
    )


def share_of_errors(matchers: str, by: str) -> str:
    """Return the expression of each arm's share of outcomes that are errors, 0 where it has none."""
    every = f"sum by ({by}) (rate(inferfleet_requests_total{{{matchers}}}{RATE}))"
    good = f'sum by ({by}) (rate(inferfleet_requests_total{{{matchers}, outcome="ok"}}{RATE}))'
    return f"1 - ({good} or {every} * 0) / {every}"


def _errors() -> list[Thing]:
    every = f"sum by ({ARM}) (rate(inferfleet_requests_total{{{ANSWERED}}}{RATE}))"
    return [
        series(
            "Share of requests",
            "Which part of the route's outcomes each version gave. A split of keys shows here.",
            units.PercentUnit,
            Query(f"{every} / on () group_left () sum({every})", NAME),
            span=6,
            stacked=True,
            most=1,
        ),
        series(
            "Requests",
            "Outcomes that each version gave in a second.",
            units.RequestsPerSecond,
            Query(every, NAME),
            span=6,
        ),
        series(
            "Failing",
            "Share of a version's outcomes that are errors. Compare a canary with the control slice.",
            units.PercentUnit,
            Query(share_of_errors(ANSWERED, ARM), NAME),
            span=6,
            limits=[(0.05, RED)],
        ),
        series(
            "Errors by code",
            "Errors that each version gave in a second, by code.",
            units.RequestsPerSecond,
            Query(
                "sum by (version, outcome)"
                f' (rate(inferfleet_requests_total{{{ANSWERED}, outcome!="ok"}}{RATE}))',
                "{{version}} {{outcome}}",
            ),
            span=6,
        ),
    ]


def _latency() -> list[Thing]:
    found = []
    for title, share in (("Half of requests", 0.5), ("95th percentile", 0.95), ("99th percentile", 0.99)):
        expr = quantile(share, "inferfleet_request_seconds", ANSWERED, "version", "variant")
        found.append(
            series(
                title,
                "From the broker's timestamp to the confirmed outcome, with the route's goal for the 99th.",
                units.Seconds,
                Query(expr, NAME, exemplar=share > 0.9),
                Query(GOAL, "goal"),
            )
        )
    return [*found]


def _batches() -> list[Thing]:
    lane = "sum by (model, version, role)"
    name = "{{model}} {{version}} {{role}}"
    seconds = f"{lane} (rate(inferfleet_batch_seconds_sum{{{LANE}}}{RATE}))"
    rows = f"{lane} (rate(inferfleet_batch_rows_sum{{{LANE}}}{RATE}))"
    return [
        series(
            "Time of a batch",
            "95th percentile of a batch's time in the model. Small shares have small batches.",
            units.Seconds,
            Query(quantile(0.95, "inferfleet_batch_seconds", LANE, "model", "version", "role"), name),
            span=6,
        ),
        series(
            "Rows in a batch",
            "Mean size of batches.",
            units.Short,
            Query(f"{rows} / {lane} (rate(inferfleet_batch_rows_count{{{LANE}}}{RATE}))", name),
            span=6,
        ),
        series(
            "Model time of 1,000 rows",
            "What a version costs: seconds in the model for 1,000 rows.",
            units.Seconds,
            Query(f"1000 * {seconds} / {rows}", name),
            span=6,
        ),
        series(
            "Waiting for a batch",
            "Rows that wait for the version's next batch.",
            units.Short,
            Query(f"{lane} (inferfleet_queue_rows{{{LANE}}})", name),
            span=6,
        ),
    ]


def coverage() -> str:
    """Return the expression of the share of requests that a shadow should see and has seen, by version."""
    seen, shed = (
        f"sum by (version) (rate(inferfleet_shadow_{name}_total{{{ROUTE}}}{RATE}))"
        for name in ("requests", "shed")
    )
    return f"{seen} / ({seen} + ({shed} or {seen} * 0) > 0)"


def differing() -> str:
    """Return the expression of the share of compared rows in which a shadow answers otherwise, by version."""
    every, unlike = (
        f"sum by (version) (rate(inferfleet_shadow_rows_total{{{ROUTE}{more}}}{RATE}))"
        for more in ("", ', result="different"')
    )
    return f"{unlike} / ({every} > 0)"


def _shadows() -> list[Thing]:
    return [
        series(
            "Rows that differ",
            "Share of compared rows in which the shadow answers otherwise, beyond the tolerance.",
            units.PercentUnit,
            Query(differing(), "{{version}}"),
            span=6,
            limits=[(0.01, ORANGE)],
        ),
        series(
            "Rows compared",
            "Rows that both versions have answered, by how far the answers are apart.",
            units.RowsPerSecond,
            Query(
                f"sum by (version, result) (rate(inferfleet_shadow_rows_total{{{ROUTE}}}{RATE}))",
                "{{version}} {{result}}",
            ),
            span=6,
            stacked=True,
        ),
        series(
            "How the shadow ends",
            "Requests that a shadow answered (ok), failed (its code), or found no partner for (unmatched).",
            units.RequestsPerSecond,
            Query(
                f"sum by (version, outcome) (rate(inferfleet_shadow_requests_total{{{ROUTE}}}{RATE}))",
                "{{version}} {{outcome}}",
            ),
            span=6,
        ),
        series(
            "Coverage",
            "Share of the requests meant for the shadow that it saw. The rest was shed: the worker was busy.",
            units.PercentUnit,
            Query(coverage(), "{{version}}"),
            span=6,
            most=1,
        ),
    ]


def _loaded() -> list[Thing]:
    return [
        series(
            "Workers that have it ready",
            "On how many workers a version is loaded, checked and warm.",
            units.Short,
            Query(f"sum by (model, version) (inferfleet_model_ready{{{LANE}}})", "{{model}} {{version}}"),
            span=12,
        ),
        series(
            "Loads",
            "Loads that ended since the workers began, by outcome. Refused: the log says why.",
            units.Short,
            Query(
                f"sum by (model, version, outcome) (inferfleet_model_loads_total{{{LANE}}})",
                "{{model}} {{version}} {{outcome}}",
            ),
            span=12,
        ),
    ]
