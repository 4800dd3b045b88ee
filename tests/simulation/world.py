"""A fleet under a seed: one thread, virtual time, and a schedule that nobody would have thought of.

Each step does one thing: produce, turn a worker, end a batch, let an envelope through, or break something.
After each the audit looks at everything. A seed also chooses which faults it has at all, so that some
schedules are calm, and some have one fault again and again. At the end all is mended, and everything must
come to rest.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable

from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_group import Group
from inferfleet.core.quarantine import CONDEMNED_AT
from inferfleet.naming import retry_group
from inferfleet.ports import RefusalKind
from inferfleet.results.memory import MemoryResults, Reply, Stored
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.worker.loop import LoopOptions
from tests.simulation.audit import Audit, ViolationError
from tests.simulation.engine import KilledError
from tests.simulation.faults import Faults
from tests.simulation.fleet import (
    NEVER_TRIPS,
    RESULTS,
    SOURCES,
    config,
    dead_letter_topics,
    retry_topics,
    table,
)
from tests.simulation.traffic import Request, is_bulky, is_large_answer, make
from tests.simulation.worker import KafkaWorker, PoolPauses

STEPS = 160
MOST_REQUESTS = 240
MOST_KILLERS = 2
ROUNDS_TO_REST = 800
LAST_STEPS_SHOWN = 30


class World:
    """Everything under one seed. :meth:`run` raises :class:`~tests.simulation.audit.ViolationError`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, wait=self._pass_time)
        self.braked = seed % 5 == 3
        """Whether models may fail on everything, and on nothing else; else brakes never trip."""
        self.deadly = seed % 5 == 1
        """Whether there are requests that end the process."""
        self._consecutive = rng.choice([2, 4]) if self.braked else NEVER_TRIPS
        self.config = config(rng.choice([1, 4, 16]), rng.choice([0, 5, 200]), self._consecutive)
        self._partitions = rng.randrange(1, 6)
        self.dead_letters = dead_letter_topics(self.config)
        self.retries = retry_topics(self.config)
        self._results: dict[tuple[str, str], Stored] = {}
        self._replies: dict[str, list[Reply]] = {}
        self.audit = self._create_topics()
        self.options = LoopOptions(
            max_rows=rng.choice([4, 30, 1000]),
            max_bytes=rng.choice([2_000, 1 << 20]),
            chunk_records=rng.choice([1, 7, 50]),
        )
        self.workers: list[KafkaWorker] = []
        self.table = table()
        self._current: KafkaWorker | None = None
        self._names = 0
        self._sent = 0
        self._killers = 0
        self._kills: Counter[str] = Counter()
        self._marks: dict[str, MemoryMarks] = {}
        self._pauses: dict[str, str] = {}
        self.broken = False
        self.store_away = False
        self.refusing: set[str] = set()
        self.seen = self.audit.seen
        self.done: deque[str] = deque(maxlen=LAST_STEPS_SHOWN)
        self.mend_topics()
        self._actions: list[tuple[Callable[[], str], int]] = [
            (self.produce, 14),
            (self.turn, 40),
            (self.finish_batch, 25),
            (self.let_through, 25),
            (self.let_time_pass, 12),
            *Faults(self).chosen(),
        ]

    def _create_topics(self) -> Audit:
        """Create every topic; return the judge of what will stand there."""
        for topic in SOURCES.values():
            self.broker.create_topic(topic, self._partitions)
        for topic in [*RESULTS.values(), *self.retries]:
            self.broker.create_topic(topic, 2)
        for topic in self.dead_letters:
            self.broker.create_topic(topic)
        outputs = {topic: route for route, topic in RESULTS.items()} | dict.fromkeys(self.dead_letters, "")
        stores = {"b": self._results}
        audit = Audit(self.broker, self.config.group, outputs, stores, self._replies, self.retries)
        audit.versions = {"a": {"1", "2"}, "b": {"2"}}
        return audit

    def run(self) -> None:
        """Run the seed's schedule, then mend everything and wait for rest."""
        try:
            for _ in range(self.rng.randrange(1, 4)):
                self.start()
            for _ in range(STEPS):
                actions, weights = zip(*self._actions, strict=True)
                self._do(self.rng.choices(actions, weights)[0])
            self._do(self.mend)
            self._come_to_rest()
            for worker in list(self.workers):
                self._do(lambda worker=worker: self.stop(worker, 1.0))
            self.audit.close()
        except ViolationError as violation:
            shown = "\n  ".join(self.done)
            raise ViolationError(f"seed {self.seed}: {violation}\n  {shown}") from violation

    def _do(self, action: Callable[[], str]) -> None:
        self.done.append("…")
        try:
            told = action()
        except KilledError:
            told = self._restart()
        self.done[-1] = f"{self.clock.monotonic():.3f} {told}"
        self.check()

    def check(self) -> None:
        """Judge the logs, the store, the groups, and every worker."""
        self.audit.look()
        for group in self._groups:
            for stream, owners in group.owners().items():
                if len(owners) > 1:
                    raise ViolationError(f"broker: {stream} has {len(owners)} owners")
        for worker in self.workers:
            worker.check()
            self.seen["route held"] += bool(worker.loop.held)
            self.seen["full"] += worker.loop.admission.full

    # The usual

    def produce(self) -> str:
        """Send a few requests to one route."""
        count = min(self.rng.choice([1, 1, 3, 20]), MOST_REQUESTS - self._sent)
        route = self.rng.choice(list(SOURCES))
        for _ in range(count):
            self._sent += 1
            request = self._request(route)
            place = self.broker.append(
                SOURCES[route], request.value, key=request.key, headers=request.headers
            )
            self.audit.sent(request, *place)
        return f"{count} requests for {route}"

    def _request(self, route: str) -> Request:
        deadly = self.deadly and self._killers < MOST_KILLERS and self.rng.random() < 0.02
        self._killers += deadly
        return make(
            self.rng,
            self._sent,
            route,
            self.clock.utc_ms(),
            faults=self.seed % 4 > 0,
            failing=not self.braked,
            deadly=deadly,
        )

    def turn(self) -> str:
        """Let a worker look at everything once."""
        worker = self.any()
        if worker is None:
            return "nobody turns"
        worker.loop.turn(0.0)
        return f"{worker} has turned"

    def finish_batch(self) -> str:
        """Let a device end a batch."""
        worker = self.any()
        return f"{worker and worker.name} ends a batch: {worker and worker.finish_batch(self.rng)}"

    def let_through(self) -> str:
        """Let some envelopes of a worker reach the broker."""
        worker = self.any()
        count = self.rng.choice([1, 3, None])
        return f"{worker and worker.name} gets {worker and worker.let_through(count)} envelopes through"

    def let_time_pass(self) -> str:
        """Let the clock go on."""
        seconds = self.rng.choice([0.004, 0.1, 0.6, 2.5])
        self.clock.advance(seconds)
        return f"{seconds} s pass"

    # The end

    def mend(self) -> str:
        """End every fault; start a worker if there is none."""
        for group in self._groups:
            group.refuses_commits = group.away = False
        self.refusing.clear()
        self.mend_topics()
        self.set_store(away=False)
        self.set_broken(False)
        self.table = table()
        if not self.workers:
            self.start()
        for worker in self.workers:
            worker.use(self.table)
            for engine in worker.engines.values():
                engine.loaded.script.oom_above = None
                engine.loaded.stumbles = 0
        return "all is mended"

    def _come_to_rest(self) -> None:
        for _ in range(ROUNDS_TO_REST):
            for worker in list(self.workers):
                self._current = worker
                try:
                    worker.loop.turn(0.0)
                    worker.settle_down()
                except KilledError:
                    self._restart()
            self.resume()
            self.clock.advance(0.3)
            self.check()
            if self._rests():
                return
        raise ViolationError(f"I6: it does not come to rest: lag {self._lag()}, {self.workers}")

    def _lag(self) -> dict[str, int]:
        """Return what is not committed: requests, and attempts that wait."""
        group = self.config.group
        lag = {topic: self.broker.lag(group, topic) for topic in SOURCES.values()}
        return lag | {
            topic: self.broker.lag(retry_group(self.config, self.config.worker.pool), topic)
            for topic in self.retries
        }

    def _rests(self) -> bool:
        if any(self._lag().values()) or not all(worker.idle for worker in self.workers):
            return False
        for worker in self.workers:
            admission = worker.loop.admission
            if admission.rows or admission.bytes or worker.loop.held:
                return False
        return True

    # Parts

    @property
    def _groups(self) -> tuple[Group, Group]:
        return self.broker.group(self.config.group), self.broker.group(
            retry_group(self.config, self.config.worker.pool)
        )

    def any(self) -> KafkaWorker | None:
        """Return some worker, which is the one that things happen to."""
        self._current = self.rng.choice(self.workers) if self.workers else None
        return self._current

    def start(self, name: str = "") -> str:
        """Start a worker, or the next life of the process ``name``."""
        self._names += not name
        results = MemoryResults(now=self.clock.monotonic)
        results.results, results.replies = self._results, self._replies
        if self.store_away:
            results.go_away()
        name = name or f"w{self._names}"
        worker = KafkaWorker(
            name,
            self.config,
            self.broker,
            self.clock,
            results,
            self.options,
            self.audit,
            PoolPauses(self._pauses),
            self._marks.setdefault(name, MemoryMarks()),
        )
        worker.news.wait = self._pass_time
        for intake in worker.watched:
            intake.seen = self.seen
        worker.use(self.table)
        self.workers.append(worker)
        if self.broken:
            self._break(worker)
        return f"{name} joins"

    def _restart(self) -> str:
        """A request has ended the current worker's process: whoever looks after it starts the next one."""
        worker = self._current
        if worker is None:
            raise AssertionError("nobody runs, and somebody was killed")
        if worker in self.workers:
            self.workers.remove(worker)
        worker.crash()
        self.seen["killed"] += 1
        self._kills[worker.name] += 1
        if self._kills[worker.name] > CONDEMNED_AT * self._killers + 1:
            raise ViolationError(
                f"I12: {self._killers} requests have ended {worker.name} {self._kills[worker.name]} times"
            )
        return f"{worker.name} is ended by a request, and {self.start(worker.name)}"

    def set_broken(self, broken: bool) -> None:
        """Let every model fail on everything, or be well again."""
        self.broken = broken
        for worker in self.workers:
            if broken:
                self._break(worker)
            for engine in worker.engines.values():
                engine.loaded.broken = broken

    def _break(self, worker: KafkaWorker) -> None:
        self.audit.was_broken = True
        self.audit.may_spoil += self._spared
        for engine in worker.engines.values():
            engine.loaded.broken = True

    @property
    def _spared(self) -> int:
        """How many requests a worker's brakes let pass before they trip."""
        return (self._consecutive - 1) * len(SOURCES)

    def resume(self) -> list[str]:
        """Resume every route that is paused; a brake may let as many pass again."""
        resumed = sorted(self._pauses)
        self._pauses.clear()
        self.seen["route braked"] += len(resumed)
        if resumed:
            self.audit.may_spoil += self._spared * len(self.workers)
        return resumed

    def stop(self, worker: KafkaWorker, timeout_s: float) -> str:
        """Stop a worker in order."""
        self._current = worker
        self.workers.remove(worker)
        worker.leave(timeout_s)
        return f"{worker.name} leaves within {timeout_s} s"

    def _pass_time(self, seconds: float) -> None:
        """While the current worker waits, time passes (some more than asked), and its things go on."""
        self.clock.advance(seconds * self.rng.choice([1, 3, 30]))
        worker = self._current
        if worker is not None and self.rng.random() < 0.3:
            worker.finish_batch(self.rng)
            worker.let_through(self.rng.choice([1, 5]))

    def set_store(self, *, away: bool) -> None:
        """Let the result store be there for all workers, or for none."""
        self.store_away = away
        for worker in self.workers:
            if away:
                worker.results.go_away()
            else:
                worker.results.come_back()

    def mend_topics(self) -> None:
        """Accept everything but what is too large."""
        for topic in {*RESULTS.values(), *self.dead_letters, *self.retries} - self.refusing:
            self.broker.accept(topic)
            if topic in RESULTS.values():
                self.broker.refuse(topic, RefusalKind.TOO_LARGE, when=is_large_answer)
            elif topic in self.retries:
                self.broker.refuse(topic, RefusalKind.TOO_LARGE, when=is_bulky)
