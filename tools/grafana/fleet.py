"""The dashboard of the whole fleet: is it well, and if not, where to look."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from tools.grafana.parts import (
    GREEN,
    GREY,
    ORANGE,
    RATE,
    RED,
    WORKER,
    Query,
    Section,
    Thing,
    number,
    page,
    quantile,
    series,
    states,
)

UID = "inferfleet-fleet"
TO_ROUTE = (
    "/d/inferfleet-route?var-route=${__field.labels.route}&${datasource:queryparam}&${__url_time_range}"
)
LEADING = {0: ("stands by", GREY), 1: ("leads", GREEN)}
ANSWERS = {0: ("away", RED), 1: ("answers", GREEN)}
READY = {0: ("not ready", ORANGE), 1: ("ready", GREEN)}


def fleet() -> str:
    """Return the dashboard's JSON."""
    return page(
        UID,
        "inferfleet: fleet",
        "All routes, workers and coordinators at a glance. A click on a route's line leads to the route.",
        [],
        [
            Section("Now", _now()),
            Section("Traffic", _traffic()),
            Section("What waits", _waiting()),
            Section("What went wrong", _wrong()),
            Section("Workers", _workers()),
            Section("Coordinators", _coordinators()),
        ],
    )


def _now() -> list[Thing]:
    return [
        number(
            "Ready workers",
            "Workers that are ready: versions warm, and a member of their group. None: nothing is answered.",
            units.Short,
            Query("sum(inferfleet_worker_ready) or vector(0)"),
            first=RED,
            limits=[(1, GREEN)],
        ),
        number(
            "Requests",
            "Requests that got their outcome, answers and errors, in a second.",
            units.RequestsPerSecond,
            Query(f"sum(rate(inferfleet_requests_total{RATE}))"),
        ),
        number(
            "Failing",
            "Share of outcomes that are errors, callers' faults included.",
            units.PercentUnit,
            Query(
                f'(sum(rate(inferfleet_requests_total{{outcome!="ok"}}{RATE})) or vector(0))'
                f" / (sum(rate(inferfleet_requests_total{RATE})) > 0)"
            ),
            limits=[(0.01, ORANGE), (0.05, RED)],
            decimals=2,
        ),
        number(
            "Not taken yet",
            "Records of all sources that no worker has taken (Kafka's lag, the depth of RabbitMQ's queues).",
            units.Short,
            Query("sum(inferfleet_consumer_lag)"),
            limits=[(1_000, ORANGE), (10_000, RED)],
        ),
        number(
            "Oldest open request",
            "Age of the oldest request that was taken and has no outcome yet.",
            units.Seconds,
            Query("max(inferfleet_oldest_request_seconds)"),
            limits=[(10, ORANGE), (60, RED)],
        ),
        number(
            "Dead letters",
            "Dead letters written in the span that is shown.",
            units.Short,
            Query("sum(increase(inferfleet_dead_letters_total[$__range])) or vector(0)"),
            limits=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Routes paused",
            "Routes that some worker does not take from: an outlet of theirs is away, or the brake is on.",
            units.Short,
            Query("sum(max by (route) (inferfleet_route_paused)) or vector(0)"),
            limits=[(1, RED)],
        ),
        number(
            "Leaders",
            "Coordinators that lead: one. With none no rollout goes on; workers answer all the same.",
            units.Short,
            Query("sum(inferfleet_coordinator_leading)"),
            first=RED,
            limits=[(1, GREEN), (2, RED)],
        ),
    ]


def _traffic() -> list[Thing]:
    return [
        series(
            "Requests by route",
            "Requests that got their outcome, in a second.",
            units.RequestsPerSecond,
            Query(f"sum by (route) (rate(inferfleet_requests_total{RATE}))", "{{route}}"),
            link=TO_ROUTE,
        ),
        series(
            "Outcomes",
            "How requests ended: ok, or the code of their error. The reference says whose fault a code is.",
            units.RequestsPerSecond,
            Query(f"sum by (outcome) (rate(inferfleet_requests_total{RATE}))", "{{outcome}}"),
            stacked=True,
        ),
        series(
            "Failing, by route",
            "Share of a route's outcomes that are errors.",
            units.PercentUnit,
            Query(
                f'sum by (route) (rate(inferfleet_requests_total{{outcome!="ok"}}{RATE}))'
                f" / sum by (route) (rate(inferfleet_requests_total{RATE}))",
                "{{route}}",
            ),
            limits=[(0.05, RED)],
            link=TO_ROUTE,
        ),
        series(
            "Latency, 99th percentile",
            "From the broker's timestamp to the confirmed outcome. The goal is on the route's own dashboard.",
            units.Seconds,
            Query(quantile(0.99, "inferfleet_request_seconds", "", "route"), "{{route}}", exemplar=True),
            link=TO_ROUTE,
        ),
        series(
            "Rows in a batch",
            "Mean size of the batches that a version runs. It grows by itself with what waits.",
            units.Short,
            Query(
                f"sum by (model, version, role) (rate(inferfleet_batch_rows_sum{RATE}))"
                f" / sum by (model, version, role) (rate(inferfleet_batch_rows_count{RATE}))",
                "{{model}} {{version}} {{role}}",
            ),
        ),
        series(
            "Devices at work",
            "Seconds of model time in a second, over all workers: 2 means that two devices never rest.",
            units.NoUnit,
            Query(
                f"sum by (model, version, role) (rate(inferfleet_batch_seconds_sum{RATE}))",
                "{{model}} {{version}} {{role}}",
            ),
            stacked=True,
        ),
    ]


def _waiting() -> list[Thing]:
    return [
        series(
            "Not taken yet",
            "Records of a route that no worker has taken. Rising without end: too few workers, or none.",
            units.Short,
            Query("sum by (route) (inferfleet_consumer_lag)", "{{route}}"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "Oldest open request",
            "Age of a route's oldest request that was taken and has no outcome yet.",
            units.Seconds,
            Query("max by (route) (inferfleet_oldest_request_seconds)", "{{route}}"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "In flight",
            "Rows that were taken and are not settled, over all workers. Bounded by [limits].",
            units.Short,
            Query("sum by (route) (inferfleet_in_flight_rows)", "{{route}}"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "Waiting for a batch",
            "Rows that were read and steered and wait for their version's next batch.",
            units.Short,
            Query("sum by (model, version, role) (inferfleet_queue_rows)", "{{model}} {{version}} {{role}}"),
            span=6,
        ),
    ]


def _wrong() -> list[Thing]:
    return [
        series(
            "Dead letters",
            "Dead letters by route and code. `inferfleet dlt list` shows them, `redrive` sends them again.",
            units.RecordsPerSecond,
            Query(f"sum by (route, code) (rate(inferfleet_dead_letters_total{RATE}))", "{{route}} {{code}}"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "Further attempts",
            "Requests that get another attempt later, because their failure may pass.",
            units.RequestsPerSecond,
            Query(f"sum by (route) (rate(inferfleet_retries_total{RATE}))", "{{route}}"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "Came again, got lost",
            "Requests that a broker delivered again although they were answered, and results that Redis had"
            " confirmed and did not have any more.",
            units.RequestsPerSecond,
            Query(f"sum by (route) (rate(inferfleet_redeliveries_total{RATE}))", "{{route}} came again"),
            Query(f"sum by (route) (rate(inferfleet_results_lost_total{RATE}))", "{{route}} results lost"),
            span=6,
            link=TO_ROUTE,
        ),
        series(
            "Cannot be served",
            "On how many workers the newest routes, a route's newest revision or a version is refused. What"
            " was served before goes on; the log says why.",
            units.Short,
            Query("sum(inferfleet_routes_refused)", "all routes"),
            Query("sum by (route) (inferfleet_route_refused)", "route {{route}}"),
            Query("sum by (model, version) (inferfleet_model_refused)", "version {{model}} {{version}}"),
            span=6,
            limits=[(1, RED)],
        ),
    ]


def _workers() -> list[Thing]:
    return [
        series(
            "Processor",
            "Cores that a worker uses.",
            units.NoUnit,
            Query(f"rate(process_cpu_seconds_total{RATE}) * {WORKER}", "{{worker}}"),
        ),
        series(
            "Memory",
            "Resident memory of a worker, models included. [models] memory_bytes bounds what versions take.",
            units.BytesIEC,
            Query(f"process_resident_memory_bytes * {WORKER}", "{{worker}}"),
        ),
        series(
            "Up for",
            "Time since a worker's process began. A saw's teeth are a worker that ends again and again.",
            units.Seconds,
            Query(f"time() - process_start_time_seconds * {WORKER}", "{{worker}}"),
        ),
        states(
            "Versions",
            "Versions that a worker has loaded, checked and warmed up.",
            Query(f"inferfleet_model_ready * {WORKER}", "{{worker}} {{model}} {{version}}"),
            names=READY,
        ),
        series(
            "Routes not followed for",
            "For how long a worker could not ask for its routes. It goes on with those that it knows.",
            units.Seconds,
            Query(f"inferfleet_route_revision_age_seconds * {WORKER}", "{{worker}}"),
            limits=[(30, RED)],
        ),
        series(
            "Workers by route revision",
            "How many workers have which revision. All should have one, but for seconds after a change.",
            units.Short,
            Query('count_values("revision", inferfleet_route_revision)', "revision {{revision}}"),
            stacked=True,
        ),
    ]


def _coordinators() -> list[Thing]:
    return [
        states(
            "Who leads",
            "Which replica holds the lease and steps rollouts.",
            Query("max by (instance) (inferfleet_coordinator_leading)", "{{instance}}"),
            names=LEADING,
            span=6,
        ),
        states(
            "The store of the control plane",
            "Whether its Redis answered each replica when it was last asked.",
            Query("min by (instance) (inferfleet_coordinator_store_up)", "{{instance}}"),
            names=ANSWERS,
            span=6,
        ),
        series(
            "Requests to the API",
            "By status: 401 and 403 are callers without the right, 409 those that came too late.",
            units.RequestsPerSecond,
            Query(f"sum by (status) (rate(inferfleet_coordinator_requests_total{RATE}))", "{{status}}"),
            span=6,
            stacked=True,
        ),
        series(
            "Time of a request to the API",
            "95th percentile, by path.",
            units.Seconds,
            Query(quantile(0.95, "inferfleet_coordinator_request_seconds", "", "path"), "{{path}}"),
            span=6,
        ),
    ]
