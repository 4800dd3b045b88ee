"""The two ends of an open loop: requests sent at planned times, and outcomes collected, a thread each."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
from confluent_kafka import (
    TIMESTAMP_LOG_APPEND_TIME,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from inferfleet.testing.checksum import expected_checksum
from loadtest.ledger import Arrival, Instants

_LONGEST_NAP_S = 0.002


def row_of(number: int) -> tuple[float, float, float, float]:
    """Return the input of a request: different for each, exact in 32 bits below 2**23."""
    return float(number), number + 0.5, -float(number), 1.0


def body_of(number: int) -> bytes:
    """Return the V2 JSON body that carries :func:`row_of`."""
    return b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%d.0,%d.5,-%d.0,1.0]}]}' % (
        number,
        number,
        number,
    )


class _Tensor(msgspec.Struct):
    data: list[int]


class _Answer(msgspec.Struct):
    outputs: list[_Tensor]


_decode = msgspec.json.Decoder(_Answer).decode


def is_right(number: int, value: bytes) -> bool:
    """Say whether an answer is version 1's checksum of this very request."""
    try:
        return tuple(_decode(value).outputs[0].data) == expected_checksum(1, row_of(number))
    except (msgspec.DecodeError, IndexError):
        return False


class Planned:
    """Sends request ``n`` at ``planned_s[n]`` from a thread of its own, whatever the answers do.

    ``sent_ms`` says when each was handed over (NaN: not yet), ``sent`` how many were. Whoever inherits says
    how one is sent, what is done in between, and how to wait until all have left.
    """

    def __init__(self, planned_s: Instants) -> None:
        self.planned_s = planned_s
        self.sent_ms = np.full(len(planned_s), np.nan)
        self.sent = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="generator", daemon=True)

    def start(self) -> None:
        """Begin; the first instant of the plan is now."""
        self._epoch_ms = time.time() * 1000
        self._began_at = time.monotonic()
        self._thread.start()

    @property
    def now_s(self) -> float:
        """Seconds since the plan began."""
        return time.monotonic() - self._began_at

    def epoch_ms(self, at_s: float) -> float:
        """Return the epoch milliseconds of an instant of the plan: the clock of record timestamps."""
        return self._epoch_ms + at_s * 1000

    @property
    def planned_ms(self) -> Instants:
        """The planned instants in epoch milliseconds."""
        return self._epoch_ms + self.planned_s * 1000

    @property
    def running(self) -> bool:
        """Whether requests are still to come; raises what ended the thread before its time."""
        if self._failure is not None:
            raise self._failure
        return self._thread.is_alive()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(60)

    def _main(self) -> None:
        try:
            self._send_all()
        except BaseException as error:
            self._failure = error

    def _send_all(self) -> None:
        sent_ms = self.sent_ms
        for number, due_s in enumerate(self.planned_s.tolist()):
            while (ahead_s := due_s - self.now_s) > 0:
                self._idle()
                time.sleep(min(ahead_s, _LONGEST_NAP_S))
                if self._stop.is_set():
                    return
            self._send(number)
            sent_ms[number] = self.epoch_ms(self.now_s)
            self.sent = number + 1
        self._flush()

    def _send(self, number: int) -> None:
        raise NotImplementedError

    def _idle(self) -> None:
        """Do what the client needs between two requests."""

    def _flush(self) -> None:
        """Wait until everything has left."""


class Generator(Planned):
    """Sends request ``n`` to partition ``n % partitions`` of a Kafka topic at its planned time."""

    def __init__(self, bootstrap: str, topic: str, planned_s: Instants, partitions: int) -> None:
        super().__init__(planned_s)
        self.refused: list[str] = []
        self._topic = topic
        self._partitions = partitions
        self._producer = Producer(
            {"bootstrap.servers": bootstrap, "linger.ms": 1, "enable.idempotence": True, "log_level": 0}
        )

    def sent_to(self, partition: int) -> int:
        """Return how many requests were handed over for a partition."""
        return (self.sent - partition + self._partitions - 1) // self._partitions

    def _send(self, number: int) -> None:
        name = b"%d" % number
        self._producer.produce(
            self._topic,
            body_of(number),
            name,
            number % self._partitions,
            on_delivery=self._delivered,
            headers=[("inferfleet-id", name)],
        )

    def _idle(self) -> None:
        self._producer.poll(0)

    def _flush(self) -> None:
        if left := self._producer.flush(30):
            raise RuntimeError(f"{left} requests could not be written to {self._topic} within 30 s")

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.refused.append(f"{message.topic()}: {error.str()}")


class Collector:
    """Takes every outcome of a topic from its beginning; the broker's own append times are the arrivals."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self.arrivals: list[Arrival] = []
        self.numbers: set[int] = set()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "loadtest-collector",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 50,
            }
        )
        self._consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
        self._thread = threading.Thread(target=self._main, name="collector", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)
        self._consumer.close()

    def check(self) -> None:
        """Raise what ended the thread before its time."""
        if self._failure is not None:
            raise self._failure

    def _main(self) -> None:
        try:
            while not self._stop.is_set():
                for message in self._consumer.consume(500, 0.05):
                    self._take(message)
        except BaseException as error:
            self._failure = error

    def _take(self, message: Message) -> None:
        if (error := message.error()) is not None:
            raise KafkaException(error)
        kind, at_ms = message.timestamp()
        if kind != TIMESTAMP_LOG_APPEND_TIME:
            raise RuntimeError(
                f"{message.topic()} does not stamp records with message.timestamp.type=LogAppendTime"
            )
        headers = dict(message.headers() or ())
        name = (headers.get("inferfleet-id") or b"").decode()
        number = int(name) if name.isdecimal() else -1
        code = (headers.get("inferfleet-code") or b"").decode()
        self.arrivals.append(Arrival(number, at_ms, message.value() or b"", code))
        self.numbers.add(number)
