"""Two model-bound workers beside one: what a second consumer-group member is worth on two cores.

The model is the sentence encoder with one thread, so the model is what is waited for. Every worker may use
every core; the broker shares them. The topic is
filled when all workers hold partitions, so that neither loading nor joining counts.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

from loadtest import subjects
from loadtest.drain import steady_rates, watch
from loadtest.squad import members
from loadtest.stage import Stage
from loadtest.workloads import EMBED
from tests.support.waiting import wait_until


def compare(
    on: Stage, *, runs: int = 3, records: int = 1_000, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Drain alternately with one worker and with two; return medians and their ratio."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(runs):
        for workers, seen in rates.items():
            seen.append(_drain(on, records, workers))
            tell(f"scale run {number + 1}/{runs}  {workers} worker(s) {seen[-1]:>8,.1f} /s")
    medians = {workers: statistics.median(seen) for workers, seen in rates.items()}
    return {"runs": rates, "median_per_s": medians, "ratio": medians[2] / medians[1]}


def _drain(on: Stage, records: int, workers: int) -> float:
    """Let the workers join, fill the topic only when all hold partitions, and return answers per second."""
    cluster = on.cluster
    requests, results = cluster.create("scale.requests"), cluster.create("scale.results")
    run = subjects.Run(EMBED, cluster.bootstrap, requests, results, on.folder)
    cluster.create_derived(run.derived)
    everywhere = frozenset(range(os.cpu_count() or 1))
    started = [subjects.start(subjects.WORKER, run, everywhere) for _ in range(workers)]
    try:
        wait_until(
            lambda: members(cluster.admin, f"lt-{run.name}.default") == workers,
            60,
            f"{workers} workers hold partitions",
        )
        cluster.fill(requests, EMBED, records)
        return steady_rates(watch(lambda: sum(cluster.ends(results)), records, started[0]), records)[0]
    finally:
        for worker in started:
            worker.kill()
        cluster.delete(requests, results, *run.derived)
