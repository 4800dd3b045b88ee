"""What a worker makes sure of before it loads anything: its brokers answer, its routes find all of theirs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from inferfleet.cli.topology import needs, uses_kafka, uses_rabbitmq
from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import BrokerError
from inferfleet.patience import Patience
from inferfleet.routes import Route

log = structlog.get_logger(__name__)


def wait_for_all(config: Config, routes: Sequence[Route], patience: Patience) -> None:
    """Wait for the brokers that the routes name and for all that they need there; bounded.

    With ``--wait`` also for topics, queues and model versions that do not stand yet; not for versions of
    routes in the control plane, where a missing one holds up its own route and no other. Raises the first
    BrokerError, or with ``--wait`` ModelRepositoryError, that is left when the patience has ended.
    """
    if uses_kafka(routes):
        wait_for_kafka(config, patience.server_s)
        patience.until("waiting_for_topics", lambda: check_topics(config, routes))
    if uses_rabbitmq(routes):
        patience.until("waiting_for_queues", lambda: check_rabbitmq(config, routes, patience.server_s))
    if patience.given and config.routes.source != "fleet":
        patience.until("waiting_for_models", lambda: look_for_models(config, routes))


def look_for_models(config: Config, routes: Sequence[Route]) -> None:
    """Raise ModelRepositoryError for the first version of the routes that is not in the repository."""
    from inferfleet.models.repository import Repository

    repository = Repository(config.models_path, config.models.trusted)
    for model, version in dict.fromkeys((route.model, each) for route in routes for each in route.versions):
        repository.look(model, version)


def wait_for_kafka(config: Config, patience_s: float) -> None:
    """Wait for Kafka, bounded.

    Raises BrokerError: an authentication failure at once, an absent broker after ``patience_s`` seconds.
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
        deadline = time.monotonic() + patience_s
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


def check_topics(config: Config, routes: Sequence[Route]) -> None:
    """Raise BrokerError for the first topic that is missing or that this worker has no right on."""
    from inferfleet.cli.kafka import Cluster

    needed = {need.name: need for need in needs(config, routes) if need.broker == "kafka"}
    cluster = Cluster(config)
    try:
        standing = cluster.topics()
        for topic, found in cluster.describe_topics(list(needed)).items():
            use, access = needed[topic].use, needed[topic].access
            if found.problem and topic not in standing:
                raise BrokerError(
                    f"topic {topic} ({use}): {found.problem}; "
                    "`inferfleet topics plan` prints what the routes need"
                )
            for right in sorted(access) if found.rights else ():
                if not found.rights & {right, "ALL"}:
                    raise BrokerError(
                        f"topic {topic} ({use}): this user has no {right} right on it; "
                        "`inferfleet topics plan --format acls` prints the rights"
                    )
    finally:
        cluster.close()


def check_rabbitmq(config: Config, routes: Sequence[Route], patience_s: float) -> None:
    """Wait for RabbitMQ, bounded, and look at all that the routes need there.

    Raises BrokerError: a refused login at once, an absent broker after ``patience_s`` seconds, then the first
    thing that is missing, of another kind, or forbidden.
    """
    from inferfleet.cli.rabbitmq import RabbitCluster

    def waiting(error: BrokerError) -> None:
        log.warning("waiting_for_rabbitmq", error=str(error))

    cluster = RabbitCluster(config)
    cluster.open(patience_s, waiting)
    try:
        cluster.check(needs(config, routes))
    finally:
        cluster.close()
