"""A worker's life: load, join, serve, follow its routes, drain, leave. The order of each is written here.

Start: models first (a worker that cannot answer must not take), then the subscription. Stop: taking ends
first, then what was taken is finished or given back, then the group is left (which commits), then the
outlets close, the device threads last.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import structlog

from inferfleet.addresses import on_rabbitmq
from inferfleet.config import Config
from inferfleet.control_ports import Reporter, RouteFeed
from inferfleet.core.retry import RetryPolicy
from inferfleet.errors import BrokerError, ConfigError, InferfleetError, ModelLoadError
from inferfleet.ports import (
    BatchingWishes,
    Clock,
    CrashMarks,
    Intake,
    LoadedModel,
    Outlet,
    PauseBoard,
    ResultOutlet,
)
from inferfleet.records import Stream
from inferfleet.routes import Route, RouteTable
from inferfleet.telemetry.admin import Health, WorkerStatus
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.engine import Engine, Loaded, News
from inferfleet.worker.loop import IDLE_WAIT_S, LoopOptions, WorkerLoop
from inferfleet.worker.observing import Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule

log = structlog.get_logger(__name__)

FEED_EVERY_S = 0.1
REFUSED_AGAIN_S = 20.0
"""A refused revision is tried again after this long: what it names may have been copied since."""
GAUGES_EVERY_S = 1.0
IDLE_CHECK_TIMEOUT_S = 2.0
LEAVE_S = 3.0
"""The share of the drain time (half of it at most) that leaving, flushing and closing may need."""
GC_THRESHOLDS = (500_000, 20, 50)

Version = tuple[str, str]


class Models(Protocol):
    """Where model versions come from; both methods verify before they parse."""

    def load(self, model: str, version: str) -> LoadedModel:
        """Fetch, load, check and warm up; blocks, called from the version's device thread."""

    def wishes(self, model: str, version: str) -> BatchingWishes:
        """Return what the version's ``[batching]`` asks for."""


def _nobody_follows(routes: tuple[Route, ...]) -> None:
    """Take no notice of the routes."""
    del routes


@dataclass(frozen=True)
class Adapters:
    """Everything a worker is joined to; chosen by the command line."""

    intake: Intake
    outlet: Outlet
    results: ResultOutlet | None
    models: Models
    metrics: PrometheusMetrics
    clock: Clock
    news: SimpleQueue[News]
    feed: RouteFeed
    pauses: PauseBoard
    marks: CrashMarks
    brokers: frozenset[str]
    """Which brokers there are adapters for: ``kafka``, ``rabbitmq``."""
    reporter: Reporter | None = None
    """Whom the worker tells how it is; ``None`` where its routes come from a file."""
    follow: Callable[[tuple[Route, ...]], None] = _nobody_follows
    """Told of the pool's routes before they are taken from: how much to prefetch, where retries wait."""
    strict: bool = True
    """Whether the start fails where a version does not load; else its route waits, and the others serve."""


class Worker:
    """One worker process. :meth:`run` belongs to one thread; ``stop`` may be called from anywhere."""

    def __init__(self, config: Config, adapters: Adapters) -> None:
        self._config = config
        self._to = adapters
        self._clock = adapters.clock
        self._stopping = False
        self._engines: dict[Version, Engine] = {}
        self._leaving: list[Engine] = []
        self._table = RouteTable("", ())
        self._next_table: RouteTable | None = None
        self._serving = False
        self._refused_revision = ""
        self._refused_at = 0.0
        self._oldest_ms: int | None = None
        brakes = self._brakes = Brakes(adapters.pauses, config.brake.consecutive, config.brake.share)
        self._careful = Careful(adapters.marks)
        delivery = Delivery(
            adapters.outlet,
            adapters.results,
            adapters.metrics,
            adapters.clock,
            max_result_bytes=config.limits.max_result_bytes,
            brakes=brakes,
            retry=RetryPolicy(config.retry.delays_ms),
            dead_letter_also=frozenset(config.dlt.include),
        )
        limits = config.limits
        self.loop = WorkerLoop(
            adapters.intake,
            adapters.outlet,
            adapters.results,
            delivery,
            brakes,
            self._careful,
            adapters.news,
            adapters.metrics,
            adapters.clock,
            LoopOptions(limits.in_flight_rows, limits.in_flight_bytes),
        )
        if adapters.reporter is not None:
            self.loop.observing = self.loop.shadowing.observing = Observing(
                config.worker_id,
                adapters.reporter,
                adapters.clock,
                config.reports.every_s,
                crashed=self._careful.active,
                letters=config.dlt.include,
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
        table = self._to.feed.log().table()
        # So that what is paused is known when the first record could be taken.
        self._brakes.routes([route.name for route in table.of_pool(self._config.worker.pool)])
        self._want(table)
        while not self._stopping and not self._all_loaded(table):
            try:
                item = self._to.news.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(item, Loaded):
                if item.error is not None:
                    raise _load_error(item)
                self._ready(item.engine)
        if not self._stopping:
            self._adopt(table)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)

    def _want(self, table: RouteTable) -> None:
        """Start loading every version that ``table`` names and that is not loaded yet."""
        for route in table.of_pool(self._config.worker.pool):
            for variant in route.variants:
                key = (route.model, variant.version)
                if key in self._engines:
                    continue
                leaving = [e for e in self._leaving if (e.model, e.version) == key]
                if leaving:  # still warm: a version never has two engines
                    self._leaving.remove(leaving[0])
                    self._engines[key] = leaving[0]
                    continue
                engine = Engine(*key, _loader(self._to.models, *key), self._to.news, self._clock)
                self._engines[key] = engine
                engine.start()

    def _all_loaded(self, table: RouteTable) -> bool:
        return all(self._engines[key].signature is not None for key in self._versions(table))

    def _versions(self, table: RouteTable) -> set[Version]:
        routes = table.of_pool(self._config.worker.pool)
        return {(route.model, variant.version) for route in routes for variant in route.variants}

    def _ready(self, engine: Engine) -> None:
        log.info("model_ready", model=engine.model, version=engine.version)
        self._to.metrics.model_ready(engine.model, engine.version, True)
        self.loop.engines.watch(engine)

    def _adopt(self, table: RouteTable) -> None:
        """Serve ``table``; every version it names is loaded."""
        plans = [
            RoutePlan(route, table.revision, self._engines, self._to.models.wishes, self._config)
            for route in table.of_pool(self._config.worker.pool)
        ]
        if self._to.results is None and (needy := [plan.name for plan in plans if plan.redis]):
            # Nothing would keep their answers, and their records would be settled without any.
            raise ConfigError(
                f"route {needy[0]} keeps results in redis, and no route did when this worker started; "
                "restart the worker"
            )
        for plan in plans:
            self._check_brokers(plan)
        self._to.follow(table.of_pool(self._config.worker.pool))
        self.loop.use([Schedule.always(plan) for plan in plans])
        self._table = table
        self._to.metrics.route_revision(table.revision)
        log.info("routes_adopted", revision=table.revision, routes=[plan.name for plan in plans])
        wanted = self._versions(table)
        for key in [key for key in self._engines if key not in wanted]:
            self._leaving.append(self._engines.pop(key))

    def _check_brokers(self, plan: RoutePlan) -> None:
        for address in (plan.source, *plan.destinations):
            broker = "rabbitmq" if on_rabbitmq(address) else "kafka"
            if broker not in self._to.brokers:
                raise ConfigError(
                    f"route {plan.name} names {address}, and no route named {broker} when this worker "
                    "started; restart the worker"
                )

    # Serve

    def _serve(self, until_idle_s: float | None) -> None:
        routes_at = gauges_at = self._clock.monotonic()
        idle_since: float | None = None
        while not self._stopping:
            took = self.loop.turn(IDLE_WAIT_S)
            now = self._clock.monotonic()
            if self.loop.loaded:
                self._heard_loaded()
            if now - gauges_at >= GAUGES_EVERY_S:
                gauges_at = now
                self.loop.gauges()
                self._oldest_ms = self.loop.ledger.oldest_timestamp_ms()
                self._retire()
                self._greet()
            if now - routes_at >= FEED_EVERY_S:
                routes_at = now
                self._follow_routes()
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
            log.info("worker_ready", worker=self._config.worker_id, group=self._config.group)
        elif self._to.intake.denied is not None:
            raise BrokerError(self._to.intake.denied)

    def _follow_routes(self) -> None:
        """Re-read the routes; load what is new before anything changes, keep the old if anything is wrong."""
        try:
            table = self._to.feed.log().table()
            if table.revision == self._table.revision:
                self._refused_revision = ""
                self._next_table = None  # taken back while its versions were loading
                return
            if table.revision == self._refused_revision:
                if self._clock.monotonic() - self._refused_at < REFUSED_AGAIN_S:
                    return
                self._refused_revision = ""
            self._want(table)
            self._next_table = table
            self._switch_if_loaded()
        except InferfleetError as error:
            log.error("routes_refused", error=str(error), kept=self._table.revision)

    def _heard_loaded(self) -> None:
        for item in self.loop.loaded:
            if item.error is None:
                self._ready(item.engine)
            else:
                engine = item.engine
                self._engines.pop((engine.model, engine.version), None)
                self._leaving = [each for each in self._leaving if each is not engine]
                self._to.metrics.model_ready(engine.model, engine.version, False)
                log.error("model_refused", error=str(_load_error(item)), kept=self._table.revision)
                if self._next_table is not None:
                    self._refuse(self._next_table)
        self.loop.loaded.clear()
        self._switch_if_loaded()

    def _switch_if_loaded(self) -> None:
        if self._next_table is None or not self._all_loaded(self._next_table):
            return
        table, self._next_table = self._next_table, None
        try:
            self._adopt(table)
        except InferfleetError as error:
            self._refuse(table)
            log.error("routes_refused", error=str(error), kept=self._table.revision)

    def _refuse(self, table: RouteTable) -> None:
        self._refused_revision = table.revision
        self._refused_at = self._clock.monotonic()
        self._next_table = None

    def _retire(self) -> None:
        """Close engines that no route names any longer, once nothing of theirs is under way."""
        idle = [e for e in self._leaving if self.loop.engines.watches(e) and not self.loop.engines.busy(e)]
        for engine in idle:
            self._leaving.remove(engine)
            self.loop.engines.forget(engine)
            engine.close()
            self._to.metrics.model_ready(engine.model, engine.version, False)
            log.info("model_unloaded", model=engine.model, version=engine.version)

    # End

    def _end(self, clean: bool) -> int:
        """Drain, leave, close; return how many records were given back."""
        timeout_s = self._config.worker.drain_timeout_s
        until = self._clock.monotonic() + timeout_s * 0.95
        log.info("draining", open=self.loop.open)
        unfinished = self.loop.drain(timeout_s - min(LEAVE_S, timeout_s / 2))
        self._to.intake.close()
        unconfirmed = self._to.outlet.close(self._left_s(until))
        if self._to.results is not None:
            unconfirmed += self._to.results.close(self._left_s(until))
        engines = [*self._engines.values(), *self._leaving]
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
        if not self._table.revision:
            missing = [f"{m}:{v}" for (m, v), engine in self._engines.items() if engine.signature is None]
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
            revision=self._table.revision,
            ready=health.ready,
            reasons=health.reasons,
            paused=dict(self.loop.held),
            assignment={topic: sorted(numbers) for topic, numbers in assignment.items()},
            models=_model_states(dict(self._engines)),
            in_flight_rows=self.loop.admission.rows,
            in_flight_bytes=self.loop.admission.bytes,
            oldest_request_seconds=0.0
            if oldest is None
            else max(0.0, (self._clock.utc_ms() - oldest) / 1000),
        )

    def _streams(self) -> tuple[Stream, ...]:
        return self.loop.ledger.streams


def _loader(models: Models, model: str, version: str) -> Callable[[], LoadedModel]:
    return lambda: models.load(model, version)


def _load_error(item: Loaded) -> InferfleetError:
    if isinstance(item.error, InferfleetError):
        return item.error
    return ModelLoadError(
        f"model {item.engine.model} version {item.engine.version} did not load: "
        f"{type(item.error).__name__}: {item.error}"
    )


def _model_states(engines: Mapping[Version, Engine]) -> dict[str, str]:
    return {
        f"{model}:{version}": "loading" if engine.signature is None else "ready"
        for (model, version), engine in engines.items()
    }
