"""What a worker makes sure of before it loads anything: its brokers answer, its routes find all of theirs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from inferfleet.cli.topology import needs
from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import BrokerError
from inferfleet.routes import Route

log = structlog.get_logger(__name__)

START_PATIENCE_S = 60.0


def wait_for_kafka(config: Config) -> None:
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


def check_rabbitmq(config: Config, routes: Sequence[Route]) -> None:
    """Wait for RabbitMQ, bounded, and look at all that the routes need there.

    Raises BrokerError: a refused login at once, an absent broker after ``START_PATIENCE_S``, then the first
    thing that is missing, of another kind, or forbidden.
    """
    from inferfleet.cli.rabbitmq import RabbitCluster

    def waiting(error: BrokerError) -> None:
        log.warning("waiting_for_rabbitmq", error=str(error))

    cluster = RabbitCluster(config)
    cluster.open(START_PATIENCE_S, waiting)
    try:
        cluster.check(needs(config, routes))
    finally:
        cluster.close()
