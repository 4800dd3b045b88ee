"""Chooses what a worker is joined to, by what the routes of its pool name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from inferfleet.cli.slot import state_folder
from inferfleet.cli.topology import retry_delays, uses_kafka, uses_rabbitmq
from inferfleet.config import Config, kafka_client_config
from inferfleet.control_ports import Reporter
from inferfleet.naming import retry_group, retry_name, retry_sources, retry_topics, source_address
from inferfleet.ports import Clock, CrashMarks, Intake, Outlet, PauseBoard, ResultOutlet
from inferfleet.routes import Route
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.engine import SLOTS
from inferfleet.worker.outlets import Outlets
from inferfleet.worker.plan import max_batch_size
from inferfleet.worker.sources import Sources
from inferfleet.worker.versions import Models

if TYPE_CHECKING:
    from inferfleet.brokers.rabbitmq_link import RabbitLink
    from inferfleet.redis_access import Place

_LITTLE_AT_ONCE = {
    "queued.min.messages": 1_000,
    "queued.max.messages.kbytes": 2_048,
    "fetch.max.bytes": 1_048_576,
    "max.partition.fetch.bytes": 1_048_576,
}
"""A retry topic is read again from what is not due, so that what was fetched beyond it was in vain."""
_COMMITTED_ONLY = {"isolation.level": "read_committed"}
"""A redrive that was broken off has taken its retries back."""
MAX_PREFETCH = 65_535
"""The protocol's own bound."""


@dataclass(frozen=True)
class Joined:
    """The adapters of one worker. ``brokers`` are those that a route may name until the process ends."""

    intake: Intake
    outlet: Outlet
    results: ResultOutlet | None
    pauses: PauseBoard
    marks: CrashMarks
    reporter: Reporter | None
    brokers: frozenset[str]
    close: Callable[[], None]


class Joining:
    """Builds the adapters that these routes need; ``news`` is the queue that wakes the worker loop."""

    def __init__(
        self,
        config: Config,
        routes: tuple[Route, ...],
        models: Models,
        news: SimpleQueue[Any],
        metrics: PrometheusMetrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self.routes: tuple[Route, ...] = ()
        self._delays: dict[str, list[str]] = {}
        self.follow(routes)
        self._models = models
        self._news = news
        self._metrics = metrics
        self._clock = clock
        self._kafka = uses_kafka(routes)
        self._link = self._open_link() if uses_rabbitmq(routes) else None
        # Routes of the control plane come and go: what a later one may name is opened when it does.
        self._open_ended = config.routes.source == "fleet"
        keeps_results = any(result.kind == "redis" for route in routes for result in route.results)
        self._redis = keeps_results or self._open_ended
        self._sources: Sources | None = None
        self._outlets: Outlets | None = None

    def follow(self, routes: tuple[Route, ...]) -> None:
        """Take these as the pool's routes from now on: how much to prefetch, and where retries wait."""
        self.routes = routes
        config = self._config
        fresh = {
            source_address(route): [retry_name(config, route, ms) for ms in retry_delays(config, route)]
            for route in routes
        }
        self._delays.clear()
        self._delays.update(fresh)

    def join(self) -> Joined:
        """Return the adapters; none of them waits for a server to be there."""
        brokers = {"kafka"} if self._kafka else set()
        return Joined(
            self._intake(),
            self._outlet(),
            self._results(),
            self._pauses(),
            self._marks(),
            self._reporter(),
            frozenset(brokers | ({"rabbitmq"} if self._link is not None else set())),
            close=self._close,
        )

    def open(self, broker: str) -> bool:
        """Join a broker, ``kafka`` or ``rabbitmq``, that a route names for the first time.

        Returns whether routes may name it now: a worker whose routes stand in a file was joined to what
        they named when it started, and to nothing else.
        """
        if not self._open_ended or self._sources is None or self._outlets is None:
            return False
        if broker == "kafka":
            self._sources.add(kafka=self._kafka_intake(self._config.group), retries=self._delayed())
            self._outlets.add(kafka=self._kafka_outlet())
        else:
            self._link = link = self._open_link()
            self._sources.add(rabbitmq=self._rabbit_intake(link))
            self._outlets.add(rabbitmq=self._rabbit_outlet(link))
        return True

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()

    def _open_link(self) -> RabbitLink:
        from inferfleet.brokers.rabbitmq_link import RabbitLink, rabbit_options

        return RabbitLink(rabbit_options(self._config), wake=lambda: self._news.put(None))

    def _intake(self) -> Intake:
        config = self._config
        kafka = self._kafka_intake(config.group) if self._kafka else None
        delayed = self._delayed() if self._kafka else None
        rabbit = self._rabbit_intake(self._link) if self._link is not None else None
        self._sources = Sources(kafka, delayed, rabbit, retry_topics(config), self._clock)
        return self._sources

    def _delayed(self) -> Intake | None:
        config = self._config
        if not config.retry.delays_ms:
            return None
        from inferfleet.brokers.delayed import DelayedIntake

        # From the start: what was put there before this group first joined waits like all else.
        group = retry_group(config, config.worker.pool)
        inner = self._kafka_intake(group, "earliest", _LITTLE_AT_ONCE, _COMMITTED_ONLY)
        return DelayedIntake(inner, self._clock, longest_ms=2 * max(config.retry.delays_ms))

    def _kafka_intake(
        self,
        group: str,
        start: str | int | None = None,
        defaults: Mapping[str, object] | None = None,
        forced: Mapping[str, object] | None = None,
    ) -> Intake:
        from inferfleet.brokers.kafka_intake import KafkaIntake, KafkaIntakeOptions

        config = self._config
        timestamp = config.kafka.start_timestamp_ms
        return KafkaIntake(
            KafkaIntakeOptions(
                group,
                kafka_client_config(config),
                start or (config.kafka.start if timestamp is None else timestamp),
                config.kafka.group_protocol,
                config.kafka.session_timeout_ms,
                config.worker_id if config.kafka.static_membership else None,
                {**(defaults or {}), **config.kafka.consumer, **(forced or {})},
            )
        )

    def _rabbit_intake(self, link: RabbitLink) -> Intake:
        from inferfleet.brokers.rabbitmq_intake import RabbitIntake

        return RabbitIntake(link, prefetch=self._prefetch, delays=self._delays)

    def _prefetch(self, source: str) -> int:
        """Return how many messages may be out at once: a batch more than the engines hold."""
        config = self._config
        if config.rabbitmq.prefetch:
            return config.rabbitmq.prefetch
        route = next(
            each
            for each in self.routes
            if source == source_address(each) or source in retry_sources(config, each)
        )
        rows = sum(
            max_batch_size(route, self._models.wishes(route.model, variant.version), config)
            for variant in route.variants
        )
        return min(rows * (SLOTS + 1), MAX_PREFETCH)

    def _outlet(self) -> Outlet:
        kafka = self._kafka_outlet() if self._kafka else None
        rabbit = None if self._link is None else self._rabbit_outlet(self._link)
        if self._open_ended or (kafka is not None and rabbit is not None):
            self._outlets = Outlets(kafka, rabbit, self._clock)
            return self._outlets
        found = kafka or rabbit
        if found is None:
            raise LookupError("no route names a broker")
        return found

    def _rabbit_outlet(self, link: RabbitLink) -> Outlet:
        from inferfleet.brokers.rabbitmq_outlet import RabbitOutlet

        return RabbitOutlet(link, self._config.rabbitmq.reply_to)

    def _kafka_outlet(self) -> Outlet:
        from inferfleet.brokers.kafka_outlet import KafkaOutlet, producer_properties

        limits = self._config.limits
        largest = max(limits.max_result_bytes, limits.max_request_bytes) + 131_072
        client = kafka_client_config(self._config)
        return KafkaOutlet(producer_properties(client, self._config.kafka.producer, largest))

    def _results(self) -> ResultOutlet | None:
        """Return the Redis outlet if any route keeps results there, or clients may wait on reply streams."""
        if not self._redis:
            return None
        from inferfleet.redis_access import open_redis, place_of
        from inferfleet.results.redis import RedisResults

        place = replace(place_of(self._config), client_name=self._config.worker_id)
        return RedisResults(
            lambda: open_redis(place),
            self._config.fleet.name,
            wake=lambda: self._news.put(None),
            stood=self._metrics.redeliveries,
            lost=self._metrics.results_lost,
        )

    def _control(self) -> Place | None:
        """Return the Redis that the pool shares its pauses and marks through; ``None`` where it has none."""
        config = self._config
        if config.control is None and not self._redis and config.routes.source != "fleet":
            return None
        from inferfleet.redis_access import control_place_of

        # Marks are written on the loop's thread, which must not be away for a session's time.
        return replace(control_place_of(config), client_name=config.worker_id, timeout_s=1.0)

    def _pauses(self) -> PauseBoard:
        from inferfleet.control.pauses import LocalPauses, RedisPauses

        place = self._control()
        if place is None:
            return LocalPauses()
        from inferfleet.redis_access import open_redis

        return RedisPauses(lambda: open_redis(place), self._config.fleet.name, self._config.worker_id)

    def _marks(self) -> CrashMarks:
        from inferfleet.control.marks import FileMarks, RedisMarks

        config = self._config
        place = self._control()
        if place is None:
            name = f"{config.fleet.name}.{config.worker.pool}.{config.worker_id}.crash.json"
            return FileMarks(state_folder(config) / name)
        from inferfleet.redis_access import open_redis

        return RedisMarks(lambda: open_redis(place), config.fleet.name, config.worker.pool, config.worker_id)

    def _reporter(self) -> Reporter | None:
        """Return whom this worker tells how it is, wherever the pool shares a Redis."""
        place = self._control()
        if place is None:
            return None
        from inferfleet.control.reporter import RedisReporter
        from inferfleet.redis_access import open_redis

        config = self._config
        return RedisReporter(
            lambda: open_redis(place),
            config.fleet.name,
            config.worker.pool,
            config.worker_id,
            heartbeat_s=config.reports.heartbeat_s,
        )
