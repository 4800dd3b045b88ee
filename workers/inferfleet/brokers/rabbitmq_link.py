"""The worker's way to RabbitMQ: one thread with an event loop, and two connections that are kept up.

One connection takes, the other publishes: a broker that is short of memory stops reading from connections
that publish, and acknowledgements must go on. Everything behind the link belongs to its loop; the worker's
thread hands work over with :meth:`RabbitLink.call` and never waits for the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import structlog
from aiormq.connection import Connection
from yarl import URL

from inferfleet.brokers.rabbitmq_tap import Tap, open_tapped
from inferfleet.config import Config
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.ports import Clock
from inferfleet.rabbitmq_access import AMQP_FAILURES, AmqpPlace, amqp_failure, refuses_for_good

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 5.0
CONNECT_TIMEOUT_S = 10.0
STEADY_AFTER_S = 5.0
"""A connection that lasted so long was a good one: the next is tried at once."""
SILENT_HEARTBEATS = 2.5
"""A connection on which nothing was heard for so many heartbeats is dead, whatever the socket says."""
TICK_S = 0.25
TOLD_AGAIN_AFTER_S = 30.0
CLOSE_TIMEOUT_S = 2.0
START_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 32 << 20
BUFFER_BYTES = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class RabbitOptions:
    """Where RabbitMQ is and how to speak to it; the values of ``[rabbitmq]`` in ``fleet.toml``.

    ``credentials`` are asked for at each connection; an empty user name or password leaves what the URL says.
    Of a body longer than ``max_body_bytes`` the rest is not kept, and about ``buffer_bytes`` are read ahead.
    """

    urls: tuple[str, ...] = ("amqp://localhost/",)
    credentials: Callable[[], tuple[str, str]] = lambda: ("", "")
    heartbeat_s: int = 10
    publish_timeout_s: float = 15.0
    ca_file: str = ""
    insecure: bool = False
    client_name: str = "inferfleet"
    consumer_timeout_s: float = 1800.0
    max_body_bytes: int = MAX_BODY_BYTES
    buffer_bytes: int = BUFFER_BYTES

    def address(self, url: str) -> URL:
        """Return what to open: a URL with the credentials of now, and with TLS and heartbeats as wished."""
        given = URL(url).update_query({"heartbeat": self.heartbeat_s})
        if self.ca_file:
            given = given.update_query({"cafile": self.ca_file})
        if self.insecure:
            given = given.update_query({"no_verify_ssl": "1"})
        username, password = self.credentials()
        if username:
            given = given.with_user(username)
        if password:
            given = given.with_password(password)
        return given


def rabbit_options(config: Config) -> RabbitOptions:
    """Return the options that a configuration asks for; a password given by file is read at each connect."""
    section, limits = config.rabbitmq, config.limits

    def credentials() -> tuple[str, str]:
        return config.current("rabbitmq.username"), config.current("rabbitmq.password")

    return RabbitOptions(
        urls=tuple(each.strip() for each in section.url.split(",")),
        credentials=credentials,
        heartbeat_s=section.heartbeat_s,
        publish_timeout_s=section.publish_timeout_s,
        ca_file=str(config.base / section.ca_file) if section.ca_file else "",
        insecure=section.insecure,
        client_name=f"{config.group}.{config.worker_id}",
        consumer_timeout_s=section.consumer_timeout_s,
        # Twice what a request may have: what is cut must still be seen to be too large.
        max_body_bytes=max(2 * limits.max_request_bytes, 1 << 20),
        buffer_bytes=max(min(limits.in_flight_bytes // 4, BUFFER_BYTES), 1 << 20),
    )


class Connected(NamedTuple):
    """An open connection: the library's for what is rare, the tap for the record path."""

    connection: Connection
    tap: Tap


class Line:
    """One connection that is kept up: after a failure the next address is tried, with growing pauses."""

    def __init__(self, use: str, options: RabbitOptions, clock: Clock) -> None:
        self.use = use
        self.denied: str | None = None
        """Why the broker will not let us in, where a person must mend it."""
        self.away: str | None = "not connected yet"
        """Why there is no connection; ``None`` while there is one."""
        self.rebuilds = 0
        self._options = options
        self._clock = clock
        self._connected: Connected | None = None
        self._up = asyncio.Event()
        self._told: tuple[str, float] | None = None

    def __repr__(self) -> str:
        return f"Line({self.use}, {'up' if self.away is None else self.away})"

    @property
    def now(self) -> Connected | None:
        """Return the connection, if there is one."""
        return self._connected

    async def connected(self) -> Connected:
        """Return the connection, waiting for one."""
        while self._connected is None:
            await self._up.wait()
        return self._connected

    async def keep_up(self) -> None:
        """Connect, wait for the end, connect again; ends when it is cancelled."""
        pause_s = FIRST_PAUSE_S
        try:
            for url in itertools.cycle(self._options.urls):
                started = self._clock.monotonic()
                self.away = await self._once(url)
                lasted = self._clock.monotonic() - started
                pause_s = FIRST_PAUSE_S if lasted > STEADY_AFTER_S else min(pause_s * 2, LAST_PAUSE_S)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        finally:
            await self._close()

    async def _once(self, url: str) -> str:
        """Use one address for as long as it lasts; return why it ended."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection, tap = await open_tapped(
                    self._options.address(url), self._options.max_body_bytes, self._options.client_name
                )
        except (*AMQP_FAILURES, ConfigError, ValueError) as error:
            return self._failed(url, error)
        self._connected = Connected(connection, tap)
        self.denied = self.away = self._told = None
        log.info("rabbitmq_connected", use=self.use, broker=_shown(url))
        self._up.set()
        await tap.lost.wait()
        self._up.clear()
        self._connected = None
        reason = self.away = await _reason(connection)
        log.warning("rabbitmq_lost", use=self.use, broker=_shown(url), reason=reason)
        await _closed(connection)
        return reason

    def _failed(self, url: str, error: BaseException) -> str:
        place = AmqpPlace((url,))
        text = str(error) if isinstance(error, ConfigError) else str(amqp_failure(place, error))
        if refuses_for_good(error):
            self.denied = text
        now = self._clock.monotonic()
        if self._told is None or self._told[0] != text or now - self._told[1] >= TOLD_AGAIN_AFTER_S:
            self._told = (text, now)
            log.warning("rabbitmq_away", use=self.use, error=text)
        return text

    def rebuild(self, reason: str) -> None:
        """Give the connection up; another one follows."""
        if self._connected is not None:
            self.rebuilds += 1
            log.warning("rabbitmq_rebuilt", use=self.use, reason=reason)
            self._connected.tap.abort()

    def tick(self) -> None:
        """Give a connection up on which nobody has spoken for too long."""
        patience_s = SILENT_HEARTBEATS * self._options.heartbeat_s
        if self._connected is not None and self._connected.tap.silent_s() > patience_s:
            self.rebuild(f"nothing was heard for {patience_s:g} s")

    async def _close(self) -> None:
        connected, self._connected = self._connected, None
        if connected is not None:
            await _closed(connected.connection)
            connected.tap.abort()


async def _closed(connection: Connection) -> None:
    """Close a connection, or let the library find out that it is gone, within a bound."""
    with contextlib.suppress(*AMQP_FAILURES):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await connection.close()


async def _reason(connection: Connection) -> str:
    """Return what the library heard of the end, given a moment to hear it."""
    closing = connection.closing
    await asyncio.wait([closing], timeout=1.0)
    error = closing.exception() if closing.done() and not closing.cancelled() else None
    return " ".join(str(error or "the socket was closed").split())


class RabbitLink:
    """The thread ``rabbitmq``; ``wake`` is called from it when there is news that a worker may wait for.

    A connection is opened when the first intake or outlet asks for it.
    """

    def __init__(
        self,
        options: RabbitOptions,
        clock: Clock | None = None,
        wake: Callable[[], None] = lambda: None,
        *,
        new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> None:
        self.options = options
        self.clock = clock or _SystemClock()
        self.wake = wake
        self._new_loop = new_loop or _fast_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticking: list[Callable[[], None]] = []
        _silence_libraries()
        self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise BrokerError("the thread for RabbitMQ did not start its event loop")

    def __repr__(self) -> str:
        return f"RabbitLink({self.taking!r}, {self.publishing!r})"

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Let the link's thread call ``function`` soon; after :meth:`close` nothing happens."""
        if not self._closed and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(function, *arguments)

    def ask(self, question: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Return what ``question`` answers on the link's thread; ``None`` where it does not in time."""
        if self._closed or self._loop is None:
            question.close()
            return None
        future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return future.result(timeout_s)
        except (TimeoutError, asyncio.CancelledError):
            future.cancel()
            return None

    def close(self, timeout_s: float = 5.0) -> None:
        """Close both connections and end the thread, within a bound."""
        if self._closed:
            return
        self.call(self._stop.set)
        self._closed = True
        self._thread.join(timeout_s)

    # What follows runs on the link's thread.

    def keep(self, task: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task for as long as the link lives, or until somebody cancels it."""
        running = asyncio.get_running_loop().create_task(task)
        self._tasks.add(running)
        running.add_done_callback(self._ended)
        return running

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("rabbitmq_task_failed", exc_info=task.exception())

    def every_tick(self, function: Callable[[], None]) -> None:
        """Call ``function`` several times a second from now on."""
        self._ticking.append(function)

    def open(self, line: Line) -> None:
        """Open a connection and keep it up; once is enough."""
        if line.tick not in self._ticking:
            self.every_tick(line.tick)
            self.keep(line.keep_up())

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            self._loop = runner.get_loop()
            self._loop.set_exception_handler(_unhandled)
            runner.run(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self.taking = Line("taking", self.options, self.clock)
        self.publishing = Line("publishing", self.options, self.clock)
        self._started.set()
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stop.wait()
            self._tick()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tick(self) -> None:
        for function in self._ticking:
            try:
                function()
            except Exception:
                log.exception("rabbitmq_tick_failed")


class _SystemClock:
    """The clocks of this machine."""

    def monotonic(self) -> float:
        """Seconds, for spans."""
        return time.monotonic()

    def utc_ms(self) -> int:
        """Epoch milliseconds."""
        return time.time_ns() // 1_000_000


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop's event loop where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop  # type: ignore[no-any-return]


def _silence_libraries() -> None:
    """Let the client library be quiet: what it would say, the link says."""
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Hear of exceptions that no task of the library has asked for: a closed channel leaves some."""
    del loop
    log.debug("rabbitmq_unhandled", reason=context.get("message"), error=repr(context.get("exception")))


def _shown(url: str) -> str:
    return str(URL(url).with_user(None).with_query(None))
