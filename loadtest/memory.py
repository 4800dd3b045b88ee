"""Does a worker's memory grow with what it has answered? Resident size early and late in a long drain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from loadtest import subjects
from loadtest.stage import Stage
from loadtest.workloads import RAW

_STALLED_S = 60.0
_LOOK_EVERY_S = 0.1


def growth(
    on: Stage,
    *,
    first: int = 500_000,
    last: int = 2_000_000,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Drain ``last`` ``raw`` requests; return resident MB at the ``first`` answer and at the last."""
    cluster = on.cluster
    requests, results = cluster.create("memory.requests"), cluster.create("memory.results")
    run = subjects.Run(RAW, cluster.bootstrap, requests, results, on.folder)
    cluster.create_derived(run.derived)
    cluster.fill(requests, RAW, last)
    worker = subjects.start(subjects.WORKER, run, on.cores.subject)
    try:
        process = psutil.Process(worker.pid)
        early = late = 0.0
        answers, moved_at = 0, time.monotonic()
        while answers < last:
            time.sleep(_LOOK_EVERY_S)
            worker.check()
            now_answers = sum(cluster.ends(results))
            late = process.memory_info().rss / 1e6
            if not early and now_answers >= first:
                early = late
                tell(f"resident at {now_answers:,} answers: {early:,.1f} MB")
            if now_answers > answers:
                answers, moved_at = now_answers, time.monotonic()
            elif time.monotonic() - moved_at > _STALLED_S:
                raise RuntimeError(f"the worker stands at {answers} of {last} answers:\n{worker.log_tail()}")
        tell(f"resident at {answers:,} answers: {late:,.1f} MB, {late - early:+.1f} MB")
    finally:
        worker.kill()
        cluster.delete(requests, results, *run.derived)
    return {"first": first, "last": last, "early_mb": early, "late_mb": late, "growth_mb": late - early}
