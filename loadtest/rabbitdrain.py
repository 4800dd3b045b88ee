"""Backlog drain on RabbitMQ: the worker, a bare aio-pika loop and a bare pika loop in turn.

A queue is empty after a drain, so each run fills its own. Both the requests and the results lie in quorum
queues, and results are confirmed before requests are acknowledged, for all three.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest import subjects
from loadtest.barerabbit import RabbitJob
from loadtest.drain import Drain, ratios, steady_rates, summary, watch, whole_rate
from loadtest.rabbit import Ends, Rabbit
from loadtest.stage import RabbitStage
from loadtest.subjects import launch, on_cores
from loadtest.workloads import Fleet, Workload, write_fleet, write_model

AIO_PIKA, PIKA = "bare aio-pika", "bare pika"
NAMES = (subjects.WORKER, AIO_PIKA, PIKA)
RECORDS = {"tiny": 60_000, "raw": 60_000, "embed": 2_000}
_MODULES = {AIO_PIKA: "loadtest.barerabbit", PIKA: "loadtest.barepika"}


def fleet_of(workload: Workload, rabbit: Rabbit, ends: Ends, folder: Path) -> Fleet:
    """Return the worker's settings for one run."""
    return Fleet(
        name=f"lt-{ends.run}",
        bootstrap="",
        repository=folder / "models",
        requests=ends.requests,
        results=ends.destination,
        model=workload.model,
        max_batch_size=workload.drain_batch,
        rabbitmq=rabbit.url,
    )


def bare_command(name: str, workload: Workload, rabbit: Rabbit, ends: Ends, folder: Path) -> list[str]:
    """Write a bare loop's job and return its command line."""
    job = RabbitJob(
        workload=workload.name,
        url=rabbit.url,
        requests=ends.requests,
        exchange=ends.exchange,
        key=ends.results,
        model_folder=str(write_model(workload, folder / "models")),
        batch=workload.bare_batch,
    )
    path = folder / f"job-{ends.run}.json"
    path.write_bytes(msgspec.json.encode(job))
    return [sys.executable, "-m", _MODULES[name], str(path)]


def drain_once(on: RabbitStage, name: str, workload: Workload, total: int) -> Drain:
    """Fill a queue and drain it with one subject; the queues are deleted afterwards."""
    rabbit = on.rabbit
    ends = rabbit.ends(workload.name)
    fleet = fleet_of(workload, rabbit, ends, on.folder)
    write_model(workload, fleet.repository)
    config = write_fleet(fleet, on.folder / fleet.name)
    if name == subjects.WORKER:
        command = [sys.executable, "-m", "inferfleet.cli", "--config", str(config), "worker"]
    else:
        command = bare_command(name, workload, rabbit, ends, on.folder)
    rabbit.create(ends, fleet, config)
    try:
        rabbit.fill(ends.requests, workload, total)
        started = time.monotonic()
        with on_cores(on.cores.subject):
            subject = launch(name, command, on.folder / f"{name.replace(' ', '-')}-{ends.run}.log")
        try:
            with rabbit.observer(ends.results) as answers:
                seen = watch(answers, total, subject)
            code = subject.terminate()
        finally:
            subject.kill()
        if left := rabbit.depth(ends.requests):
            raise RuntimeError(f"{name} ended with {left} requests that it had not acknowledged")
    finally:
        rabbit.delete(ends)
    first = next(look.at for look in seen if look.answers)
    steady, per_cpu_s = steady_rates(seen, total)
    return Drain(name, total, steady, whole_rate(seen), per_cpu_s, first - started, code)


def compare(
    on: RabbitStage,
    workload: Workload,
    *,
    runs: int = 5,
    records: int | None = None,
    names: Sequence[str] = NAMES,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Drain alternately ``runs`` times with each subject; return :func:`summarised` figures."""
    total = records or RECORDS[workload.name]
    done: list[Drain] = []
    for number in range(runs):
        for name in names:
            one = drain_once(on, name, workload, total)
            done.append(one)
            tell(
                f"{workload.name} run {number + 1}/{runs}  {name:<13} {one.steady:>10,.0f} /s"
                f" {one.per_cpu_s:>10,.0f} per CPU second"
            )
    return summarised(workload.name, done)


def summarised(workload: str, done: Sequence[Drain]) -> dict[str, Any]:
    """Return medians and the worker's ratios.

    ``ratio`` is to the bare aio-pika loop, since that is the worker's own library; ``to_pika`` is for the
    reader who asks what the library costs.
    """
    return {**summary(workload, done, AIO_PIKA), "to_pika": ratios(done, PIKA)}


def shown(result: dict[str, Any]) -> str:
    """Return the figures of :func:`compare` as a short text."""
    rates, per_cpu_s = result["median_per_s"], result["median_per_cpu_s"]
    lines = [f"{'median':<13} {'per s':>10} {'per CPU s':>10}"]
    lines += [f"{name:<13} {rate:>10,.0f} {per_cpu_s[name]:>10,.0f}" for name, rate in rates.items()]
    for what, found in ((AIO_PIKA, result), (PIKA, result["to_pika"])):
        if found["ratio"] is not None:
            lines.append(
                f"{subjects.WORKER} / {what}: {found['ratio']:.2f} ({found['ratio_per_cpu_s']:.2f} per CPU s)"
            )
    return "\n".join(lines)
