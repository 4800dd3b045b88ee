"""The client for threads: every method may be called from any of them, and every wait is bounded.

Threads of its own: for each broker in use one that hears of deliveries (``senders``), and one that reads the
reply stream; they start with the first ``submit`` that needs them and end with ``close``. Results that are
waited for come through the reply stream; once a second the reader looks whether a value already stands for
what has not come.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, Unpack

from inferfleet.client.inbox import Done, Inbox
from inferfleet.client.outcome import ClientError, Outcome, Result, ResultTimeout, SubmitError
from inferfleet.client.request import Inputs, Request, RequestOptions
from inferfleet.client.sender import Message, Sender
from inferfleet.client.senders import Senders
from inferfleet.client.session import open_session
from inferfleet.client.window import Window
from inferfleet.config import Config
from inferfleet.redis_access import REDIS_ERRORS, open_redis
from inferfleet.wire.stored import reply_key, result_key

BLOCK_MS = 1000
SWEEP_ROWS = 500
_FIRST_DELAY_S, _MAX_DELAY_S = 0.02, 0.5


class Client:
    """Submits requests to Kafka or RabbitMQ and waits for their results in Redis.

    ``config`` is a :class:`~inferfleet.config.Config` or a path to ``fleet.toml``; the other arguments
    overrule it, and with ``bootstrap_servers`` or ``rabbitmq_url``, and ``routes``, none is needed.
    ``routes`` maps a route to its source, ``TOPIC`` or ``rabbitmq:QUEUE``. With ``reply=False`` requests ask
    for no reply and Redis is touched by ``result`` alone. Close it, or use it as a context manager. Raises
    :class:`~inferfleet.errors.ConfigError`.

    A route that answers to ``reply`` and not to Redis is waited for on a queue of the client's own, which
    lasts as long as its connection.
    """

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
        self._lock = threading.Lock()
        self._inbox = Inbox()
        self._stop = threading.Event()
        self._sender: Sender | None = None
        self._reader: threading.Thread | None = None
        self._redis: Any = None
        self._trouble = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, route: str, inputs: Inputs | bytes, **options: Unpack[RequestOptions]) -> str:
        """Hand one request over to the sender and return its id (``id``, else a new one).

        ``inputs`` and ``options`` (``id``, ``key``, ``headers``, ``deadline_ms``, ``priority``, ``binary``,
        ``topic``) are the fields of :class:`Request`.
        Raises :class:`SubmitError` if an earlier request could not be delivered or the queue stays full,
        :class:`DuplicateIdError` while another payload is in flight under the id, ConfigError for an
        unknown route, ValueError for inputs that no request can have.
        """
        return self.send(route, Request(inputs, **options))

    def send(self, route: str, request: Request, done: Done | None = None) -> str:
        """Submit a ready :class:`Request`; ``done`` hears its outcome, on one of the client's threads."""
        message, payload = self._session.prepare(route, request)
        sender = self._running(message)
        if self._session.reply is not None:
            with self._lock:
                self._inbox.expect(message.id, route, payload, done)
        try:
            sender.send(message)
        except SubmitError:
            with self._lock:
                self._inbox.forget(message.id)
            raise
        return message.id

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until the broker has all that was submitted; :class:`SubmitError` if it does not take one."""
        if self._sender is not None:
            self._sender.flush(timeout_s)

    def result(self, request_id: str, timeout: float = 30.0, *, route: str | None = None) -> Result:
        """Wait up to ``timeout`` seconds for the outcome of an id, this client's or another's.

        For an id that this client submitted, only an answer to its own payload counts; ``route`` is needed
        for other ids where there are several routes. Raises :class:`ResultTimeout`, and
        :class:`SubmitError` if the request was never delivered.
        """
        ends_at = time.monotonic() + timeout
        came: SimpleQueue[Outcome] = SimpleQueue()
        with self._lock:
            known = self._inbox.claim(request_id, came.put)
        if not known:
            return self._poll(request_id, self._session.stored_route(route), ends_at, timeout)
        try:
            outcome = came.get(timeout=max(0.0, ends_at - time.monotonic()))
        except Empty:
            self._look_last(request_id)
            try:
                outcome = came.get_nowait()
            except Empty:
                with self._lock:
                    self._inbox.leave(request_id, came.put)
                raise self._late(request_id, timeout) from None
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    def peek(self, route: str, ids: Sequence[str]) -> dict[str, Result]:
        """Return the results that stand now, by id, whoever submitted them; one round trip.

        Raises :class:`ClientError` while Redis does not answer.
        """
        keys = [result_key(self._session.fleet, route, request_id) for request_id in ids]
        try:
            bodies = _get_all(self._shared(), keys)
        except REDIS_ERRORS as error:
            raise ClientError(f"Redis at {self._session.place.shown} does not answer: {error}") from None
        found = zip(ids, bodies, strict=True)
        return {request_id: Result(request_id, route, body) for request_id, body in found if body is not None}

    def map(
        self,
        route: str,
        items: Iterable[Inputs | bytes | Request],
        *,
        max_in_flight: int = 256,
        ordered: bool = True,
        timeout: float = 60.0,
    ) -> Iterator[Result]:
        """Submit all ``items`` and yield their results, at most ``max_in_flight`` at a time.

        In the order of ``items``, or of arrival with ``ordered=False``; error outcomes are yielded too.
        Raises :class:`ResultTimeout` when one takes longer than ``timeout`` seconds, and what ``submit``
        raises.
        """
        window = Window(max_in_flight, timeout, ordered=ordered)
        came: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        rest = iter(items)
        more = True
        try:
            while True:
                while more and window.has_room:
                    item = next(rest, None)
                    more = item is not None
                    if item is not None:
                        self._launch(route, item, window, came)
                outcome = window.take()
                if outcome is None:
                    if window.empty:
                        return
                    window.arrived(*self._next_of(window, came, timeout))
                elif isinstance(outcome, ClientError):
                    raise outcome
                else:
                    yield outcome
        finally:
            with self._lock:
                for request_id in window.ids():
                    self._inbox.forget(request_id)

    def close(self, timeout_s: float = 10.0) -> None:
        """Deliver what was submitted, stop the threads, and give up every wait; twice is fine.

        Raises :class:`SubmitError` if requests were not delivered within ``timeout_s``.
        """
        if self._stop.is_set():
            return
        left = self._sender.close(timeout_s) if self._sender is not None else 0
        self._stop.set()
        with self._lock:
            self._inbox.end(lambda request_id: ClientError(f"request {request_id}: the client was closed"))
        if self._reader is not None:
            self._wake_reader()
            self._reader.join(BLOCK_MS / 1000 + self._session.place.timeout_s)
        if self._redis is not None:
            self._redis.close()
        if left:
            raise SubmitError(f"{left} requests were not delivered within {timeout_s:g} s")

    def _launch(self, route: str, item: Any, window: Window, came: SimpleQueue[tuple[int, Outcome]]) -> None:
        request = item if isinstance(item, Request) else Request(item)
        number = window.number
        window.sent(self.send(route, request, lambda outcome: came.put((number, outcome))), time.monotonic())

    def _next_of(
        self, window: Window, came: SimpleQueue[tuple[int, Outcome]], timeout: float
    ) -> tuple[int, Outcome]:
        request_id, ends_at = window.first()
        try:
            return came.get(timeout=max(0.0, ends_at - time.monotonic()))
        except Empty:
            self._look_last(request_id)
            try:
                return came.get_nowait()
            except Empty:
                raise self._late(request_id, timeout) from None

    def _running(self, message: Message) -> Sender:
        """Return the sender; the first call starts it, and the first for a result in Redis the reader."""
        with self._lock:
            if self._stop.is_set():
                raise ClientError("the client is closed")
            if self._sender is None:
                self._sender = Senders(self._session, self._undelivered, self._replied)
            if self._reader is None and self._session.reply is not None and not message.by_reply:
                self._reader = threading.Thread(target=self._read, name="inferfleet-replies", daemon=True)
                self._reader.start()
            return self._sender

    def _undelivered(self, request_id: str, failure: SubmitError) -> None:
        with self._lock:
            self._inbox.failed(request_id, failure)

    def _replied(self, request_id: str, body: bytes) -> None:
        with self._lock:
            self._inbox.replied(request_id, body)

    def _read(self) -> None:
        """Read the reply stream until the client is closed; an outage only delays it."""
        stream = reply_key(self._session.fleet, self._session.reply or "")
        last: bytes | str = "0"
        swept_at = time.monotonic()
        delay_s = _FIRST_DELAY_S
        redis: Any = None
        while not self._stop.is_set():
            try:
                redis = redis or open_redis(self._session.place)
                for _, entries in redis.xread({stream: last}, count=SWEEP_ROWS, block=BLOCK_MS):
                    last = entries[-1][0]
                    with self._lock:
                        for _, fields in entries:
                            self._inbox.replied(fields[b"id"].decode(), fields[b"body"])
                if time.monotonic() - swept_at >= BLOCK_MS / 1000:
                    self._sweep(redis)
                    swept_at = time.monotonic()
                self._trouble, delay_s = "", _FIRST_DELAY_S
            except REDIS_ERRORS as error:
                self._trouble = f"; Redis at {self._session.place.shown} does not answer: {error}"
                if redis is not None:
                    redis.close()
                    redis = None
                self._stop.wait(delay_s)
                delay_s = min(2.0, delay_s * 2)
        if redis is not None:
            _abandon(redis, stream)

    def _wake_reader(self) -> None:
        """End the read that may block: an entry of no id is nobody's outcome."""
        if self._trouble:
            return
        stream = reply_key(self._session.fleet, self._session.reply or "")
        with contextlib.suppress(*REDIS_ERRORS):
            self._shared().xadd(stream, {"id": "", "body": ""})

    def _sweep(self, redis: Any) -> None:
        """Take the values that stand already for the requests that have waited longest."""
        with self._lock:
            pairs = self._inbox.oldest(SWEEP_ROWS)
        if not pairs:
            return
        bodies = _get_all(redis, [result_key(self._session.fleet, route, id_) for route, id_ in pairs])
        with self._lock:
            for (_, request_id), body in zip(pairs, bodies, strict=True):
                if body is not None:
                    self._inbox.stands(request_id, body)

    def _shared(self) -> Any:
        with self._lock:
            if self._redis is None:
                self._redis = open_redis(self._session.place)
            return self._redis

    def _get(self, route: str, request_id: str) -> bytes | None:
        body: bytes | None = self._shared().get(result_key(self._session.fleet, route, request_id))
        return body

    def _look_last(self, request_id: str) -> None:
        """The time is up: what stands now is the outcome, if it answers this request."""
        with self._lock:
            route = self._inbox.route_of(request_id)
        if route is None or self._session.by_reply(route):
            return
        try:
            body = self._get(route, request_id)
        except REDIS_ERRORS as error:
            self._trouble = f"; Redis at {self._session.place.shown} does not answer: {error}"
            return
        if body is not None:
            with self._lock:
                self._inbox.stands(request_id, body, last=True)

    def _poll(self, request_id: str, route: str, ends_at: float, timeout: float) -> Result:
        """Wait for an id that somebody else submitted: its value is looked for, ever less often."""
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                body = self._get(route, request_id)
                self._trouble = ""
            except REDIS_ERRORS as error:
                body, self._trouble = None, f"; Redis at {self._session.place.shown} does not answer: {error}"
            if body is not None:
                return Result(request_id, route, body)
            left = ends_at - time.monotonic()
            if left <= 0 or self._stop.wait(min(delay_s, left)):
                raise self._late(request_id, timeout)
            delay_s = min(_MAX_DELAY_S, delay_s * 2)

    def _late(self, request_id: str, timeout: float) -> ResultTimeout:
        return ResultTimeout(request_id, timeout, self._trouble)


def _get_all(redis: Any, keys: Sequence[str]) -> list[bytes | None]:
    """Return the values under ``keys``; a pipeline, because a cluster has no MGET over several slots."""
    with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.get(key)
        bodies: list[bytes | None] = pipe.execute()
    return bodies


def _abandon(redis: Any, stream: str) -> None:
    """Nobody reads the stream any more; without this it would stay until its lifetime ends."""
    with contextlib.suppress(*REDIS_ERRORS):
        redis.delete(stream)
        redis.close()
