"""Live traffic for rollouts: digits at a steady rate, and for each answer whether it was right.

The labels go to a topic of their own, as a system that learns the truth later would write them. Nothing here
knows which version will answer; that is read from the answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from inferfleet.demo.digits import Digits
from inferfleet.demo.processes import DemoError
from inferfleet.demo.traffic import Answer, decode_answer, v2_json

ROUTE = "live"
FEEDBACK = "live.feedback"
RATE_PER_S = 300
_TURN_S = 0.05
_KEYS = 400
_TIMEOUT_S = 10.0
_JOIN_S = 15.0


@dataclass(slots=True)
class Served:
    """What one version answered; the times are seconds on a monotonic clock."""

    answered: int = 0
    right: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 without any."""
        return self.right / self.answered if self.answered else 0.0


@dataclass(slots=True)
class Count:
    """What came of the live requests."""

    sent: int = 0
    answered: set[str] = field(default_factory=set)
    errors: int = 0
    versions: dict[str, Served] = field(default_factory=dict)
    variants: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, answer: Answer, right: bool, variant: str, now: float) -> None:
        """Count the first outcome of a request."""
        if answer.id in self.answered:
            return
        self.answered.add(answer.id)
        if answer.error is not None:
            self.errors += 1
            return
        served = self.versions.setdefault(answer.version, Served(first_at=now))
        served.answered += 1
        served.right += right
        served.last_at = now
        self.variants[variant, answer.version] += 1


class LiveTraffic:
    """Sends and judges on a thread of its own until it is closed; only unseen images are sent."""

    def __init__(self, bootstrap_servers: str, data: Digits) -> None:
        address = {"bootstrap.servers": bootstrap_servers, "log_level": 2}
        self._producer = Producer({**address, "linger.ms": 5, "partitioner": "murmur2_random"})
        self._answers = Consumer(
            {
                **address,
                "group.id": "inferfleet.demo.live",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 10,
            }
        )
        partitions = self._producer.list_topics(f"{ROUTE}.results", timeout=_TIMEOUT_S).topics
        self._answers.assign(
            [
                TopicPartition(f"{ROUTE}.results", each, 0)
                for each in partitions[f"{ROUTE}.results"].partitions
            ]
        )
        self._digits = data.digits
        self._rows = np.flatnonzero(data.unseen)
        self._images = data.images
        self.count = Count()
        self._sending = True
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="live-traffic", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def check(self) -> None:
        """Raise DemoError where sending or reading has failed."""
        if self._failure is not None:
            raise DemoError(f"live traffic: {self._failure}")

    def stop_sending(self) -> None:
        """Send nothing more; answers are still read."""
        self._sending = False

    def close(self) -> None:
        """End the thread and give the connections back."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
        self._producer.flush(_TIMEOUT_S)
        self._answers.close()

    def _run(self) -> None:
        try:
            began_at = time.monotonic()
            while not self._stopped.is_set():
                due = int((time.monotonic() - began_at) * RATE_PER_S)
                while self._sending and self.count.sent < due:
                    self._send(self.count.sent)
                self._producer.poll(0)
                for message in self._answers.consume(500, _TURN_S):
                    self._judge(message)
        except Exception as error:
            self._failure = error

    def _send(self, number: int) -> None:
        request_id = f"live-{number}"
        self._producer.produce(
            f"{ROUTE}.requests",
            key=b"user-%d" % (number * 7 % _KEYS),
            value=v2_json(request_id, "image", "FP32", self._images[self._row(number)]),
        )
        self.count.sent += 1

    def _row(self, number: int) -> int:
        return int(self._rows[number % len(self._rows)])

    def _judge(self, message: Message) -> None:
        failure = message.error()
        if failure is not None:
            raise DemoError(failure.str())
        headers = {
            name: value if isinstance(value, bytes) else b"" for name, value in message.headers() or []
        }
        answer = decode_answer(ROUTE, message.value() or b"", headers)
        number = int(answer.id.rpartition("-")[2])
        right = answer.error is None and int(answer.outputs["label"][0]) == int(
            self._digits[self._row(number)]
        )
        self.count.note(answer, right, _variant(headers), time.monotonic())
        if answer.error is None:
            label = {"id": answer.id, "correct": int(right)}
            self._producer.produce(FEEDBACK, key=message.key(), value=json.dumps(label).encode())


def _variant(headers: Mapping[str, bytes]) -> str:
    served = headers.get("inferfleet-served", b"").decode()
    return dict(part.partition("=")[::2] for part in served.split(";")).get("variant", "")
