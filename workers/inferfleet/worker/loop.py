"""The worker loop: one thread that owns the intake, the outlets and all state of the record path.

One turn looks at everything once: confirmations, finished batches, expired requests, due batches, commits,
new records. Nothing in a turn waits for a model or a server; at its end the loop waits, bounded, for the
thing that is most likely to happen next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import structlog

from inferfleet.core.admission import Admission
from inferfleet.core.batcher import NEVER, Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.ports import Clock, Intake, Outlet, ResultOutlet
from inferfleet.records import BatchResult, Chunk, Requests, Served, Stream
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.delivery import Delivery, Settling
from inferfleet.worker.engine import Engine, Finished, Loaded, News
from inferfleet.worker.plan import RoutePlan, VariantPlan

log = structlog.get_logger(__name__)

CHUNK_RECORDS = 500
COMMIT_EVERY_S = 0.5
BUSY_WAIT_S = 0.001
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
        news: SimpleQueue[News],
        metrics: PrometheusMetrics,
        clock: Clock,
        options: LoopOptions,
    ) -> None:
        self._intake = intake
        self._outlet = outlet
        self._results = results
        self._delivery = delivery
        self._news = news
        self._metrics = metrics
        self._clock = clock
        self._options = options
        self.ledger = Ledger()
        self.batcher = Batcher()
        self.admission = Admission((), options.max_rows, options.max_bytes)
        self.loaded: list[Loaded] = []
        self.held: dict[str, str] = {}
        self._plans: dict[str, RoutePlan] = {}
        self._by_served: dict[Served, tuple[RoutePlan, VariantPlan]] = {}
        self._engines: list[Engine] = []
        self._charged: dict[Chunk, tuple[str, int, int]] = {}
        self._paused: set[str] = set()
        self._dropped: set[str] = set()
        self._full_since: float | None = None
        self._committed_at = 0.0
        self._draining = False
        delivery.on_settled = self._settled

    def __repr__(self) -> str:
        return f"WorkerLoop({self.ledger!r}, {self.batcher!r}, {self.admission!r})"

    def use(self, plans: Collection[RoutePlan]) -> None:
        """Serve these routes from now on; what is under way ends as it began."""
        self._follow_sources({plan.source for plan in plans})
        self._plans = {plan.source: plan for plan in plans}
        for plan in plans:
            for variant in plan.variants:
                self._by_served[variant.served] = (plan, variant)
        self.admission.routes([plan.name for plan in plans])
        self._intake.subscribe(sorted(self._plans), self)

    def _follow_sources(self, sources: set[str]) -> None:
        """Pause what is served no longer: it is still assigned until the group has heard of it.

        Nobody would answer a record taken meanwhile, and if its route came back before the revoke, later
        records would be settled past it.
        """
        dropped, back = set(self._plans) - sources, self._dropped & sources
        if dropped:
            self._intake.pause(dropped)
            # Some members are told that such streams are lost, which is too late to settle anything.
            self._intake.settle(self.ledger.positions())
        self._dropped = (self._dropped | dropped) - back
        self._paused = (self._paused - dropped) | back

    def watch(self, engine: Engine) -> None:
        """Look after an engine: its batches and its news."""
        self._engines.append(engine)

    def forget(self, engine: Engine) -> None:
        """Look after an engine no longer; it holds no batch and no request waits for it."""
        self._engines.remove(engine)

    def watches(self, engine: Engine) -> bool:
        """Return whether this engine has loaded and is looked after."""
        return engine in self._engines

    def busy(self, engine: Engine) -> bool:
        """Return whether a batch runs or a request waits for this engine."""
        return engine.in_flight > 0 or self.batcher.waiting(engine.model, engine.version) > 0

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
        wait_s = self._wait_s(now, max_wait_s)
        may_take = self._may_take(now)
        engines_run = any(engine.in_flight for engine in self._engines)
        chunks = self._take(0.0 if engines_run or not may_take else wait_s) if may_take else self._mind()
        for chunk in chunks:
            self._read(chunk)
        if chunks:
            self._dispatch()
            return True
        if engines_run or not may_take:
            self._listen(wait_s)
        return False

    def _pump(self, *, flush: bool = False) -> None:
        """Everything but taking: confirmations, finished batches, due batches."""
        self._outlet.poll()
        if self._results is not None:
            self._results.poll()
        self._delivery.retry_parked(self._clock.monotonic())
        self._listen(0.0)
        self._dispatch(flush=flush or self._draining)

    def _listen(self, wait_s: float) -> None:
        """Hear what device threads and outlets have put into the queue, waiting for the first."""
        try:
            item = self._news.get(timeout=wait_s) if wait_s > 0 else self._news.get_nowait()
            while True:
                if isinstance(item, Finished):
                    item.engine.in_flight -= 1
                    self._finished(item.result)
                elif isinstance(item, Loaded):
                    self.loaded.append(item)
                item = self._news.get_nowait()
        except Empty:
            return

    def _finished(self, result: BatchResult) -> None:
        lane = result.batch.lane
        self.batcher.observed(lane, result.batch.rows, result.seconds)
        if result.lane_limit is not None:
            self.batcher.limit(lane.model, lane.version, result.lane_limit)
        self._metrics.batch(lane.model, lane.version, lane.role, result.batch.rows, result.seconds)
        started = self._clock.monotonic()
        for answer in result.answers:
            self._delivery.answer(*self._served(answer.part), answer)
        for failure in result.failures:
            self._delivery.row_failures(self._served(failure.part)[0], [failure])
        self._metrics.stage("predict", result.seconds)
        self._metrics.stage("write", self._clock.monotonic() - started)
        # Between batches, so that the client's reports do not pile up behind a long queue of news.
        self._outlet.poll()
        self._dispatch()

    def _served(self, part: Requests) -> tuple[RoutePlan, VariantPlan]:
        if part.served is None:
            raise LookupError(f"{part.chunk} was never steered")
        return self._by_served[part.served]

    def _dispatch(self, *, flush: bool = False) -> None:
        """Answer what has expired, and give every free engine its most urgent due batch."""
        if not self.batcher.rows:
            return
        now_ms = self._clock.utc_ms()
        for part in self.batcher.expire(now_ms):
            self._delivery.expired(self._served(part)[0], part)
        now = NEVER if flush else self._clock.monotonic()
        for engine in self._engines:
            while engine.free and (batch := self.batcher.due(engine.model, engine.version, now, now_ms)):
                engine.submit(batch)

    # Taking

    def _may_take(self, now: float) -> bool:
        """Return whether any route may take now, and pause those that have not been able to for long."""
        blocked = {
            source
            for source, plan in self._plans.items()
            if plan.name in self.held or not self.admission.may_take(plan.name)
        }
        if not self.admission.full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        lasting = self._full_since is not None and now - self._full_since >= PAUSE_AFTER_S
        wanted = {
            source for source in blocked if lasting or self._draining or self._plans[source].name in self.held
        }
        if self._draining:
            wanted = set(self._plans)
        if wanted - self._paused:
            self._intake.pause(wanted - self._paused)
        if self._paused - wanted:
            self._intake.resume(self._paused - wanted)
        self._paused = wanted
        # While the bound is met by not taking, nothing is taken from anybody who shares the client.
        return not self._draining and len(self._plans) > len(blocked) and not (blocked - wanted)

    def _take(self, wait_s: float) -> list[Chunk]:
        rows, size_bytes = self.admission.room()
        return self._intake.take(min(self._options.chunk_records, rows), size_bytes, wait_s)

    def _mind(self) -> list[Chunk]:
        """Stay a member while nothing may be taken: with every source paused, polling returns no record."""
        if self._paused >= set(self._plans):
            return self._intake.take(1, 1, 0.0)
        return []

    def _read(self, chunk: Chunk) -> None:
        """Decode, steer and queue one chunk."""
        plan = self._plans.get(chunk.stream.source)
        if plan is None:  # a record that nobody here can answer stays open: somebody else takes it
            self.ledger.began(chunk)
            return
        now = self._clock.monotonic()
        self.ledger.began(chunk)
        if plan.route.time == "received":
            chunk.timestamps_ms = [self._clock.utc_ms()] * len(chunk)
        decoded = plan.decoder.decode(chunk)
        rows = len(chunk)
        for part in decoded.requests:
            if part.row_counts is not None:
                rows += part.total_rows - len(part)
            for variant, piece in plan.steer(part):
                self.batcher.add(variant.lane(piece), piece, now)
        self._charged[chunk] = (plan.name, rows, chunk.size_bytes)
        self.admission.took(plan.name, rows, chunk.size_bytes)
        if decoded.rejected is not None:
            self._delivery.fail(plan, decoded.rejected)
        self._metrics.stage("read", self._clock.monotonic() - now)

    def _hold(self, now: float) -> None:
        """Decide which routes must not take because something of their own is away."""
        held = self._delivery.held()
        if self._results is not None:
            away_since = self._results.away_since
            if away_since is not None and now - away_since >= RESULTS_AWAY_PATIENCE_S:
                for plan in self._plans.values():
                    if plan.redis:
                        held.setdefault(plan.name, "redis does not answer")
        for name in held.keys() - self.held.keys():
            log.warning("route_paused", route=name, reason=held[name])
            self._metrics.route_paused(name, True)
        for name in self.held.keys() - held.keys():
            log.info("route_resumed", route=name)
            self._metrics.route_paused(name, False)
        self.held = held

    # Waiting

    def _wait_s(self, now: float, max_wait_s: float) -> float:
        """Return how long nothing can be missed: short while something is under way elsewhere."""
        if any(engine.in_flight for engine in self._engines) or self._outlet.pending():
            return min(max_wait_s, BUSY_WAIT_S)
        wait_s = max_wait_s
        if self._results is not None and self._results.pending():
            wait_s = min(wait_s, BUSY_WAIT_S)
        if self.batcher.rows:
            now_ms = self._clock.utc_ms()
            for engine in self._engines:
                wait_s = min(wait_s, self.batcher.next_due(engine.model, engine.version, now, now_ms) - now)
        return max(0.0, wait_s)

    # Settling

    def _settled(self, settling: Settling) -> None:
        chunk = settling.chunk
        if not self.ledger.settle(chunk, settling.rows):
            return
        name = settling.plan.name
        for (version, variant, outcome), count in settling.outcomes.items():
            self._metrics.outcomes(name, version, variant, outcome, count)
        now_ms = self._clock.utc_ms()
        timestamps = chunk.timestamps_ms
        if len(settling.rows) < len(timestamps):
            timestamps = [timestamps[row] for row in settling.rows]
        self._metrics.request_seconds(name, (now_ms - np.array(timestamps)) / 1000)
        if not chunk.open:
            self._release(chunk)

    def _release(self, chunk: Chunk) -> None:
        charge = self._charged.pop(chunk, None)
        if charge is not None:
            self.admission.freed(*charge)

    def _commit(self, now: float) -> None:
        if now - self._committed_at < COMMIT_EVERY_S:
            return
        self._committed_at = now
        positions = self.ledger.positions()
        if positions:
            self._intake.settle(positions)

    # Rebalance news: called inside the intake's take, on this thread.

    def assigned(self, streams: Collection[Stream]) -> None:
        """Start an epoch for each stream."""
        self.ledger.assigned(streams)

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
        for chunk in forgotten:
            self._release(chunk)
        if forgotten:
            self.batcher.drop_dead()
            log.info(
                "records_given_back",
                records=sum(chunk.open for chunk in forgotten),
                streams=len(set(streams)),
            )

    # Ending

    def drain(self, timeout_s: float) -> int:
        """Take nothing more, finish what was taken within ``timeout_s``; return how many stay open."""
        self._draining = True
        until = self._clock.monotonic() + timeout_s
        while self.open and (left := until - self._clock.monotonic()) > 0:
            self.turn(min(left, BUSY_WAIT_S))
        return self.open

    def gauges(self) -> None:
        """Refresh the metrics that are read off, not counted."""
        lag: dict[str, int] = {}
        for stream, records in self._intake.lag().items():
            lag[stream.source] = lag.get(stream.source, 0) + records
        now_ms = self._clock.utc_ms()
        for source, plan in self._plans.items():
            oldest = self.ledger.oldest_timestamp_ms((source,))
            self._metrics.oldest_request_seconds(
                plan.name, 0.0 if oldest is None else max(0.0, (now_ms - oldest) / 1000)
            )
            self._metrics.consumer_lag(plan.name, lag.get(source, 0))
            self._metrics.in_flight(plan.name, *self.admission.held(plan.name))
            for variant in plan.variants:
                served = variant.served
                waiting = self.batcher.waiting(served.model, served.version)
                self._metrics.queue_rows(served.model, served.version, "primary", waiting)
        if self.batcher.lanes > 256:
            self.batcher.tidy()
