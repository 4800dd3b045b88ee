"""Where a detached shadow reads what the primary of its route answers."""

from __future__ import annotations

from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import ConfigError
from inferfleet.ports import OutcomeFeed
from inferfleet.routes import Route


def open_outcomes(config: Config, primary: Route) -> OutcomeFeed:
    """Return the outcomes of a route: from its Kafka topic, else from Redis.

    Raises :class:`~inferfleet.errors.ConfigError` for a route that has its results in neither.
    """
    for result in primary.results:
        if result.kind == "kafka":
            from inferfleet.brokers.kafka_outcomes import KafkaOutcomes

            return KafkaOutcomes(kafka_client_config(config), f"{config.group}.outcomes", result.name)
    if any(result.kind == "redis" for result in primary.results):
        from inferfleet.redis_access import open_redis, place_of
        from inferfleet.results.outcomes import RedisOutcomes

        place = place_of(config)
        return RedisOutcomes(lambda: open_redis(place), config.fleet.name, primary.name)
    raise ConfigError(
        f"route {primary.name} has its results neither in a Kafka topic nor in Redis: "
        "a detached shadow finds nothing to compare with"
    )
