"""A fleet on RabbitMQ under a seed: channels are lost, acknowledgements too, and messages come again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from inferfleet import config as settings
from inferfleet.addresses import REPLY
from inferfleet.errors import Code
from inferfleet.naming import dead_letter_name, retry_addresses, retry_name
from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Amqp, Envelopes
from inferfleet.results.memory import MemoryResults
from inferfleet.routes import parse_routes
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.wire.encode import STATUS_OK
from inferfleet.worker.loop import LoopOptions
from tests.simulation.audit import ViolationError
from tests.simulation.channel_audit import MINE, ChannelAudit, Way
from tests.simulation.rabbit import ChannelIntake, Rabbit, RabbitOutlet
from tests.simulation.traffic import BULKY, LARGE, make
from tests.simulation.worker import PoolPauses, SimWorker

STEPS = 140
MOST_REQUESTS = 120
ROUNDS_TO_REST = 600
LAST_STEPS_SHOWN = 30
FOREIGN = "somebodys.queue"
OUT = "x/out"

TABLE = parse_routes(
    """
[[route]]
name = "a"
source = "rabbitmq:q"
results = ["rabbitmq:x/out", "reply"]
model = "m"
version = "1"
""",
    "inferfleet",
    "routes.toml",
)
(ROUTE,) = TABLE.routes
_CONFIG = """
[batching]
max_batch_size = {batch}
max_queue_delay_ms = {delay}
[retry]
delays_ms = [300, 1_000, 3_000]
[brake]
consecutive = {consecutive}
share = 1.0
"""


class ChannelWorld:
    """Everything under one seed. :meth:`run` raises :class:`~tests.simulation.audit.ViolationError`.

    ``alone``: there is one worker, and it lives; then whatever has a name is answered exactly once.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.alone = seed % 3 > 0
        self.braked = seed % 4 == 2
        self.clock = FakeClock()
        self.config = settings.parse(
            _CONFIG.format(
                batch=rng.choice([1, 4, 16]),
                delay=rng.choice([0, 5, 200]),
                consecutive=2 if self.braked else 1_000,
            )
        )
        self.rabbit = Rabbit(self.clock, self._refusal)
        ready = retry_name(self.config, ROUTE, "ready")
        self._delays = {
            address: index + 2 for index, address in enumerate(retry_addresses(self.config, ROUTE))
        }
        self._letters = dead_letter_name(self.config, ROUTE)
        for name in ("q", ready, OUT, MINE, FOREIGN, self._letters):
            self.rabbit.declare(name)
        for delay in self.config.retry.delays_ms:
            self.rabbit.declare(retry_name(self.config, ROUTE, delay), ready)
        self.options = LoopOptions(rng.choice([4, 30, 1000]), 1 << 20, rng.choice([1, 7, 50]))
        self._prefetch = rng.choice([3, 20, 100])
        self.audit = ChannelAudit(self.rabbit, self._delays, alone=self.alone)
        self.seen = self.audit.seen
        self._pauses: dict[str, str] = {}
        self.workers: list[SimWorker] = []
        self._current: SimWorker | None = None
        self._names = 0
        self._refusing = ""
        self.broken = False
        self.done: deque[str] = deque(maxlen=LAST_STEPS_SHOWN)
        self._actions = self._chosen()

    def _chosen(self) -> list[tuple[Callable[[], str], int]]:
        faults: list[tuple[Callable[[], str], int]] = [
            (self.lose_channel, 8),
            (self.refuse, 3),
            (self.stumble, 3),
        ]
        if not self.alone:
            faults += [(self.join, 3), (self.leave, 2), (self.crash, 2)]
        usual: list[tuple[Callable[[], str], int]] = [
            (self.produce, 14),
            (self.turn, 40),
            (self.finish_batch, 25),
            (self.let_through, 25),
            (self.let_acks_arrive, 12),
            (self.let_time_pass, 12),
        ]
        if self.braked:
            usual += [(self.break_models, 3), (self.resume, 1)]
        return usual + [fault for fault in faults if self.rng.random() < 0.7]

    def run(self) -> None:
        """Run the seed's schedule, then mend everything and wait for rest."""
        try:
            self.join()
            for _ in range(STEPS):
                actions, weights = zip(*self._actions, strict=True)
                self._do(self.rng.choices(actions, weights)[0])
            self._do(self.mend)
            self._come_to_rest()
            for worker in list(self.workers):
                self._do(lambda worker=worker: self._stop(worker, 1.0))
            self._judge()
            self.audit.close()
        except ViolationError as violation:
            shown = "\n  ".join(self.done)
            raise ViolationError(f"seed {self.seed}: {violation}\n  {shown}") from violation

    def _do(self, action: Callable[[], str]) -> None:
        self.done.append("…")
        self.done[-1] = f"{self.clock.monotonic():.3f} {action()}"
        self._judge()

    # What happens

    def produce(self) -> str:
        """Send a few requests, with and without names, some with a queue for the answer."""
        count = min(self.rng.choice([1, 3, 20]), MOST_REQUESTS - len(self.audit.ways))
        for _ in range(count):
            self._send()
        return f"{count} requests"

    def _send(self) -> None:
        rng, number = self.rng, len(self.audit.ways) + 1
        made = make(rng, number, "a", self.clock.utc_ms(), faults=True, failing=not self.braked)
        key = b"key-%d" % number
        amqp = Amqp(
            rng.choice([None, MINE, MINE, FOREIGN]),
            rng.choice([None, f"c-{number}"]),
            rng.choice([None, f"m-{number}"]),
        )
        has_id = made.named or bool(amqp.message_id or amqp.correlation_id)
        readable = not made.expected & {Code.DECODE, Code.EMPTY, Code.SHAPE}
        if amqp.reply_to == FOREIGN and readable:
            made.expected, made.fails = frozenset([Code.ROUTE]), 0
        message = self.rabbit.send("q", made.headers, key, made.value or b"", amqp)
        self.audit.sent(key, Way(made, amqp, has_id and readable, message.number))

    def turn(self) -> str:
        """Let a worker look at everything once."""
        worker = self._any()
        if worker is not None:
            worker.loop.turn(0.0)
        return f"{worker} has turned"

    def finish_batch(self) -> str:
        """Let a device end a batch."""
        worker = self._any()
        return f"{worker and worker.name} ends a batch: {worker and worker.finish_batch(self.rng)}"

    def let_through(self) -> str:
        """Let some envelopes of a worker reach the broker."""
        worker, count = self._any(), self.rng.choice([1, 3, None])
        return f"{worker and worker.name} gets {worker and worker.let_through(count)} envelopes through"

    def let_acks_arrive(self) -> str:
        """Let a worker's acknowledgements reach the broker."""
        worker = self._any()
        if worker is not None:
            _intake(worker).let_acks_arrive()
        return f"{worker and worker.name} has acknowledged"

    def let_time_pass(self) -> str:
        """Let the clock go on."""
        seconds = self.rng.choice([0.004, 0.1, 0.6, 2.5])
        self.clock.advance(seconds)
        return f"{seconds} s pass"

    def lose_channel(self) -> str:
        """Close a channel of a worker, before or after its acknowledgements have arrived."""
        worker = self._any()
        if worker is None:
            return "nobody has a channel"
        intake = _intake(worker)
        source = self.rng.choice(list(intake.channels))
        intake.lose(source, acks_arrive=self.rng.random() < 0.5)
        self.seen["channel lost"] += 1
        return f"{worker.name} loses its channel on {source}"

    def refuse(self) -> str:
        """Begin or end refusing at some destination."""
        chosen = self.rng.choice(["", "rabbitmq:x/out", REPLY, f"rabbitmq:/{self._letters}", *self._delays])
        self._refusing = chosen
        return f"{chosen or 'nothing'} is refused"

    def stumble(self) -> str:
        """Let the next run of a worker's models fail for no reason."""
        worker = self._any()
        for engine in worker.engines.values() if worker else ():
            engine.loaded.stumbles = 1
        return f"{worker and worker.name} stumbles"

    def break_models(self) -> str:
        """Let every model fail on everything, or be well again."""
        self.broken = not self.broken
        self.audit.was_broken = True
        for worker in self.workers:
            for engine in worker.engines.values():
                engine.loaded.broken = self.broken
        return f"the models are broken: {self.broken}"

    def resume(self) -> str:
        """Resume what a brake has paused."""
        self._pauses.clear()
        return "resumed"

    def join(self) -> str:
        """Start another worker."""
        if len(self.workers) > 2:
            return "enough workers"
        self._names += 1
        worker = SimWorker(
            f"w{self._names}",
            self.config,
            ChannelIntake(self.rabbit, self._prefetch),
            RabbitOutlet(self.rabbit),
            self.clock,
            MemoryResults(now=self.clock.monotonic),
            self.options,
            self.audit.attempts,
            PoolPauses(self._pauses),
            MemoryMarks(),
        )
        worker.news.wait = self._pass_time
        worker.use(TABLE)
        self.workers.append(worker)
        return f"{worker.name} joins"

    def leave(self) -> str:
        """Stop a worker in order, with more or less patience."""
        worker = self._any()
        return "nobody" if worker is None else self._stop(worker, self.rng.choice([0.0, 0.02, 0.3]))

    def _stop(self, worker: SimWorker, timeout_s: float) -> str:
        self._current = worker
        self.workers.remove(worker)
        worker.leave(timeout_s)
        self._count_redeliveries(worker)
        return f"{worker.name} leaves within {timeout_s} s"

    def crash(self) -> str:
        """Kill a worker."""
        worker = self._any()
        if worker is None:
            return "nobody crashes"
        self.workers.remove(worker)
        _intake(worker).vanish()
        worker.outlet.vanish()
        self._count_redeliveries(worker)
        return f"{worker.name} is killed"

    # The end

    def mend(self) -> str:
        """End every fault; start a worker if there is none."""
        self._refusing = ""
        self._pauses.clear()
        if not self.workers:
            self.join()
        for worker in self.workers:
            for engine in worker.engines.values():
                engine.loaded.broken = False
                engine.loaded.stumbles = 0
        return "all is mended"

    def _come_to_rest(self) -> None:
        for _ in range(ROUNDS_TO_REST):
            for worker in self.workers:
                self._current = worker
                worker.loop.turn(0.0)
                worker.settle_down()
                _intake(worker).let_acks_arrive()
            self.resume()
            self.clock.advance(0.3)
            self._judge()
            if self._rests():
                return
        left = {name: len(queue) for name, queue in self.rabbit.queues.items() if queue}
        raise ViolationError(f"I6: it does not come to rest: {left}, {self.workers}")

    def _rests(self) -> bool:
        names = ["q", *self.rabbit.ready_of, *self.rabbit.ready_of.values()]
        if any(self.rabbit.queues[name] for name in names):
            return False
        for worker in self.workers:
            admission = worker.loop.admission
            out = [channel for channel in _intake(worker).channels.values() if channel.out]
            if out or not worker.idle or admission.rows or admission.bytes or worker.loop.held:
                return False
        return True

    # Parts

    def _any(self) -> SimWorker | None:
        self._current = self.rng.choice(self.workers) if self.workers else None
        return self._current

    def _pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds * self.rng.choice([1, 3, 30]))
        worker = self._current
        if worker is not None and self.rng.random() < 0.3:
            worker.finish_batch(self.rng)
            worker.let_through(self.rng.choice([1, 5]))

    def _refusal(self, envelopes: Envelopes, row: int) -> Refusal | None:
        if envelopes.destination == self._refusing:
            return Refusal(RefusalKind.LATER, "told to refuse")
        headers = envelopes.headers[row]
        large = STATUS_OK in headers and (dict(headers)["inferfleet-id"] or b"").startswith(LARGE.encode())
        bulky = envelopes.destination in self._delays and b'"' + BULKY.encode() in envelopes.values[row]
        return Refusal(RefusalKind.TOO_LARGE, "it is too large") if large or bulky else None

    def _count_redeliveries(self, worker: SimWorker) -> None:
        intake = _intake(worker)
        self.audit.redelivered(intake.redelivered)
        intake.redelivered.clear()

    def _judge(self) -> None:
        for worker in self.workers:
            self._count_redeliveries(worker)
            worker.check()
            self.seen["route held"] += bool(worker.loop.held)
        self.seen["route braked"] += len(self._pauses)
        self.audit.look()


def _intake(worker: SimWorker) -> ChannelIntake:
    assert isinstance(worker.intake, ChannelIntake)
    return worker.intake
