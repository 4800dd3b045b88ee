"""What measuring itself costs a worker: the same backlog with all metrics, without exemplars, without any.

Every request carries a sampled ``traceparent``, so that each part and each batch leaves exemplars. The figure
is processor time for each request; rounds alternate, and ratios are of neighbouring runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.trace_context import first_sampled, trace_id
from inferfleet.worker.counting import exemplar_of
from loadtest import drain as drains
from loadtest.drain import Drain
from loadtest.mutedworker import MUTED as MUTED_METRICS
from loadtest.stage import Stage
from loadtest.subjects import WORKER, Run, launch, on_cores, worker_command
from loadtest.workloads import TINY

TRACED = replace(TINY, headers=[("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")])
CHUNK = 500
MUTED = {WORKER: None, "no exemplars": "exemplars", "no metrics": "metrics"}


def command_of(name: str, run: Run) -> list[str]:
    """Return the command line of the worker, or of one that measures less."""
    command = worker_command(run)
    what = MUTED[name]
    return command if what is None else [sys.executable, "-m", "loadtest.mutedworker", what, *command[3:]]


def drain_once(on: Stage, name: str, requests: str, total: int) -> Drain:
    """Drain ``requests`` with one of them into a fresh topic."""
    results = on.cluster.create("traced.results")
    run = Run(TRACED, on.cluster.bootstrap, requests, results, on.folder)
    on.cluster.create_derived(run.derived)
    with on_cores(on.cores.subject):
        subject = launch(name, command_of(name, run), on.folder / f"{name.replace(' ', '-')}-{run.name}.log")
    try:
        seen = drains.watch(lambda: sum(on.cluster.ends(results)), total, subject)
        code = subject.terminate()
    finally:
        subject.kill()
        on.cluster.delete(results, *run.derived)
    steady, per_cpu_s = drains.steady_rates(seen, total)
    return Drain(name, total, steady, drains.whole_rate(seen), per_cpu_s, 0.0, code)


def compare(on: Stage, *, runs: int, records: int, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Fill once, then drain with each in turn; return CPU seconds per 1,000 requests and what each adds."""
    requests = on.cluster.create("traced.requests")
    rounds: list[dict[str, Drain]] = []
    try:
        on.cluster.fill(requests, TRACED, records)
        for number in range(runs):
            names = list(MUTED) if number % 2 == 0 else list(reversed(MUTED))
            rounds.append({name: drain_once(on, name, requests, records) for name in names})
            costs = "  ".join(f"{name} {cost(rounds[-1][name]) * 1000:.2f}" for name in MUTED)
            tell(f"run {number + 1}/{runs}  CPU ms per 1,000: {costs}")
    finally:
        on.cluster.delete(requests)
    return {
        "cpu_s_per_1000": {name: statistics.median(cost(each[name]) for each in rounds) for name in MUTED},
        "calls_us_per_1000": call_costs(),
        "more_with_exemplars": _more(rounds, "no exemplars"),
        "more_with_metrics": _more(rounds, "no metrics"),
        "runs": [asdict(one) for each in rounds for one in each.values()],
    }


def call_costs() -> dict[str, float]:
    """Return microseconds of processor time of the calls alone, for 1,000 requests: the quietest of many.

    As in a full drain: chunks and batches of 500, each chunk one part, each batch one chunk. The selection of
    exemplars is among them.
    """
    traces: list[bytes | None] = [value for _, value in TRACED.headers or ()] * CHUNK
    seconds = np.linspace(0.001, 0.2, CHUNK)
    found = {}
    for name, kind in (("all", PrometheusMetrics), ("no exemplars", MUTED_METRICS["exemplars"])):
        metrics = kind()
        metrics.routes({"r": 0.1})

        def calls(metrics: PrometheusMetrics = metrics, shown: bool = name == "all") -> None:
            metrics.records("r", CHUNK)
            for stage in ("read", "gather", "predict", "write", "hand_over"):
                metrics.stage(stage, 0.001)
            first = first_sampled(traces) if shown else None
            metrics.batch(
                "m",
                "1",
                "primary",
                CHUNK,
                0.002,
                None,
                None if first is None else trace_id(traces[first] or b""),
            )
            metrics.outcomes("r", "1", "stable", "ok", CHUNK)
            trace, at = exemplar_of(traces, seconds) if shown else (None, 0)
            metrics.request_seconds("r", seconds, "1", "stable", trace=trace, at=at)

        best = float("inf")
        for _ in range(200):
            began = time.thread_time()
            for _ in range(20):
                calls()
            best = min(best, time.thread_time() - began)
        found[name] = round(best / 20 * 1e6 * 1000 / CHUNK, 1)
    return found


def cost(one: Drain) -> float:
    """Return seconds of processor time for 1,000 requests."""
    return 1000 / one.per_cpu_s


def _more(rounds: list[dict[str, Drain]], without: str) -> float:
    """Return the share by which the worker costs more than the one that measures less, median over rounds."""
    return statistics.median([cost(each[WORKER]) / cost(each[without]) for each in rounds]) - 1
