"""The demo's own producer and consumers on Kafka: send requests, collect answers, know when work is over."""

from __future__ import annotations

import time
from collections.abc import Iterable

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from inferfleet.demo.processes import DemoError
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Request, decode_answer

_TIMEOUT_S = 10.0
_TAKE = 500


class KafkaWires:
    """Implements :class:`~inferfleet.demo.broker.Wires` with a producer and consumers."""

    def __init__(self, bootstrap_servers: str, group: str, routes: Iterable[str], tally: Tally) -> None:
        # Lines of the client library do not belong between the lines of the demo; errors come as errors.
        address = {"bootstrap.servers": bootstrap_servers, "log_level": 2}
        self._tally = tally
        self._group = group
        self._refused: list[str] = []
        self._producer = Producer(
            {**address, "linger.ms": 5, "enable.idempotence": True, "partitioner": "murmur2_random"}
        )
        # No group is joined: every answer of every partition is read, from the first one on.
        self._answers = Consumer(
            {
                **address,
                "group.id": f"{group}.demo",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 10,
                "enable.partition.eof": False,
            }
        )
        self._progress = Consumer({**address, "group.id": group, "enable.auto.commit": False})
        self._requests = [each for route in routes for each in self._partitions(f"{route}.requests")]
        self._results = [each for route in routes for each in self._partitions(f"{route}.results")]
        self._answers.assign([TopicPartition(each.topic, each.partition, 0) for each in self._results])

    def send(self, requests: Iterable[Request]) -> None:
        """Send requests and return when the broker has them all."""
        for request in requests:
            self._producer.produce(
                f"{request.route}.requests",
                key=request.key,
                value=request.value,
                headers=[*request.headers],
                on_delivery=self._delivered,
            )
            self._tally.note_sent(request.route, request.id, time.monotonic())
        if self._producer.flush(_TIMEOUT_S) or self._refused:
            raise DemoError(f"the broker did not take every request: {self._refused[:1] or 'no answer'}")

    def collect(self, seconds: float) -> int:
        """Take the answers that arrive within ``seconds``; returns how many records came."""
        until = time.monotonic() + seconds
        count = 0
        while True:
            left = until - time.monotonic()
            messages = self._answers.consume(_TAKE, max(0.0, min(left, 0.05)))
            for message in messages:
                self._note(message)
            count += len(messages)
            if left <= 0:
                return count

    def unsettled(self) -> list[str]:
        """Return where requests are not committed yet; if nowhere, nothing comes any more, nor again."""
        committed = self._progress.committed(self._requests, timeout=_TIMEOUT_S)
        return self._short_of_the_end(self._progress, committed)

    def unread(self) -> list[str]:
        """Return where records of the result topics were not taken yet."""
        return self._short_of_the_end(self._answers, self._answers.position(self._results))

    def _short_of_the_end(self, consumer: Consumer, positions: list[TopicPartition]) -> list[str]:
        short = []
        for each in positions:
            low, high = consumer.get_watermark_offsets(each, timeout=_TIMEOUT_S, cached=False)
            if low < high and each.offset < high:
                short.append(f"{each.topic}[{each.partition}] at {max(each.offset, low)} of {high}")
        return short

    def close(self) -> None:
        """Give the connections back."""
        self._answers.close()
        self._progress.close()

    def _partitions(self, topic: str) -> list[TopicPartition]:
        try:
            metadata = self._producer.list_topics(topic, timeout=_TIMEOUT_S).topics[topic]
        except KafkaException as error:
            raise DemoError(f"topic {topic}: {error.args[0].str()}") from None
        if metadata.error is not None:
            raise DemoError(f"topic {topic}: {metadata.error.str()}")
        return [TopicPartition(topic, number) for number in sorted(metadata.partitions)]

    def _note(self, message: Message) -> None:
        failure = message.error()
        if failure is not None:
            raise DemoError(f"reading answers: {failure.str()}")
        route = (message.topic() or "").removesuffix(".results")
        headers = {
            name: value if isinstance(value, bytes) else b"" for name, value in message.headers() or []
        }
        self._tally.note_answer(decode_answer(route, message.value() or b"", headers), time.monotonic())

    def _delivered(self, failure: KafkaError | None, message: Message) -> None:
        if failure is not None:
            self._refused.append(f"{message.topic()}: {failure.str()}")
