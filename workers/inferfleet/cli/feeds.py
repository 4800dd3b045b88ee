"""Opens the feeds that rollouts read labels from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import ConfigError

if TYPE_CHECKING:
    from inferfleet.control_ports import LabelFeed
    from inferfleet.feedback import Sought


def label_feeds(config: Config) -> Callable[[Sought], LabelFeed]:
    """Return what opens a feed on the Kafka of these settings; it raises ConfigError for any other place.

    The consumer group's name is ``<fleet>.coordinator.<rollout>``; nothing is committed under it.
    """

    def open_feed(sought: Sought) -> LabelFeed:
        for place in (sought.source, sought.answers):
            if place.kind != "kafka":
                raise ConfigError(f"labels and answers are read from Kafka topics, not from {place}")
        from inferfleet.brokers.kafka_feedback import KafkaFeedback

        group = f"{config.fleet.name}.coordinator.{sought.reader}"
        return KafkaFeedback(kafka_client_config(config), group, sought)

    return open_feed
