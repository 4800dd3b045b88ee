"""RabbitMQ's side of a load test: queues, fast filling, and a cheap view of how many messages wait."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pika
from pika.exceptions import AMQPError

from loadtest.workloads import Fleet, Workload
from tests.support.rabbitmq_publisher import Outgoing, SteadyPublisher
from tests.support.rabbitmq_queues import RabbitQueues

_WINDOW = 5_000


class Ends(NamedTuple):
    """The two ends of one run: a request queue, and a result queue behind an exchange of its own."""

    requests: str
    results: str

    @property
    def exchange(self) -> str:
        """Where results are published, with the name of their queue as routing key."""
        return f"{self.results}.exchange"

    @property
    def destination(self) -> str:
        """Exchange and routing key, as a route's ``results`` names them behind ``rabbitmq:``."""
        return f"{self.exchange}/{self.results}"

    @property
    def run(self) -> str:
        """A name that no other run has."""
        return self.results.rsplit(".", 1)[-1]


class Rabbit(RabbitQueues):
    """A node on which queues are made and measured; what is made here goes with :meth:`close`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._made: dict[Ends, Fleet] = {}

    def ends(self, label: str) -> Ends:
        """Return names that nobody else has."""
        run = uuid.uuid4().hex[:8]
        return Ends(f"loadtest.{label}.requests.{run}", f"loadtest.{label}.results.{run}")

    def create(self, ends: Ends, fleet: Fleet, config: Path) -> None:
        """Create all that a fleet with one route needs, by its own plan, whoever will take the requests."""
        command = [
            sys.executable,
            "-m",
            "inferfleet.cli",
            "--config",
            str(config),
            "topics",
            "plan",
            "--apply",
        ]
        self._made[ends] = fleet
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise RuntimeError(f"topics plan --apply failed:\n{done.stdout}{done.stderr}")

    def delete(self, ends: Ends) -> None:
        """Delete what :meth:`create` made."""
        self.delete_queue(*ends, *self._made.pop(ends).derived)
        self.delete_exchange(ends.exchange)

    def close(self) -> None:
        """Delete all that is left."""
        for ends in list(self._made):
            self.delete(ends)

    def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.consumer_count)

    @contextlib.contextmanager
    def observer(self, queue: str) -> Iterator[Callable[[], int]]:
        """Yield a function that returns how many messages of ``queue`` are ready, by one connection."""
        # Nobody answers heartbeats between two looks.
        with self.channel(heartbeat=0) as channel:
            yield lambda: int(channel.queue_declare(queue, passive=True).method.message_count)

    def fill(self, queue: str, workload: Workload, count: int, seed: int = 1) -> float:
        """Write requests 0 to ``count``; return seconds, once all of them are confirmed and ready.

        Without confirms it would be twice as fast, but a quorum queue drops what it is behind with when its
        publisher leaves.
        """
        headers = {name: value.decode() for name, value in workload.headers or ()} or None
        properties = pika.BasicProperties(delivery_mode=2, headers=headers)
        started = time.monotonic()
        with SteadyPublisher(self.url, window=_WINDOW) as publisher:
            publisher.publish_all(
                [Outgoing(queue, body, properties) for body in workload.bodies(count, seed)]
            )
            publisher.wait(300)
        self.wait_depth(queue, count, 60)
        return time.monotonic() - started


class Depth:
    """How many messages of a queue are ready, for as long as the node comes and goes."""

    def __init__(self, rabbit: Rabbit, queue: str) -> None:
        self._rabbit = rabbit
        self._queue = queue
        self._open = contextlib.ExitStack()
        self._look: Callable[[], int] | None = None

    def __call__(self) -> int | None:
        """Return the number, or None while the node does not answer."""
        try:
            if self._look is None:
                self._look = self._open.enter_context(self._rabbit.observer(self._queue))
            return self._look()
        except (AMQPError, OSError):
            self.close()
            return None

    def close(self) -> None:
        """Give the connection back."""
        self._look = None
        with contextlib.suppress(AMQPError, OSError):
            self._open.close()
