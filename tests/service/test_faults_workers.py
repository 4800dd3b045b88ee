"""Workers are killed, drained, added and taken away under load: nothing lost, every answer the right one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import (
    OpenLoop,
    Reader,
    Sender,
    Verdict,
    answered_since,
    judge,
    now_ms,
    row_of,
    silences,
    v2_body,
)
from tests.support.servers import KafkaServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]

PARTITIONS = 6
RATE = 300
IN_FLIGHT_ROWS = 500


class UnderLoad:
    """A fleet with one route over six partitions, an open loop that feeds it, and a reader of its answers."""

    def __init__(self, fleet: Fleet, load: OpenLoop, reader: Reader) -> None:
        self.fleet = fleet
        self.load = load
        self.reader = reader

    def settle(self) -> int:
        """Return the present instant, milliseconds, once every partition is answered after now."""
        asked_at = now_ms()
        wait_until(answered_since(self.reader, self.load, asked_at), 60, "every partition is answered")
        return now_ms()

    def owned(self, worker: WorkerProcess) -> int:
        return len(worker.status()["assignment"].get(self.fleet.source("sums"), ()))

    def wait_owned(self, *wanted: tuple[WorkerProcess, int]) -> None:
        """Return once each worker has as many partitions as it should."""
        for worker, count in wanted:
            wait_until(lambda w=worker, n=count: self.owned(w) == n, 60, f"{worker.name} owns {count}")

    def report(self, what: str, since_ms: int) -> None:
        """Print each partition's longest silence since an instant."""
        spans = silences(self.load, self.reader, since_ms, now_ms())
        shown = " ".join(f"{partition}:{span:.1f}" for partition, span in spans.items())
        print(f"\n{what}: longest silence {max(spans.values()):.1f} s (by partition {shown})")

    def judged(self) -> Verdict:
        """Stop sending, wait for the last answer, and judge them all."""
        self.load.stop()
        self.reader.wait_ids(self.load.rows, 60)
        return judge(self.load.rows, self.reader)


@contextlib.contextmanager
def under_load(folder: Path, kafka: KafkaServer, protocol: str, *names: str) -> Iterator[UnderLoad]:
    """Start workers, then the load; wait until every partition is answered."""
    settings = {
        "kafka": {"group_protocol": protocol},
        "limits": {"in_flight_rows": IN_FLIGHT_ROWS},
    }
    with Fleet(folder, kafka, settings=settings) as fleet:
        fleet.checksum(delay_ms=5)
        fleet.route(partitions=PARTITIONS)
        fleet.prepare()
        workers = [fleet.launch(name) for name in names]
        for worker in workers:
            worker.wait_ready()
        client = kafka.client_config()
        with (
            Reader(client, fleet.results("sums")) as reader,
            OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
        ):
            state = UnderLoad(fleet, load, reader)
            state.settle()
            yield state


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_killed_workers_lose_nothing(kafka: KafkaServer, tmp_path: Path, protocol: str) -> None:
    """Two of three workers are killed one after the other and replaced: every request has its own answer."""
    with under_load(tmp_path, kafka, protocol, "w-1", "w-2", "w-3") as state:
        for number, victim in enumerate(state.fleet.workers[:2]):
            load, since = state.load, now_ms()
            load.wait_sent(RATE // 10)
            wait_until(lambda v=victim: v.status()["in_flight_rows"] > 0, 20, "rows in flight")
            victim.kill()
            state.fleet.launch(f"w-{number + 4}")
            state.settle()
            state.report(f"{protocol}, kill {number + 1}", since)
        verdict = state.judged()

    print(f"{protocol}, two kills: {verdict}")
    assert verdict.right, verdict
    assert verdict.duplicates <= IN_FLIGHT_ROWS * 2


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_scaling_and_draining_answers_everything_once(
    kafka: KafkaServer, tmp_path: Path, protocol: str
) -> None:
    """1 -> 3 -> 1 workers under load, each drained by SIGTERM: nothing lost, nothing twice, exit code 0."""
    with under_load(tmp_path, kafka, protocol, "w-1") as state:
        since = now_ms()
        first = state.fleet.workers[0]
        others = [state.fleet.launch("w-2"), state.fleet.launch("w-3")]
        for worker in others:
            worker.wait_ready()
        state.wait_owned((first, 2), (others[0], 2), (others[1], 2))
        state.settle()
        state.report(f"{protocol}, 1 -> 3", since)
        for worker in (first, others[0]):
            since = now_ms()
            assert worker.finish() == 0, worker.log_tail()
            state.settle()
            state.report(f"{protocol}, SIGTERM of {worker.name}", since)
        state.wait_owned((others[1], PARTITIONS))
        verdict = state.judged()
        assert others[1].finish() == 0

    print(f"{protocol}, 1 -> 3 -> 1: {verdict}")
    assert verdict.right, verdict
    assert verdict.duplicates == 0


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_worker_without_partitions_is_ready(kafka: KafkaServer, tmp_path: Path, protocol: str) -> None:
    """The idle ones of a group are ready; one of them drains at once, one takes over from a dead one."""
    with Fleet(tmp_path, kafka, settings={"kafka": {"group_protocol": protocol}}) as fleet:
        fleet.checksum()
        fleet.route(partitions=1)
        fleet.prepare()
        source = fleet.source("sums")
        workers = [fleet.launch(f"w-{number}") for number in range(3)]
        for each in workers:
            each.wait_ready()

        def owner() -> WorkerProcess | None:
            found = [each for each in workers if each.running and source in each.status()["assignment"]]
            return found[0] if len(found) == 1 else None

        busy = wait_until(owner, 30, "one of them has the partition")
        assert [each.ask("/readyz")[0] for each in workers] == [200] * 3
        spare = next(each for each in workers if each is not busy)
        assert spare.finish() == 0
        busy = wait_until(owner, 30, "one of the others has it")
        (idle,) = {*workers} - {spare, busy}
        busy.kill()
        wait_until(lambda: owner() is idle, 60, "the idle worker takes over")
        assert idle.ready
        sender = Sender(kafka.client_config())
        sender.send(fleet.source("sums"), v2_body([row_of(1)]), id="a")
        sender.flush()
        with Reader(kafka.client_config(), fleet.results("sums")) as reader:
            reader.wait_ids(["a"])
        assert idle.finish() == 0


HANGING = """
import threading
from pathlib import Path
import numpy as np

class Model:
    def load(self, folder, device, parameters):
        self.flag = Path(parameters["flag"])

    def predict(self, tensors):
        x = tensors["x"]
        if self.flag.exists() and (x[:, 0] > 0).any():
            threading.Event().wait()
        words = np.ascontiguousarray(x, "<f4").view("<u4").astype(np.int64)
        return {"check": np.stack([words[:, 0], words[:, 1]], axis=1)}
"""


@pytest.fixture
def hanging(kafka: KafkaServer, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet whose model hangs while the file ``hang`` is there."""
    with Fleet(tmp_path, kafka, settings={"worker": {"drain_timeout_s": 4}}) as fleet:
        fleet.handler(HANGING, flag=str(tmp_path / "hang"))
        fleet.route(partitions=1)
        yield fleet.prepare()


def hang(fleet: Fleet, worker: WorkerProcess) -> list[str]:
    """Send requests on which the model hangs; return their ids once they are taken."""
    (fleet.folder / "hang").touch()
    names = [f"h-{n}" for n in range(100)]
    sender = Sender(fleet.kafka.client_config())
    for number, name in enumerate(names):
        sender.send(fleet.source("sums"), v2_body([row_of(number + 1)]), id=name)
    sender.flush()
    wait_until(lambda: worker.status()["in_flight_rows"] == 100, 20, "all rows are in flight")
    return names


def test_a_hung_model_does_not_outlive_the_drain(hanging: Fleet) -> None:
    """SIGTERM with a model that never returns ends within the bound, and the next worker answers."""
    worker = hanging.worker("w-1")
    names = hang(hanging, worker)
    since = now_ms()
    assert worker.finish(15) == 0
    print(f"\ndrain_timeout_s = 4, ended after {(now_ms() - since) / 1000:.1f} s")
    (hanging.folder / "hang").unlink()
    with hanging.running("w-2"), Reader(hanging.kafka.client_config(), hanging.results("sums")) as reader:
        reader.wait_ids(names)
        assert len(reader.outcomes) == len(names)


def test_a_second_signal_stops_at_once(hanging: Fleet) -> None:
    """The second SIGTERM does not wait for the drain; what was taken is answered by the next worker."""
    hanging.settings["worker"]["drain_timeout_s"] = 600
    hanging.write()
    worker = hanging.worker("w-1")
    names = hang(hanging, worker)
    worker.send_signal(signal.SIGTERM)
    worker.wait_event("draining")
    assert worker.running
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 128 + signal.SIGTERM
    (hanging.folder / "hang").unlink()
    with hanging.running("w-2"), Reader(hanging.kafka.client_config(), hanging.results("sums")) as reader:
        reader.wait_ids(names)
