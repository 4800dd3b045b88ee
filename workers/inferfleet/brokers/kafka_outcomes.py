"""Outcomes of a route as they are published on Kafka, for a shadow in another pool.

A thread reads every partition of the result topic from about now on, assigned by hand: no group is joined,
nothing is committed, and whoever answers the route does not notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from queue import Empty, Full, Queue
from typing import Any

import structlog
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from inferfleet.brokers.kafka_problems import Problems, silent_logger
from inferfleet.ports import Heard
from inferfleet.records import Header
from inferfleet.wire import headers as names

log = structlog.get_logger(__name__)

AT_ONCE = 500
WAITING = 64
"""Groups of outcomes that wait to be fetched; beyond that the reader falls behind, and that is all."""
LOOK_EVERY_S = 30.0
LOOK_AGAIN_S = 1.0
ASK_S = 5.0
POLL_S = 0.2


class KafkaOutcomes:
    """Implements :class:`~inferfleet.ports.OutcomeFeed`; ``client`` are librdkafka properties."""

    def __init__(self, client: Mapping[str, Any], group: str, topic: str) -> None:
        self._topic = topic
        self._problems = Problems()
        self._properties = {
            **client,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "latest",
            "queued.max.messages.kbytes": 16_384,
            "error_cb": self._problems.tell,
        }
        self._heard: Queue[Heard] = Queue(WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"outcomes-{topic}", daemon=True)
        self._thread.start()

    def ask(self, ids: Sequence[str]) -> None:
        """They come by themselves."""

    def poll(self) -> list[Heard]:
        """Return what has come."""
        found: list[Heard] = []
        try:
            while True:
                found.append(self._heard.get_nowait())
        except Empty:
            return found

    def close(self, *, wait: bool = True) -> None:
        """Stop reading."""
        self._stopping.set()
        if wait:
            self._thread.join(ASK_S + POLL_S)

    def _run(self) -> None:
        consumer = Consumer(self._properties, logger=silent_logger())
        assigned: dict[int, int] = {}
        look_at = 0.0
        try:
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= look_at:
                    look_at = now + (LOOK_EVERY_S if self._look(consumer, assigned) else LOOK_AGAIN_S)
                if not assigned:
                    self._stopping.wait(POLL_S)
                    continue
                self._read(consumer, assigned)
        finally:
            consumer.close()

    def _look(self, consumer: Consumer, assigned: dict[int, int]) -> bool:
        """Assign partitions that are not read yet: the first from their ends, later ones from their start."""
        try:
            known = consumer.list_topics(self._topic, timeout=ASK_S).topics.get(self._topic)
        except KafkaException as error:
            self._problems.tell(error.args[0])
            return False
        if known is None or known.error is not None:
            return False
        fresh = sorted(set(known.partitions) - set(assigned))
        if fresh:
            try:
                starts = {number: 0 if assigned else self._end(consumer, number) for number in fresh}
            except KafkaException as error:
                self._problems.tell(error.args[0])
                return False
            parts = [TopicPartition(self._topic, *each) for each in (*starts.items(), *assigned.items())]
            consumer.assign(parts)
            assigned.update(starts)
            log.info("outcomes_followed", topic=self._topic, partition_count=len(assigned))
        return bool(assigned)

    def _end(self, consumer: Consumer, number: int) -> int:
        """Return where a partition ends now: left to the client, that is found out at some later moment."""
        _, end = consumer.get_watermark_offsets(TopicPartition(self._topic, number), timeout=ASK_S)
        return int(end)

    def _read(self, consumer: Consumer, assigned: dict[int, int]) -> None:
        try:
            messages = consumer.consume(AT_ONCE, POLL_S)
        except KafkaException as error:
            self._problems.tell(error.args[0])
            self._stopping.wait(POLL_S)
            return
        found = Heard([], [], [])
        for message in messages:
            problem = message.error()
            if problem is not None:
                self._problems.tell(problem)
                continue
            assigned[message.partition() or 0] = (message.offset() or 0) + 1
            _take(message, found)
        while found.ids and not self._stopping.is_set():
            try:
                self._heard.put(found, timeout=POLL_S)
            except Full:
                continue
            return


def _take(message: Message, found: Heard) -> None:
    headers: list[Header] = message.headers() or []
    request_id, length = None, None
    for name, value in headers:
        if name == names.ID:
            request_id = value
        elif name == names.JSON_LENGTH:
            length = value
    body = message.value()
    if request_id is None or body is None:
        return
    found.ids.append(request_id.decode("utf-8", "replace"))
    found.bodies.append(body)
    found.json_lengths.append(int(length) if length is not None and length.isdigit() else None)
