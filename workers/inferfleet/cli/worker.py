"""``inferfleet worker``: the place where a worker's adapters are chosen and joined."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import structlog

from inferfleet import __version__
from inferfleet.cli.frame import Session
from inferfleet.cli.slot import with_worker_id
from inferfleet.config import Config, check_supported, kafka_client_config
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.ports import BatchingWishes, LoadedModel, ResultOutlet
from inferfleet.routes import RouteTable, load_routes
from inferfleet.telemetry.logs import configure
from inferfleet.telemetry.metrics import PrometheusMetrics

if TYPE_CHECKING:
    from inferfleet.worker.lifecycle import Worker

log = structlog.get_logger(__name__)

START_PATIENCE_S = 60.0
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may hold the interpreter while another wants it: a device thread that has finished
must not wait the default 5 ms behind the loop."""


class RepositoryModels:
    """Model versions from the repository, on one device."""

    def __init__(self, config: Config) -> None:
        from inferfleet.models.repository import Repository

        self._repository = Repository(config.models_path, config.models.trusted)
        self._device = config.worker.device
        self._threads = config.worker.threads
        self._wishes: dict[tuple[str, str], BatchingWishes] = {}

    def load(self, model: str, version: str) -> LoadedModel:
        """Verify, load, check and warm up."""
        from inferfleet.runtimes import registry

        found = self._repository.fetch(model, version)
        self._wishes[model, version] = found.batching
        return registry.load(found, self._device, self._threads)

    def wishes(self, model: str, version: str) -> BatchingWishes:
        """Return a loaded version's ``[batching]``; the worker loop asks, so no file is read."""
        return self._wishes[model, version]


@click.command()
@click.option("--until-idle", type=float, metavar="S", help="Exit 0 after S seconds with nothing to do.")
@click.pass_obj
def worker(session: Session, until_idle: float | None) -> None:
    """Run one worker until SIGTERM; it drains and exits 0.

    A second SIGTERM stops at once: what was taken is taken again by another worker.

    \b
    Example:
      inferfleet --config fleet.toml worker
      inferfleet worker --until-idle 10
    """
    config = with_worker_id(session.config)
    check_supported(config)
    configure(config.log.format, config.log.level, secrets=config.secrets)
    _limit_threads(config)
    table = _routes(config)
    _wait_for_kafka(config)
    _check_topics(config, table)
    _run(config, table, until_idle)


def _limit_threads(config: Config) -> None:
    """Keep numeric libraries from starting more threads than this worker was granted."""
    if config.worker.threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(config.worker.threads))


def _routes(config: Config) -> RouteTable:
    path = config.routes_path
    if path is None:
        raise ConfigError("[routes] source names no file")
    table = load_routes(path, config.fleet.name)
    if not table.of_pool(config.worker.pool):
        raise ConfigError(f"{path}: no route belongs to pool {config.worker.pool!r}")
    for route in table.of_pool(config.worker.pool):
        if route.order != "none":
            raise ConfigError(f'{path}: route {route.name}: order = "{route.order}" does not exist yet')
    return table


def _run(config: Config, table: RouteTable, until_idle: float | None) -> None:
    from inferfleet.brokers.kafka_intake import KafkaIntake, KafkaIntakeOptions
    from inferfleet.brokers.kafka_outlet import KafkaOutlet, producer_properties
    from inferfleet.telemetry.admin import AdminServer
    from inferfleet.worker.clock import SystemClock
    from inferfleet.worker.engine import News
    from inferfleet.worker.lifecycle import Adapters, Worker

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    news: SimpleQueue[News] = SimpleQueue()
    metrics = PrometheusMetrics(__version__, config.worker_id)
    client = kafka_client_config(config)
    largest = max(config.limits.max_result_bytes, config.limits.max_request_bytes) + 131_072
    start = config.kafka.start_timestamp_ms
    adapters = Adapters(
        intake=KafkaIntake(
            KafkaIntakeOptions(
                config.group,
                client,
                config.kafka.start if start is None else start,
                config.kafka.group_protocol,
                config.kafka.session_timeout_ms,
                config.worker_id if config.kafka.static_membership else None,
                config.kafka.consumer,
            )
        ),
        outlet=KafkaOutlet(producer_properties(client, config.kafka.producer, largest)),
        results=_results(config, table, news, metrics),
        models=RepositoryModels(config),
        metrics=metrics,
        clock=SystemClock(),
        news=news,
        read_routes=lambda: _routes(config),
    )
    running = Worker(config, adapters)
    _on_signals(running, config.worker.drain_timeout_s)
    with AdminServer(config.worker.admin_address, metrics.registry, running.health, running.status) as admin:
        log.info("worker_started", worker=config.worker_id, version=__version__, admin=admin.address)
        running.run(until_idle)


def _results(
    config: Config, table: RouteTable, news: SimpleQueue[Any], metrics: PrometheusMetrics
) -> ResultOutlet | None:
    """Return the Redis outlet if any route keeps results there, or clients may wait on reply streams."""
    routes = table.of_pool(config.worker.pool)
    if not any(result.kind == "redis" for route in routes for result in route.results):
        return None
    from inferfleet.redis_access import open_redis, place_of
    from inferfleet.results.redis import OutletOptions, RedisResults

    place = replace(place_of(config), client_name=config.worker_id)
    return RedisResults(
        lambda: open_redis(place),
        config.fleet.name,
        wake=lambda: news.put(None),
        stood=metrics.redeliveries,
        # Keys of one atomic step share a slot on a cluster, so there each row is a step.
        options=OutletOptions(rows_per_step=1) if place.mode == "cluster" else None,
    )


def _on_signals(running: Worker, drain_timeout_s: float) -> None:
    """Stop on the first SIGTERM or SIGINT; end the process on a second one, or when the drain takes too long.

    The loop's thread may sit in a call to a broker that does not answer, so signals are heard on a thread of
    their own. Ending without the rest is safe: what has no confirmed outcome is taken again.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _heard)

    def obey(keep: socket.socket = told) -> None:
        del keep
        heard.recv(1)
        running.stop()
        heard.settimeout(drain_timeout_s)
        try:
            (number,) = heard.recv(1)
        except TimeoutError:
            log.warning("drain_cut_short", drain_timeout_s=drain_timeout_s)
            os._exit(0)
        os._exit(128 + number)

    threading.Thread(target=obey, name="signals", daemon=True).start()


def _heard(number: int, frame: FrameType | None) -> None:
    """Take the place of the default action; the wake-up socket has the number already."""


def _wait_for_kafka(config: Config) -> None:
    """Wait for Kafka, bounded.

    Raises BrokerError: an authentication failure at once, an absent broker after ``START_PATIENCE_S``.
    """
    from confluent_kafka import Consumer, KafkaError, KafkaException

    refused: list[KafkaError] = []

    def noticed(error: KafkaError) -> None:
        if error.code() in (
            KafkaError._AUTHENTICATION,
            KafkaError.SASL_AUTHENTICATION_FAILED,
            KafkaError._SSL,
        ):
            refused.append(error)

    from inferfleet.brokers.kafka_problems import silent_logger

    properties = {**kafka_client_config(config), "group.id": config.group, "error_cb": noticed}
    consumer = Consumer(properties, logger=silent_logger())
    try:
        deadline = time.monotonic() + START_PATIENCE_S
        told = False
        while True:
            try:
                consumer.poll(0)
                consumer.list_topics(timeout=3)
                break
            except KafkaException as error:
                consumer.poll(0)
                where = config.kafka.bootstrap_servers
                if refused:
                    raise BrokerError(f"kafka at {where} refuses us: {refused[0].str()}") from None
                if time.monotonic() > deadline:
                    raise BrokerError(
                        f"kafka at {where} does not answer ([kafka] bootstrap_servers): {error.args[0].str()}"
                    ) from None
                if not told:
                    log.warning("waiting_for_kafka", bootstrap_servers=where, error=error.args[0].str())
                    told = True
    finally:
        consumer.close()


def _check_topics(config: Config, table: RouteTable) -> None:
    """Raise BrokerError for the first topic that is missing or that this worker has no right on."""
    from inferfleet.cli.kafka import Cluster

    needed = _topics(config, table)
    cluster = Cluster(config)
    try:
        standing = cluster.topics()
        for topic, found in cluster.describe_topics(list(needed)).items():
            use, right = needed[topic]
            if found.problem and topic not in standing:
                raise BrokerError(
                    f"topic {topic} ({use}): {found.problem}; "
                    "`inferfleet topics plan` prints what the routes need"
                )
            if found.rights and not found.rights & {right, "ALL"}:
                raise BrokerError(
                    f"topic {topic} ({use}): this user has no {right} right on it; "
                    "`inferfleet topics plan --format acls` prints the rights"
                )
    finally:
        cluster.close()


def _topics(config: Config, table: RouteTable) -> dict[str, tuple[str, str]]:
    """Return what each topic is for, and the right that it needs."""
    from inferfleet.config import dead_letter_topic

    topics: dict[str, tuple[str, str]] = {}
    for route in table.of_pool(config.worker.pool):
        topics[route.source.name] = (f"source of route {route.name}", "READ")
        for result in route.results:
            if result.kind == "kafka":
                topics[result.name] = (f"results of route {route.name}", "WRITE")
        topics[dead_letter_topic(config, route.source.name)] = (
            f"dead letters of route {route.name}",
            "WRITE",
        )
    return topics
