"""The client for asyncio: the rules of the threaded one, its waiting done by the loop itself.

Results are read by one task with redis-py's asyncio client; deliveries are heard by a thread of the sender's,
which tells the loop of failures only. Use it from the loop that entered it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from inferfleet.client.inbox import Done, Inbox
from inferfleet.client.outcome import ClientError, Outcome, Result, ResultTimeout, SubmitError
from inferfleet.client.request import Inputs, Request, RequestOptions
from inferfleet.client.sender import Message, Sender
from inferfleet.client.senders import Senders
from inferfleet.client.session import open_session
from inferfleet.client.sync import BLOCK_MS, SWEEP_ROWS
from inferfleet.client.window import Window
from inferfleet.config import Config
from inferfleet.redis_access import REDIS_ERRORS, open_redis_async
from inferfleet.wire.stored import reply_key, result_key

_FIRST_DELAY_S, _MAX_DELAY_S = 0.02, 0.5


class AsyncClient:
    """Submits requests and awaits their results; the arguments are those of ``Client``."""

    def __init__(
        self,
        config: Config | str | os.PathLike[str] | None = None,
        *,
        bootstrap_servers: str | None = None,
        rabbitmq_url: str | None = None,
        redis_url: str | None = None,
        fleet: str | None = None,
        routes: Mapping[str, str] | None = None,
        reply: bool = True,
    ) -> None:
        self._session = open_session(
            config,
            bootstrap_servers=bootstrap_servers,
            rabbitmq_url=rabbitmq_url,
            redis_url=redis_url,
            fleet=fleet,
            routes=routes,
            reply=reply,
        )
        self._inbox = Inbox()
        self._sender: Sender | None = None
        self._reader: asyncio.Task[None] | None = None
        self._redis: Any = None
        self._closed = False
        self._trouble = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, route: str, inputs: Inputs | bytes, **options: Unpack[RequestOptions]) -> str:
        """Hand one request over and return its id; takes and raises what ``Client.submit`` does."""
        return await self.send(route, Request(inputs, **options))

    async def send(self, route: str, request: Request, done: Done | None = None) -> str:
        """Submit a ready :class:`Request`; ``done`` is called on the loop with its outcome."""
        message, payload = self._session.prepare(route, request)
        sender = self._running(message)
        if self._session.reply is not None:
            self._inbox.expect(message.id, route, payload, done)
        try:
            if not sender.try_send(message):
                # The queue is full: wait for room off the loop, where blocking is allowed.
                await asyncio.to_thread(sender.send, message)
        except SubmitError:
            self._inbox.forget(message.id)
            raise
        return message.id

    async def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until the broker has all that was submitted; :class:`SubmitError` if it does not take one."""
        if self._sender is not None:
            await asyncio.to_thread(self._sender.flush, timeout_s)

    async def result(self, request_id: str, timeout: float = 30.0, *, route: str | None = None) -> Result:  # noqa: ASYNC109 - a bound is part of the contract
        """Wait up to ``timeout`` seconds for the outcome of an id; raises what ``Client.result`` raises."""
        ends_at = time.monotonic() + timeout
        came: asyncio.Queue[Outcome] = asyncio.Queue()
        done = came.put_nowait
        if not self._inbox.claim(request_id, done):
            return await self._poll(request_id, self._session.stored_route(route), ends_at, timeout)
        try:
            async with asyncio.timeout(timeout):
                outcome = await came.get()
        except TimeoutError:
            await self._look_last(request_id)
            if came.empty():
                raise self._late(request_id, timeout) from None
            outcome = came.get_nowait()
        finally:
            self._inbox.leave(request_id, done)
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    async def map(
        self,
        route: str,
        items: Iterable[Inputs | bytes | Request],
        *,
        max_in_flight: int = 256,
        ordered: bool = True,
        timeout: float = 60.0,  # noqa: ASYNC109 - a bound is part of the contract
    ) -> AsyncIterator[Result]:
        """Submit all ``items`` and yield their results, as ``Client.map`` does."""
        window = Window(max_in_flight, timeout, ordered=ordered)
        came: asyncio.Queue[tuple[int, Outcome]] = asyncio.Queue()
        rest = iter(items)
        more = True
        try:
            while True:
                while more and window.has_room:
                    item = next(rest, None)
                    more = item is not None
                    if item is not None:
                        await self._launch(route, item, window, came)
                outcome = window.take()
                if outcome is None:
                    if window.empty:
                        return
                    window.arrived(*await self._next_of(window, came, timeout))
                elif isinstance(outcome, ClientError):
                    raise outcome
                else:
                    yield outcome
        finally:
            for request_id in window.ids():
                self._inbox.forget(request_id)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Deliver what was submitted, stop reading, and give up every wait; raises as ``Client.close``."""
        if self._closed:
            return
        self._closed = True
        left = await asyncio.to_thread(self._sender.close, timeout_s) if self._sender is not None else 0
        self._inbox.end(lambda request_id: ClientError(f"request {request_id}: the client was closed"))
        if self._reader is not None:
            await self._end_reading(self._reader)
            await self._abandon()
        if self._redis is not None:
            await self._redis.aclose()
        if left:
            raise SubmitError(f"{left} requests were not delivered within {timeout_s:g} s")

    async def _launch(
        self, route: str, item: Any, window: Window, came: asyncio.Queue[tuple[int, Outcome]]
    ) -> None:
        request = item if isinstance(item, Request) else Request(item)
        number = window.number
        sent = await self.send(route, request, lambda outcome: came.put_nowait((number, outcome)))
        window.sent(sent, time.monotonic())

    async def _next_of(
        self, window: Window, came: asyncio.Queue[tuple[int, Outcome]], timeout_s: float
    ) -> tuple[int, Outcome]:
        request_id, ends_at = window.first()
        try:
            async with asyncio.timeout(max(0.0, ends_at - time.monotonic())):
                return await came.get()
        except TimeoutError:
            await self._look_last(request_id)
            if came.empty():
                raise self._late(request_id, timeout_s) from None
            return came.get_nowait()

    def _running(self, message: Message) -> Sender:
        """Return the sender; the first call starts it, and the first for a result in Redis the reader."""
        if self._closed:
            raise ClientError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._sender is None:

            def undelivered(request_id: str, failure: SubmitError) -> None:
                # A loop that is closed has nobody left who waits.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._inbox.failed, request_id, failure)

            def replied(request_id: str, body: bytes) -> None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._inbox.replied, request_id, body)

            self._sender = Senders(self._session, undelivered, replied)
        if self._reader is None and self._session.reply is not None and not message.by_reply:
            self._reader = loop.create_task(self._read(), name="inferfleet-replies")
        return self._sender

    def _open(self) -> Any:
        if self._redis is None:
            self._redis = open_redis_async(self._session.place)
        return self._redis

    async def _read(self) -> None:
        """Read the reply stream until cancelled; an outage only delays it."""
        stream = reply_key(self._session.fleet, self._session.reply or "")
        last: bytes | str = "0"
        swept_at = time.monotonic()
        delay_s = _FIRST_DELAY_S
        while not self._closed:
            try:
                for _, entries in await self._open().xread({stream: last}, count=SWEEP_ROWS, block=BLOCK_MS):
                    last = entries[-1][0]
                    for _, fields in entries:
                        self._inbox.replied(fields[b"id"].decode(), fields[b"body"])
                if time.monotonic() - swept_at >= BLOCK_MS / 1000:
                    await self._sweep()
                    swept_at = time.monotonic()
                self._trouble, delay_s = "", _FIRST_DELAY_S
            except REDIS_ERRORS as error:
                self._trouble = f"; Redis at {self._session.place.shown} does not answer: {error}"
                await asyncio.sleep(delay_s)
                delay_s = min(2.0, delay_s * 2)

    async def _sweep(self) -> None:
        """Take the values that stand already for the requests that have waited longest."""
        pairs = self._inbox.oldest(SWEEP_ROWS)
        if not pairs:
            return
        async with self._open().pipeline(transaction=False) as pipe:
            for route, request_id in pairs:
                pipe.get(result_key(self._session.fleet, route, request_id))
            bodies = await pipe.execute()
        for (_, request_id), body in zip(pairs, bodies, strict=True):
            if body is not None:
                self._inbox.stands(request_id, body)

    async def _look_last(self, request_id: str) -> None:
        """The time is up: what stands now is the outcome, if it answers this request."""
        route = self._inbox.route_of(request_id)
        if route is None or self._session.by_reply(route):
            return
        try:
            body = await self._open().get(result_key(self._session.fleet, route, request_id))
        except REDIS_ERRORS as error:
            self._trouble = f"; Redis at {self._session.place.shown} does not answer: {error}"
            return
        if body is not None:
            self._inbox.stands(request_id, body, last=True)

    async def _poll(self, request_id: str, route: str, ends_at: float, timeout_s: float) -> Result:
        """Wait for an id that somebody else submitted: its value is looked for, ever less often."""
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                body = await self._open().get(result_key(self._session.fleet, route, request_id))
                self._trouble = ""
            except REDIS_ERRORS as error:
                body, self._trouble = None, f"; Redis at {self._session.place.shown} does not answer: {error}"
            if body is not None:
                return Result(request_id, route, body)
            left = ends_at - time.monotonic()
            if left <= 0 or self._closed:
                raise self._late(request_id, timeout_s)
            await asyncio.sleep(min(delay_s, left))
            delay_s = min(_MAX_DELAY_S, delay_s * 2)

    async def _end_reading(self, reader: asyncio.Task[None]) -> None:
        """Let the read that may block come back: an entry of no id is nobody's outcome.

        Cancelled in the middle of a command, redis-py's cluster client may go on, or leave connections open.
        """
        if not self._trouble:
            with contextlib.suppress(*REDIS_ERRORS):
                await self._open().xadd(
                    reply_key(self._session.fleet, self._session.reply or ""), {"id": "", "body": ""}
                )
            await asyncio.wait([reader], timeout=BLOCK_MS / 1000)
        reader.cancel()
        await asyncio.wait([reader], timeout=self._session.place.timeout_s)

    async def _abandon(self) -> None:
        """Nobody reads the stream any more; without this it would stay until its lifetime ends."""
        with contextlib.suppress(*REDIS_ERRORS):
            await self._open().delete(reply_key(self._session.fleet, self._session.reply or ""))

    def _late(self, request_id: str, timeout_s: float) -> ResultTimeout:
        return ResultTimeout(request_id, timeout_s, self._trouble)
