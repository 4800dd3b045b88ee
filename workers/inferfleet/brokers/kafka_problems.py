"""What librdkafka complains about: once per kind and outage, by callbacks, never by lines of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import structlog
from confluent_kafka import KafkaError

log = structlog.get_logger(__name__)

AGAIN_AFTER_S = 30.0


class Problems:
    """Logs ``kafka_problem``; the same kind again only after ``AGAIN_AFTER_S`` or once all was well.

    The texts of one outage differ (attempt counts, addresses), so the error's name is what is compared.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at: dict[str, float] = {}

    def __bool__(self) -> bool:
        """Whether anything was told since all was well."""
        return bool(self._told_at)

    def tell(self, error: KafkaError) -> None:
        """Log the error unless its kind was told a moment ago."""
        name, now = error.name(), self._clock()
        told_at = self._told_at.get(name)
        if told_at is None or now - told_at >= AGAIN_AFTER_S:
            self._told_at[name] = now
            log.warning("kafka_problem", error=error.str(), code=name, fatal=error.fatal())

    def over(self) -> None:
        """All is well: the next problem is news."""
        self._told_at.clear()


def silent_logger() -> logging.Logger:
    """Return a logger for librdkafka's own lines: errors reach us through callbacks."""
    logger = logging.getLogger("inferfleet.librdkafka")
    logger.setLevel(logging.CRITICAL)
    return logger
