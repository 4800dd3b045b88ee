"""Many workers' ends of the control plane in one process: real feeds and reporters, and nothing behind them.

``python -m loadtest.crowd PLAN.json`` runs until SIGTERM and then writes what it has seen. Each worker has
its two threads and two connections, as in a real one; they share what is parsed of the routes, because a real
one parses them on a machine of its own. Models load at once.
"""

from __future__ import annotations

import heapq
import json
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from inferfleet.control.feed import RedisRouteFeed
from inferfleet.control.reporter import RedisReporter
from inferfleet.plane import WorkerReport, version_name
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import EMPTY_LOG, Revision, RouteLog
from inferfleet.summaries import Histogram, Window

STACK_BYTES = 512 * 1024


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who takes part, where the store is, how often they speak, and where to write what was seen.

    Revisions up to ``known`` are the start's and are not timed.
    """

    url: str
    fleet: str
    workers: int
    pools: int
    known: int
    output: str
    heartbeat_s: float = 2.0
    every_s: float = 5.0


class Sightings:
    """When the first and the last worker saw each revision, in epoch seconds, and how many did."""

    def __init__(self, known: int) -> None:
        self.known = known
        self.seen: dict[int, tuple[int, float, float]] = {}
        self._lock = threading.Lock()

    def add(self, before: int, number: int) -> None:
        """Note that one more worker has everything up to ``number``, after having had ``before``."""
        now = time.time()
        with self._lock:
            for each in range(max(before, self.known) + 1, number + 1):
                count, first, _ = self.seen.get(each, (0, now, now))
                self.seen[each] = (count + 1, first, now)


class Worker:
    """One worker's feed and reporter."""

    def __init__(self, number: int, plan: Plan, sightings: Sightings) -> None:
        self.name, self.pool = f"w-{number:03d}", f"p-{number % plan.pools}"
        self._sightings = sightings
        self._number = 0
        self._log: RouteLog = EMPTY_LOG
        self._mine: dict[str, tuple[Revision, ...]] = {}
        where = Place(plan.url, client_name=self.name)
        self.feed = RedisRouteFeed(
            lambda: open_redis(where), plan.fleet, address=where.shown, copy=None, wake=self._woken
        )
        self.reporter = RedisReporter(
            lambda: open_redis(where), plan.fleet, self.pool, self.name, heartbeat_s=plan.heartbeat_s
        )

    def _woken(self) -> None:
        number = self.feed.log().head.number
        self._sightings.add(self._number, number)
        self._number = number

    def beat(self) -> None:
        """Report as a worker does that has loaded what its pool's routes need."""
        found = self.feed.log()
        if found is not self._log:
            self._log = found
            self._mine = {
                name: revisions
                for name, revisions in found.kept.items()
                if any(each.route is not None and each.route.pool == self.pool for each in revisions)
            }
        ready = {
            version_name(each.route.model, version)
            for revisions in self._mine.values()
            for each in revisions
            if each.route is not None
            for version in each.route.versions | set(each.route.warm)
        }
        self.reporter.heartbeat(
            WorkerReport(
                worker=self.name,
                pool=self.pool,
                head=found.head,
                at_ms=int(time.time() * 1000),
                adopted={name: revisions[-1].number for name, revisions in self._mine.items()},
                ready=sorted(ready),
                digests=dict.fromkeys(sorted(ready), "d" * 64),
                lag=dict.fromkeys(self._mine, 3),
                rows_per_s=dict.fromkeys(self._mine, 12.5),
                stale=self.feed.stale,
            )
        )

    def sum_up(self, every_s: float, sketch: Histogram) -> None:
        """Append a window for each variant of each of the pool's routes."""
        now_ms = int(time.time() * 1000)
        windows: list[Window] = []
        for name, revisions in self._mine.items():
            timed = [each for each in revisions if each.effective_from_ms is not None]
            route = timed[-1].route if timed else None
            if route is None:
                continue
            windows.extend(
                Window(
                    worker=self.name,
                    route=name,
                    model=route.model,
                    version=variant.version,
                    variant=variant.name,
                    revision=timed[-1].number,
                    start_ms=now_ms - int(every_s * 1000),
                    end_ms=now_ms,
                    requests=60,
                    codes={"ok": 60},
                    batches=8,
                    rows=60,
                    compute_s=0.3,
                    compute=sketch,
                    latency=sketch,
                )
                for variant in route.variants
            )
        self.reporter.append(windows)


def main(path: str) -> None:
    """Run a crowd as the plan in a file says."""
    plan = msgspec.json.decode(Path(path).read_bytes(), type=Plan)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    threading.stack_size(STACK_BYTES)
    sightings = Sightings(plan.known)
    sketch = Histogram()
    sketch.add(np.random.default_rng(7).lognormal(-4.0, 0.6, 60))
    workers = [Worker(number, plan, sightings) for number in range(plan.workers)]
    for worker in workers:
        worker.feed.start()
    now = time.monotonic()
    due = [(now + plan.heartbeat_s * n / plan.workers, n, "beat") for n in range(plan.workers)]
    due += [(now + plan.every_s * (1 + n / plan.workers), n, "sum") for n in range(plan.workers)]
    heapq.heapify(due)
    while not stopping.is_set():
        at, number, what = heapq.heappop(due)
        if stopping.wait(max(0.0, at - time.monotonic())):
            break
        if what == "beat":
            workers[number].beat()
            heapq.heappush(due, (at + plan.heartbeat_s, number, what))
        else:
            workers[number].sum_up(plan.every_s, sketch)
            heapq.heappush(due, (at + plan.every_s, number, what))
    Path(plan.output).write_text(
        json.dumps({"seen": sightings.seen, "dropped": sum(each.reporter.dropped for each in workers)})
    )
    # A thousand threads are not waited for one by one: everything that counts is written.
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
