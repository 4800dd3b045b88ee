"""Idle latency: one request at a time, from sending to its result in Kafka, beside the bare loop.

Both subjects take the first record by ``poll`` and linger for nothing; the worker's ``max_queue_delay_ms``
is 0. The next request follows its answer after a short pause of varying length, so that no client's timer
falls in step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from loadtest import subjects
from loadtest.cluster import PARTITIONS, key_of
from loadtest.stage import Stage
from loadtest.workloads import TINY

_ANSWER_WITHIN_S = 30.0
_WARM_UP = 20


def compare(
    on: Stage, *, runs: int = 3, requests: int = 300, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure both subjects in turn; return the median of their p50 and p99 in ms, and the p50's ratio."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in subjects.NAMES}
    for number in range(runs):
        for name in subjects.NAMES:
            one = _measure(on, name, requests)
            seen[name].append(one)
            tell(
                f"latency run {number + 1}/{runs}  {name:<10} p50 {one['p50_ms']:6.2f} ms"
                f"  p99 {one['p99_ms']:6.2f} ms"
            )
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in ("p50_ms", "p99_ms")}
        for name, found in seen.items()
    }
    return {
        "median": medians,
        "ratio_p50": medians[subjects.WORKER]["p50_ms"] / medians[subjects.BARE]["p50_ms"],
        "runs": seen,
    }


def _measure(on: Stage, name: str, count: int) -> dict[str, float]:
    cluster = on.cluster
    requests, results = cluster.create("latency.requests"), cluster.create("latency.results")
    run = subjects.Run(TINY, cluster.bootstrap, requests, results, on.folder, latency=True)
    cluster.create_derived(run.derived)
    subject = subjects.start(name, run, on.cores.subject)
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "loadtest-latency"})
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 0, "log_level": 0})
    try:
        consumer.assign([TopicPartition(results, number, 0) for number in range(PARTITIONS)])
        spans = sorted(_ask(producer, consumer, requests, count + _WARM_UP)[_WARM_UP:])
    finally:
        consumer.close()
        subject.kill()
        cluster.delete(requests, results, *run.derived)
    return {"p50_ms": spans[len(spans) // 2] * 1e3, "p99_ms": spans[int(len(spans) * 0.99)] * 1e3}


def _ask(producer: Producer, consumer: Consumer, topic: str, count: int) -> list[float]:
    """Send ``count`` requests one after the other; return seconds from sending to the answer of each."""
    pauses = random.Random(1)
    spans: list[float] = []
    for number, body in enumerate(TINY.bodies(count)):
        sent_at = time.perf_counter()
        producer.produce(topic, body, key_of(number))
        producer.poll(0)
        while (message := consumer.poll(_ANSWER_WITHIN_S)) is None or message.error() is not None:
            if message is None:
                raise RuntimeError(f"request {number} was not answered within {_ANSWER_WITHIN_S:g} s")
        spans.append(time.perf_counter() - sent_at)
        producer.poll(0)
        time.sleep(pauses.uniform(0.002, 0.015))
    return spans
