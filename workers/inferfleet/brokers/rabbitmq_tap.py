"""A connection of aiormq's whose bytes pass through our splitter first.

The library keeps what is rare: the handshake, TLS, heartbeats, opening and closing channels, topology.
Between its reader and the socket stands the *tap*, which takes the frames of the record path out of the
stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiormq.connection import Connection, TransportFactory
from yarl import URL

from inferfleet.brokers.rabbitmq_frames import HEARTBEAT, FrameError, Splitter

WRITE_HIGH_BYTES = 1 << 20
"""How much may wait in the socket's buffer before publishing waits, too."""
_SIGN_OF_LIFE_S = 1.0


class Tap(asyncio.StreamReaderProtocol):
    """Between socket and library; belongs to the thread of its loop, as everything here."""

    def __init__(self, splitter: Splitter, reader: asyncio.StreamReader) -> None:
        self._loop_time = asyncio.get_running_loop().time
        super().__init__(reader, loop=asyncio.get_running_loop())
        self.splitter = splitter
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        """The connection is gone, for whatever reason."""
        self.writable = True
        self.on_writable: list[Callable[[], None]] = []
        self.heard_at = self._loop_time()
        self._told_at = self.heard_at
        self.held = False
        """Whether we have stopped reading: nothing is heard, and nobody is to blame."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; the library writes to it as well, whole frames only."""
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        """Cut what has come; what is not of the record path goes on to the library."""
        now = self.heard_at = self._loop_time()
        was_blocked = self.splitter.blocked
        try:
            others = self.splitter.feed(data)
        except FrameError:
            self.abort()
            return
        if others:
            self._told_at = now
            super().data_received(others)
        elif now - self._told_at >= _SIGN_OF_LIFE_S:
            self._sign_of_life(now)
        if was_blocked and not self.splitter.blocked:
            self._go_on()

    def _sign_of_life(self, now: float) -> None:
        """Let the library know that the broker lives: it counts the frames that it sees itself."""
        self._told_at = now
        super().data_received(HEARTBEAT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits for the end."""
        super().connection_lost(exc)
        self.lost.set()
        self._go_on()

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        super().pause_writing()
        self.writable = False

    def resume_writing(self) -> None:
        """The socket's buffer has room again."""
        super().resume_writing()
        self.writable = True
        self._go_on()

    def _go_on(self) -> None:
        for each in self.on_writable:
            each()

    def write(self, frames: bytes) -> None:
        """Send whole frames; on a connection that is gone they are gone, too."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frames)

    def hold(self) -> None:
        """Read no more from the socket: the broker waits until :meth:`release`."""
        if not self.held and self.transport is not None and not self.transport.is_closing():
            self.held = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Read again."""
        if self.held and self.transport is not None:
            self.held = False
            self.heard_at = self._loop_time()
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def silent_s(self) -> float:
        """Return for how long nothing has come, although we listened."""
        now = self._loop_time()
        if self.held:
            self._sign_of_life(now)
            return 0.0
        return now - self.heard_at

    def abort(self) -> None:
        """End the connection without a word: nobody may be there to hear it."""
        if self.transport is not None:
            self.transport.abort()


class _Through(TransportFactory):
    """Opens sockets for aiormq, each with the tap in between."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self.tap: Tap | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the library's ends of the connection."""
        provider = kwargs.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        tap = self.tap = Tap(self._splitter, reader)
        where = url.host or "localhost", url.port or 5672
        transport, _ = await loop.create_connection(lambda: tap, *where, ssl=context, **kwargs)
        return reader, asyncio.StreamWriter(transport, tap, reader, loop)


async def open_tapped(url: URL, max_body_bytes: int, name: str) -> tuple[Connection, Tap]:
    """Return an open connection and its tap. Raises what aiormq and the socket raise."""
    through = _Through(Splitter(max_body_bytes))
    connection = Connection(
        url,
        loop=asyncio.get_running_loop(),
        transport_factory=through,
        client_properties={"connection_name": name, "product": "inferfleet"},
    )
    try:
        await connection.connect()
    except BaseException:
        if through.tap is not None:
            through.tap.abort()
        raise
    if through.tap is None:
        raise ConnectionError("aiormq opened a connection without its transport factory")
    return connection, through.tap
