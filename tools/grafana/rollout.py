"""The dashboard of a route's rollout: where it stands, what it compares, and what holds it."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from tools.grafana.fleet import LEADING
from tools.grafana.parts import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RATE,
    RED,
    WORKER,
    PrometheusAnnotation,
    Query,
    Section,
    Thing,
    number,
    page,
    quantile,
    series,
    states,
)
from tools.grafana.route import GOAL, ROUTE, model_variable, route_variable
from tools.grafana.versions import ANSWERED, ARM, LANE, NAME, coverage, differing, share_of_errors

UID = "inferfleet-rollout"
PHASE = {1: ("in this phase", BLUE)}
HOLD = {1: ("holds", ORANGE)}
WAITS = {0: ("no", GREEN), 1: ("yes", ORANGE)}
REFUSED = {0: ("served", GREEN), 1: ("refused", RED)}


def rollout() -> str:
    """Return the dashboard's JSON."""
    return page(
        UID,
        "inferfleet: rollout",
        "A route's rollout: where it stands, how the new version does beside the old one, and what holds it.",
        [route_variable(), model_variable()],
        [
            Section("Now", _now()),
            Section("How it goes", _course()),
            Section("The new version beside the old one", _arms()),
            Section("What the shadow says", _shadow()),
            Section("Who carries it out", _machinery()),
        ],
        [
            PrometheusAnnotation(
                "Rollout steps",
                f"sum(changes(inferfleet_rollout_percent{{{ROUTE}}}[1m])) > 0",
                "The share of the new version changed",
                PURPLE,
            )
        ],
    )


def _now() -> list[Thing]:
    return [
        number(
            "Phase",
            "The phase of the route's rollout; none: no rollout goes on. docs/policies.md explains them.",
            units.NoUnit,
            Query(f"max by (phase) (inferfleet_rollout_phase{{{ROUTE}}})", "{{phase}}"),
            first=BLUE,
            named=True,
        ),
        number(
            "Share of keys",
            "Which part of the route's keys the new version answers.",
            units.Percent,
            Query(f"max(inferfleet_rollout_percent{{{ROUTE}}})"),
            first=BLUE,
        ),
        number(
            "Held for",
            "For how long the oldest hold has stood. While anything holds it, a phase's time does not count.",
            units.Seconds,
            Query(f"max(inferfleet_rollout_held_seconds{{{ROUTE}}})"),
            limits=[(1, ORANGE), (600, RED)],
        ),
        number(
            "Waits for a person",
            "Whether only a person lets it go on: `inferfleet rollout resume`, `approve` or `abort`.",
            units.NoUnit,
            Query(f"max(inferfleet_rollout_paused{{{ROUTE}}})"),
            names=WAITS,
            limits=[(1, ORANGE)],
        ),
        number(
            "Last end",
            "How the route's last rollout ended. `inferfleet rollout status` says why.",
            units.NoUnit,
            Query(
                f"topk(1, max by (outcome) (inferfleet_rollout_ended_timestamp_seconds{{{ROUTE}}}))",
                "{{outcome}}",
            ),
            first=BLUE,
            named=True,
        ),
        number(
            "Last ended",
            "When the route's last rollout ended.",
            units.DateTimeFromNow,
            Query(f"1000 * max(inferfleet_rollout_ended_timestamp_seconds{{{ROUTE}}})"),
            first=BLUE,
        ),
        number(
            "Workers that report",
            "Workers whose reports reach the control plane. Without any nothing goes on.",
            units.Short,
            Query("sum(max by (pool) (inferfleet_coordinator_workers))"),
            first=RED,
            limits=[(1, GREEN)],
        ),
        number(
            "Leaders",
            "Coordinators that lead: one. With none the rollout stands as it is.",
            units.Short,
            Query("sum(inferfleet_coordinator_leading)"),
            first=RED,
            limits=[(1, GREEN), (2, RED)],
        ),
    ]


def _course() -> list[Thing]:
    return [
        states(
            "Phases",
            "When the rollout was in which phase.",
            Query(f"max by (phase) (inferfleet_rollout_phase{{{ROUTE}}})", "{{phase}}"),
            names=PHASE,
            span=6,
        ),
        series(
            "Planned share of keys",
            "Which part of the route's keys the new version answers, step by step.",
            units.Percent,
            Query(f"max(inferfleet_rollout_percent{{{ROUTE}}})", "planned"),
            span=6,
            most=100,
        ),
        states(
            "Holds",
            "What held the rollout, and when. `inferfleet rollout status` says it in words.",
            Query(f"max by (kind) (inferfleet_rollout_hold{{{ROUTE}}})", "{{kind}}"),
            names=HOLD,
            span=6,
        ),
        series(
            "Ended",
            "Rollouts of the route that ended, counted since a coordinator began to lead.",
            units.Short,
            Query(f"sum by (outcome) (inferfleet_rollouts_ended_total{{{ROUTE}}})", "{{outcome}}"),
            span=6,
        ),
    ]


def _arms() -> list[Thing]:
    every = f"sum by ({ARM}) (rate(inferfleet_requests_total{{{ANSWERED}}}{RATE}))"
    unfit = f'{ANSWERED}, outcome="E_MODEL_OUTPUT"'
    cost, rows = (
        f"sum by (model, version) (rate(inferfleet_batch_{what}_sum{{{LANE}}}{RATE}))"
        for what in ("seconds", "rows")
    )
    return [
        series(
            "Share of requests",
            "What each arm really answered: canary and control get as much as the plan says, or something is"
            " wrong with the split.",
            units.PercentUnit,
            Query(f"{every} / on () group_left () sum({every})", NAME),
            stacked=True,
            most=1,
        ),
        series(
            "Failing",
            "Share of an arm's outcomes that are errors. The canary is compared with the control slice.",
            units.PercentUnit,
            Query(share_of_errors(ANSWERED, ARM), NAME),
            limits=[(0.05, RED)],
        ),
        series(
            "Answers of another shape, or not finite",
            "Outputs that are no answer. By default more than one in a thousand, and three, end a rollout.",
            units.RequestsPerSecond,
            Query(
                f"sum by ({ARM}) (rate(inferfleet_requests_total{{{unfit}}}{RATE}))",
                NAME,
            ),
        ),
        series(
            "Latency, 95th percentile",
            "From the broker's timestamp to the confirmed outcome.",
            units.Seconds,
            Query(
                quantile(0.95, "inferfleet_request_seconds", ANSWERED, "version", "variant"),
                NAME,
                exemplar=True,
            ),
        ),
        series(
            "Latency, 99th percentile",
            "The same, and the route's goal.",
            units.Seconds,
            Query(quantile(0.99, "inferfleet_request_seconds", ANSWERED, "version", "variant"), NAME),
            Query(GOAL, "goal"),
        ),
        series(
            "Model time of 1,000 rows",
            "What a version costs: seconds in the model for 1,000 rows.",
            units.Seconds,
            Query(f"1000 * {cost} / {rows}", "{{model}} {{version}}"),
        ),
    ]


def _shadow() -> list[Thing]:
    return [
        series(
            "Rows that differ",
            "Share of compared rows in which the new version answers otherwise, beyond the tolerance.",
            units.PercentUnit,
            Query(differing(), "{{version}}"),
            limits=[(0.01, ORANGE)],
        ),
        series(
            "Rows compared",
            "Rows that both versions have answered. The shadow's phase lasts until there are enough.",
            units.RowsPerSecond,
            Query(f"sum by (version) (rate(inferfleet_shadow_rows_total{{{ROUTE}}}{RATE}))", "{{version}}"),
        ),
        series(
            "Coverage",
            "Share of the requests meant for the shadow that it saw. The rest was shed: workers were busy.",
            units.PercentUnit,
            Query(coverage(), "{{version}}"),
            most=1,
        ),
    ]


def _machinery() -> list[Thing]:
    return [
        series(
            "Revision served",
            "The route's revision that each worker serves. Apart for long: see the refusals beside it.",
            units.NoUnit,
            Query(f"max by (worker) (inferfleet_route_adopted{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            span=6,
        ),
        states(
            "Revision refused",
            "Workers that cannot serve the route's newest revision and go on with the one before.",
            Query(f"max by (worker) (inferfleet_route_refused{{{ROUTE}}} * {WORKER})", "{{worker}}"),
            names=REFUSED,
            span=6,
        ),
        series(
            "Workers that have it ready",
            "On how many workers a version is loaded, checked and warm. Steps wait until all are.",
            units.Short,
            Query(f"sum by (model, version) (inferfleet_model_ready{{{LANE}}})", "{{model}} {{version}}"),
            span=6,
        ),
        series(
            "The leader's looks",
            "Steps of the leader by how they ended: done, fenced (another leads), away (Redis), failed.",
            units.CountsPerSecond,
            Query(f"sum by (outcome) (rate(inferfleet_coordinator_ticks_total{RATE}))", "{{outcome}}"),
            span=6,
        ),
        series(
            "Time of a look",
            "95th percentile of one step of the leader, over all rollouts.",
            units.Seconds,
            Query(quantile(0.95, "inferfleet_coordinator_tick_seconds", ""), "95 %"),
            span=12,
        ),
        states(
            "Who leads",
            "Which replica holds the lease and steps rollouts.",
            Query("max by (instance) (inferfleet_coordinator_leading)", "{{instance}}"),
            names=LEADING,
            span=12,
        ),
    ]
