"""The bare loop on RabbitMQ by pika: the same as :mod:`loadtest.barerabbit`, for the reader to compare.

It runs on pika's ``SelectConnection``, because the blocking one waits for the confirm of every message.
Run as ``python -m loadtest.barepika JOB.json``; SIGTERM ends it.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pika
from pika.adapters.select_connection import IOLoop

from loadtest.bareloop import STEPS
from loadtest.barerabbit import RabbitJob, freeze


class _Loop:
    """Two connections on one I/O loop; every method runs there."""

    def __init__(self, job: RabbitJob) -> None:
        self._job = job
        self._step = STEPS[job.workload](Path(job.model_folder))
        self._io = IOLoop()
        self._arrived: list[tuple[int, bytes]] = []
        self._scheduled = False
        # The last result of each batch and the last request it answers, oldest first.
        self._batches: deque[tuple[int, int]] = deque()
        self._published = self._confirmed = 0
        self._late: set[int] = set()
        self._failure: BaseException | None = None
        self._properties = pika.BasicProperties(delivery_mode=2)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._io.add_callback_threadsafe(self._io.stop))
        self._connect(self._giving)
        freeze()
        self._io.start()
        if self._failure is not None:
            raise self._failure

    def _connect(self, use: Any) -> None:
        def lost(_connection: Any, error: BaseException) -> None:
            self._failure = error
            self._io.stop()

        pika.SelectConnection(
            pika.URLParameters(self._job.url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=use),
            on_open_error_callback=lost,
            on_close_callback=lost,
            custom_ioloop=self._io,
        )

    def _giving(self, channel: Any) -> None:
        self._results = channel
        channel.confirm_delivery(self._on_confirm, callback=lambda _frame: self._connect(self._taking))

    def _taking(self, channel: Any) -> None:
        self._requests = channel
        channel.basic_qos(prefetch_count=self._job.prefetch)
        channel.basic_consume(self._job.requests, self._take)

    def _take(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        self._arrived.append((method.delivery_tag, body))
        if len(self._arrived) >= self._job.batch:
            self._answer()
        elif not self._scheduled:
            # Runs once everything that this turn of the I/O loop has read is taken.
            self._scheduled = True
            self._io.add_callback(self._answer_rest)

    def _answer_rest(self) -> None:
        self._scheduled = False
        if self._arrived:
            self._answer()

    def _answer(self) -> None:
        batch, self._arrived = self._arrived, []
        job, publish, properties = self._job, self._results.basic_publish, self._properties
        for answer in self._step([body for _, body in batch]):
            publish(job.exchange, job.key, answer, properties, mandatory=True)
        self._published += len(batch)
        self._batches.append((self._published, batch[-1][0]))

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        if not isinstance(method, pika.spec.Basic.Ack):
            raise RuntimeError(f"the broker refused result {method.delivery_tag}")
        if method.multiple:
            self._confirmed = max(self._confirmed, method.delivery_tag)
        else:
            self._late.add(method.delivery_tag)
        # Confirms may come out of order; what follows the confirmed prefix without a gap joins it.
        while self._late and (following := self._confirmed + 1) in self._late:
            self._late.remove(following)
            self._confirmed = following
        last_request = 0
        while self._batches and self._batches[0][0] <= self._confirmed:
            last_request = self._batches.popleft()[1]
        if last_request:
            self._requests.basic_ack(last_request, multiple=True)


def main(job: RabbitJob) -> None:
    """Loop until SIGTERM or SIGINT."""
    _Loop(job).run()


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RabbitJob))
