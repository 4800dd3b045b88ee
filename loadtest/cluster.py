"""The broker side of a load test: topics, fast filling, and a cheap view of how far a topic has grown."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from loadtest.workloads import Workload

PARTITIONS = 6


class Cluster:
    """A Kafka cluster that topics are made on and measured at; topics made here go with :meth:`close`."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self.admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
        self._observer = self._new_observer()
        self._made: set[str] = set()

    def create(self, label: str, partitions: int = PARTITIONS, retention_bytes: int = -1) -> str:
        """Create a topic with a name of its own and return the name.

        ``retention_bytes`` bounds each partition; -1 keeps everything until the topic is deleted.
        """
        name = f"loadtest.{label}.{uuid.uuid4().hex[:8]}"
        self.create_named(name, partitions, retention_bytes)
        return name

    def create_named(self, name: str, partitions: int = 1, retention_bytes: int = -1) -> None:
        """Create this very topic; return once each partition has a leader."""
        settings = {
            "segment.bytes": str(64 << 20),
            "retention.bytes": str(retention_bytes),
            "file.delete.delay.ms": "1000",
            "max.message.bytes": "4194304",
        }
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=settings)
        self.admin.create_topics([topic])[name].result(30)
        self._made.add(name)
        gives_up_at = time.monotonic() + 30
        while not self._has_leaders(name, partitions):
            if time.monotonic() > gives_up_at:
                raise RuntimeError(f"topic {name} has no leaders after 30 s")
            time.sleep(0.05)

    def create_derived(self, names: Iterable[str]) -> None:
        """Create the topics that belong to a source, of one partition each."""
        for name in names:
            self.create_named(name)

    def _has_leaders(self, topic: str, partitions: int) -> bool:
        try:
            self.ends(topic, partitions)
        except KafkaException:
            # librdkafka 2.16 remembers "unknown partition" for minutes when it was asked a moment too early.
            self._observer.close()
            self._observer = self._new_observer()
            return False
        return True

    def _new_observer(self) -> Consumer:
        return Consumer(
            {"log_level": 0, "bootstrap.servers": self.bootstrap, "group.id": "loadtest-observer"}
        )

    def delete(self, *names: str) -> None:
        """Delete topics that :meth:`create` made; those already gone are not an error."""
        mine = [name for name in names if name in self._made]
        if not mine:
            return
        for name, future in self.admin.delete_topics(mine).items():
            try:
                future.result(30)
            except KafkaException as error:
                if error.args[0].name() != "UNKNOWN_TOPIC_OR_PART":
                    raise
            self._made.discard(name)

    def close(self) -> None:
        """Delete every topic that is left."""
        self.delete(*self._made)
        self._observer.close()

    def ends(self, topic: str, partitions: int = PARTITIONS) -> list[int]:
        """Return each partition's high watermark: 0.3 ms a partition, whatever the topic holds."""
        return [
            self._observer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for number in range(partitions)
        ]

    def fill(self, topic: str, workload: Workload, count: int, seed: int = 1, first: int = 0) -> float:
        """Write requests ``first`` to ``first + count`` round-robin over the partitions; return seconds."""
        producer = Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "linger.ms": 20,
                "batch.size": 1_000_000,
                "batch.num.messages": 100_000,
                "queue.buffering.max.messages": 500_000,
                "queue.buffering.max.kbytes": 262_144,
            }
        )
        started = time.monotonic()
        produce, headers = producer.produce, workload.headers
        for number, body in enumerate(workload.bodies(count, seed, first), first):
            while True:
                try:
                    produce(topic, body, key_of(number), number % PARTITIONS, headers=headers)
                    break
                except BufferError:
                    producer.poll(0.05)
        if left := producer.flush(120):
            raise RuntimeError(f"{left} requests could not be written to {topic} within 120 s")
        return time.monotonic() - started


def key_of(number: int) -> bytes:
    """Return the key of a request: many keys, none of them hot."""
    return b"k%d" % (number % 10_007)
