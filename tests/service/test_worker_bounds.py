"""What a worker may hold: memory stays flat before any backlog, and slow models cost no membership."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fleet import Fleet
from tests.support.fleet_traffic import RAW_HEADERS, Reader, Sender, judge, raw_body, row_of
from tests.support.servers import KafkaServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

IN_FLIGHT_ROWS = 1000
CHUNK_ROWS = 500


@pytest.mark.slow
def test_a_backlog_of_any_size_needs_no_more_memory(kafka: KafkaServer, tmp_path: Path) -> None:
    """50,000 raw records before a slow model: in-flight rows stay at their bound and a chunk, memory flat."""
    limits = {"in_flight_rows": IN_FLIGHT_ROWS}
    with Fleet(tmp_path, kafka, settings={"limits": limits}) as fleet:
        fleet.checksum(delay_ms=10)
        fleet.route(partitions=3)
        fleet.prepare()
        sender = Sender(kafka.client_config())
        for number in range(50_000):
            sender.send(fleet.source("sums"), raw_body(row_of(number)), id=f"b-{number}", headers=RAW_HEADERS)
        sender.flush()
        held: list[float] = []
        memory: list[float] = []
        with fleet.running() as worker, Reader(kafka.client_config(), fleet.results("sums")) as reader:

            def look_until(count: int) -> None:
                def reached() -> bool:
                    reader.pull()
                    held.append(worker.status()["in_flight_rows"])
                    memory.append(worker.rss_mb)
                    return len(reader.by_id) >= count

                wait_until(reached, 90, f"{count} answers, {len(reader.by_id)} are there")

            look_until(15_000)
            before = max(memory[-10:])
            look_until(50_000)
            after = max(memory[-10:])
            verdict = judge({f"b-{n}": row_of(n) for n in range(50_000)}, reader)

    print(f"\nin flight at most {max(held):.0f}, memory {before:.1f} -> {after:.1f} MiB; {verdict}")
    assert verdict.right, verdict
    assert max(held) <= IN_FLIGHT_ROWS + CHUNK_ROWS
    assert after - before < 15


SLOW = """
import threading
import numpy as np

class Model:
    def load(self, folder, device, parameters):
        self.takes_s = parameters["takes_s"]

    def predict(self, tensors):
        x = tensors["x"]
        if x.any():
            threading.Event().wait(self.takes_s)
        return {"check": np.zeros((len(x), 2), np.int64)}
"""
MODEL_TIME = {
    # Longer than the session and than the longest allowed time between polls; KIP-848: the broker's 6 s.
    "classic": (4.0, {"session_timeout_ms": 2000}, {"max.poll.interval.ms": "3000"}),
    "consumer": (6.5, {}, {"max.poll.interval.ms": "3000"}),
}


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_model_time_costs_no_membership(kafka: KafkaServer, tmp_path: Path, protocol: str) -> None:
    """A batch that takes longer than session and poll interval: no rebalance, no partition lost."""
    takes_s, settings, consumer = MODEL_TIME[protocol]
    given = {
        "kafka": {"group_protocol": protocol, **settings},
        "kafka.consumer": consumer,
        "limits": {"in_flight_rows": 64},
    }
    with Fleet(tmp_path, kafka, settings=given) as fleet:
        fleet.handler(SLOW, takes_s=takes_s)
        fleet.route(partitions=2)
        fleet.prepare()
        names = [f"s-{n}" for n in range(64)]
        sender = Sender(kafka.client_config())
        for number, name in enumerate(names):
            topic, body = fleet.source("sums"), raw_body(row_of(number))
            sender.send(topic, body, id=name, headers=RAW_HEADERS, partition=number % 2)
        sender.flush()
        with fleet.running() as worker, Reader(kafka.client_config(), fleet.results("sums")) as reader:
            reader.wait_ids(names)
            assert worker.ready
            moves = [
                event["event"]
                for event in worker.events()
                if event["event"].startswith("partitions_") and ".retry." not in event["partitions"]
            ]
            assert worker.events("kafka_problem") == []

    assert len(reader.outcomes) == len(names)
    assert moves == ["partitions_assigned"]
