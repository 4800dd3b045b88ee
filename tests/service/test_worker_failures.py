"""Bad rows, bad models, late and repeated requests: each gets its own outcome, its neighbours theirs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from inferfleet import Client
from inferfleet.testing.checksum import expected_checksum
from inferfleet.testing.checksum_handler import checksums
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Sender, judge, now_ms, row_of, v2_body
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

POISON = -999.0
HANDLER = """
import time
import numpy as np

PRIME, START = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)

def checksums(rows):
    words = np.ascontiguousarray(rows, "<f4").view("<u4").astype(np.uint64)
    sums = np.full(len(rows), START, np.uint64)
    for column in range(words.shape[1]):
        sums = (sums ^ words[:, column]) * PRIME
    return (sums >> np.uint64(11)).astype(np.int64)

class Model:
    def load(self, folder, device, parameters):
        self.at_most = parameters.get("at_most", 10**9)
        self.shorten = parameters.get("shorten", False)
        self.sleep_s = parameters.get("sleep_s", 0)
        self.log = parameters.get("log", "")

    def predict(self, tensors):
        x = tensors["x"]
        if len(x) > self.at_most:
            raise MemoryError(f"{len(x)} rows")
        if (x[:, 0] == -999).any():
            if not self.shorten:
                raise ValueError("poison")
            x = x[x[:, 0] != -999]
        if self.log:
            with open(self.log, "a") as file:
                file.write(" ".join(str(int(v)) for v in x[:, 0]) + "\\n")
        time.sleep(self.sleep_s if x[:, 0].any() else 0)
        return {"check": np.stack([np.ones(len(x), np.int64), checksums(x)], axis=1)}
"""
NAN_SETTINGS = """
runtime = "python"
file = "model.py"
input = [{name = "x", datatype = "FP32", shape = [4]}]
output = [{name = "y", datatype = "FP32", shape = []}]
"""
NAN_HANDLER = """
import numpy as np

class Model:
    def predict(self, tensors):
        return {"y": np.where(tensors["x"][:, 0] == -999, np.nan, tensors["x"][:, 0])}
"""


@pytest.fixture(scope="module")
def fleet(
    kafka: KafkaServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """One worker's worth of models that fail in different ways."""
    limits = {"limits": {"max_request_bytes": 100_000}}
    with Fleet(tmp_path_factory.mktemp("failures"), kafka, redis_server, settings=limits) as made:
        made.handler(HANDLER, "picky")
        made.handler(HANDLER, "shorter", shorten=True)
        made.handler(HANDLER, "small", at_most=10)
        made.handler(HANDLER, "slow", sleep_s=0.4, log=str(made.folder / "slow.log"))
        file = made.folder / "model.py"
        file.write_text(NAN_HANDLER)
        made.trust("nan")
        made.repository.add("nan", "1", [file], settings=NAN_SETTINGS)
        made.checksum()
        for model in ("picky", "shorter", "small", "nan"):
            made.route(model, model=model)
        made.route("slow", model="slow", partitions=1, max_batch_size=4, max_queue_delay_ms=0)
        made.route("flood", partitions=1)
        made.route("repeated", partitions=1, redis=True)
        yield made.prepare()


@pytest.fixture(scope="module")
def worker(fleet: Fleet) -> Iterator[WorkerProcess]:
    """One worker that serves them all; whatever a test sends, it must still drain with 0 at the end."""
    with fleet.running() as started:
        yield started


@pytest.fixture
def sender(kafka: KafkaServer) -> Sender:
    return Sender(kafka.client_config())


def test_the_handler_here_is_the_checksum_model() -> None:
    """The handler below answers what the checksum model of version 1 answers."""
    assert int(checksums(np.array([row_of(3)], np.float32))[0]) == expected_checksum("1", row_of(3))[1]


def test_one_poison_row_among_ten_thousand(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """9,999 answers, one E_MODEL, one dead letter with the original key, body and headers."""
    sent = {f"p-{n}": row_of(n) for n in range(10_000)}
    bad = (POISON, 1.0, 2.0, 3.0)
    bad_body = v2_body([bad], parameters={"kept": "as it was"})
    for name, row in sent.items():
        if name == "p-4321":
            sender.send(
                fleet.source("picky"), bad_body, id=name, key=b"the key", headers=[("tenant", b"\x00\xff")]
            )
        else:
            sender.send(fleet.source("picky"), v2_body([row]), id=name)
    sender.flush()
    del sent["p-4321"]
    client = kafka.client_config()
    with (
        Reader(client, fleet.results("picky")) as reader,
        Reader(client, fleet.dead_letters("picky")) as dead,
    ):
        reader.wait_ids([*sent, "p-4321"])
        (letter,) = dead.wait_count(1)
        (error,) = reader.by_id.pop("p-4321")
        verdict = judge(sent, reader)

    assert verdict.right, verdict
    assert verdict.duplicates == 0
    assert (error.code, error.key) == ("E_MODEL", b"the key")
    assert error.body["retryable"] is False
    assert (letter.key, letter.value) == (b"the key", bad_body)
    assert letter.headers["tenant"] == b"\x00\xff"
    assert letter.headers["inferfleet-code"] == b"E_MODEL"
    assert letter.headers["inferfleet-origin-topic"] == fleet.source("picky").encode()


def test_a_wrong_count_of_outputs_shifts_no_answer(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A model that leaves one request out: that one is E_MODEL_OUTPUT, the others are right."""
    sent = {f"c-{n}": row_of(n) if n % 50 else (POISON, 1.0, 2.0, 3.0) for n in range(500)}
    for name, row in sent.items():
        sender.send(fleet.source("shorter"), v2_body([row]), id=name)
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("shorter")) as reader:
        reader.wait_ids(sent)
        failed = {name for name in sent if reader.only(name).code}
        codes = {reader.only(name).code for name in failed}
        for name in failed:
            del reader.by_id[name], sent[name]
        verdict = judge(sent, reader)

    assert failed == {f"c-{n}" for n in range(0, 500, 50)}
    assert codes == {"E_MODEL_OUTPUT"}
    assert verdict.right, verdict


def test_a_nan_is_an_error_of_its_own_row(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """NaN in one row is E_MODEL_OUTPUT for it, with a dead letter; the rows beside it are answered."""
    for number in range(64):
        value = POISON if number == 7 else float(number)
        sender.send(fleet.source("nan"), v2_body([(value, 0.0, 0.0, 0.0)]), id=f"n-{number}")
    sender.flush()
    client = kafka.client_config()
    with Reader(client, fleet.results("nan")) as reader, Reader(client, fleet.dead_letters("nan")) as dead:
        reader.wait_ids([f"n-{n}" for n in range(64)])
        (letter,) = dead.wait_count(1)
        codes = {n: reader.only(f"n-{n}").code for n in range(64)}
        values = [reader.only(f"n-{n}").body["outputs"][0]["data"] for n in range(64) if n != 7]

    assert {n: code for n, code in codes.items() if code} == {7: "E_MODEL_OUTPUT"}
    assert values == [[float(n)] for n in range(64) if n != 7]
    assert letter.id == "n-7"


def test_out_of_memory_halves_and_goes_on(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A model with room for ten rows answers everything, a request of 30 rows too; no dead letter."""
    sent = {f"oom-{n}": row_of(n) for n in range(1000)}
    for name, row in sent.items():
        sender.send(fleet.source("small"), v2_body([row]), id=name)
    sender.send(fleet.source("small"), v2_body([row_of(n) for n in range(30)]), id="wide")
    sender.flush()
    with Reader(kafka.client_config(), fleet.results("small")) as reader:
        reader.wait_ids([*sent, "wide"])
        (wide,) = reader.by_id.pop("wide")
        verdict = judge(sent, reader)

    assert verdict.right, verdict
    assert wide.body["outputs"][0]["shape"] == [30, 2]
    assert wide.check == tuple(v for n in range(30) for v in expected_checksum("1", row_of(n)))
    assert worker.metric("dead_letters_total", route="small") == 0
    limits = [event["limit"] for event in worker.events("batch_size_halved")]
    assert 5 <= min(limits) <= 10, limits


HOSTILE: list[tuple[bytes | None, list[tuple[str, bytes]], str]] = [
    (None, [], "E_EMPTY"),
    (b"", [], "E_EMPTY"),
    (b"{", [], "E_DECODE"),
    (b"\xff\xfe{\x00}\x00", [], "E_DECODE"),
    (b"[" * 90_000, [], "E_DECODE"),
    (b'{"inputs": []}', [], "E_SCHEMA"),
    (v2_body([row_of(1)]).replace(b'"x"', b'"y"'), [], "E_SCHEMA"),
    (v2_body([row_of(1)]).replace(b"FP32", b"OBJECT"), [], "E_DTYPE"),
    (v2_body([row_of(1)]).replace(b"[1, 4]", b"[1, -4]"), [], "E_SHAPE"),
    (v2_body([row_of(1)]).replace(b"[1, 4]", b"[1, 4294967296]"), [], "E_SHAPE"),
    (v2_body([row_of(1)]).replace(b"[1, 4]", b"[2, 4]"), [], "E_SHAPE"),
    (v2_body([row_of(1)]).replace(b"1.5", b"NaN"), [], "E_DECODE"),
    (b" " * 100_001, [], "E_TOO_LARGE"),
    (v2_body([row_of(1)]), [("content-type", b"application/python-pickle")], "E_CONTENT_TYPE"),
    (v2_body([row_of(1)]), [("inferfleet-priority", b"11")], "E_HEADER"),
    (v2_body([row_of(1)]), [("inferfleet-deadline-ms", b"1")], "E_DEADLINE"),
]


def test_a_flood_of_bad_requests_stops_nobody(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """Half of 4,000 requests are bad in sixteen ways: each gets its own code, every good one its answer."""
    good = {f"g-{n}": row_of(n) for n in range(2000)}
    bad = {f"b-{n}": HOSTILE[n % len(HOSTILE)][2] for n in range(2000)}
    for number in range(2000):
        sender.send(fleet.source("flood"), v2_body([row_of(number)]), id=f"g-{number}")
        body, headers, _ = HOSTILE[number % len(HOSTILE)]
        if body is None or len(body) < 50_000 or number < 100:
            sender.send(fleet.source("flood"), body, id=f"b-{number}", headers=headers)
        else:
            del bad[f"b-{number}"]
    sender.flush()
    client = kafka.client_config()
    kept = sum(code != "E_DEADLINE" for code in bad.values())
    with (
        Reader(client, fleet.results("flood")) as reader,
        Reader(client, fleet.dead_letters("flood")) as dead,
    ):
        reader.wait_ids([*good, *bad], 60)
        dead.wait_count(kept)
        found = {name: reader.by_id.pop(name)[0].code for name in bad}
        verdict = judge(good, reader)

    assert {name: code for name, code in found.items() if code != bad[name]} == {}
    assert verdict.right, verdict
    assert Counter(letter.code for letter in dead.outcomes) == Counter(
        code for code in bad.values() if code != "E_DEADLINE"
    )


def test_late_requests_do_not_run_and_urgent_ones_run_first(
    fleet: Fleet, worker: WorkerProcess, sender: Sender, kafka: KafkaServer
) -> None:
    """A deadline that passes in the queue is E_DEADLINE without a run; priority 1 overtakes 9."""
    topic = fleet.source("slow")
    for number in range(1, 9):
        sender.send(topic, v2_body([row_of(number)]), id=f"busy-{number}")
    sender.flush()
    wait_until(lambda: worker.status()["in_flight_rows"] > 0, 20, "the slow model is busy")
    for number in range(100, 112):
        sender.send(
            topic, v2_body([row_of(number)]), id=f"low-{number}", headers=[("inferfleet-priority", b"9")]
        )
    for number in range(200, 204):
        late = [("inferfleet-deadline-ms", b"%d" % (now_ms() + 300))]
        sender.send(topic, v2_body([row_of(number)]), id=f"late-{number}", headers=late)
    for number in range(300, 304):
        urgent = [("inferfleet-priority", b"1")]
        sender.send(topic, v2_body([row_of(number)]), id=f"urgent-{number}", headers=urgent)
    sender.flush()
    names = [f"late-{n}" for n in range(200, 204)]
    with Reader(kafka.client_config(), fleet.results("slow")) as reader:
        reader.wait_ids([f"low-{n}" for n in range(100, 112)] + names)
        codes = [reader.only(name).code for name in names]
    ran = [[int(v) for v in line.split()] for line in (fleet.folder / "slow.log").read_text().splitlines()]
    order = [number for batch in ran for number in batch]

    assert codes == ["E_DEADLINE"] * 4
    assert not set(order) & set(range(200, 204))
    assert max(order.index(n) for n in range(300, 304)) < max(order.index(n) for n in range(100, 112))
    assert max(map(len, ran)) <= 4
    assert worker.metric("dead_letters_total", route="slow") == 0


def test_a_reused_id_never_gets_the_other_payloads_answer(
    fleet: Fleet, worker: WorkerProcess, kafka: KafkaServer, redis_server: RedisServer
) -> None:
    """The first answer stands in Redis; the second client hears E_DUP_ID and its request is a dead letter."""
    first, second = v2_body([row_of(1)]), v2_body([row_of(2)])
    with redis_server.client() as redis, Client(str(fleet.config)) as one, Client(str(fleet.config)) as two:
        one.submit("repeated", first, id="dup")
        assert tuple(one.result("dup", 20).outputs["check"].ravel()) == expected_checksum("1", row_of(1))
        stood = redis.get(f"{fleet.name}:result:repeated:dup")
        two.submit("repeated", second, id="dup")
        said = two.result("dup", 20)
        assert redis.get(f"{fleet.name}:result:repeated:dup") == stood
    with Reader(kafka.client_config(), fleet.dead_letters("repeated")) as dead:
        (letter,) = dead.wait_count(1)

    assert said.code == "E_DUP_ID"
    assert (letter.code, letter.value) == ("E_DUP_ID", second)
    assert json.loads(stood or b"")["id"] == "dup"
