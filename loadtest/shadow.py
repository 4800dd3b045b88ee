"""What a shadow costs those who wait: an open loop at half load, without a shadow and with one, in turn.

The shadow is as heavy as the primary and shares its core, so every moment that it takes is one that the
primary could have had. Its batches are bounded by a tenth of the route's latency goal, and that is what the
primary's p99 may lose. Comparison, repetitions and reports run as they do in a fleet.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from inferfleet.models.repository import Repository
from inferfleet.testing import checksum_handler
from loadtest import ledger, squad
from loadtest.cluster import PARTITIONS
from loadtest.openloop import stamp_on_append
from loadtest.squad import Squad
from loadtest.stage import Stage
from loadtest.subjects import on_cores
from loadtest.traffic import Collector, Generator, is_right
from loadtest.workloads import Fleet, write_fleet
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

COVERAGE = 0.3
"""The least share of requests that the shadow is to have seen."""
_ROW_S = 0.004
_MAX_BATCH = 8
_ANSWERED_S = 60.0
_HANDLER = """

_Plain = Model


class Model(_Plain):
    def load(self, folder, device, parameters):
        super().load(folder, device, parameters)
        self._rounds = int(parameters["rounds"])
        self._work = np.ones((256, 256), np.float32)

    def predict(self, tensors):
        for _ in range(self._rounds * len(tensors["x"])):
            self._work @ self._work
        return super().predict(tensors)
"""
_SETTINGS = """
runtime = "python"
file = "model.py"
input = [{{ name = "x", datatype = "FP32", shape = [4] }}]
output = [{{ name = "check", datatype = "INT64", shape = [2] }}]
[parameters]
version = 1
rounds = {rounds}
"""


@dataclass(frozen=True)
class Plan:
    """``runs`` of each kind, ``seconds`` each after ``warmup``.

    ``load`` is the share of the time in which the primary's model is busy without a shadow.
    """

    runs: int = 3
    seconds: float = 30.0
    warmup: float = 4.0
    load: float = 0.5
    goal_ms: float = 200.0

    @property
    def cap_ms(self) -> float:
        """What one batch of the shadow is expected to take at most."""
        return self.goal_ms / 10


_PROBE = Plan(seconds=8.0, warmup=2.0)


def compare(on: Stage, plan: Plan, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run without and with the shadow in turn; return medians, coverage and ``shortfalls``, if any."""
    # One thread, as in the worker: others of the library would run on other cores.
    with on_cores(on.cores.subject), threadpool_limits(1):
        row_s, rounds = _calibrate()
    seen: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with RedisServer(on.folder / "redis") as redis:
        # What a row costs in a worker, whose other threads share the core, is more than what it costs alone.
        low = plan.load / row_s / 4
        probe = _measure(on, _PROBE, low, rounds, redis.url, shadow=False, seed=0)
        rate = low * plan.load / probe["busy"]
        tell(
            f"at {low:.0f} requests/s the model is busy {probe['busy']:.0%}; {rate:.0f}/s are {plan.load:.0%}"
        )
        for number in range(plan.runs):
            for kind, found in seen.items():
                one = _measure(on, plan, rate, rounds, redis.url, shadow=kind == "with", seed=number)
                found.append(one)
                tell(
                    f"run {number + 1}/{plan.runs}  {kind:<8} p50 {one['p50_ms']:7.2f}"
                    f"  p99 {one['p99_ms']:7.2f} ms  busy {one['busy']:4.0%}  coverage {one['coverage']:4.0%}"
                    f"  machine {one['machine']:.1f}"
                )
    return _summary(plan, rate, seen)


def _summary(plan: Plan, rate: float, seen: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    median = {
        kind: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for kind, found in seen.items()
    }
    before, after = median["without"]["p99_ms"], median["with"]["p99_ms"]
    batch_ms = median["with"]["shadow_p99_ms"]
    shortfalls = []
    if after > before + plan.cap_ms:
        shortfalls.append(f"p99 {after:.1f} ms is more than {before:.1f} + {plan.cap_ms:g} ms")
    if median["with"]["coverage"] < COVERAGE:
        shortfalls.append(f"coverage {median['with']['coverage']:.0%} is below {COVERAGE:.0%}")
    return {
        "rate": rate,
        "cap_ms": plan.cap_ms,
        "shadow_batch_p99_ms": batch_ms,
        "median": median,
        "runs": seen,
        "shortfalls": shortfalls,
    }


def _calibrate() -> tuple[float, int]:
    """Return the seconds of a row on this core, and how many products it is made of."""
    work = np.ones((256, 256), np.float32)
    spans = []
    for _ in range(300):
        began = time.perf_counter()
        work @ work
        spans.append(time.perf_counter() - began)
    product_s = sorted(spans)[len(spans) // 10]  # what others do on this core is not the model's
    rounds = max(1, round(_ROW_S / product_s))
    return rounds * product_s, rounds


def _write(fleet: Fleet, rounds: int, plan: Plan, redis: str, *, shadow: bool) -> Squad:
    repository = Repository(fleet.repository)
    fleet.repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        handler = Path(folder) / "model.py"
        handler.write_text(Path(checksum_handler.__file__).read_text() + _HANDLER)
        for version in ("1", "2"):
            repository.add(fleet.model, version, [handler], settings=_SETTINGS.format(rounds=rounds))
    config = write_fleet(fleet, fleet.repository.parent)
    routes = config.parent / "routes.toml"
    added = 'shadows = [{ name = "next", version = "2" }]\n' if shadow else ""
    routes.write_text(routes.read_text() + f"goal_p99_ms = {plan.goal_ms}\n" + added)
    config.write_text(config.read_text() + f'[control]\nurl = "{redis}"\n')
    return Squad(config, f"{fleet.name}.default")


def _measure(
    on: Stage, plan: Plan, rate: float, rounds: int, redis: str, *, shadow: bool, seed: int
) -> dict[str, float]:
    cluster = on.cluster
    requests, results = cluster.create("shadow.requests"), cluster.create("shadow.results")
    stamp_on_append(cluster, results)
    fleet = Fleet(
        name=f"lt-{uuid.uuid4().hex[:8]}",
        bootstrap=cluster.bootstrap,
        repository=on.folder / f"shadow-{requests.rsplit('.', 1)[-1]}" / "models",
        requests=requests,
        results=results,
        model=squad.MODEL,
        max_batch_size=_MAX_BATCH,
        max_queue_delay_ms=0,
        producer={"linger.ms": 0},
    )
    cluster.create_derived(fleet.derived)
    workers = _write(fleet, rounds, plan, redis, shadow=shadow)
    planned_s = ledger.planned_times(rate, plan.warmup + plan.seconds, poisson=True, seed=seed)
    generator = Generator(cluster.bootstrap, requests, planned_s, PARTITIONS)
    try:
        with Collector(cluster.bootstrap, results, PARTITIONS) as collector:
            with on_cores(on.cores.subject):
                workers.start()
            workers.wait_members(cluster.admin, 1)
            admin = _admin(workers)
            wait_until(
                lambda: _sum(admin, "model_ready") == 1 + shadow, _ANSWERED_S, "the versions are loaded"
            )
            busy, began, machine = _sum(admin, "batch_seconds_sum", role="primary"), time.monotonic(), _cpu()
            generator.start()
            wait_until(lambda: not generator.running, plan.warmup + plan.seconds + _ANSWERED_S, "all is sent")
            spent = time.monotonic() - began
            busy = _sum(admin, "batch_seconds_sum", role="primary") - busy
            wait_until(lambda: len(collector.numbers) >= generator.sent, _ANSWERED_S, "all is answered")
            found = _figures(plan, generator, collector, admin)
            workers.finish()
        return found | {"busy": busy / spent, "machine": (_cpu() - machine) / spent}
    finally:
        generator.stop()
        workers.close()
        cluster.delete(requests, results, *fleet.derived)


def _figures(plan: Plan, generator: Generator, collector: Collector, admin: str) -> dict[str, float]:
    collector.check()
    tally = ledger.judge(generator.sent, collector.arrivals, is_right)
    if tally.wrong or tally.lost or tally.foreign:
        raise RuntimeError(f"answers are not what they should be: {tally}")
    at_ms, _ = ledger.first_answers(generator.sent, collector.arrivals)
    waited = (at_ms - generator.planned_ms)[generator.planned_s >= plan.warmup]
    answered, shed = _sum(admin, "shadow_requests_total"), _sum(admin, "shadow_shed_total")
    return {
        "p50_ms": float(np.percentile(waited, 50)),
        "p99_ms": float(np.percentile(waited, 99)),
        "coverage": answered / generator.sent,
        "shed": shed,
        "shadow_p99_ms": _quantile(admin, "shadow", 0.99) * 1e3,
        "requests": float(generator.sent),
    }


def _cpu() -> float:
    """Return the processor seconds that this machine has spent so far, over all cores and processes."""
    ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _admin(workers: Squad) -> str:
    (worker,) = workers.alive
    log = workers.config.parent / f"{worker.name}.log"
    found: list[str] = []

    def told() -> bool:
        workers.check()
        lines = [line for line in log.read_text().splitlines() if '"worker_started"' in line]
        found.extend(str(json.loads(line)["admin"]) for line in lines)
        return bool(found)

    wait_until(told, _ANSWERED_S, "the worker tells its address")
    return found[0]


def _samples(admin: str, name: str, **labels: str) -> list[tuple[str, float]]:
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    found = []
    for line in lines:
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == f"inferfleet_{name}" and all(each in series for each in wanted):
            found.append((series, float(value)))
    return found


def _sum(admin: str, name: str, **labels: str) -> float:
    return sum(value for _, value in _samples(admin, name, **labels))


def _quantile(admin: str, role: str, share: float) -> float:
    """Return the upper bound of the histogram's bucket that holds a quantile of a role's batch seconds."""
    buckets = []
    for series, value in _samples(admin, "batch_seconds_bucket", role=role):
        bound = series.partition('le="')[2].partition('"')[0]
        buckets.append((float(bound), value))
    buckets.sort()
    total = buckets[-1][1] if buckets else 0.0
    return next((bound for bound, count in buckets if total and count >= share * total), 0.0)


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    without, with_ = result["median"]["without"], result["median"]["with"]
    lines = [
        f"{'':<10} {'p50':>9} {'p99':>9}  medians, ms",
        f"{'without':<10} {without['p50_ms']:>9.2f} {without['p99_ms']:>9.2f}",
        f"{'with':<10} {with_['p50_ms']:>9.2f} {with_['p99_ms']:>9.2f}",
        f"p99 + {with_['p99_ms'] - without['p99_ms']:.2f} ms;"
        f" a shadow's batch may take {result['cap_ms']:g} ms"
        f" (its p99: at most {result['shadow_batch_p99_ms']:g} ms)",
        f"coverage {with_['coverage']:.0%}; the primary's model was busy {without['busy']:.0%} of the time",
        *result["shortfalls"],
    ]
    return "\n".join(lines)
