"""A TCP proxy between a client and a server, which lets connections go dead, slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

_CHUNK = 1 << 16
_CHUNKS_ON_THE_WAY = 64
_ANSWERS_WITHIN_S = 10.0
# Closing with this option resets the connection instead of ending it in order.
_RESET = struct.pack("ii", 1, 0)

Writer = asyncio.StreamWriter
Chunks = asyncio.Queue[tuple[float, bytes]]
"""What is on its way: when it is due, and the bytes; none of them ends the stream."""


class TcpProxy:
    """Listens on ``port`` and forwards every connection to a loopback port; usable as a context manager.

    ``latency_ms`` is how much later each byte arrives, either way; it may be changed at any time.
    """

    def __init__(self, target: int, *, latency_ms: float = 0.0) -> None:
        self.target = target
        self.latency_ms = latency_ms
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._writers: set[Writer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWERS_WITHIN_S)
        self._loop.close()

    def url(self, url: str) -> str:
        """Return ``url`` with this proxy in the place of its host and port."""
        parts = urlsplit(url)
        user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        return urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{self.port}"))

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._tasks)

    def stall(self) -> None:
        """Forward nothing more, in either direction: connections stay open and new ones are accepted."""
        self._call(self._set_flowing(False))

    def resume(self) -> None:
        """Forward again, what was sent meanwhile too."""
        self._call(self._set_flowing(True))

    def drop(self) -> None:
        """Reset every connection; new ones are forwarded."""
        self._call(self._reset())

    def _call(self, asked: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result(_ANSWERS_WITHIN_S)

    async def _listen(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # Aborted transports close their sockets in the loop's next turn.

    async def _set_flowing(self, on: bool) -> None:
        if on:
            self._flows.set()
        else:
            self._flows.clear()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            with contextlib.suppress(OSError):
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        """Forward one connection until both sides have ended, or either is cut."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        self._writers.add(writer)
        try:
            # A stalled proxy opens nothing either: the client sees a connection that never says a word.
            await self._flows.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as ways:
                for source, sink in ((reader, far_writer), (far_reader, writer)):
                    on_the_way: Chunks = asyncio.Queue(_CHUNKS_ON_THE_WAY)
                    ways.create_task(self._read(source, on_the_way))
                    ways.create_task(self._deliver(on_the_way, sink))
        except* (OSError, asyncio.CancelledError):
            pass  # Whatever cuts one side cuts both.
        finally:
            for each in writers:
                self._writers.discard(each)
                each.transport.abort()
            self._tasks.discard(task)

    async def _read(self, source: asyncio.StreamReader, on_the_way: Chunks) -> None:
        chunk = b"more"
        while chunk:
            try:
                chunk = await source.read(_CHUNK)
            except OSError:
                await self._flows.wait()  # A stalled proxy does not tell either side that the other is gone.
                raise
            await on_the_way.put((self._loop.time() + self.latency_ms / 1000, chunk))

    async def _deliver(self, on_the_way: Chunks, writer: Writer) -> None:
        while True:
            due_at, chunk = await on_the_way.get()
            await asyncio.sleep(max(0.0, due_at - self._loop.time()))
            await self._flows.wait()
            if not chunk:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()
