"""Labels and outcomes of one route, read from Kafka from a rollout's start on.

Partitions are assigned by hand and nothing is committed: every coordinator that takes over reads all of it
again, and no group has to be agreed on. Positions live here only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from inferfleet.brokers.kafka_problems import Problems, silent_logger
from inferfleet.feedback import Feedback, Sought
from inferfleet.wire.feedback import AnswerReader, read_label

log = structlog.get_logger(__name__)

ASK_S = 1.0
"""How long the broker is waited for where partitions are looked up; the leader has more to do than this."""
AGAIN_S = 10.0
LOOK_S = 30.0
AT_ONCE = 500

Part = tuple[str, int]


class KafkaFeedback:
    """Implements :class:`~inferfleet.control_ports.LabelFeed` on two topics of one cluster.

    ``client`` holds librdkafka properties; ``group`` is only a name, for rights and logs.
    """

    def __init__(
        self,
        client: Mapping[str, Any],
        group: str,
        sought: Sought,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sought = sought
        self._clock = clock
        self._reader = AnswerReader(sought)
        self._problems = Problems(clock)
        properties = {
            **client,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "queued.max.messages.kbytes": 16_384,
            "error_cb": self._problems.tell,
        }
        self._consumer = Consumer(properties, logger=silent_logger())
        self._topics = {sought.source.name, sought.answers.name}
        self._at: dict[Part, int] = {}
        self._ended: set[Part] = set()
        self._ends: dict[Part, int] = {}
        self._look_at = clock()
        self._stale = "the partitions have not been looked up yet"
        self._closed = False

    @property
    def stale(self) -> str:
        """Why nothing can be read now; empty while it can."""
        return self._stale

    def poll(self, most: int = 20_000) -> Feedback:
        """Return what has come, at most ``most`` messages; waits for partitions only, within a bound.

        It has caught up where each partition was read to its end, or to where its end was at the last poll:
        topics that are written to all the time are never at their ends all at once.
        """
        found = Feedback([], [], caught_up=False)
        if self._closed:
            return found
        if self._clock() >= self._look_at:
            self._look()
        read, unread = 0, 0
        while read < most and self._at:
            try:
                messages = self._consumer.consume(AT_ONCE, 0 if read else 0.05)
            except KafkaException as error:
                self._stale = f"Kafka: {error.args[0].str()}"
                break
            unread += sum(self._take(message, found) for message in messages)
            read += len(messages)
            if not messages:
                break
        caught_up = bool(self._at) and all(self._is_read(part, at) for part, at in self._at.items())
        self._ends = {part: self._end_of(part) for part in self._at}
        return found._replace(caught_up=caught_up, unread=unread)

    def _is_read(self, part: Part, at: int) -> bool:
        return part in self._ended or 0 <= self._ends.get(part, -1) <= at

    def _end_of(self, part: Part) -> int:
        """Return the end of a partition as the last fetch has told it, without asking; -1 before one has."""
        known = self._consumer.get_watermark_offsets(TopicPartition(*part), cached=True)
        return -1 if known is None or known[1] is None else int(known[1])

    def _take(self, message: Message, found: Feedback) -> bool:
        """Put one message where it belongs; say whether it should have been a label and is none."""
        topic, partition, offset = message.topic() or "", message.partition() or 0, message.offset() or 0
        error = message.error()
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                self._ended.add((topic, partition))
            else:
                self._problems.tell(error)
            return False
        self._at[topic, partition] = offset + 1
        self._ended.discard((topic, partition))
        at_ms, body, headers = message.timestamp()[1], message.value() or b"", message.headers()
        if topic == self._sought.answers.name:
            answered = self._reader.read(message.key(), headers, body, at_ms)
            if answered is not None:
                found.answers.append(answered)
        if topic != self._sought.source.name:
            return False
        label = read_label(body, headers, at_ms)
        if label is not None:
            found.labels.append(label)
        return label is None

    def _look(self) -> None:
        """Assign partitions that are not read yet, from the rollout's start on."""
        now = self._clock()
        try:
            fresh = self._fresh()
        except KafkaException as error:
            self._stale = f"Kafka: {error.args[0].str()}"
            self._look_at = now + AGAIN_S
            return
        self._look_at = now + LOOK_S
        if fresh:
            self._at |= fresh
            self._consumer.assign([TopicPartition(*part, offset) for part, offset in self._at.items()])
            log.info("feedback_assigned", reader=self._sought.reader, partition_count=len(self._at))
        missing = sorted(self._topics - {topic for topic, _ in self._at})
        self._stale = f"topic {missing[0]} does not exist or may not be read" if missing else ""
        if missing:
            self._look_at = now + AGAIN_S

    def _fresh(self) -> dict[Part, int]:
        """Return partitions that are not read yet, each with the first offset that matters."""
        parts: list[TopicPartition] = []
        for topic in sorted(self._topics):
            known = self._consumer.list_topics(topic, timeout=ASK_S).topics.get(topic)
            numbers = known.partitions if known is not None and known.error is None else ()
            fresh = (number for number in numbers if (topic, number) not in self._at)
            parts += [TopicPartition(topic, number, max(0, self._sought.since_ms)) for number in fresh]
        if not parts:
            return {}
        starts: dict[Part, int] = {}
        for found in self._consumer.offsets_for_times(parts, timeout=ASK_S):
            if found.error is not None:
                raise KafkaException(found.error)
            offset = found.offset
            if offset == OFFSET_END or offset < 0:
                # Nothing is as young as that: what comes from now on is.
                part = TopicPartition(found.topic, found.partition)
                offset = self._consumer.get_watermark_offsets(part, timeout=ASK_S)[1]
            starts[found.topic, found.partition] = offset
        return starts

    def close(self) -> None:
        """Leave; twice is fine."""
        if not self._closed:
            self._closed = True
            self._consumer.close()
