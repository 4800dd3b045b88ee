"""The embedded broker: librdkafka's mock Kafka cluster in a process of its own.

``python -m inferfleet.demo.broker [--detached] TOPIC...`` prints the bootstrap address as its first line
and lives until SIGTERM or, unless ``--detached``, until its standard input closes: a demo that dies
takes its broker along. The mock keeps records in memory (5 MiB a partition), gives every topic four
partitions and knows no topic administration, no rights and no TLS: it is a stage, not a store.
"""

from __future__ import annotations

import signal
import sys
import threading

from confluent_kafka import Producer

PARTITIONS = 4
_ANSWER_TIMEOUT_S = 10.0


def serve(topics: list[str], detached: bool) -> None:
    """Run the mock cluster with ``topics`` in place until told to stop; blocks."""
    # The cluster lives inside this producer: it ends with the object.
    cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    address = ",".join(
        f"{broker.host}:{broker.port}"
        for broker in cluster.list_topics(timeout=_ANSWER_TIMEOUT_S).brokers.values()
    )
    for topic in topics:
        # Asking a producer about one topic by name creates it; consumers ask without that right.
        cluster.list_topics(topic, timeout=_ANSWER_TIMEOUT_S)

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
    arguments = sys.argv[1:]
    serve([name for name in arguments if name != "--detached"], "--detached" in arguments)
