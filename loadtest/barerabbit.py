"""The bare loop on RabbitMQ by aio-pika: consume, decode, one model call, encode, publish, and nothing else.

It is the yardstick of the RabbitMQ figures. Results are confirmed before requests are acknowledged, which is
how the library is used; nothing is routed or validated, and a fault ends it. Run as
``python -m loadtest.barerabbit JOB.json``; SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import aio_pika
import msgspec
from aio_pika.abc import AbstractIncomingMessage

from loadtest.bareloop import STEPS


class RabbitJob(msgspec.Struct, frozen=True):
    """One run of a bare loop on RabbitMQ: results go to ``exchange`` with ``key``, ``prefetch`` are open."""

    workload: str
    url: str
    requests: str
    exchange: str
    key: str
    model_folder: str
    batch: int = 500
    prefetch: int = 1_000


def freeze() -> None:
    """Keep the garbage collector from walking what stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Loop:
    def __init__(self, job: RabbitJob) -> None:
        self._job = job
        self._step = STEPS[job.workload](Path(job.model_folder))
        self._arrived: deque[AbstractIncomingMessage] = deque()
        self._woken = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        job = self._job
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        # Two connections: a broker that slows a publisher down stops reading its acknowledgements as well.
        async with await aio_pika.connect(job.url) as taking, await aio_pika.connect(job.url) as giving:
            channel = await taking.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=job.prefetch)
            results = await giving.channel(publisher_confirms=True, on_return_raises=True)
            exchange = await results.get_exchange(job.exchange)
            queue = await channel.get_queue(job.requests)
            freeze()
            await queue.consume(self._take)
            while True:
                await self._woken.wait()
                if self._stopping:
                    return
                await self._answer(exchange)

    def _stop(self) -> None:
        self._stopping = True
        self._woken.set()

    async def _take(self, message: AbstractIncomingMessage) -> None:
        self._arrived.append(message)
        self._woken.set()

    async def _answer(self, exchange: aio_pika.abc.AbstractExchange) -> None:
        arrived, key = self._arrived, self._job.key
        batch = [arrived.popleft() for _ in range(min(len(arrived), self._job.batch))]
        if not arrived:
            self._woken.clear()
        answers = self._step([message.body for message in batch])
        persistent = aio_pika.DeliveryMode.PERSISTENT
        await asyncio.gather(
            *[exchange.publish(aio_pika.Message(answer, delivery_mode=persistent), key) for answer in answers]
        )
        await batch[-1].ack(multiple=True)


def main(job: RabbitJob) -> None:
    """Loop until SIGTERM or SIGINT."""

    async def run() -> None:
        await _Loop(job).run()

    with asyncio.Runner(loop_factory=fastest_loop()) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(run())


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RabbitJob))
