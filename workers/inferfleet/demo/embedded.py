"""The embedded broker: librdkafka's mock Kafka cluster in a process of its own.

``python -m inferfleet.demo.embedded [--detached]`` prints the bootstrap address as its first line and
lives until SIGTERM or, unless ``--detached``, until its standard input closes: a demo that dies takes its
broker along. The mock keeps records in memory (5 MiB a partition), gives every topic four
partitions and knows no topic administration, no rights and no TLS: it is a stage, not a store.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable

from confluent_kafka import Producer

PARTITIONS = 4
_ANSWER_TIMEOUT_S = 10.0


def create_topics(address: str, topics: Iterable[str]) -> None:
    """Let the embedded broker at ``address`` have these topics.

    Asking a producer about one topic by name creates it; consumers ask without that right.
    """
    producer = Producer({"bootstrap.servers": address, "log_level": 0})
    for topic in topics:
        producer.list_topics(topic, timeout=_ANSWER_TIMEOUT_S)


def serve(detached: bool) -> None:
    """Run the mock cluster until told to stop; blocks."""
    # The cluster lives inside this producer: it ends with the object.
    cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    address = ",".join(
        f"{broker.host}:{broker.port}"
        for broker in cluster.list_topics(timeout=_ANSWER_TIMEOUT_S).brokers.values()
    )
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    if not detached:
        threading.Thread(target=_wait_for_end_of_input, args=(stopped,), daemon=True).start()
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    stopped.wait()


def _wait_for_end_of_input(stopped: threading.Event) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    stopped.set()


if __name__ == "__main__":
    serve("--detached" in sys.argv[1:])
