"""Publishing envelopes to Kafka: every record is confirmed or refused, by its delivery report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from inferfleet.brokers.kafka_intake import silent_logger
from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Envelopes

log = structlog.get_logger(__name__)

_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE}
_DENIED = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}


def producer_properties(
    client: Mapping[str, Any], overrides: Mapping[str, Any], max_message_bytes: int
) -> dict[str, Any]:
    """Return the producer's librdkafka properties: idempotent, acknowledged by all, Java's partitioner."""
    return {
        **client,
        "linger.ms": 1,
        "queue.buffering.max.messages": 1_000_000,
        "message.max.bytes": max_message_bytes,
        "message.timeout.ms": 60_000,
        "reconnect.backoff.max.ms": 1_000,
        "topic.metadata.propagation.max.ms": 5_000,
        **overrides,
        "partitioner": "murmur2_random",
        "enable.idempotence": True,
    }


class _Group:
    """One published column set; its bound method is the delivery callback of all its records.

    Reports are counted here and told to the receipt once, when the last one is in: nothing smaller than
    the group can be settled.
    """

    __slots__ = ("envelopes", "left", "matched", "outlet", "receipt", "refused", "sent")

    def __init__(self, envelopes: Envelopes, receipt: Receipt, outlet: KafkaOutlet) -> None:
        self.envelopes = envelopes
        self.receipt = receipt
        self.outlet = outlet
        self.left = len(envelopes)
        self.sent = 0
        self.refused = 0
        self.matched: set[int] = set()

    def delivered(self, error: KafkaError | None, message: Message) -> None:
        """Count one delivery report; find the record only where it failed."""
        if error is not None:
            self.refuse(self._index(message), error)
            return
        self.left -= 1
        if not self.left:
            self.finish()

    def refuse(self, index: int, error: KafkaError) -> None:
        """Record ``index`` was not accepted."""
        self.matched.add(index)
        self.refused += 1
        self.left -= 1
        self.receipt.refused(index, _refusal(error))
        if not self.left:
            self.finish()

    def finish(self) -> None:
        """Every record has its report."""
        count = len(self.envelopes)
        self.outlet._pending -= count
        if count > self.refused:
            self.receipt.confirmed(count - self.refused)

    def _index(self, message: Message) -> int:
        """Return which record a failed report is about: equal ones are interchangeable."""
        key, value = message.key(), message.value()
        for index in range(len(self.envelopes)):
            if (
                index not in self.matched
                and self.envelopes.values[index] == value
                and self.envelopes.keys[index] == key
            ):
                return index
        raise LookupError(f"a delivery report for {message.topic()} matches nothing that was published")


class KafkaOutlet:
    """Implements :class:`~inferfleet.ports.Outlet` on a confluent-kafka producer."""

    def __init__(self, properties: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._properties = {**properties, "error_cb": self._on_error}
        self._clock = clock
        self._fatal: str | None = None
        self._producer = Producer(self._properties, logger=silent_logger())
        self._pending = 0
        self._waiting: deque[_Group] = deque()
        self.problem: str | None = None

    def __repr__(self) -> str:
        return f"KafkaOutlet(pending={self._pending}, waiting={len(self._waiting)})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand the records to the client; what its full queue refuses follows in later polls."""
        self._pending += len(envelopes)
        group = _Group(envelopes, receipt, self)
        if self._waiting or not self._send(group):
            self._waiting.append(group)

    def _send(self, group: _Group) -> bool:
        """Hand over what is left of ``group``; return whether the client's queue took all of it."""
        envelopes = group.envelopes
        topic, produce, callback = envelopes.destination, self._producer.produce, group.delivered
        keys, values, headers = envelopes.keys, envelopes.values, envelopes.headers
        sent = group.sent
        while sent < len(values):
            at = sent
            try:
                for at in range(sent, len(values)):
                    produce(topic, values[at], keys[at], -1, callback, None, 0, headers[at])
                sent = len(values)
            except BufferError:
                group.sent = at
                return False
            except KafkaException as error:
                group.refuse(at, error.args[0])
                sent = at + 1
        group.sent = sent
        return True

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Serve delivery reports, then send what waits for room."""
        self._producer.poll(max_wait_s)
        if self._fatal is not None:
            self._rebuild()
        while self._waiting and self._send(self._waiting[0]):
            self._waiting.popleft()

    def _rebuild(self) -> None:
        """Replace a producer that can never send again; its unsent records are refused with LATER."""
        log.error("producer_replaced", error=self._fatal)
        self._fatal = None
        old = self._producer
        self._producer = Producer(self._properties, logger=silent_logger())
        old.purge()
        old.flush(1.0)

    def pending(self) -> int:
        """Return how many records are neither confirmed nor refused."""
        return self._pending

    def close(self, timeout_s: float) -> int:
        """Flush within ``timeout_s``."""
        until = self._clock() + timeout_s
        while self._pending and (left := until - self._clock()) > 0:
            self.poll(min(left, 0.05))
        return self._pending

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error.str()
        text = error.str()
        if text != self.problem:
            log.warning("kafka_problem", error=text, code=error.name(), fatal=error.fatal())
            self.problem = text


def _refusal(error: KafkaError) -> Refusal:
    code = error.code()
    if code in _TOO_LARGE:
        return Refusal(RefusalKind.TOO_LARGE, error.str())
    if code in _DENIED:
        return Refusal(RefusalKind.DENIED, error.str())
    return Refusal(RefusalKind.LATER, error.str())
