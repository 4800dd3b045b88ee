"""Requests at planned times, answers read back, and a verdict on each by its id."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from inferfleet.testing.checksum import expected_checksum
from tests.support.servers import ClientConfig
from tests.support.waiting import wait_until

Row = tuple[float, ...]


def row_of(number: int, size: int = 4) -> Row:
    """Return the input of request ``number``: different for each, and exact in 32 bits."""
    return (float(number), number + 0.5, -float(number), *[1.0] * (size - 3))


def v2_body(rows: Sequence[Row], **members: Any) -> bytes:
    """Return a V2 JSON body with the rows of ``x``."""
    data = [value for row in rows for value in row]
    tensor = {"name": "x", "shape": [len(rows), len(rows[0])], "datatype": "FP32", "data": data}
    return json.dumps({**members, "inputs": [tensor]}).encode()


def raw_body(row: Row) -> bytes:
    """Return one row as a raw tensor."""
    return np.array(row, "<f4").tobytes()


RAW_HEADERS = [("content-type", b"application/octet-stream"), ("inference-header-content-length", b"0")]


class Outcome(NamedTuple):
    """One record of a result topic or a dead-letter topic."""

    id: str
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]
    timestamp_ms: int

    @property
    def code(self) -> str:
        """The error code, empty for an answer."""
        return self.headers.get("inferfleet-code", b"").decode()

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return dict(json.loads(self.value or b"{}"))

    @property
    def check(self) -> tuple[int, ...]:
        """The checksum model's answer to one row."""
        length = int(self.headers.get("inference-header-content-length", b"-1"))
        if length >= 0:
            return tuple(np.frombuffer((self.value or b"")[length:], "<i8").tolist())
        return tuple(self.body["outputs"][0]["data"])

    @property
    def served(self) -> dict[str, str]:
        """The ``inferfleet-served`` header as a mapping."""
        text = self.headers["inferfleet-served"].decode()
        return dict(part.split("=", 1) for part in text.split(";"))


class Sender:
    """Sends records and remembers what became of each; every record must be accepted in the end."""

    def __init__(self, client: ClientConfig) -> None:
        self._producer = Producer(
            {
                **client,
                "linger.ms": 2,
                "enable.idempotence": True,
                "message.timeout.ms": 60_000,
                "log_level": 0,
            }
        )
        self.refused: list[str] = []

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        id: str | None = None,  # noqa: A002
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes]] = (),
        partition: int = -1,
    ) -> None:
        """Hand a record over; it waits where the client's queue is full."""
        named = [] if id is None else [("inferfleet-id", id.encode())]
        self._producer.produce(
            topic, value, key, partition, headers=[*named, *headers], on_delivery=self._delivered
        )
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.refused.append(f"{message.topic()}: {error.str()}")

    def flush(self) -> None:
        """Return once every record stands in its topic."""
        assert self._producer.flush(60) == 0
        assert not self.refused, self.refused[:3]

    def poll(self) -> None:
        """Hear what was delivered."""
        self._producer.poll(0)


class Reader:
    """Reads a topic from its beginning, all partitions, in the caller's thread.

    It joins no group; ``group`` is a name that the user may look at.
    """

    def __init__(self, client: ClientConfig, topic: str, group: str = "reader") -> None:
        self._consumer = Consumer({**client, "group.id": group, "enable.auto.commit": False, "log_level": 0})
        partitions = self._consumer.list_topics(topic, timeout=20).topics[topic].partitions
        self._consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        self.topic = topic
        self.outcomes: list[Outcome] = []
        self.by_id: dict[str, list[Outcome]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def pull(self, wait_s: float = 0.05) -> None:
        """Take what has arrived."""
        for message in self._consumer.consume(1000, wait_s):
            if message.error() is not None:
                if message.error().code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):
                    continue
                raise KafkaException(message.error())
            headers: dict[str, bytes] = {}
            for name, value in message.headers() or ():
                headers.setdefault(name, value or b"")
            name = headers.get("inferfleet-id", b"").decode()
            outcome = Outcome(name, message.key(), message.value(), headers, message.timestamp()[1])
            self.outcomes.append(outcome)
            self.by_id.setdefault(name, []).append(outcome)

    def wait_ids(self, ids: Iterable[str], timeout_s: float = 40.0) -> None:
        """Return once each id has an outcome."""
        missing = set(ids)

        def none_missing() -> bool:
            self.pull()
            missing.difference_update(self.by_id)
            return not missing

        try:
            wait_until(none_missing, timeout_s, "")
        except AssertionError:
            some = sorted(missing)[:5]
            raise AssertionError(f"{len(missing)} ids have no outcome in {self.topic}: {some}") from None

    def wait_count(self, count: int, timeout_s: float = 40.0) -> list[Outcome]:
        """Return all outcomes once there are ``count``."""

        def enough() -> bool:
            self.pull()
            return len(self.outcomes) >= count

        wait_until(enough, timeout_s, f"{count} records in {self.topic}, {len(self.outcomes)} are there")
        return self.outcomes

    def only(self, name: str) -> Outcome:
        """Return the one outcome of an id."""
        (outcome,) = self.by_id[name]
        return outcome


class Verdict(NamedTuple):
    """What became of the requests; ``unequal`` have answers that differ, ``wrong`` one that is not theirs."""

    sent: int
    lost: list[str]
    duplicates: int
    unequal: list[str]
    wrong: list[str]

    def __str__(self) -> str:
        return (
            f"sent {self.sent}, lost {len(self.lost)}, duplicates {self.duplicates}, "
            f"unequal {len(self.unequal)}, wrong {len(self.wrong)}"
        )

    @property
    def right(self) -> bool:
        """Whether every request has its own answer, and repeated ones are equal."""
        return not (self.lost or self.unequal or self.wrong)


def judge(sent: Mapping[str, Row], reader: Reader, versions: Iterable[str] = ("1",)) -> Verdict:
    """Compare each answer with the checksum of its own input, whichever of ``versions`` gave it."""
    allowed = tuple(versions)
    lost = [name for name in sent if name not in reader.by_id]
    wrong, unequal = [], []
    duplicates = 0
    for name, outcomes in reader.by_id.items():
        if name not in sent:
            wrong.append(name)
            continue
        duplicates += len(outcomes) - 1
        if len({outcome.value for outcome in outcomes}) > 1:
            unequal.append(name)
        for outcome in outcomes:
            version = outcome.served.get("version", "")
            right = not outcome.code and version in allowed
            if not right or outcome.check != expected_checksum(version, sent[name]):
                wrong.append(name)
    return Verdict(len(sent), lost, duplicates, unequal, wrong)


@dataclass
class OpenLoop:
    """Sends ``rate`` requests a second at planned times from a thread of its own, whatever the answers do.

    Requests go to the partitions in turn, so the silence of each can be told afterwards.
    """

    client: ClientConfig
    topic: str
    partitions: int
    rate: float
    rows: dict[str, Row] = field(default_factory=dict)
    partition_of: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sender = Sender(self.client)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="open-loop", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more; every request sent stands in its topic when this returns."""
        self._stop.set()
        self._thread.join(90)
        if self._failure is not None:
            raise self._failure

    def _main(self) -> None:
        started = time.monotonic()
        number = 0
        try:
            while not self._stop.is_set():
                due = int((time.monotonic() - started) * self.rate)
                while number < due:
                    name, row = f"r-{number}", row_of(number)
                    self._sender.send(
                        self.topic,
                        v2_body([row]),
                        id=name,
                        key=name.encode(),
                        partition=number % self.partitions,
                    )
                    self.rows[name] = row
                    self.partition_of[name] = number % self.partitions
                    number += 1
                self._sender.poll()
                self._stop.wait(0.005)
            self._sender.flush()
        except BaseException as error:
            self._failure = error

    def wait_sent(self, more: int, timeout_s: float = 60.0) -> None:
        """Return once ``more`` further requests were sent."""
        goal = len(self.rows) + more
        wait_until(lambda: len(self.rows) >= goal or self._failure is not None, timeout_s, f"{goal} sent")


def silences(load: OpenLoop, reader: Reader, since_ms: int, until_ms: int) -> dict[int, float]:
    """Return each source partition's longest time without an answer, seconds, between two instants."""
    out: dict[int, float] = {}
    for partition in range(load.partitions):
        stamps = sorted(
            outcome.timestamp_ms
            for outcome in reader.outcomes
            if load.partition_of.get(outcome.id) == partition and since_ms <= outcome.timestamp_ms <= until_ms
        )
        edges = [since_ms, *stamps, until_ms]
        out[partition] = max((b - a) / 1000 for a, b in pairwise(edges))
    return out


def answered_since(reader: Reader, load: OpenLoop, since_ms: int, each: int = 5) -> Callable[[], bool]:
    """Return a condition: every source partition had ``each`` answers after an instant."""

    def reached() -> bool:
        reader.pull()
        counts = [0] * load.partitions
        for outcome in reversed(reader.outcomes):
            if outcome.timestamp_ms > since_ms and outcome.id in load.partition_of:
                counts[load.partition_of[outcome.id]] += 1
        return min(counts) >= each

    return reached


def now_ms() -> int:
    """Return epoch milliseconds, the clock of record timestamps."""
    return time.time_ns() // 1_000_000
