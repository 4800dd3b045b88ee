"""Publishing envelopes to Kafka: every record is confirmed or refused.

A delivery report for each record that went well costs as much as the record's headers. So there are two
producers, the *hands*: one is filled while the other drains. Both report failures only; when a draining
hand has nothing left in its queue, everything that was handed to it has been acknowledged or has failed by
a report of its own, and its groups are settled at once. Then the hands change places.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from inferfleet.brokers.kafka_problems import Problems, silent_logger
from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Envelopes

log = structlog.get_logger(__name__)

REPLACED_AFTER_S = 2.0
"""How long a producer that can never send again stays before a new one tries."""
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
    """One published column set; nothing smaller than the group can be settled."""

    __slots__ = ("envelopes", "left", "outlet", "receipt", "refused", "sent")

    def __init__(self, envelopes: Envelopes, receipt: Receipt, outlet: KafkaOutlet) -> None:
        self.envelopes = envelopes
        self.receipt = receipt
        self.outlet = outlet
        self.left = 1  # the hand that carries the group; then one for each record that is sent alone
        self.sent = 0
        self.refused: set[int] = set()

    def delivered_alone(self, index: int, error: KafkaError | None, message: Message) -> None:
        """Hear of record ``index``, which was sent in a batch of its own."""
        del message
        if error is not None:
            self.refuse(index, error)
        self.one_less()

    def refuse(self, index: int, error: KafkaError) -> None:
        """Record ``index`` was not accepted."""
        self.refused.add(index)
        self.receipt.refused(index, _refusal(error))

    def drained(self, failed: list[Failed]) -> None:
        """The hand is empty: deal with the records that failed, then confirm the rest."""
        for index, error in self._failed_records(failed).items():
            if error.code() in _TOO_LARGE:
                # The broker refuses a batch as a whole, so this record may be a large one's neighbour.
                self.left += 1
                self.outlet.send_alone(self, index)
            else:
                self.refuse(index, error)
        self.one_less()

    def one_less(self) -> None:
        """One of the things that the group waits for has come."""
        self.left -= 1
        if self.left:
            return
        count = len(self.envelopes)
        self.outlet._pending -= count
        if count > len(self.refused):
            self.receipt.confirmed(count - len(self.refused))

    def _failed_records(self, failed: list[Failed]) -> dict[int, KafkaError]:
        """Return the records that the failed reports are about.

        A report carries topic, key and value, no headers and no index. Where only some of several records
        with equal key and value have failed, all of them count as failed: one too many repeats, none is lost.
        """
        topic, envelopes = self.envelopes.destination, self.envelopes
        errors = {(key, value): error for where, key, value, error in failed if where == topic}
        if not errors:
            return {}
        return {
            index: errors[record]
            for index, record in enumerate(zip(envelopes.keys, envelopes.values, strict=True))
            if index not in self.refused and record in errors
        }


Failed = tuple[str, bytes | None, bytes | None, KafkaError]
"""Topic, key, value and error of a record that was not delivered."""


class _Hand:
    """A producer that reports failures only, and what was handed to it since it was last empty."""

    def __init__(
        self,
        properties: Mapping[str, Any],
        problem: Callable[[KafkaError], None],
        clock: Callable[[], float],
    ) -> None:
        self._properties = {
            **properties,
            "delivery.report.only.error": True,
            "on_delivery": self._failed,
            "error_cb": problem,
        }
        self._problem = problem
        self._clock = clock
        self._fatal: KafkaError | None = None
        self._replaced_at = 0.0
        self._failures: list[Failed] = []
        self.groups: list[_Group] = []
        self.producer = Producer(self._properties, logger=silent_logger())

    def send(self, group: _Group) -> bool:
        """Take what is left of ``group``; return whether the client's queue had room for all of it."""
        envelopes = group.envelopes
        topic, produce = envelopes.destination, self.producer.produce
        keys, values, headers = envelopes.keys, envelopes.values, envelopes.headers
        sent = group.sent
        if not self.groups or self.groups[-1] is not group:  # it may wait for room more than once
            self.groups.append(group)
        while sent < len(values):
            at = sent
            try:
                for at in range(sent, len(values)):
                    produce(topic, values[at], keys[at], -1, None, None, 0, headers[at])
                sent = len(values)
            except BufferError:
                group.sent = at
                return False
            except KafkaException as error:
                group.refuse(at, self._fatal or error.args[0])
                sent = at + 1
        group.sent = sent
        return True

    def poll(self, max_wait_s: float) -> None:
        """Hear of failures; a producer that can never send again is replaced after a pause.

        Meanwhile it refuses everything, so that its routes wait and say why.
        """
        try:
            self.producer.poll(max_wait_s)
        except KafkaException as error:
            # The client raises what is fatal instead of telling the error callback.
            if not error.args[0].fatal():
                raise
            self._died(error.args[0])
        # Not before the dead one has told all it knows: what it holds would count as acknowledged.
        if self._fatal is not None and self._clock() >= self._replaced_at and not len(self.producer):
            log.info("producer_replaced", error=self._fatal.str())
            self._fatal = None
            self.producer = Producer(self._properties, logger=silent_logger())

    def _died(self, error: KafkaError) -> None:
        self._fatal = error
        self._replaced_at = self._clock() + REPLACED_AFTER_S
        self._problem(error)
        _give_up(self.producer)

    def settle(self) -> None:
        """Settle all groups if nothing of them is left in the client's queue."""
        if self.groups and not len(self.producer):
            groups, self.groups = self.groups, []
            failures, self._failures = self._failures, []
            for group in groups:
                group.drained(failures)

    def _failed(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            told = self._fatal or error
            self._failures.append((message.topic(), message.key(), message.value(), told))


class KafkaOutlet:
    """Implements :class:`~inferfleet.ports.Outlet` on confluent-kafka producers."""

    def __init__(self, properties: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._problems = Problems(clock)
        self._properties = {**properties, "error_cb": self._problems.tell}
        self._clock = clock
        self._filling = _Hand(properties, self._problems.tell, clock)
        self._draining = _Hand(properties, self._problems.tell, clock)
        self._alone: Producer | None = None
        self._pending = 0
        self._waiting: deque[_Group] = deque()
        self._waiting_alone: deque[tuple[_Group, int]] = deque()

    def __repr__(self) -> str:
        return f"KafkaOutlet(pending={self._pending}, waiting={len(self._waiting)})"

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand the records to the client; what its full queue refuses follows in later polls."""
        self._pending += len(envelopes)
        group = _Group(envelopes, receipt, self)
        if self._waiting or not self._filling.send(group):
            self._waiting.append(group)

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
            group.refuse(index, error.args[0])
            group.one_less()

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Settle what has been acknowledged, then send what waits for room."""
        self._filling.poll(0)
        self._draining.poll(max_wait_s)
        self._poll_alone()
        self._draining.settle()
        while self._waiting and self._filling.send(self._waiting[0]):
            self._waiting.popleft()
        # A group that is only half handed over keeps its hand, so that one hand answers for all of it.
        if self._filling.groups and not self._draining.groups and not self._waiting:
            self._filling, self._draining = self._draining, self._filling
        for _ in range(len(self._waiting_alone)):
            self.send_alone(*self._waiting_alone.popleft())

    def pending(self) -> int:
        """Return how many records are neither confirmed nor refused."""
        return self._pending

    def close(self, timeout_s: float) -> int:
        """Flush within ``timeout_s``."""
        until = self._clock() + timeout_s
        while self._pending and (left := until - self._clock()) > 0:
            self.poll(min(left, 0.05))
        return self._pending

    def _poll_alone(self) -> None:
        if self._alone is None:
            return
        try:
            self._alone.poll(0)
        except KafkaException as error:
            if not error.args[0].fatal():
                raise
            self._problems.tell(error.args[0])
            alone, self._alone = self._alone, None
            _give_up(alone)


def _give_up(producer: Producer) -> None:
    """Let everything that a dead producer holds fail now."""
    producer.purge()
    with contextlib.suppress(KafkaException):  # it is dead, and was heard
        producer.flush(1.0)


def _refusal(error: KafkaError) -> Refusal:
    code = error.code()
    if code in _TOO_LARGE:
        return Refusal(RefusalKind.TOO_LARGE, error.str())
    if code in _DENIED:
        return Refusal(RefusalKind.DENIED, error.str())
    return Refusal(RefusalKind.LATER, error.str())
