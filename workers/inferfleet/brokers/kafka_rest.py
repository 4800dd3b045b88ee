"""Whether anything is left of some topics: taken to the end here, settled to the end elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition

from inferfleet.brokers.kafka_problems import silent_logger


class Rest:
    """Asks the broker on behalf of one member; ``properties`` are its consumer's, without callbacks."""

    def __init__(
        self,
        consumer: Consumer,
        properties: Mapping[str, Any],
        from_start: bool,
        clock: Callable[[], float],
    ) -> None:
        self._consumer = consumer
        self._properties = {**properties, "enable.partition.eof": True}
        self._from_start = from_start
        self._clock = clock

    def empty(self, topics: Collection[str], assigned: Collection[tuple[str, int]], timeout_s: float) -> bool:
        """Return whether nothing is left; each question waits up to ``timeout_s``. Raises KafkaException.

        A member that died still holds its partitions for a while: what is left there is ours in a moment.
        """
        elsewhere: list[TopicPartition] = []
        for topic in topics:
            for number in self._consumer.list_topics(topic, timeout=timeout_s).topics[topic].partitions:
                ours = (topic, number) in assigned
                left = self._left(topic, number, ours, timeout_s)
                if left is not None and ours:
                    return False
                if left is not None:
                    elsewhere.append(left)
        return not elsewhere or not self._hold_records(elsewhere, timeout_s)

    def _left(self, topic: str, number: int, ours: bool, timeout_s: float) -> TopicPartition | None:
        """Return where the rest of a partition begins; ``None`` if there is no rest."""
        partition = TopicPartition(topic, number)
        low, high = self._consumer.get_watermark_offsets(partition, timeout=timeout_s)
        position = self._consumer.position([partition])[0].offset if ours else -1
        if position < 0 and low < high:
            position = self._consumer.committed([partition], timeout=timeout_s)[0].offset
        if position < 0:
            position = low if self._from_start else high
        return TopicPartition(topic, number, position) if position < high else None

    def _hold_records(self, partitions: list[TopicPartition], timeout_s: float) -> bool:
        """Whether records stand there: a transaction leaves an offset without one, which nobody settles."""
        consumer = Consumer(self._properties, logger=silent_logger())
        until = self._clock() + timeout_s
        ends = 0
        try:
            consumer.assign(partitions)
            while ends < len(partitions) and self._clock() < until:
                message = consumer.poll(0.1)
                if message is not None and message.error() is None:
                    return True
                if message is not None and message.error().code() == KafkaError._PARTITION_EOF:
                    ends += 1
        finally:
            consumer.close()
        return ends < len(partitions)
