"""The worker loop: one thread that owns the intake, the outlets and all state of the record path.

One turn looks at everything once: confirmations, finished batches, expired requests, due batches, commits,
new records. Nothing in a turn waits for a model or a server; at its end the loop waits, bounded, for the
thing that is most likely to happen next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog

from inferfleet.addresses import on_rabbitmq
from inferfleet.core.admission import Admission
from inferfleet.core.batcher import Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.errors import Code
from inferfleet.ports import Clock, Intake, Outlet, ResultOutlet
from inferfleet.records import BatchResult, Chunk, Requests, RowFailure, Stream
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.telemetry.traces import NO_TRACES, Traces
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful
from inferfleet.worker.counting import Counting
from inferfleet.worker.delivery import Delivery, Settling
from inferfleet.worker.dispatching import Dispatching
from inferfleet.worker.engine import Finished, Loaded, News
from inferfleet.worker.failing import failures_of
from inferfleet.worker.gauges import Gauges
from inferfleet.worker.observing import Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.reading import Reading
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.shadowing import Shadowing
from inferfleet.worker.steered import Steered

log = structlog.get_logger(__name__)

CHUNK_RECORDS = 500
COMMIT_EVERY_S = 0.5
BUSY_WAIT_S = 0.001
FULL_WAIT_S = 0.01
"""How long to wait while every engine has all that it takes: the end of one of them wakes the loop."""
IDLE_WAIT_S = 0.05
PAUSE_AFTER_S = 0.1
"""A bound that is held for less is met by not taking: pausing throws the client's prefetch away."""
RESULTS_AWAY_PATIENCE_S = 1.0


@dataclass(frozen=True)
class LoopOptions:
    """Bounds of one worker: ``max_rows`` and ``max_bytes`` in flight, ``chunk_records`` per take."""

    max_rows: int
    max_bytes: int
    chunk_records: int = CHUNK_RECORDS


class WorkerLoop:
    """Joins the stations. Also the intake's listener: rebalance news arrives inside :meth:`turn`."""

    def __init__(
        self,
        intake: Intake,
        outlet: Outlet,
        results: ResultOutlet | None,
        delivery: Delivery,
        brakes: Brakes,
        careful: Careful,
        news: SimpleQueue[News],
        metrics: PrometheusMetrics,
        clock: Clock,
        options: LoopOptions,
        traces: Traces = NO_TRACES,
    ) -> None:
        self._intake = intake
        self._outlet = outlet
        self._results = results
        self._delivery = delivery
        self._brakes = brakes
        self._news = news
        self._metrics = metrics
        self._clock = clock
        self._options = options
        self.ledger = Ledger()
        self.batcher = Batcher()
        self.admission = Admission((), options.max_rows, options.max_bytes)
        self._reading = Reading(
            self.ledger, self.batcher, self.admission, delivery, metrics, clock, self._came, traces
        )
        self._counting = Counting(metrics, traces, clock)
        self._gauges = Gauges(self.ledger, self.batcher, self.admission, metrics)
        self.engines = Dispatching(self.batcher, careful, clock, self._expired, self._condemned)
        self.shadowing = Shadowing(self.engines, careful, metrics, clock)
        self.observing: Observing | None = None
        self.loaded: list[Loaded] = []
        self.held: dict[str, str] = {}
        self.ended: Counter[str] = Counter()
        """How many records of each route have had their outcome since the start."""
        self._schedules: dict[str, Schedule] = {}
        self._steered = Steered()
        self._prompt: set[Stream] = set()
        self._paused: set[str] = set()
        self._dropped: set[str] = set()
        self._full_since: float | None = None
        self._committed_at = 0.0
        self._draining = False
        delivery.on_settled = self._settled

    def __repr__(self) -> str:
        return f"WorkerLoop({self.ledger!r}, {self.batcher!r}, {self.admission!r})"

    def use(self, schedules: Collection[Schedule]) -> None:
        """Serve these routes from now on.

        What runs ends as it began. What only waits under a revision that is not in force at its time any
        longer (an abort has taken its place) is steered anew.
        """
        self._follow_sources({source for each in schedules for source in each.sources})
        self._schedules = {source: each for each in schedules for source in each.sources}
        self._steered.serve(schedules, lambda: [*self.engines.open(), *self._brakes.withheld_parts()])
        goals = {each.name: each.plan.route.goal_p99_ms for each in schedules}
        self._metrics.routes({name: goal and goal / 1000 for name, goal in goals.items()})
        names = [each.name for each in schedules]
        self.admission.routes(names)
        self._brakes.routes(names)
        if self.observing is not None:
            self.observing.serve([each.plan for each in schedules])
        self._again(self.engines.withdraw(self._moved))
        self._reading.back(self._schedules)
        self._intake.subscribe(sorted(self._schedules), self)

    def _moved(self, part: Requests) -> bool:
        return self._steered.moved(part, self._schedules.get(part.chunk.stream.source))

    def _again(self, parts: Iterable[Requests]) -> None:
        by_source: dict[str, list[Requests]] = {}
        for part in parts:
            by_source.setdefault(part.chunk.stream.source, []).append(part)
        for source, own in by_source.items():
            self._reading.again(self._schedules.get(source), own)

    def _follow_sources(self, sources: set[str]) -> None:
        """Pause what is served no longer: it is still assigned until the group has heard of it.

        Nobody would answer a record taken meanwhile, and if its route came back before the revoke, later
        records would be settled past it.
        """
        dropped, back = set(self._schedules) - sources, self._dropped & sources
        if dropped:
            self._intake.pause(dropped)
            # Some members are told that such streams are lost, which is too late to settle anything.
            self._intake.settle(self.ledger.positions())
        self._dropped = (self._dropped | dropped) - back
        self._paused = (self._paused - dropped) | back

    @property
    def open(self) -> int:
        """Return how many taken records have no confirmed outcome."""
        return self.ledger.open_records()

    # One turn

    def turn(self, max_wait_s: float = IDLE_WAIT_S) -> bool:
        """Look at everything once; return whether records were taken."""
        self._pump()
        now = self._clock.monotonic()
        self._commit(now)
        self._hold(now)
        if self.observing is not None:
            self.observing.tick(now)
        wait_s = self._wait_s(now, max_wait_s)
        may_take = self._may_take(now)
        engines_run = self.engines.running
        chunks = self._take(0.0 if engines_run or not may_take else wait_s) if may_take else self._mind()
        for chunk in chunks:
            self._reading.read(self._schedules.get(chunk.stream.source), chunk)
        if chunks:
            self.engines.run()
            return True
        if self.shadowing.ready and not self.engines.running and not self.batcher.rows:
            self.shadowing.run()
        if engines_run or not may_take:
            self._listen(wait_s)
        return False

    def _pump(self, *, flush: bool = False) -> None:
        """Everything but taking: confirmations, finished batches, due batches."""
        self._outlet.poll()
        if self._results is not None:
            self._results.poll()
        now = self._clock.monotonic()
        self._delivery.retry_parked(now)
        crowded = self.admission.full and not self.engines.running and not self.batcher.rows
        self._delivery.hear(now, flush=flush or self._draining, crowded=crowded)
        self._listen(0.0)
        self._again(self._brakes.released())
        self.engines.run(flush=flush or self._draining)

    def _listen(self, wait_s: float) -> None:
        """Hear what device threads and outlets have put into the queue, waiting for the first."""
        try:
            item = self._news.get(timeout=wait_s) if wait_s > 0 else self._news.get_nowait()
            while True:
                if isinstance(item, Finished):
                    if not self.shadowing.finished(item):
                        self._finished(self.engines.finished(item))
                elif isinstance(item, Loaded):
                    self.loaded.append(item)
                item = self._news.get_nowait()
        except Empty:
            return

    def _came(self, plan: RoutePlan, piece: Requests) -> None:
        if self.observing is not None:
            self.observing.came(plan, piece)

    def _finished(self, result: BatchResult) -> None:
        lane = result.batch.lane
        self.batcher.observed(lane, result.batch.rows, result.seconds)
        if result.lane_limit is not None:
            self.batcher.limit(lane.model, lane.version, result.lane_limit)
        heard_at = self._counting.batch(result)
        failures = list(result.failures)
        answered: dict[str, int] = {}
        for answer in result.answers:
            plan, variant = self._steered.of(answer.part)
            failed = self._delivery.answer(plan, variant, answer)
            failures += failed
            if plan.shadows:
                self.shadowing.offer(plan, variant, answer, failed)
            if answer.part.chunk.origins is None:
                answered[plan.name] = answered.get(plan.name, 0) + len(answer.part) - len(failed)
        if self.observing is not None:
            self.observing.batch(result, failures, self._steered.of)
        if failures:
            self._failed(failures, answered)
        for name, count in answered.items():
            self._brakes.answered(name, lane.version, count)
        self._counting.written(heard_at)
        # Between batches, so that the client's reports do not pile up behind a long queue of news.
        self._outlet.poll()
        self.engines.run()

    def _failed(self, failures: list[RowFailure], answered: dict[str, int]) -> None:
        """End failed requests, all of a route at once: its brake counts them before any is moved.

        Takes out of ``answered`` what it has counted with them.
        """
        by_route: dict[str, tuple[RoutePlan, list[RowFailure]]] = {}
        for failure in failures:
            plan = self._steered.of(failure.part)[0]
            by_route.setdefault(plan.name, (plan, []))[1].append(failure)
        for plan, failed in by_route.values():
            self._delivery.row_failures(plan, failed, answered.pop(plan.name, 0))

    def _expired(self, part: Requests) -> None:
        self._delivery.expired(self._steered.of(part)[0], part)

    def _condemned(self, part: Requests) -> None:
        """Answer a request that has ended the process, whatever a brake says: it must not run again."""
        verdict = (Code.MODEL, "the process that ran this request has ended, again and again")
        self._delivery.fail(self._steered.of(part)[0], failures_of(part, [0], [verdict]))

    # Taking

    def _may_take(self, now: float) -> bool:
        """Return whether any route may take now, and pause those that have not been able to for long."""
        blocked = {
            source
            for source, each in self._schedules.items()
            if each.name in self.held or not self.admission.may_take(each.name)
        }
        if not self.admission.full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        lasting = self._full_since is not None and now - self._full_since >= PAUSE_AFTER_S
        wanted = {
            source
            for source in blocked
            if lasting or self._draining or self._schedules[source].name in self.held
        }
        if self._draining:
            wanted = set(self._schedules)
        if wanted - self._paused:
            self._intake.pause(wanted - self._paused)
        if self._paused - wanted:
            self._intake.resume(self._paused - wanted)
        self._paused = wanted
        # While the bound is met by not taking, nothing is taken from anybody who shares the client.
        return not self._draining and len(self._schedules) > len(blocked) and not (blocked - wanted)

    def _take(self, wait_s: float) -> list[Chunk]:
        rows, size_bytes = self.admission.room()
        return self._intake.take(min(self._options.chunk_records, rows), size_bytes, wait_s)

    def _mind(self) -> list[Chunk]:
        """Stay a member while nothing may be taken: with every source paused, polling returns no record."""
        if self._paused >= set(self._schedules):
            return self._intake.take(1, 1, 0.0)
        return []

    def _hold(self, now: float) -> None:
        """Decide which routes must not take because something of their own is away."""
        held = self._delivery.held()
        if self._results is not None:
            away_since = self._results.away_since
            if away_since is not None and now - away_since >= RESULTS_AWAY_PATIENCE_S:
                for each in self._schedules.values():
                    if each.redis:
                        held.setdefault(each.name, "redis does not answer")
        for name, reason in self._brakes.held().items():
            held.setdefault(name, reason)
        for name in held.keys() - self.held.keys():
            log.warning("route_paused", route=name, reason=held[name])
            self._metrics.route_paused(name, True)
        for name in self.held.keys() - held.keys():
            log.info("route_resumed", route=name)
            if name in {each.name for each in self._schedules.values()}:
                self._metrics.route_paused(name, False)
        self.held = held

    # Waiting

    def _wait_s(self, now: float, max_wait_s: float) -> float:
        """Return how long nothing can be missed: short while something is under way elsewhere."""
        if self.engines.full:
            return min(max_wait_s, FULL_WAIT_S)
        if self.engines.running or self._outlet.pending():
            return min(max_wait_s, BUSY_WAIT_S)
        if self.shadowing.ready and not self.batcher.rows:
            return 0.0
        wait_s = min(max_wait_s, BUSY_WAIT_S) if self.shadowing.busy(now) else max_wait_s
        if self._results is not None and self._results.pending():
            wait_s = min(wait_s, BUSY_WAIT_S)
        wait_s = min(wait_s, self.engines.next_due_s(now))
        return max(0.0, wait_s)

    # Settling

    def _settled(self, settling: Settling) -> None:
        chunk = settling.chunk
        if chunk.amqp is not None and chunk.wanted:  # else a refusal has settled what nobody was told
            for sharing, row in self._reading.recent.settled(settling):
                self._reading.settle(sharing, [row])
        if not self._reading.settle(chunk, settling.rows) and not chunk.orphaned:
            return
        self._counting.outcomes(settling)
        if not settling.outcomes:  # they come again for another attempt
            return
        self.ended[settling.plan.name] += len(settling.rows)
        now_ms = self._clock.utc_ms()
        seconds = self._counting.latencies(settling, now_ms)
        if self.observing is not None:
            self.observing.settled(settling, now_ms, seconds)

    def _commit(self, now: float) -> None:
        if now - self._committed_at < COMMIT_EVERY_S:
            # An acknowledgement costs RabbitMQ little, and makes room for the next message.
            positions = self.ledger.positions(self._prompt) if self._prompt else {}
        else:
            self._committed_at = now
            positions = self.ledger.positions()
        if positions:
            self._intake.settle(positions)
            self._counting.committed()

    # Rebalance news: called inside the intake's take, on this thread.

    def assigned(self, streams: Collection[Stream]) -> None:
        """Start an epoch for each stream."""
        self.ledger.assigned(streams)
        self._prompt.update(stream for stream in streams if on_rabbitmq(stream.source))

    def revoked(self, streams: Collection[Stream], grace_s: float) -> Mapping[Stream, int]:
        """Finish what ends within the grace, settle the prefix, forget the rest."""
        until = self._clock.monotonic() + grace_s
        while self.ledger.open_records(streams) and (left := until - self._clock.monotonic()) > 0:
            self._pump(flush=True)
            self._listen(min(left, BUSY_WAIT_S))
        # Also what was committed in the background: if that is still refused, nobody repeats it later.
        self.ledger.repeat(streams)
        positions = self.ledger.positions(streams)
        self._give_up(streams)
        return positions

    def lost(self, streams: Collection[Stream]) -> None:
        """Forget them at once."""
        self._give_up(streams)

    def settle_refused(self, streams: Collection[Stream]) -> None:
        """Settle these again with the next commit."""
        self.ledger.repeat(streams)

    def _give_up(self, streams: Collection[Stream]) -> None:
        forgotten = self.ledger.ended(streams)
        self._prompt.difference_update(streams)
        if not forgotten:
            return
        dropped = self.engines.drop_dead() + self._brakes.drop_dead()
        orphans = 0
        for chunk in forgotten:
            if chunk.amqp is not None and not self._draining:
                orphans += self._reading.orphan(chunk, dropped)
            self._reading.release(chunk)
        log.info(
            "records_given_back",
            records=sum(chunk.open for chunk in forgotten),
            streams=len(set(streams)),
            still_running=orphans,
        )

    # Ending

    def drain(self, timeout_s: float) -> int:
        """Take nothing more, finish what was taken within ``timeout_s``; return how many stay open."""
        self._draining = True
        self.shadowing.close()
        until = self._clock.monotonic() + timeout_s
        # What a destination refused has this last chance: its pause may be longer than the drain.
        self._delivery.retry_parked(self._clock.monotonic(), force=True)
        while self.open > self._brakes.withheld() and (left := until - self._clock.monotonic()) > 0:
            self.turn(min(left, BUSY_WAIT_S))
        if self.observing is not None:
            self.observing.close()
        return self.open

    def lag(self) -> dict[str, int]:
        """Return how many records of each route are not taken yet, as far as is known without asking."""
        lag: dict[str, int] = {}
        for stream, records in self._intake.lag().items():
            schedule = self._schedules.get(stream.source)
            if schedule is not None:
                lag[schedule.name] = lag.get(schedule.name, 0) + records
        return lag

    def gauges(self) -> None:
        """Refresh the metrics that are read off, not counted."""
        routes = {each.name: each for each in self._schedules.values()}
        self._gauges.refresh(routes.values(), self.lag(), self._clock.utc_ms())
        self.shadowing.gauges()
        if self.batcher.lanes > 256:
            self.batcher.tidy()
