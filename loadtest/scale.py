"""Two model-bound workers beside one: what a second consumer-group member is worth on two cores.

The model is the sentence encoder with one thread, so the model is what is waited for. Every worker may use
every core; the broker shares them. Both runs drain the same backlog, in turn, and only the part in which
all workers hold partitions counts.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

from loadtest import subjects
from loadtest.drain import steady_rates, watch
from loadtest.stage import Stage
from loadtest.workloads import EMBED


def compare(
    on: Stage, *, runs: int = 3, records: int = 3_000, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Drain alternately with one worker and with two; return medians and their ratio."""
    requests = on.cluster.create("scale.requests")
    on.cluster.fill(requests, EMBED, records)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(runs):
        for workers, seen in rates.items():
            seen.append(_drain(on, requests, records, workers))
            tell(f"scale run {number + 1}/{runs}  {workers} worker(s) {seen[-1]:>8,.1f} /s")
    medians = {workers: statistics.median(seen) for workers, seen in rates.items()}
    return {"runs": rates, "median_per_s": medians, "ratio": medians[2] / medians[1]}


def _drain(on: Stage, requests: str, records: int, workers: int) -> float:
    results = on.cluster.create("scale.results")
    run = subjects.Run(EMBED, on.cluster.bootstrap, requests, results, on.folder)
    on.cluster.create_named(run.dead_letters)
    everywhere = frozenset(range(os.cpu_count() or 1))
    started = [subjects.start(subjects.WORKER, run, everywhere) for _ in range(workers)]
    try:
        seen = watch(lambda: sum(on.cluster.ends(results)), records, started[0])
        return steady_rates(seen, records)[0]
    finally:
        for worker in started:
            worker.kill()
        on.cluster.delete(results)
