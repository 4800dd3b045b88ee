"""Open loop: requests at planned times, whatever the answers do, while workers are killed, drained and added.

Every answer is the checksum of its own input, so what was lost, repeated or crossed is counted one by one.
Latency runs from the planned time to the result's append in Kafka. After each event the longest silence of
each request partition is told, and how many rows the event could repeat.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from loadtest import ledger, squad
from loadtest.cluster import PARTITIONS, Cluster
from loadtest.ledger import Event
from loadtest.squad import Squad
from loadtest.stage import Stage
from loadtest.subjects import on_cores
from loadtest.traffic import Collector, Generator, is_right
from loadtest.workloads import Fleet

KILL_LIMIT_S, MOVE_LIMIT_S = 10.0, 5.0
"""Longest silence allowed after a SIGKILL, and after a SIGTERM or a change of size."""
_NOTHING_NEW_S, _LATE_COPIES_S = 30.0, 3.0
_CALM_MARGIN_MS = 1_000.0


@dataclass(frozen=True)
class Plan:
    """What an open loop does; spans in seconds, ``rate`` in requests a second over all partitions.

    ``scale`` holds numbers of workers for parts of equal length and overrides ``workers``; requests planned
    during ``warmup`` are judged, but left out of the latency.
    """

    seconds: float = 95.0
    rate: float = 1_500.0
    poisson: bool = False
    workers: int = 3
    kill_every: float | None = None
    sigterm: bool = False
    scale: tuple[int, ...] = ()
    protocol: str = "classic"
    delay_ms: float = 20.0
    warmup: float = 5.0
    seed: int = 1

    @property
    def size(self) -> int:
        """Workers at the start."""
        return self.scale[0] if self.scale else self.workers

    @property
    def limit_s(self) -> float:
        """The longest silence that an event may cause."""
        return KILL_LIMIT_S if self.kill_every and not self.sigterm else MOVE_LIMIT_S

    def moments(self) -> Sequence[tuple[float, int | None]]:
        """Return when something happens, seconds after the warm-up, and the new size (None: a worker goes).

        Requests flow for at least :attr:`limit_s` after a worker has gone, or its silence could not be told.
        """
        if self.scale:
            part = self.seconds / len(self.scale)
            return [(part * number, size) for number, size in enumerate(self.scale)][1:]
        if not self.kill_every:
            return []
        count = int((self.seconds - self.limit_s) / self.kill_every + 1e-9)
        return [(self.kill_every * number, None) for number in range(1, count + 1)]


def run(on: Stage, plan: Plan, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the plan with real workers on fresh topics; return figures and ``shortfalls`` (none: all holds)."""
    cluster = on.cluster
    requests, results = cluster.create("openloop.requests"), cluster.create("openloop.results")
    stamp_on_append(cluster, results)
    fleet = Fleet(
        name=f"lt-{uuid.uuid4().hex[:8]}",
        bootstrap=cluster.bootstrap,
        repository=on.folder / f"openloop-{requests.rsplit('.', 1)[-1]}" / "models",
        requests=requests,
        results=results,
        model=squad.MODEL,
    )
    cluster.create_derived(fleet.derived)
    workers = squad.write_squad(fleet, plan.delay_ms, plan.protocol)
    planned_s = ledger.planned_times(
        plan.rate, plan.warmup + plan.seconds, poisson=plan.poisson, seed=plan.seed
    )
    generator = Generator(cluster.bootstrap, requests, planned_s, PARTITIONS)
    everywhere = frozenset(range(os.cpu_count() or 1))
    try:
        with on_cores(everywhere), Collector(cluster.bootstrap, results, PARTITIONS) as collector:
            for _ in range(plan.size):
                workers.start()
            workers.wait_members(cluster.admin, plan.size)
            events = _Director(cluster, plan, workers, generator, fleet.requests, tell).direct()
            _wait_answered(generator, collector)
            workers.finish()
        collector.check()
        dead = cluster.ends(fleet.derived[0], 1)[0]
        return _figures(plan, generator, collector, events, workers.codes, dead)
    finally:
        generator.stop()
        workers.close()
        cluster.delete(requests, results, *fleet.derived)


def stamp_on_append(cluster: Cluster, topic: str) -> None:
    """Let the broker stamp records of a topic when it appends them."""
    entry = ConfigEntry(
        "message.timestamp.type", "LogAppendTime", incremental_operation=AlterConfigOpType.SET
    )
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    cluster.admin.incremental_alter_configs([resource])[resource].result(30)


@dataclass
class _Director:
    """Brings about the plan's events while the generator sends."""

    cluster: Cluster
    plan: Plan
    workers: Squad
    generator: Generator
    topic: str
    tell: Callable[[str], None]

    def direct(self) -> list[Event]:
        """Return the events once every request was sent."""
        witness = Consumer({"bootstrap.servers": self.cluster.bootstrap, "group.id": self.workers.group})
        events: list[Event] = []
        try:
            self.generator.start()
            for at_s, size in self.plan.moments():
                self._send_until(self.plan.warmup + at_s)
                events.append(self._event(at_s, size, witness))
            self._send_until(float("inf"))
        finally:
            witness.close()
        return events

    def _send_until(self, at_s: float) -> None:
        while self.generator.now_s < at_s and self.generator.running:
            self.workers.check()
            time.sleep(0.01)

    def _event(self, at_s: float, size: int | None, witness: Consumer) -> Event:
        now_ms = self.generator.epoch_ms(self.generator.now_s)
        sent = [self.generator.sent_to(partition) for partition in range(PARTITIONS)]
        what = self._replace() if size is None else ""
        # Asked for before the first replacement is up: the dead worker's commits end here.
        committed = [
            max(0, each.offset)
            for each in witness.committed(
                [TopicPartition(self.topic, number) for number in range(PARTITIONS)], 10
            )
        ]
        if size is not None:
            what = self._resize(size)
        uncommitted = [max(0, high - low) for high, low in zip(sent, committed, strict=True)]
        self.tell(f"{at_s:6.1f} s  {what}")
        return Event(what, at_s, now_ms, self.plan.limit_s, uncommitted)

    def _replace(self) -> str:
        if self.plan.sigterm:
            return f"SIGTERM {self.workers.drain()}, {self.workers.start()} starts"
        return f"SIGKILL {self.workers.kill()}, {self.workers.start()} starts"

    def _resize(self, size: int) -> str:
        before = len(self.workers.alive)
        while len(self.workers.alive) < size:
            self.workers.start()
        while len(self.workers.alive) > size:
            self.workers.drain(-1)
        return f"{before} -> {size} workers"


def _wait_answered(generator: Generator, collector: Collector) -> None:
    """Return once every request has an outcome and late copies had time to come, or nothing new comes."""
    moved_at, seen = time.monotonic(), -1
    complete_at: float | None = None
    while time.monotonic() - moved_at < _NOTHING_NEW_S:
        collector.check()
        if len(collector.arrivals) != seen:
            moved_at, seen = time.monotonic(), len(collector.arrivals)
        if complete_at is None and len(collector.numbers - {-1}) >= generator.sent:
            complete_at = time.monotonic()
        if complete_at is not None and time.monotonic() - complete_at > _LATE_COPIES_S:
            return
        time.sleep(0.05)


def _figures(
    plan: Plan,
    generator: Generator,
    collector: Collector,
    events: Sequence[Event],
    codes: Sequence[int],
    dead_letters: int,
) -> dict[str, Any]:
    planned_ms, sent_ms, sent = generator.planned_ms, generator.sent_ms, generator.sent
    tally = ledger.judge(sent, collector.arrivals, is_right)
    first, copies = ledger.first_answers(sent, collector.arrivals)
    until_ms = generator.epoch_ms(plan.warmup + plan.seconds)
    ledger.settle_events(events, sent_ms, first, copies, until_ms)
    begins_ms = generator.epoch_ms(plan.warmup)
    calm_until_ms = events[0].at_ms if events else until_ms
    measured = planned_ms >= begins_ms
    # What is in flight at the first event waits for what comes of it, so it says nothing about calm.
    calm = measured & (planned_ms < calm_until_ms - _CALM_MARGIN_MS)
    calm_first = np.where(first <= calm_until_ms, first, np.nan)
    missing = ledger.shortfalls(tally, events, codes)
    missing += [f"{dead_letters} dead letters"] * bool(dead_letters)
    missing += [f"request not accepted: {text}" for text in generator.refused[:1]]
    late_ms = (sent_ms - planned_ms)[measured]
    return {
        "plan": asdict(plan),
        "partitions": PARTITIONS,
        "tally": tally._asdict(),
        "dead_letters": dead_letters,
        "drain_exit_codes": list(codes),
        "latency_ms": ledger.latency(planned_ms[measured], first[measured]),
        "latency_ms_before_events": ledger.latency(planned_ms[calm], first[calm]),
        "longest_silence_before_events_s": max(
            ledger.longest_silences(calm_first, PARTITIONS, begins_ms, calm_until_ms)
        ),
        "generator_late_ms": {"p99": float(np.percentile(late_ms, 99)), "max": float(late_ms.max())},
        "events": [event.figures() for event in events],
        "in_flight_at_events": sum(event.in_flight for event in events),
        "shortfalls": missing,
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures of :func:`run` as a short text."""
    plan, tally, late = figures["plan"], figures["tally"], figures["generator_late_ms"]
    sizes = " -> ".join(str(size) for size in plan["scale"]) or plan["workers"]
    lines = [
        f"{tally['sent']:,} requests, {plan['rate']:,g}/s {'poisson' if plan['poisson'] else 'evenly'} over "
        f"{figures['partitions']} partitions, {sizes} workers, {plan['protocol']} protocol",
        f"{'at s':>6}  {'event':<32} {'unanswered':>10} {'uncommitted':>11} {'duplicates':>10} "
        f"{'silence s':>9} {'limit s':>7}",
    ]
    lines += [
        f"{event['at_s']:>6.1f}  {event['what']:<32} {event['unanswered']:>10,} {event['in_flight']:>11,} "
        f"{event['duplicates']:>10,} {event['longest_s']:>9.2f} {event['limit_s']:>7g}"
        for event in figures["events"]
    ]
    lines.append(f"longest silence before any event {figures['longest_silence_before_events_s']:.2f} s")
    for name, key in (("before any event", "latency_ms_before_events"), ("all", "latency_ms")):
        seen = figures[key]
        lines.append(
            f"latency ms, {name:<17} p50 {seen['p50']:,.1f}  p90 {seen['p90']:,.1f}  p99 {seen['p99']:,.1f}"
            f"  p99.9 {seen['p99.9']:,.1f}  max {seen['max']:,.1f}  ({seen['count']:,} requests)"
        )
    lines += [
        f"generator late by p99 {late['p99']:.1f} ms, max {late['max']:.1f} ms",
        f"lost {tally['lost']}, wrong {tally['wrong']}, duplicates {tally['duplicates']} "
        f"(unequal {tally['unequal']}), in flight at events {figures['in_flight_at_events']}, "
        f"dead letters {figures['dead_letters']}, drain exit codes {figures['drain_exit_codes']}",
        "holds" if not figures["shortfalls"] else "DOES NOT HOLD: " + "; ".join(figures["shortfalls"]),
    ]
    return "\n".join(lines)
