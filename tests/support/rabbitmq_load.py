"""An open loop over RabbitMQ that outlives its node: what is not confirmed is sent again under its id."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

import pika
from pika.exceptions import AMQPError

from tests.support.fleet_traffic import Row, row_of, v2_body
from tests.support.rabbitmq_fleet import assert_right
from tests.support.rabbitmq_queues import Received
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

_AGAIN_S = 0.1
FAILURES = (AMQPError, OSError)


def plain(server: RabbitServer) -> Any:
    """Return a blocking connection of a plain client."""
    parameters = pika.URLParameters(server.url)
    parameters.socket_timeout = parameters.blocked_connection_timeout = 15
    parameters.heartbeat = 10
    return pika.BlockingConnection(parameters)


class Judged(NamedTuple):
    """What became of a load: copies beyond the first, and the longest time without an outcome, seconds."""

    sent: int
    duplicates: int
    silence_s: float


class Load:
    """Sends numbered requests to ``queue`` at ``rate`` a second, and reads their outcomes from ``answers``.

    ``connect`` gives a blocking connection to a node that is up; it is called again after each failure.
    """

    def __init__(self, connect: Callable[[], Any], queue: str, answers: str, rate: float = 200.0) -> None:
        self._connect = connect
        self._queue = queue
        self._answers = answers
        self._rate = rate
        self._stop_sending = threading.Event()
        self._stop = threading.Event()
        self.rows: dict[str, Row] = {}
        """What is confirmed by the broker."""
        self.outcomes: list[Received] = []
        self.ids: set[str] = set()
        self.arrivals: list[float] = []
        self.sent_again = 0
        self._threads = [
            threading.Thread(target=self._send_all, name="load-sender", daemon=True),
            threading.Thread(target=self._read_all, name="load-reader", daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_sending.set()
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    @property
    def answered(self) -> int:
        """How many requests have an outcome."""
        return len(self.ids)

    def wait_progress(self, more: int = 50, timeout_s: float = 60.0) -> None:
        """Return once so many more requests are answered."""
        goal = self.answered + more
        wait_until(lambda: self.answered >= goal, timeout_s, f"{more} more requests are answered")

    def judged(self, timeout_s: float = 90.0, since: float = 0.0) -> Judged:
        """Stop sending, wait for the last outcome, and judge them all."""
        self._stop_sending.set()
        self._threads[0].join(30)
        wait_until(
            lambda: self.rows.keys() <= self.ids,
            timeout_s,
            "every request is answered",
            every_s=0.1,
        )
        duplicates = assert_right(self.rows, self.outcomes)
        times = [at for at in self.arrivals if at >= since]
        silence = max((b - a for a, b in pairwise(times)), default=0.0)
        return Judged(len(self.rows), duplicates, silence)

    def _send_all(self) -> None:
        number, started = 0, time.monotonic()
        while not self._stop_sending.is_set():
            with contextlib.suppress(*FAILURES), contextlib.closing(self._connect()) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                while not self._stop_sending.is_set():
                    name, row = f"r-{number}", row_of(number)
                    properties = pika.BasicProperties(delivery_mode=2, message_id=name)
                    channel.basic_publish("", self._queue, v2_body([row]), properties, mandatory=True)
                    self.rows[name] = row
                    number += 1
                    ahead = number / self._rate - (time.monotonic() - started)
                    if ahead > 0:
                        self._stop_sending.wait(min(ahead, 1.0))
            # Whether the last one arrived is unknown: it goes again under its own id.
            self.sent_again += 1
            self._stop_sending.wait(_AGAIN_S)

    def _read_all(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(*FAILURES), contextlib.closing(self._connect()) as connection:
                channel = connection.channel()
                channel.basic_qos(prefetch_count=500)
                for method, properties, body in channel.consume(self._answers, inactivity_timeout=0.05):
                    if method is not None:
                        found = Received(
                            body, properties, method.redelivered, method.exchange, method.routing_key
                        )
                        if not method.redelivered or found.headers["inferfleet-id"] not in self.ids:
                            self.outcomes.append(found)
                        self.ids.add(str(found.headers["inferfleet-id"]))
                        self.arrivals.append(time.monotonic())
                        channel.basic_ack(method.delivery_tag)
                    if self._stop.is_set():
                        return
            self._stop.wait(_AGAIN_S)
