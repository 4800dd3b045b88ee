"""Puts requests into Kafka topics: an idempotent producer whose failures are never silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from inferfleet.client.outcome import SubmitError
from inferfleet.client.sender import Failed, Failures, Message
from inferfleet.errors import ConfigError


def producer_properties(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return librdkafka properties: nothing doubled, and a missing topic is known in seconds."""
    return {
        "linger.ms": 1,
        "message.timeout.ms": 30_000,
        "topic.metadata.propagation.max.ms": 5_000,
        "reconnect.backoff.max.ms": 1_000,
        "queue.buffering.max.messages": 100_000,
        **given,
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
    }


class KafkaSender:
    """Owns a producer and the thread that hears of deliveries; ``failed`` is called on it.

    Raises ConfigError for properties that librdkafka refuses.
    """

    def __init__(self, properties: Mapping[str, Any], failed: Failed) -> None:
        try:
            # librdkafka's own lines on stderr would break into a program's output; failures are raised.
            self._producer = Producer({**properties, "error_cb": self._noted, "log_level": 0})
        except KafkaException as error:
            raise ConfigError(f"[kafka] client: {error.args[0].str()}") from None
        self._failed = failed
        self._failures = Failures()
        self._last_error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="inferfleet-sender", daemon=True)
        self._thread.start()

    def send(self, message: Message, timeout_s: float = 30.0) -> None:
        """Hand over; waits up to ``timeout_s`` while the producer's queue is full. Raises SubmitError."""
        gives_up_at = time.monotonic() + timeout_s
        while not self.try_send(message):
            if time.monotonic() >= gives_up_at:
                raise SubmitError(
                    f"request {message.id}: the send queue stayed full for {timeout_s:g} s{self._why()}",
                    message.id,
                )
            self._producer.poll(0.05)

    def try_send(self, message: Message) -> bool:
        """Hand over without waiting; false while the queue is full. Raises SubmitError."""
        self._failures.raise_kept()
        try:
            self._producer.produce(
                message.topic,
                value=message.value,
                key=message.key,
                headers=message.headers,
                on_delivery=lambda error, _: self._delivered(message.id, message.topic, error),
            )
        except BufferError:
            return False
        except KafkaException as error:
            text = f"request {message.id}: topic {message.topic} does not take it: {error.args[0].str()}"
            raise SubmitError(text, message.id) from None
        return True

    def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is delivered. Raises SubmitError if something is not."""
        left = self._producer.flush(timeout_s)
        self._failures.raise_kept()
        if left:
            raise SubmitError(f"{left} requests were not delivered within {timeout_s:g} s{self._why()}")

    def close(self, timeout_s: float) -> int:
        """Deliver what is left within ``timeout_s`` and end the thread; return how many stay undelivered."""
        left = int(self._producer.flush(timeout_s))
        if left:
            self._producer.purge()
            self._producer.flush(1.0)
        self._stop.set()
        self._thread.join(2.0)
        return left

    def _poll(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(0.1)

    def _noted(self, error: KafkaError) -> None:
        self._last_error = error.str()

    def _why(self) -> str:
        return f" ({self._last_error})" if self._last_error else ""

    def _delivered(self, request_id: str, topic: str, error: KafkaError | None) -> None:
        if error is None:
            return
        text = f"request {request_id}: topic {topic} did not take it: {error.str()}{self._why()}"
        failure = SubmitError(text, request_id)
        self._failures.add(failure)
        self._failed(request_id, failure)
