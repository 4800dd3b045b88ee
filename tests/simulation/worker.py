"""One simulated worker: the real loop, delivery and plans on a memory broker and threadless engines."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import msgspec

from inferfleet.brokers.delayed import DelayedIntake
from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_intake import MemoryIntake
from inferfleet.brokers.memory_outlet import MemoryOutlet
from inferfleet.config import Config
from inferfleet.core.retry import RetryPolicy
from inferfleet.naming import retry_group, retry_topics
from inferfleet.ports import Clock, Intake, IntakeListener, PauseBoard
from inferfleet.records import Chunk, Stream
from inferfleet.results.memory import MemoryResults
from inferfleet.routes import RouteTable
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.testing.puppet import Script
from inferfleet.wire.headers import NOT_BEFORE
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.loop import LoopOptions, WorkerLoop
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.sources import Sources
from tests.simulation.audit import Audit, ViolationError
from tests.simulation.engine import SimEngine, SimModel, VirtualNews
from tests.simulation.traffic import POISON

VERSIONS = ("1", "2")
MAX_ROWS_OF_A_REQUEST = 5


class NoWishes:
    """A model that leaves its batching to the configuration."""

    max_batch_size = max_queue_delay_ms = max_rows = sort_by_length = None


class WatchedIntake(MemoryIntake):
    """An intake that remembers what it gave out, so that what may be repeated is known exactly."""

    def __init__(self, broker: MemoryBroker, group: str, let_go: Callable[[Stream, int], None]) -> None:
        super().__init__(broker, group)
        self.seen: Counter[str] = Counter()
        self.taken: dict[Stream, list[Chunk]] = {}
        self.notes_itself = True
        self._let_go = let_go

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        super().subscribe(sources, _Witness(listener, self))

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        chunks = super().take(max_records, max_bytes, max_wait_s)
        if self.notes_itself:
            self.note(chunks)
        return chunks

    def note(self, chunks: list[Chunk]) -> None:
        """Remember what was given out."""
        for chunk in chunks:
            self.taken.setdefault(chunk.stream, []).append(chunk)

    def expel(self) -> None:
        self.give_back(list(self.taken))
        super().expel()

    def vanish(self) -> None:
        self.give_back(list(self.taken))
        super().vanish()

    def _forget(self, streams: Collection[Stream]) -> None:  # type: ignore[override]
        self.give_back(streams)
        super()._forget(streams)

    def give_back(self, streams: Collection[Stream]) -> None:
        """What was taken and is not committed now will be taken again."""
        for stream in streams:
            committed = self._group.committed.get(stream, 0)
            for chunk in self.taken.pop(stream, ()):
                for position in chunk.positions:
                    if position >= committed:
                        self._let_go(stream, position)

    def finished(self, stream: Stream) -> int | None:
        """Return the end of what was taken of ``stream`` and is settled without a gap, if anything is."""
        end: int | None = None
        for chunk in self.taken.get(stream, ()):
            prefix = chunk.settled_prefix()
            if prefix:
                end = chunk.positions[prefix - 1] + 1
            if prefix < len(chunk):
                break
        return end

    def promised(self, streams: Collection[Stream], positions: Mapping[Stream, int]) -> None:
        """At a revoke, all that is finished must be settled: told before, or told now."""
        for stream in streams:
            end = self.finished(stream)
            known = max(self._group.committed.get(stream, 0), positions.get(stream, 0))
            if end is not None and known < end and stream in self._member.owned:
                raise ViolationError(f"I2: {stream} is finished up to {end}; the revoke settles {known}")


class WatchedRetries(DelayedIntake):
    """Delayed retries over a watched intake, which is told what is left of its chunks."""

    def __init__(self, inner: WatchedIntake, clock: Clock) -> None:
        super().__init__(inner, clock)
        inner.notes_itself = False
        self._watched = inner

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        chunks = super().take(max_records, max_bytes, max_wait_s)
        self._watched.note(chunks)
        now_ms = self._clock.utc_ms()
        for chunk in chunks:
            for headers in chunk.headers:
                due_ms = int(dict(headers or ())[NOT_BEFORE] or b"")
                if due_ms > now_ms:
                    raise ViolationError(f"delay: {chunk} is taken at {now_ms}, and due at {due_ms}")
        return chunks


class PoolPauses:
    """The pauses of a pool, as one of its workers sees them: ``shared`` is the same for all."""

    def __init__(self, shared: dict[str, str]) -> None:
        self._shared = shared
        self._routes: frozenset[str] = frozenset()

    def watch(self, routes: Collection[str]) -> None:
        """Follow exactly these routes from now on."""
        self._routes = frozenset(routes)

    def current(self) -> Mapping[str, str]:
        """Return the paused ones of the routes that are watched."""
        return {route: why for route, why in self._shared.items() if route in self._routes}

    def pause(self, route: str, reason: str) -> None:
        """Pause a route for the pool."""
        self._shared.setdefault(route, reason)

    def resume(self, route: str) -> None:
        """Take the pause away."""
        self._shared.pop(route, None)

    def close(self) -> None:
        """The pauses outlive this worker."""


class _Witness:
    """Hears the news first, and checks what the loop makes of a revoke."""

    def __init__(self, loop: IntakeListener, intake: WatchedIntake) -> None:
        self._loop = loop
        self._intake = intake

    def assigned(self, streams: Collection[Stream]) -> None:
        self._intake.seen["assigned"] += 1
        self._loop.assigned(streams)

    def revoked(self, streams: Collection[Stream], grace_s: float) -> Mapping[Stream, int]:
        self._intake.seen["revoked"] += 1
        positions = self._loop.revoked(streams, grace_s)
        self._intake.promised(streams, positions)
        return positions

    def lost(self, streams: Collection[Stream]) -> None:
        self._intake.seen["lost"] += 1
        self._loop.lost(streams)

    def settle_refused(self, streams: Collection[Stream]) -> None:
        self._intake.seen["commit refused"] += 1
        self._loop.settle_refused(streams)


class SimWorker:
    """A worker of the fleet, and the strings it hangs on."""

    def __init__(
        self,
        name: str,
        config: Config,
        intake: Intake,
        outlet: MemoryOutlet,
        clock: FakeClock,
        results: MemoryResults,
        options: LoopOptions,
        attempts: Callable[[int], int],
        pauses: PauseBoard,
        marks: MemoryMarks,
    ) -> None:
        """``attempts`` says how many attempts the request of a number has had."""
        self.name = name
        self._config = msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, id=name))
        self.options = options
        self.intake = intake
        self.outlet = outlet
        self.results = results
        self.news = VirtualNews()
        metrics = PrometheusMetrics()
        brakes = Brakes(pauses, config.brake.consecutive, config.brake.share)
        delivery = Delivery(
            self.outlet,
            results,
            metrics,
            clock,
            max_result_bytes=config.limits.max_result_bytes,
            brakes=brakes,
            retry=RetryPolicy(config.retry.delays_ms),
        )
        self.delivery = delivery
        self.loop = WorkerLoop(
            self.intake,
            self.outlet,
            results,
            delivery,
            brakes,
            Careful(marks),
            self.news,
            metrics,
            clock,
            options,
        )
        self.engines = {
            ("m", version): SimEngine(
                "m",
                SimModel(version, Script(fail_on=frozenset([POISON])), attempts=attempts),
                self.news,
                clock,
            )
            for version in VERSIONS
        }
        for engine in self.engines.values():
            self.loop.engines.watch(engine)

    def __repr__(self) -> str:
        return f"{self.name}: {self.loop!r} {self.intake!r} {self.outlet!r}"

    def use(self, table: RouteTable) -> None:
        """Serve the routes of ``table`` from now on."""
        self.loop.use(
            [
                Schedule.always(
                    RoutePlan(route, table.revision, self.engines, lambda *_: NoWishes(), self._config)
                )
                for route in table.routes
            ]
        )

    # Strings

    def finish_batch(self, rng: random.Random) -> bool:
        """Let an engine end its oldest batch; return whether there was one."""
        running = [engine for engine in self.engines.values() if engine.queued]
        if running:
            rng.choice(running).finish(rng.random() * 0.1)
        return bool(running)

    def let_through(self, count: int | None = None) -> int:
        """Let envelopes reach the broker."""
        return self.outlet.let_through(count)

    def settle_down(self) -> None:
        """Let everything that is under way end well."""
        for engine in self.engines.values():
            while engine.queued:
                engine.finish()
        self.outlet.let_through()

    def leave(self, timeout_s: float) -> None:
        """End as after SIGTERM: drain, leave the group, close."""
        self.loop.drain(timeout_s)
        self.intake.close()
        self.outlet.close(0.5)
        self.results.close(0.5)
        self.outlet.vanish()

    @property
    def idle(self) -> bool:
        """Whether nothing is open, waiting, or under way."""
        return not (
            self.loop.open or self.loop.batcher.rows or self.outlet.pending() or self.results.pending()
        )

    def check(self) -> None:
        """Judge what a worker may hold."""
        admission = self.loop.admission
        # A take brings one more where two intakes were asked for one each.
        overshoot = (self.options.chunk_records + 1) * MAX_ROWS_OF_A_REQUEST
        # Below twice the bound by contract: routes below their share may take while the worker is full.
        if admission.rows > 2 * self.options.max_rows + overshoot:
            raise ViolationError(
                f"I14: {self} holds {admission.rows} rows; the bound is {self.options.max_rows}"
            )
        if min(admission.rows, admission.bytes, self.loop.batcher.rows) < 0:
            raise ViolationError(f"I14: {self} counts below nothing")


class KafkaWorker(SimWorker):
    """A worker whose requests stand in topics of a memory broker; ``watched`` are its memberships."""

    def __init__(
        self,
        name: str,
        config: Config,
        broker: MemoryBroker,
        clock: FakeClock,
        results: MemoryResults,
        options: LoopOptions,
        audit: Audit,
        pauses: PauseBoard,
        marks: MemoryMarks,
    ) -> None:
        self.watched = [
            WatchedIntake(broker, config.group, audit.may_repeat),
            WatchedIntake(broker, retry_group(config, config.worker.pool), audit.may_repeat),
        ]
        source, retries = self.watched
        intake = Sources(source, WatchedRetries(retries, clock), None, retry_topics(config), clock)
        outlet = MemoryOutlet(broker, holding=True)
        super().__init__(name, config, intake, outlet, clock, results, options, audit.attempts, pauses, marks)

    def crash(self) -> None:
        """End as a killed process."""
        for intake in self.watched:
            intake.vanish()
        self.outlet.vanish()

    def check(self) -> None:
        """Judge what a worker may hold."""
        super().check()
        admission = self.loop.admission
        taken = [chunk for intake in self.watched for chunks in intake.taken.values() for chunk in chunks]
        held = sum(len(chunk) for chunk in taken if chunk.open)
        if held > admission.rows:
            raise ViolationError(
                f"I14: {self} holds {held} records of open chunks and counts {admission.rows}"
            )
