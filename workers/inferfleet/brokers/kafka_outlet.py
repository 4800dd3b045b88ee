"""Publishing envelopes to Kafka: every record is confirmed or refused, by its delivery report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
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
        "linger.ms": 5,
        "batch.size": 1_000_000,
        "batch.num.messages": 100_000,
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

    __slots__ = ("envelopes", "failed", "left", "outlet", "receipt", "refused", "sent")

    def __init__(self, envelopes: Envelopes, receipt: Receipt, outlet: KafkaOutlet) -> None:
        self.envelopes = envelopes
        self.receipt = receipt
        self.outlet = outlet
        self.left = len(envelopes)
        self.sent = 0
        self.refused: set[int] = set()
        self.failed: list[tuple[bytes | None, bytes | None, KafkaError]] = []

    def delivered(self, error: KafkaError | None, message: Message) -> None:
        """Count one delivery report; which record a failed one is about is found at the end."""
        if error is not None:
            self.failed.append((message.key(), message.value(), error))
        self.left -= 1
        if not self.left:
            self.finish()

    def delivered_alone(self, index: int, error: KafkaError | None, message: Message) -> None:
        """Count the report of record ``index``, which was sent in a batch of its own."""
        del message
        if error is not None:
            self.refuse(index, error)
        self.left -= 1
        if not self.left:
            self.finish()

    def refused_at_once(self, index: int, error: KafkaError) -> None:
        """The client itself does not take record ``index``."""
        self.refuse(index, error)
        self.left -= 1
        if not self.left:
            self.finish()

    def refuse(self, index: int, error: KafkaError) -> None:
        """Record ``index`` was not accepted."""
        self.refused.add(index)
        self.receipt.refused(index, _refusal(error))

    def finish(self) -> None:
        """Every report is in: deal with the failed ones, then confirm the rest."""
        failed, self.failed = self._failed_records(), []
        self.left += 1  # this loop itself: a record that the client refuses at once must not finish the group
        for index, error in failed.items():
            if error.code() in _TOO_LARGE:
                # The broker refuses a batch as a whole, so this record may be a large one's neighbour.
                self.left += 1
                self.outlet.send_alone(self, index)
            else:
                self.refuse(index, error)
        self.left -= 1
        if self.left:
            return
        count = len(self.envelopes)
        self.outlet._pending -= count
        if count > len(self.refused):
            self.receipt.confirmed(count - len(self.refused))

    def _failed_records(self) -> dict[int, KafkaError]:
        """Return the records that the failed reports are about.

        A report carries key and value, no headers and no index. Where only some of several records with
        equal key and value have failed, all of them count as failed: one too many repeats, none is lost.
        """
        if not self.failed:
            return {}
        envelopes = self.envelopes
        places: dict[tuple[bytes | None, bytes | None], list[int]] = {}
        for index, record in enumerate(zip(envelopes.keys, envelopes.values, strict=True)):
            if index not in self.refused:
                places.setdefault(record, []).append(index)
        return {index: error for key, value, error in self.failed for index in places[key, value]}


class KafkaOutlet:
    """Implements :class:`~inferfleet.ports.Outlet` on a confluent-kafka producer."""

    def __init__(self, properties: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._properties = {**properties, "error_cb": self._on_error}
        self._clock = clock
        self._fatal: str | None = None
        self._producer = Producer(self._properties, logger=silent_logger())
        self._alone: Producer | None = None
        self._pending = 0
        self._waiting: deque[_Group] = deque()
        self._waiting_alone: deque[tuple[_Group, int]] = deque()
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
                group.refused_at_once(at, error.args[0])
                sent = at + 1
        group.sent = sent
        return True

    def send_alone(self, group: _Group, index: int) -> None:
        """Send one record in a batch of its own, to learn whether the topic takes it."""
        if self._alone is None:
            topic = group.envelopes.destination
            log.warning(
                "batch_too_large",
                topic=topic,
                mend=f"raise max.message.bytes of {topic}, or lower batch.size under [kafka.producer]",
            )
            self._alone = Producer({**self._properties, "batch.num.messages": 1}, logger=silent_logger())
        envelopes = group.envelopes
        callback = partial(group.delivered_alone, index)
        value, key, headers = envelopes.values[index], envelopes.keys[index], envelopes.headers[index]
        try:
            self._alone.produce(envelopes.destination, value, key, -1, callback, None, 0, headers)
        except BufferError:
            self._waiting_alone.append((group, index))
        except KafkaException as error:
            group.refused_at_once(index, error.args[0])

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Serve delivery reports, then send what waits for room."""
        self._producer.poll(max_wait_s)
        if self._alone is not None:
            self._alone.poll(0)
        if self._fatal is not None:
            self._rebuild()
        while self._waiting and self._send(self._waiting[0]):
            self._waiting.popleft()
        for _ in range(len(self._waiting_alone)):
            self.send_alone(*self._waiting_alone.popleft())

    def _rebuild(self) -> None:
        """Replace a producer that can never send again; its unsent records are refused with LATER."""
        log.error("producer_replaced", error=self._fatal)
        self._fatal = None
        old = [producer for producer in (self._producer, self._alone) if producer is not None]
        self._producer, self._alone = Producer(self._properties, logger=silent_logger()), None
        for producer in old:
            producer.purge()
            producer.flush(1.0)

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
