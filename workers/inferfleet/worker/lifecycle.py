"""A worker's life: load, join, serve, follow its routes, drain, leave. The order of each is written here.

Start: models first (a worker that cannot answer must not take), then the subscription. Stop: taking ends
first, then what was taken is finished or given back, then the group is left (which commits), then the
outlets close, the device threads last.
"""

from __future__ import annotations

import gc
from queue import Empty

import structlog

from inferfleet.addresses import on_rabbitmq
from inferfleet.config import Config
from inferfleet.core.retry import RetryPolicy
from inferfleet.core.revisions import Adoption, adoption
from inferfleet.errors import BrokerError, ConfigError, InferfleetError
from inferfleet.plane import version_name
from inferfleet.ports import OutcomeFeed
from inferfleet.records import Stream
from inferfleet.revisions import Head, RouteLog
from inferfleet.telemetry.admin import Health, WorkerStatus
from inferfleet.worker.adapters import Adapters as Adapters
from inferfleet.worker.adopting import Adopting
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.detached import Detached
from inferfleet.worker.engine import Loaded
from inferfleet.worker.heart import Heart
from inferfleet.worker.loop import IDLE_WAIT_S, LoopOptions, WorkerLoop
from inferfleet.worker.observing import Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.versions import REFUSED_AGAIN_S, Versions

log = structlog.get_logger(__name__)

FEED_EVERY_S = 0.1
REVIEW_EVERY_S = 1.0
"""How often what is served is looked at anew although nothing was heard: time alone changes it."""
GAUGES_EVERY_S = 1.0
IDLE_CHECK_TIMEOUT_S = 2.0
LEAVE_S = 3.0
"""The share of the drain time (half of it at most) that leaving, flushing and closing may need."""
GC_THRESHOLDS = (500_000, 20, 50)
_GOES_ON = (Adoption.SAME, Adoption.NEWER)


class Worker:
    """One worker process. :meth:`run` belongs to one thread; ``stop`` may be called from anywhere."""

    def __init__(self, config: Config, adapters: Adapters) -> None:
        self._config = config
        self._to = adapters
        self._clock = adapters.clock
        self._stopping = False
        self._brokers = set(adapters.brokers)
        self._started = False
        self._serving = False
        self._refused_at: float | None = None
        self._told: dict[str, object] = {}
        self._shape: list[tuple[object, ...]] | None = None
        self._declined: Head | None = None
        self._oldest_ms: int | None = None
        self._brakes = Brakes(adapters.pauses, config.brake.consecutive, config.brake.share)
        self._careful = Careful(adapters.marks)
        self._detached = self._shadows()
        self.loop = self._loop()
        self._versions = Versions(
            adapters.models,
            self.loop.engines,
            adapters.news,
            adapters.metrics,
            adapters.clock,
            config.models.memory_bytes,
        )
        self._adopting = Adopting(config, adapters.models.wishes, self._check)
        self._heart = Heart(
            config,
            adapters.feed,
            adapters.reporter,
            self.loop,
            self._versions,
            self._adopting,
            adapters.metrics,
            adapters.clock,
            adapters.release,
        )
        if adapters.reporter is not None:
            observing = self.loop.observing = self.loop.shadowing.observing = Observing(
                config.worker_id,
                adapters.reporter,
                adapters.clock,
                config.reports.every_s,
                crashed=self._careful.active,
                letters=config.dlt.include,
            )
            if self._detached is not None:
                self._detached.observing = observing

    def _shadows(self) -> Detached | None:
        if self._to.outcomes is None:
            return None
        most = max(1, self._config.limits.in_flight_rows // 2)
        return Detached(self._outcomes, self._to.metrics, self._clock, place=self._answers_of, most=most)

    def _loop(self) -> WorkerLoop:
        config, adapters = self._config, self._to
        delivery = Delivery(
            adapters.outlet,
            adapters.results,
            adapters.metrics,
            adapters.clock,
            max_result_bytes=config.limits.max_result_bytes,
            brakes=self._brakes,
            retry=RetryPolicy(config.retry.delays_ms),
            dead_letter_also=frozenset(config.dlt.include),
        )
        limits = config.limits
        delivery.detached = self._detached
        return WorkerLoop(
            adapters.intake,
            adapters.outlet,
            adapters.results,
            delivery,
            self._brakes,
            self._careful,
            adapters.news,
            adapters.metrics,
            adapters.clock,
            LoopOptions(limits.in_flight_rows, limits.in_flight_bytes),
            adapters.traces,
        )

    def stop(self) -> None:
        """Ask the worker to drain and end; safe in a signal handler."""
        self._stopping = True

    def run(self, until_idle_s: float | None = None) -> int:
        """Serve until stopped, or until nothing was left to do for ``until_idle_s``.

        Returns how many records were given back unfinished: somebody else answers them. Raises
        :class:`~inferfleet.errors.InferfleetError` when it cannot start.
        """
        clean = False
        try:
            self._start()
            self._serve(until_idle_s)
            clean = True
        finally:
            unfinished = self._end(clean)
        return unfinished

    # Start

    def _start(self) -> None:
        self._adopting.found(self._first_log())
        # So that what is paused is known when the first record could be taken.
        self._brakes.routes(self._adopting.names)
        self._want(self._clock.utc_ms())
        while not self._stopping and self._versions.loading:
            self._heart.beat(draining=False)
            try:
                item = self._to.news.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(item, Loaded):
                self._versions.heard([item], self._adopting.label)
                self._end_if_lacking()
        if not self._stopping:
            self._end_if_lacking()
            self._take_over(self._clock.utc_ms())
            self._started = True
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)

    def _end_if_lacking(self) -> None:
        """Refuse to start without a version that somebody at the terminal has asked for."""
        missing = self._adopting.missing(self._versions.loaded, self._clock.utc_ms())
        for key, error in self._versions.refused.items():
            if self._to.strict and key in missing:
                raise error

    def _outcomes(self, name: str) -> OutcomeFeed:
        """Open what the primary route of this name answers; raises ConfigError where it cannot be read."""
        if self._to.outcomes is None:
            raise ConfigError("this worker has no way to outcomes of other routes")
        return self._to.outcomes(self._adopting.log.table().named(name))

    def _answers_of(self, name: str) -> object:
        """Return where the route of this name has its answers; ``None`` while there is no such route."""
        return next((each.results for each in self._adopting.log.table().routes if each.name == name), None)

    def _first_log(self) -> RouteLog:
        try:
            return self._to.feed.log()
        except ConfigError as error:
            if self._to.strict:
                raise
            # It is told once; the other routes are good.
            log.error("routes_refused", error=str(error), kept="")
            return self._to.feed.log()

    def _want(self, now_ms: int) -> None:
        self._versions.want(self._adopting.wanted(now_ms))

    def _take_over(self, now_ms: int) -> None:
        """Serve what can be served now; every version that it names is loaded.

        Raises InferfleetError where routes of a file cannot be served as they stand there.
        """
        schedules = self._adopting.schedules(self._versions.loaded, now_ms)
        self._to.metrics.route_revision(self._adopting.label)
        shape: list[tuple[object, ...]] = [(each.plan, *each.plans) for each in schedules]
        if shape != self._shape:
            self._shape = shape
            self._to.follow(tuple(each.plan.route for each in schedules))
            self.loop.use(schedules)
            names = [each.name for each in schedules]
            log.info("routes_adopted", revision=self._adopting.label, routes=names)
        if self._detached is not None:
            # Also when nothing of this pool has moved: the route that they shadow is another pool's.
            self._detached.serve([each.plan for each in schedules if each.plan.route.shadow_of is not None])

    def _check(self, plan: RoutePlan) -> None:
        if self._to.results is None and plan.redis:
            # Nothing would keep its answers, and its records would be settled without any.
            raise ConfigError(
                f"route {plan.name} keeps results in redis, and no route did when this worker started; "
                "restart the worker"
            )
        for address in (plan.source, *plan.destinations):
            broker = "rabbitmq" if on_rabbitmq(address) else "kafka"
            if broker not in self._brokers and not self._to.open(broker):
                raise ConfigError(
                    f"route {plan.name} names {address}, and no route named {broker} when this worker "
                    "started; restart the worker"
                )
            self._brokers.add(broker)

    # Serve

    def _serve(self, until_idle_s: float | None) -> None:
        looked_at = reviewed_at = gauges_at = self._clock.monotonic()
        idle_since: float | None = None
        while not self._stopping:
            took = self.loop.turn(IDLE_WAIT_S)
            now = self._clock.monotonic()
            news = bool(self.loop.loaded)
            if news:
                self._versions.heard(self.loop.loaded, self._adopting.label)
                self.loop.loaded.clear()
            if now - looked_at >= FEED_EVERY_S:
                looked_at = now
                news |= self._heard_routes()
                self._heart.beat(draining=False)
            if news or now - reviewed_at >= REVIEW_EVERY_S:
                reviewed_at = now
                self._review()
            if now - gauges_at >= GAUGES_EVERY_S:
                gauges_at = now
                self.loop.gauges()
                self._oldest_ms = self.loop.ledger.oldest_timestamp_ms()
                self._greet()
            if until_idle_s is not None:
                if took or self.loop.open or not self._to.intake.joined:
                    idle_since = None
                elif idle_since is None:
                    idle_since = now
                elif now - idle_since >= until_idle_s:
                    if self._to.intake.drained(IDLE_CHECK_TIMEOUT_S):
                        log.info("idle", seconds=until_idle_s)
                        return
                    idle_since = None

    def _greet(self) -> None:
        """Say once that the worker serves; refuse to wait for ever where the broker says no."""
        if self._serving:
            return
        if self._to.intake.joined:
            self._serving = True
            log.info("worker_ready", group=self._config.group)
        elif self._to.intake.denied is not None:
            raise BrokerError(self._to.intake.denied)

    def _heard_routes(self) -> bool:
        """Return whether there is a newer log; one that cannot be understood changes nothing."""
        try:
            found = self._to.feed.log()
        except InferfleetError as error:
            log.error("routes_refused", error=str(error), kept=self._adopting.label)
            return False
        if found is self._adopting.log or found == self._adopting.log:
            self._declined = None
            return False
        if found.head.number and adoption(self._adopting.log.head, found.head) not in _GOES_ON:
            if found.head != self._declined:
                self._declined = found.head
                log.error(
                    "routes_refused", error=f"the log goes back to {found.head}", kept=self._adopting.label
                )
            return False
        self._refused_at = self._declined = None
        self._adopting.found(found)
        return True

    def _review(self) -> None:
        """Load what is wanted, take over what can be, and let go what nobody wants, in this order."""
        # One time for all: what a plan counts on is not let go a moment later.
        now, now_ms = self._clock.monotonic(), self._clock.utc_ms()
        self._want(now_ms)
        if self._refused_at is None or now - self._refused_at >= REFUSED_AGAIN_S:
            self._refused_at = None
            try:
                self._take_over(now_ms)
            except InferfleetError as error:
                self._refused_at = now
                log.error("routes_refused", error=str(error), kept=self._adopting.label)
        self._show()
        self._tell()
        self._want(now_ms)
        self._versions.retire()

    def _show(self) -> None:
        """Let the metrics say how far the routes are followed."""
        metrics, adopting = self._to.metrics, self._adopting
        served = self._refused_at is None and self._declined is None
        metrics.routes_refused(bool(self._to.feed.refused) or not served)
        metrics.routes_adopted(adopting.adopted, adopting.refused)

    def _tell(self) -> None:
        """Say once what is not served as its newest revision wants, and why."""
        told: dict[str, object] = {}
        for name, error in self._adopting.refused.items():
            told[f"{name} {error}"] = True
            if f"{name} {error}" not in self._told:
                log.error("route_refused", route=name, error=str(error))
        for name, (number, lacking) in self._adopting.late(self._versions.loaded).items():
            told[f"{name} {number}"] = True
            if f"{name} {number}" not in self._told:
                log.warning("revision_waits", route=name, revision=number, versions=lacking)
        self._told = told

    # End

    def _end(self, clean: bool) -> int:
        """Drain, leave, close; return how many records were given back."""
        timeout_s = self._config.worker.drain_timeout_s
        until = self._clock.monotonic() + timeout_s * 0.95
        log.info("draining", open=self.loop.open)
        self._heart.beat(draining=True)
        unfinished = self.loop.drain(timeout_s - min(LEAVE_S, timeout_s / 2))
        self._to.intake.close()
        if self._detached is not None:
            self._detached.close()
        unconfirmed = self._to.outlet.close(self._left_s(until))
        if self._to.results is not None:
            unconfirmed += self._to.results.close(self._left_s(until))
        engines = self._versions.all
        for engine in engines:
            engine.close()
        for engine in engines:
            engine.join(self._left_s(until) if engine.signature is not None else 0.0)
        if self._to.reporter is not None:
            self._to.reporter.close()
        self._to.feed.close()
        self._to.pauses.close()
        self._careful.close(clean=clean)
        log.info("stopped", given_back=unfinished, unconfirmed=unconfirmed)
        return unfinished

    def _left_s(self, until: float) -> float:
        return max(0.0, until - self._clock.monotonic())

    # What others may ask; called from the admin thread, reads only

    def health(self) -> Health:
        """Return whether the worker is ready: versions warm, and a member of its group."""
        reasons: list[str] = []
        if not self._started:
            missing = [version_name(*key) for key in self._versions.loading]
            reasons.append("loading " + " ".join(missing) if missing else "starting")
        elif not self._serving:
            reasons.append(f"not yet a member of {self._config.group}")
        if self._stopping:
            reasons.append("draining")
        return Health(True, not reasons, tuple(reasons))

    def status(self) -> WorkerStatus:
        """Return what ``inferfleet status`` shows of this worker."""
        assignment: dict[str, list[int]] = {}
        for stream in self._streams():
            assignment.setdefault(stream.source, []).append(stream.partition)
        oldest = self._oldest_ms  # as of the last look: the ledger itself changes under this thread's hands
        health = self.health()
        return WorkerStatus(
            worker=self._config.worker_id,
            group=self._config.group,
            revision=self._adopting.label,
            ready=health.ready,
            reasons=health.reasons,
            paused=dict(self.loop.held),
            assignment={topic: sorted(numbers) for topic, numbers in assignment.items()},
            models=self._models(),
            adopted=dict(self._adopting.adopted),
            refused=self._adopting.refusals(self._versions.refused),
            stale=self._heart.stale,
            in_flight_rows=self.loop.admission.rows,
            in_flight_bytes=self.loop.admission.bytes,
            oldest_request_seconds=0.0
            if oldest is None
            else max(0.0, (self._clock.utc_ms() - oldest) / 1000),
        )

    def _models(self) -> dict[str, str]:
        states = {version_name(*key): "loading" for key in self._versions.loading}
        return states | {version_name(*key): "ready" for key in self._versions.loaded}

    def _streams(self) -> tuple[Stream, ...]:
        return self.loop.ledger.streams
