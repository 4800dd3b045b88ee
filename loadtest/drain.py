"""Backlog drain: how fast a subject empties a full request topic, bare loop and worker in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import psutil

from loadtest import subjects
from loadtest.stage import Stage
from loadtest.subjects import Run, Subject
from loadtest.workloads import Workload

_LOOK_EVERY_S = 0.1
_STALLED_S = 60.0
FROM_SHARE, TO_SHARE = 0.1, 0.9


@dataclass(frozen=True)
class Drain:
    """One drain.

    ``steady`` is answers/s between 10 % and 90 % of the answers, ``whole`` from the first to the last.
    ``per_cpu_s`` is answers per second of processor time of the subject within the steady part: on a
    machine that is shared with other work it is the steadier figure of the two.
    """

    subject: str
    records: int
    steady: float
    whole: float
    per_cpu_s: float
    until_first_s: float
    exit_code: int


class Look(NamedTuple):
    """What was seen at one instant: monotonic seconds, answers so far, the subject's processor seconds."""

    at: float
    answers: int
    cpu_s: float = 0.0


def steady_rates(seen: Sequence[Look], total: int) -> tuple[float, float]:
    """Return answers per second, and per processor second, between 10 % and 90 % of ``total``.

    ``seen`` is ascending; crossings are interpolated between looks.
    """
    low, high = FROM_SHARE * total, TO_SHARE * total
    times = [(look.at, look.answers) for look in seen]
    cpu = [(look.cpu_s, look.answers) for look in seen]
    spent_cpu_s = crossing(cpu, high) - crossing(cpu, low)
    rate = (high - low) / (crossing(times, high) - crossing(times, low))
    return rate, (high - low) / spent_cpu_s if spent_cpu_s else 0.0


def crossing(seen: Sequence[tuple[float, int]], count: float) -> float:
    """Return the interpolated first value of each pair at which ``count`` answers had been seen."""
    before_at, before = seen[0]
    for at, answers in seen:
        if answers >= count:
            if answers == before:
                return at
            return before_at + (at - before_at) * (count - before) / (answers - before)
        before_at, before = at, answers
    raise ValueError(f"only {before} of {count:g} answers were seen")


def whole_rate(seen: Sequence[Look]) -> float:
    """Return answers per second from the last look without an answer to the first look with all."""
    started = max((look.at for look in seen if not look.answers), default=seen[0].at)
    total = seen[-1].answers
    ended = next(look.at for look in seen if look.answers == total)
    return total / (ended - started)


def watch(
    count: Callable[[], int], total: int, subject: Subject, every_s: float = _LOOK_EVERY_S
) -> list[Look]:
    """Look at ``count()`` until it reaches ``total`` and return every look.

    Raises ``RuntimeError`` when the subject ends or nothing new comes for a minute.
    """
    process = psutil.Process(subject.pid)

    def look() -> Look:
        subject.check()
        spent = process.cpu_times()
        return Look(time.monotonic(), count(), spent.user + spent.system)

    seen = [look()]
    moved_at = seen[0].at
    while seen[-1].answers < total:
        time.sleep(every_s)
        now, answers, _ = latest = look()
        if answers > seen[-1].answers:
            moved_at = now
        elif now - moved_at > _STALLED_S:
            raise RuntimeError(
                f"{subject.name} stands at {answers} of {total} answers for {_STALLED_S:g} s; its log ends:\n"
                f"{subject.log_tail()}"
            )
        seen.append(latest)
    return seen


def drain_once(on: Stage, name: str, workload: Workload, requests: str, total: int) -> Drain:
    """Drain ``requests`` with one subject into a fresh result topic, which is deleted afterwards."""
    cluster = on.cluster
    results = cluster.create(f"{workload.name}.results")
    run = Run(workload, cluster.bootstrap, requests, results, on.folder)
    cluster.create_derived(run.derived)
    started = time.monotonic()
    subject = subjects.start(name, run, on.cores.subject)
    try:
        seen = watch(lambda: sum(cluster.ends(results)), total, subject)
        code = subject.terminate()
    finally:
        subject.kill()
        cluster.delete(results, *run.derived)
    first = next(look.at for look in seen if look.answers)
    steady, per_cpu_s = steady_rates(seen, total)
    return Drain(name, total, steady, whole_rate(seen), per_cpu_s, first - started, code)


def compare(
    on: Stage,
    workload: Workload,
    *,
    runs: int = 5,
    records: int | None = None,
    names: Sequence[str] = subjects.NAMES,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fill once, then drain alternately ``runs`` times with each subject; return medians and their ratio."""
    cluster = on.cluster
    total = records or workload.drain_records
    requests = cluster.create(f"{workload.name}.requests")
    done: list[Drain] = []
    try:
        took_s = cluster.fill(requests, workload, total)
        tell(f"{workload.name}: {total:,} requests written in {took_s:.1f} s")
        for number in range(runs):
            for name in names:
                one = drain_once(on, name, workload, requests, total)
                done.append(one)
                tell(
                    f"{workload.name} run {number + 1}/{runs}  {name:<10} {one.steady:>10,.0f} /s"
                    f" {one.per_cpu_s:>10,.0f} per CPU second"
                )
    finally:
        cluster.delete(requests)
    return summary(workload.name, done)


def summary(workload: str, done: Sequence[Drain], yardstick: str = subjects.BARE) -> dict[str, Any]:
    """Return medians per subject, the worker's ratio to the bare loop, and every run.

    The ratio is the median over pairs of neighbouring runs: what else the machine does moves both of a pair
    more alike than it moves runs that lie minutes apart.
    """
    of: dict[str, list[Drain]] = {}
    for one in done:
        of.setdefault(one.subject, []).append(one)
    return {
        "workload": workload,
        "median_per_s": {name: statistics.median(one.steady for one in ones) for name, ones in of.items()},
        "median_per_cpu_s": {
            name: statistics.median(one.per_cpu_s for one in ones) for name, ones in of.items()
        },
        **ratios(done, yardstick),
        "runs": [asdict(one) for one in done],
    }


def ratios(done: Sequence[Drain], yardstick: str) -> dict[str, float | None]:
    """Return the worker's ``ratio`` to a subject, and that ``per_cpu_s``; None without a pair of runs."""
    beside = [one for one in done if one.subject == yardstick]
    workers = [one for one in done if one.subject == subjects.WORKER]
    pairs = list(zip(beside, workers, strict=False))
    return {
        "ratio": _median([worker.steady / bare.steady for bare, worker in pairs]),
        "ratio_per_cpu_s": _median([worker.per_cpu_s / bare.per_cpu_s for bare, worker in pairs]),
    }


def _median(ratios: list[float]) -> float | None:
    return statistics.median(ratios) if ratios else None
