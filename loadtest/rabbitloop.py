"""Open loop on RabbitMQ: requests at planned times while workers are killed and the node itself is restarted.

Every answer is the checksum of its own input. All outcomes stay in their queue until everything is quiet and
are read then, by a plain consumer, so what was lost, repeated, changed or crossed is counted one by one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest import ledger, squad
from loadtest.ledger import Arrival, Instants, Tally
from loadtest.rabbit import Depth, Ends, Rabbit
from loadtest.squad import Squad
from loadtest.stage import RabbitStage
from loadtest.subjects import on_cores
from loadtest.traffic import Planned, body_of, is_right
from loadtest.workloads import Fleet
from tests.support.rabbitmq_publisher import SteadyPublisher
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

KILL_LIMIT_S, RESTART_LIMIT_S = 10.0, 20.0
"""Longest silence allowed after a worker went, and from the node's return to the next outcome."""
_LOOK_EVERY_S = 0.05
_QUIET_S, _NOTHING_NEW_S = 5.0, 60.0


@dataclass(frozen=True)
class RabbitPlan:
    """What an open loop on RabbitMQ does: ``count`` requests, ``rate`` a second.

    The node is restarted ``restart_node`` times, evenly spread: first in order, then killed, and so on.
    """

    count: int = 100_000
    rate: float = 1_500.0
    poisson: bool = False
    workers: int = 3
    kill_every: float | None = None
    sigterm: bool = False
    restart_node: int = 0
    delay_ms: float = 20.0
    seed: int = 1

    @property
    def seconds(self) -> float:
        """How long requests flow."""
        return self.count / self.rate

    def times(self) -> Instants:
        """Return when each request is due, seconds from the start."""
        longest = 2 * self.seconds + 10
        return ledger.planned_times(self.rate, longest, poisson=self.poisson, seed=self.seed)[: self.count]

    def moments(self) -> list[tuple[float, str]]:
        """Return what happens when: ``worker``: one goes, another comes; ``stop``, ``kill``: the node."""
        every, number = self.kill_every or self.seconds, 1
        out: list[tuple[float, str]] = []
        while every * number < self.seconds:
            out.append((every * number, "worker"))
            number += 1
        step = self.seconds / (self.restart_node + 1)
        out += [(step * n, "kill" if n % 2 == 0 else "stop") for n in range(1, self.restart_node + 1)]
        return sorted(out)


@dataclass
class Incident:
    """Something that was done, at ``at_s`` of the plan, and what followed until the next one.

    ``over_s`` is when it was over: for the ``node``, when it answered again. ``outcomes`` is how many had
    been seen, copies included, ``unanswered`` how many of the ``sent`` requests had none. ``silence_s`` must
    not exceed ``limit_s``: after the node, the time from ``over_s`` to the next outcome, after a worker the
    longest time without one while the node was there.
    """

    what: str
    at_s: float
    limit_s: float
    sent: int
    outcomes: int
    over_s: float
    node: bool = False
    unanswered: int = 0
    silence_s: float = 0.0


@dataclass
class Course:
    """What was seen while requests flowed: outcomes so far at instants of the plan, and the incidents."""

    growth: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    incidents: list[Incident] = field(default_factory=list)
    revived: list[str] = field(default_factory=list)
    """Workers that ended by themselves and were started anew, as a supervisor does."""

    def look(self, at_s: float, outcomes: int | None) -> None:
        """Note a look; None while the node is away."""
        if outcomes is not None and outcomes > self.growth[-1][1]:
            self.growth.append((at_s, outcomes))

    def count_unanswered(self, numbers: Sequence[int]) -> None:
        """Fill in how many requests had no outcome; ``numbers`` are those of all outcomes in their order."""
        for each in self.incidents:
            each.unanswered = max(0, each.sent - len(set(numbers[: each.outcomes])))

    def settle(self, until_s: float) -> None:
        """Fill in the silences; ``until_s`` is when requests stopped flowing."""
        grew = [at_s for at_s, _ in self.growth]
        away: list[tuple[float, float]] = []
        for each in self.incidents:
            if each.node:
                back_s = next((at_s for at_s in grew if at_s > each.over_s), until_s)
                each.silence_s = max(0.0, back_s - each.over_s)
                away.append((each.at_s, back_s))
        ends = [each.at_s for each in self.incidents[1:]] + [until_s]
        for each, end_s in zip(self.incidents, ends, strict=True):
            if not each.node:
                edges = [each.at_s, *(at_s for at_s in grew if each.at_s < at_s < end_s), end_s]
                each.silence_s = max(_outside(gap, away) for gap in itertools.pairwise(edges))


def _outside(gap: tuple[float, float], away: Sequence[tuple[float, float]]) -> float:
    """Return how much of a gap lies outside the times in which the node was away, which do not overlap."""
    inside = sum(max(0.0, min(gap[1], back_s) - max(gap[0], gone_s)) for gone_s, back_s in away)
    return gap[1] - gap[0] - inside


class RabbitGenerator(Planned):
    """Publishes requests at their planned times; what may not have arrived goes again under its own id."""

    def __init__(self, publisher: SteadyPublisher, queue: str, planned_s: Instants) -> None:
        super().__init__(planned_s)
        self._publisher = publisher
        self._queue = queue

    def _send(self, number: int) -> None:
        name = str(number)
        headers = {"inferfleet-id": name}
        self._publisher.publish(self._queue, body_of(number), message_id=name, headers=headers)

    def _flush(self) -> None:
        self._publisher.wait(120)


def run(on: RabbitStage, plan: RabbitPlan, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the plan with real workers on fresh queues; return figures and ``shortfalls`` (none: all holds)."""
    rabbit = on.rabbit
    ends = rabbit.ends("openloop")
    fleet = Fleet(
        name=f"lt-{ends.run}",
        bootstrap="",
        repository=on.folder / f"openloop-{ends.run}" / "models",
        requests=ends.requests,
        results=ends.destination,
        model=squad.MODEL,
        rabbitmq=rabbit.url,
    )
    workers = squad.write_squad(fleet, plan.delay_ms)
    # The kernel ends a node whose starting thread has ended, so the thread that restarts it stays to the end.
    with ThreadPoolExecutor(1, "node-keeper") as keeper:
        rabbit.create(ends, fleet, workers.config)
        try:
            return _run(on, plan, ends, fleet, workers, keeper, tell)
        finally:
            workers.close()
            rabbit.delete(ends)


def _run(
    on: RabbitStage,
    plan: RabbitPlan,
    ends: Ends,
    fleet: Fleet,
    workers: Squad,
    keeper: ThreadPoolExecutor,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    rabbit, (requests, results) = on.rabbit, ends
    everywhere = frozenset(range(os.cpu_count() or 1))
    with on_cores(everywhere), SteadyPublisher(rabbit.url) as publisher:
        generator = RabbitGenerator(publisher, requests, plan.times())
        for _ in range(plan.workers):
            workers.start()
        wait_until(lambda: rabbit.consumers(requests) >= plan.workers, 60, "every worker consumes")
        director = _Director(on, plan, workers, generator, results, keeper, tell)
        try:
            course = director.direct()
            _wait_quiet(rabbit, requests, results, plan.count)
            workers.finish()
        finally:
            generator.stop()
        left = {name: rabbit.depth(name) for name in (requests, *fleet.derived)}
        outcomes = list(_arrivals(rabbit, results))
        course.count_unanswered([each.number for each in outcomes])
        return _figures(plan, course, outcomes, left, workers.codes, publisher)


@dataclass
class _Director:
    """Brings about the plan's incidents while the generator sends."""

    on: RabbitStage
    plan: RabbitPlan
    workers: Squad
    generator: RabbitGenerator
    results: str
    keeper: ThreadPoolExecutor
    tell: Callable[[str], None]
    course: Course = field(default_factory=Course)

    def direct(self) -> Course:
        """Return what was seen, once every request was sent and the node is back."""
        depth = Depth(self.on.rabbit, self.results)
        away: Future[None] | None = None
        try:
            self.generator.start()
            moments = self.plan.moments()
            while self.generator.running or (away is not None and not away.done()):
                self.course.look(self.generator.now_s, depth())
                self._revive()
                if away is not None and away.done():
                    away.result()
                    away = None
                if moments and moments[0][0] <= self.generator.now_s:
                    what = moments[0][1]
                    if what == "worker":
                        self._replace()
                        moments.pop(0)
                    elif away is None:
                        away = self._restart(what)
                        moments.pop(0)
                time.sleep(_LOOK_EVERY_S)
            self.course.settle(self.generator.now_s)
        finally:
            depth.close()
        return self.course

    def _incident(self, what: str, limit_s: float) -> Incident:
        now_s = self.generator.now_s
        incident = Incident(
            what, now_s, limit_s, self.generator.sent, self.course.growth[-1][1], over_s=now_s
        )
        self.course.incidents.append(incident)
        self.tell(f"{now_s:6.1f} s  {what}")
        return incident

    def _replace(self) -> None:
        name = self.workers.drain() if self.plan.sigterm else self.workers.kill()
        word = "SIGTERM" if self.plan.sigterm else "SIGKILL"
        self._incident(f"{word} {name}, {self.workers.start()} starts", KILL_LIMIT_S)

    def _restart(self, how: str) -> Future[None]:
        server = self.on.server
        if server is None:
            raise RuntimeError("a node that was not started for the test is not restarted")
        what = "the node is killed and started" if how == "kill" else "the node is stopped and started"
        incident = self._incident(what, RESTART_LIMIT_S)
        incident.node = True
        return self.keeper.submit(self._restart_node, server, how, incident)

    def _restart_node(self, server: RabbitServer, how: str, incident: Incident) -> None:
        if how == "kill":
            server.kill()
        else:
            server.stop()
        server.start()
        incident.over_s = self.generator.now_s

    def _revive(self) -> None:
        for name in self.workers.revive():
            self.course.revived.append(name)
            self.tell(f"{self.generator.now_s:6.1f} s  {name} ended by itself and is started again")


def _wait_quiet(rabbit: Rabbit, requests: str, results: str, count: int) -> None:
    """Return once every request may have its outcome and nothing new comes, or has not come for long."""
    seen, moved_at = -1, time.monotonic()
    while (still_s := time.monotonic() - moved_at) < _NOTHING_NEW_S:
        outcomes = rabbit.depth(results)
        if outcomes != seen:
            seen, moved_at = outcomes, time.monotonic()
        elif still_s > _QUIET_S and outcomes >= count and not rabbit.depth(requests):
            return
        time.sleep(0.1)


def _arrivals(rabbit: Rabbit, results: str) -> Iterator[Arrival]:
    for at, message in enumerate(rabbit.take(results, rabbit.depth(results), 120)):
        name = str(message.headers.get("inferfleet-id", ""))
        code = str(message.headers.get("inferfleet-code", ""))
        yield Arrival(int(name) if name.isdecimal() else -1, at, message.body, code)


def shortfalls(
    tally: Tally, course: Course, left: dict[str, int], codes: Sequence[int], returned: int
) -> list[str]:
    """Return what does not hold, a line each; empty when all does."""
    named = {
        "requests without an outcome": tally.lost,
        "requests with differing copies": tally.unequal,
        "wrong answers": tally.wrong,
        "outcomes of requests that nobody sent": tally.foreign,
        "requests that no queue took": returned,
        "drained workers that did not exit 0": sum(code != 0 for code in codes),
    }
    out = [f"{count} {what}" for what, count in named.items() if count]
    out += [f"{count} messages left in {name}" for name, count in left.items() if count]
    for incident in course.incidents:
        if incident.silence_s > incident.limit_s:
            out.append(
                f"{incident.what}: silence of {incident.silence_s:.1f} s, limit {incident.limit_s:g} s"
            )
        if not incident.unanswered:
            out.append(f"{incident.what}: nothing was in flight, so it shows nothing")
    return out


def _figures(
    plan: RabbitPlan,
    course: Course,
    outcomes: Sequence[Arrival],
    left: dict[str, int],
    codes: Sequence[int],
    publisher: SteadyPublisher,
) -> dict[str, Any]:
    tally = ledger.judge(plan.count, outcomes, is_right)
    return {
        "plan": asdict(plan),
        "tally": tally._asdict(),
        "sent_again": publisher.repeated,
        "drain_exit_codes": list(codes),
        "revived": course.revived,
        "incidents": [asdict(incident) for incident in course.incidents],
        "shortfalls": shortfalls(tally, course, left, codes, len(publisher.returned)),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures of :func:`run` as a short text."""
    plan, tally = figures["plan"], figures["tally"]
    lines = [
        f"{tally['sent']:,} requests, {plan['rate']:,g}/s through RabbitMQ, {plan['workers']} workers",
        f"{'at s':>6}  {'incident':<32} {'unanswered':>10} {'over s':>7} {'silence s':>9} {'limit s':>7}",
    ]
    lines += [
        f"{each['at_s']:>6.1f}  {each['what']:<32} {each['unanswered']:>10,} {each['over_s']:>7.1f} "
        f"{each['silence_s']:>9.2f} {each['limit_s']:>7g}"
        for each in figures["incidents"]
    ]
    lines += [
        f"lost {tally['lost']}, wrong {tally['wrong']}, duplicates {tally['duplicates']} "
        f"(unequal {tally['unequal']}), sent again {figures['sent_again']}, "
        f"started anew {len(figures['revived'])}, drain exit codes {figures['drain_exit_codes']}",
        "holds" if not figures["shortfalls"] else "DOES NOT HOLD: " + "; ".join(figures["shortfalls"]),
    ]
    return "\n".join(lines)
