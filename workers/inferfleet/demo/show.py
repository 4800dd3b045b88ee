"""The performance: requests in waves, one worker killed on the way, the rest at once, every answer in."""

from __future__ import annotations

import time

import redis

from inferfleet.demo.broker import Broker, Wires
from inferfleet.demo.processes import DemoError, Processes
from inferfleet.demo.report import Findings, Killing
from inferfleet.demo.screen import Gauge, Screen
from inferfleet.demo.stage import FLEET, Batches, Stage, Worker, start_worker
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Load, Request

_WAVES = 24
_WAVE_S = 0.25
_KILL_AFTER = _WAVES // 2
_SHARE_IN_WAVES = 0.6
_LOOK_S = 0.1
_PATIENCE_S = 60.0


class Show:
    """Drives one demo over workers that are ready; everything happens on the caller's thread."""

    def __init__(
        self,
        stage: Stage,
        processes: Processes,
        broker: Broker,
        wires: Wires,
        tally: Tally,
        workers: list[Worker],
        screen: Screen,
    ) -> None:
        self._stage = stage
        self._processes = processes
        self._broker = broker
        self._wires = wires
        self._tally = tally
        self._workers = workers
        self._screen = screen
        self._batches: dict[tuple[str, str], Batches] = {}

    def perform(self, redis_port: int) -> Findings:
        """Send everything once, kill a worker on the way, wait for every answer, and say what was found."""
        requests = mixed(list(self._tally.loads.values()))
        in_waves = int(len(requests) * _SHARE_IN_WAVES)
        with self._screen.gauge(len(requests)) as gauge:
            killing = self._waves(requests[:in_waves], gauge)
            owed = self._broker.takeover(killing.victim)
            self._screen.say(f"waiting for the answers that {killing.victim} owes: {owed}")
            self._wait_for_answers(gauge)
            self._screen.say("all answered; the rest at once")
            burst_s = self._burst(requests[in_waves:], gauge)
            self._wait_for_the_end(gauge)
        for worker in self._workers:
            self._count_batches(worker)
        return Findings(
            tally=self._tally,
            batches=self._batches,
            killing=killing,
            burst=len(requests) - in_waves,
            burst_s=burst_s,
            missing_in_redis=missing_results(redis_port, list(self._tally.sent_at)),
            admins=tuple(worker.admin for worker in self._workers),
        )

    def _waves(self, requests: list[Request], gauge: Gauge) -> Killing:
        killing = None
        for number in range(_WAVES):
            low, high = (len(requests) * n // _WAVES for n in (number, number + 1))
            self._wires.send(requests[low:high])
            if number == _KILL_AFTER:
                killing = self._kill_one()
            self._wires.collect(_WAVE_S)
            gauge.show(self._tally)
        if killing is None:
            raise DemoError("no worker was killed: there were too few waves")
        return killing

    def _kill_one(self) -> Killing:
        """Kill the worker that answered most so far, with requests just sent, and start another one."""
        victim = max(self._workers, key=lambda worker: self._tally.workers[worker.name])
        self._count_batches(victim)
        answered, waiting = self._tally.answered, self._tally.sent - self._tally.answered
        self._processes.kill(victim.started)
        self._workers.remove(victim)
        successor = start_worker(self._processes, self._stage, f"worker-{len(self._workers) + 2}")
        self._workers.append(successor)
        self._screen.say(
            f"[bold]{victim.name} killed with SIGKILL[/bold] after {answered} answers of all, with {waiting} "
            f"requests under way; {successor.name} starts in its place"
        )
        return Killing(victim.name, successor.name, answered, waiting)

    def _burst(self, requests: list[Request], gauge: Gauge) -> float:
        """Send the rest at once; returns the seconds until all of it was answered."""
        began_at = time.monotonic()
        self._wires.send(requests)
        self._wait_for_answers(gauge)
        last = max(self._tally.answered_at.get((each.route, each.id), began_at) for each in requests)
        return last - began_at

    def _wait_for_answers(self, gauge: Gauge) -> None:
        """Return when all is answered and all workers are ready, or when nothing moves any more."""
        give_up_at = time.monotonic() + _PATIENCE_S
        while self._tally.unanswered or not all(worker.is_ready() for worker in self._workers):
            if self._wires.collect(_LOOK_S):
                give_up_at = time.monotonic() + _PATIENCE_S
            elif time.monotonic() > give_up_at:
                return
            gauge.show(self._tally)

    def _wait_for_the_end(self, gauge: Gauge) -> None:
        """Return when every request is settled and every outcome was read: no more can come."""
        give_up_at = time.monotonic() + _PATIENCE_S
        while missing := self._wires.unsettled() or self._wires.unread():
            if time.monotonic() > give_up_at:
                self._screen.say(f"not all was settled and read: {', '.join(missing)}")
                return
            self._wires.collect(_LOOK_S)
            gauge.show(self._tally)

    def _count_batches(self, worker: Worker) -> None:
        for key, each in worker.batches().items():
            self._batches[key] = self._batches.get(key, Batches()) + each


def mixed(loads: list[Load]) -> list[Request]:
    """Return all requests, those of each route in order and spread evenly over the whole."""
    placed = [
        (number / len(load.requests), request)
        for load in loads
        for number, request in enumerate(load.requests)
    ]
    return [request for _, request in sorted(placed, key=lambda pair: pair[0])]


def missing_results(port: int, requests: list[tuple[str, str]]) -> int:
    """Return how many requests have no answer in Redis, or only an error."""
    with redis.Redis(host="127.0.0.1", port=port, socket_timeout=10.0) as client:
        found = client.mget([f"{FLEET}:result:{route}:{request_id}" for route, request_id in requests])
    return sum(body is None or b'"outputs"' not in body for body in found)
