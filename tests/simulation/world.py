"""A fleet under a seed: one thread, virtual time, and a schedule that nobody would have thought of.

Each step does one thing: produce, turn a worker, end a batch, let an envelope through, or break something.
After each the audit looks at everything. A seed also chooses which faults it has at all, so that some
schedules are calm, and some have one fault again and again. At the end all is mended, and everything must
come to rest.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import cache

from inferfleet import config as settings
from inferfleet.brokers.memory import MemoryBroker
from inferfleet.config import Config, dead_letter_topic
from inferfleet.ports import RefusalKind
from inferfleet.records import Stream
from inferfleet.results.memory import MemoryResults, Reply, Stored
from inferfleet.routes import RouteTable, parse_routes
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.loop import LoopOptions
from tests.simulation.audit import Audit, ViolationError
from tests.simulation.traffic import is_large_answer, make
from tests.simulation.worker import SimWorker

SOURCES = {"a": "a.in", "b": "b.in"}
RESULTS = {"a": "a.out", "b": "b.out"}
STEPS = 160
MOST_REQUESTS = 240
MOST_WORKERS = 4
ROUNDS_TO_REST = 400
LAST_STEPS_SHOWN = 30

_ROUTES = """
[[route]]
name = "a"
source = "kafka:a.in"
results = ["kafka:a.out"]
model = "m"
[[route.variants]]
name = "stable"
version = "1"
weight = {stable}
[[route.variants]]
name = "next"
version = "2"
weight = {next}
"""
_ROUTE_B = """
[[route]]
name = "b"
source = "kafka:b.in"
results = ["kafka:b.out", "redis"]
model = "m"
version = "2"
max_batch_size = 3
"""
_CONFIG = """
[batching]
max_batch_size = {batch}
max_queue_delay_ms = {delay}
[limits]
max_request_rows = 8
"""


@cache
def _table(stable: int, with_b: bool) -> RouteTable:
    text = _ROUTES.format(stable=stable, next=100 - stable) + (_ROUTE_B if with_b else "")
    return parse_routes(text, "inferfleet", "routes.toml")


@cache
def _config(batch: int, delay: int) -> Config:
    return settings.parse(_CONFIG.format(batch=batch, delay=delay))


class World:
    """Everything under one seed. :meth:`run` raises :class:`~tests.simulation.audit.ViolationError`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, wait=self._pass_time)
        self.config = _config(rng.choice([1, 4, 16]), rng.choice([0, 5, 200]))
        self.partitions = rng.randrange(1, 6)
        for topic in SOURCES.values():
            self.broker.create_topic(topic, self.partitions)
        for topic in RESULTS.values():
            self.broker.create_topic(topic, 2)
        self._dead_letters = [dead_letter_topic(self.config, source) for source in SOURCES.values()]
        for topic in self._dead_letters:
            self.broker.create_topic(topic)
        self._results: dict[tuple[str, str], Stored] = {}
        self._replies: dict[str, list[Reply]] = {}
        outputs = {topic: route for route, topic in RESULTS.items()} | dict.fromkeys(self._dead_letters, "")
        stores = {"b": self._results}
        self.audit = Audit(self.broker, self.config.group, outputs, stores, self._replies)
        self.audit.versions = {"a": {"1", "2"}, "b": {"2"}}
        self.options = LoopOptions(
            max_rows=rng.choice([4, 30, 1000]),
            max_bytes=rng.choice([2_000, 1 << 20]),
            chunk_records=rng.choice([1, 7, 50]),
        )
        self.workers: list[SimWorker] = []
        self._table = _table(70, True)
        self._current: SimWorker | None = None
        self._names = 0
        self._sent = 0
        self._store_away = False
        self._refusing: set[str] = set()
        self.seen = self.audit.seen
        self.done: deque[str] = deque(maxlen=LAST_STEPS_SHOWN)
        self._mend_topics()
        self._actions = self._choose_actions()

    def _choose_actions(self) -> list[tuple[Callable[[], str], int]]:
        """Return what may happen and how often: the usual, and the faults that this seed has."""
        usual: list[tuple[Callable[[], str], int]] = [
            (self.produce, 14),
            (self.turn, 40),
            (self.finish_batch, 25),
            (self.let_through, 25),
            (self.let_time_pass, 12),
        ]
        faults: list[tuple[Callable[[], str], int]] = [
            (self.join, 3),
            (self.leave, 2),
            (self.crash, 2),
            (self.freeze, 2),
            (self.refuse_commits, 3),
            (self.refuse_topic, 4),
            (self.send_store_away, 3),
            (self.run_out_of_memory, 2),
            (self.stumble, 4),
            (self.change_routes, 2),
            (self.leave_gaps, 3),
            (self.send_coordinator_away, 3),
        ]
        return usual + [fault for fault in faults if self.rng.random() < 0.45]

    def run(self) -> None:
        """Run the seed's schedule, then mend everything and wait for rest."""
        try:
            for _ in range(self.rng.randrange(1, 4)):
                self._join()
            for _ in range(STEPS):
                actions, weights = zip(*self._actions, strict=True)
                self._do(self.rng.choices(actions, weights)[0])
            self._do(self.mend)
            self._come_to_rest()
            for worker in list(self.workers):
                self._do(lambda worker=worker: self._leave(worker, 1.0))
            self.audit.close()
        except ViolationError as violation:
            shown = "\n  ".join(self.done)
            raise ViolationError(f"seed {self.seed}: {violation}\n  {shown}") from violation

    def _do(self, action: Callable[[], str]) -> None:
        self.done.append("…")
        self.done[-1] = f"{self.clock.monotonic():.3f} {action()}"
        self.check()

    def check(self) -> None:
        """Judge the logs, the store, the group, and every worker."""
        self.audit.look()
        for stream, owners in self.broker.group(self.config.group).owners().items():
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
            request = make(self.rng, self._sent, route, self.clock.utc_ms(), faults=self.seed % 4 > 0)
            place = self.broker.append(
                SOURCES[route], request.value, key=request.key, headers=request.headers
            )
            self.audit.sent(request, *place)
        return f"{count} requests for {route}"

    def turn(self) -> str:
        """Let a worker look at everything once."""
        worker = self._any()
        if worker is None:
            return "nobody turns"
        worker.loop.turn(0.0)
        return f"{worker} has turned"

    def finish_batch(self) -> str:
        """Let a device end a batch."""
        worker = self._any()
        return f"{worker and worker.name} ends a batch: {worker and worker.finish_batch(self.rng)}"

    def let_through(self) -> str:
        """Let some envelopes of a worker reach the broker."""
        worker = self._any()
        count = self.rng.choice([1, 3, None])
        return f"{worker and worker.name} gets {worker and worker.let_through(count)} envelopes through"

    def let_time_pass(self) -> str:
        """Let the clock go on."""
        seconds = self.rng.choice([0.004, 0.1, 0.6, 2.5])
        self.clock.advance(seconds)
        return f"{seconds} s pass"

    # Faults

    def join(self) -> str:
        """Start another worker."""
        return self._join() if len(self.workers) < MOST_WORKERS else "enough workers"

    def leave(self) -> str:
        """Stop a worker in order, with more or less patience."""
        worker = self._any()
        return "nobody leaves" if worker is None else self._leave(worker, self.rng.choice([0.0, 0.02, 0.3]))

    def crash(self) -> str:
        """Kill a worker; the group notices in its own time."""
        worker = self._any()
        if worker is None:
            return "nobody crashes"
        self.workers.remove(worker)
        worker.crash()
        return f"{worker.name} is killed"

    def freeze(self) -> str:
        """Let a worker be away for longer than its session; it is not told until it takes again."""
        worker = self._any()
        if worker is not None:
            worker.intake.expel()
        return f"{worker and worker.name} is expelled"

    def refuse_commits(self) -> str:
        """Begin or end refusing commits."""
        group = self.broker.group(self.config.group)
        group.refuses_commits = not group.refuses_commits
        return f"commits are refused: {group.refuses_commits}"

    def send_coordinator_away(self) -> str:
        """Let the group's coordinator go away, or come back: meanwhile no assignment changes."""
        group = self.broker.group(self.config.group)
        group.away = not group.away
        return f"the coordinator is away: {group.away}"

    def refuse_topic(self) -> str:
        """Begin or end refusing at a result or dead-letter topic."""
        topic = self.rng.choice([*RESULTS.values(), *self._dead_letters])
        if topic in self._refusing:
            self._refusing.discard(topic)
            self._mend_topics()
            return f"{topic} accepts"
        self._refusing.add(topic)
        share = self.rng.choice([0.3, 1.0])
        kind = self.rng.choice([RefusalKind.LATER, RefusalKind.DENIED])
        self.broker.refuse(topic, kind, when=lambda _: self.rng.random() < share)
        return f"{topic} refuses {share} as {kind}"

    def send_store_away(self) -> str:
        """Let the result store go away, or come back."""
        self._set_store(away=not self._store_away)
        return f"the store is away: {self._store_away}"

    def run_out_of_memory(self) -> str:
        """Give a worker's device less memory, or enough again."""
        worker, rows = self._any(), self.rng.choice([1, 2, 3, None])
        for engine in worker.engines.values() if worker else ():
            engine.loaded.script.oom_above = rows
        return f"{worker and worker.name} has memory for {rows} rows"

    def stumble(self) -> str:
        """Let the next run of a worker's models fail for no reason."""
        worker = self._any()
        for engine in worker.engines.values() if worker else ():
            engine.loaded.stumbles = 1
        return f"{worker and worker.name} stumbles"

    def change_routes(self) -> str:
        """Shift weights, and take route b away or bring it back, worker by worker or for all."""
        self._table = _table(self.rng.choice([10, 70]), self.rng.random() < 0.7)
        chosen = self.rng.sample(self.workers, self.rng.randrange(len(self.workers) + 1))
        for worker in chosen:
            worker.use(self._table)
        return f"routes {self._table.revision} for {[worker.name for worker in chosen]}"

    def leave_gaps(self) -> str:
        """Leave offsets without a record."""
        stream = Stream(self.rng.choice(list(SOURCES.values())), self.rng.randrange(self.partitions))
        self.broker.skip(stream, self.rng.randrange(1, 4))
        return f"a gap in {stream}"

    # The end

    def mend(self) -> str:
        """End every fault; start a worker if there is none."""
        group = self.broker.group(self.config.group)
        group.refuses_commits = group.away = False
        self._refusing.clear()
        self._mend_topics()
        self._set_store(away=False)
        self._table = _table(70, True)
        if not self.workers:
            self._join()
        for worker in self.workers:
            worker.use(self._table)
            for engine in worker.engines.values():
                engine.loaded.script.oom_above = None
                engine.loaded.stumbles = 0
        return "all is mended"

    def _come_to_rest(self) -> None:
        for _ in range(ROUNDS_TO_REST):
            for worker in self.workers:
                self._current = worker
                worker.loop.turn(0.0)
                worker.settle_down()
            self.clock.advance(0.3)
            self.check()
            if self._rests():
                return
        lag = {topic: self.broker.lag(self.config.group, topic) for topic in SOURCES.values()}
        raise ViolationError(f"I6: it does not come to rest: lag {lag}, {self.workers}")

    def _rests(self) -> bool:
        if any(self.broker.lag(self.config.group, topic) for topic in SOURCES.values()):
            return False
        if not all(worker.idle for worker in self.workers):
            return False
        for worker in self.workers:
            admission = worker.loop.admission
            if admission.rows or admission.bytes or worker.loop.held:
                return False
        return True

    # Parts

    def _any(self) -> SimWorker | None:
        self._current = self.rng.choice(self.workers) if self.workers else None
        return self._current

    def _join(self) -> str:
        self._names += 1
        results = MemoryResults(now=self.clock.monotonic)
        results.results, results.replies = self._results, self._replies
        if self._store_away:
            results.go_away()
        worker = SimWorker(
            f"w{self._names}",
            self.config,
            self.broker,
            self.clock,
            results,
            self.options,
            self.audit.may_repeat,
        )
        worker.news.wait = self._pass_time
        worker.intake.seen = self.seen
        worker.use(self._table)
        self.workers.append(worker)
        return f"{worker.name} joins"

    def _leave(self, worker: SimWorker, timeout_s: float) -> str:
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

    def _set_store(self, *, away: bool) -> None:
        self._store_away = away
        for worker in self.workers:
            if away:
                worker.results.go_away()
            else:
                worker.results.come_back()

    def _mend_topics(self) -> None:
        """Accept everything but answers that are too large."""
        for topic in [*RESULTS.values(), *self._dead_letters]:
            if topic not in self._refusing:
                self.broker.accept(topic)
                if topic in RESULTS.values():
                    self.broker.refuse(topic, RefusalKind.TOO_LARGE, when=is_large_answer)
