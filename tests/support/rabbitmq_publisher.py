"""A client that publishes until everything is confirmed, whatever happens to connections and nodes."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import pika

from tests.support.waiting import wait_until

_TICK_S = 0.002
_AGAIN_S = 0.2
_CLOSE_S = 2.0
# Pika reports every connection that a test breaks as an error, with a trace.
logging.getLogger("pika").setLevel(logging.CRITICAL)


class Outgoing(NamedTuple):
    """One message on its way; ``key`` is a queue's name where ``exchange`` is empty."""

    key: str
    body: bytes
    properties: Any
    exchange: str = ""


class SteadyPublisher:
    """Publishes from a thread of its own with confirms; what is not known to be kept is sent again.

    A message whose confirm was lost is sent again unchanged, so a queue may hold it twice. So it is with all
    that are unconfirmed when nothing was confirmed for ``patience_s``. Connections are tried in turn over
    ``urls``. At most ``window`` messages wait for their confirms. ``repeated`` counts what was sent again,
    ``returned`` holds what no queue took (the broker confirms those as well).
    """

    def __init__(self, *urls: str, window: int = 2_000, patience_s: float = 15.0) -> None:
        self.confirmed = 0
        self.repeated = 0
        self.returned: list[Outgoing] = []
        self._urls = itertools.cycle(urls)
        self._window = window
        self._patience_s = patience_s
        self._waiting: deque[Outgoing] = deque()
        self._unconfirmed: dict[int, Outgoing] = {}
        self._accepted = 0
        self._tag = 0
        self._progress_at = 0.0
        self._channel: Any = None
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="steady-publisher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(20)

    def publish(self, key: str, body: bytes, *, exchange: str = "", **properties: Any) -> None:
        """Take a persistent message; ``properties`` are AMQP's, as ``message_id`` and ``headers``."""
        given = pika.BasicProperties(**{"delivery_mode": 2, **properties})
        self._accepted += 1
        self._waiting.append(Outgoing(key, body, given, exchange))

    def publish_all(self, messages: Sequence[Outgoing]) -> None:
        """Take many messages as they are."""
        self._accepted += len(messages)
        self._waiting.extend(messages)

    @property
    def pending(self) -> int:
        """Messages that were taken and are not confirmed; raises what ended the thread before its time."""
        if self._failure is not None:
            raise self._failure
        return self._accepted - self.confirmed

    def wait(self, timeout_s: float = 60.0) -> None:
        """Return once everything that was taken is confirmed."""
        wait_until(lambda: not self.pending, timeout_s, "every message is confirmed")

    def _main(self) -> None:
        try:
            while not self._stop.is_set():
                self._run_connection(next(self._urls))
                self._stop.wait(_AGAIN_S)
        except BaseException as error:
            self._failure = error

    def _run_connection(self, url: str) -> None:
        """Publish until the connection ends; what is unconfirmed then goes back to the front."""
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 10
        parameters.socket_timeout = parameters.stack_timeout = 5
        connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._opened,
            on_open_error_callback=lambda connection, _error: connection.ioloop.stop(),
            on_close_callback=lambda connection, _reason: connection.ioloop.stop(),
        )
        try:
            connection.ioloop.start()
        finally:
            connection.ioloop.close()
        self._channel = None
        self.repeated += len(self._unconfirmed)
        self._waiting.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()

    def _opened(self, connection: Any) -> None:
        def channel_opened(channel: Any) -> None:
            self._channel, self._tag = channel, 0
            channel.add_on_return_callback(self._on_return)
            channel.add_on_close_callback(lambda _channel, _reason: self._leave(connection))
            channel.confirm_delivery(self._on_confirm, callback=lambda _frame: self._tick(connection))

        connection.channel(on_open_callback=channel_opened)

    def _leave(self, connection: Any) -> None:
        if connection.is_open:
            connection.close()
            connection.ioloop.call_later(_CLOSE_S, connection.ioloop.stop)

    def _tick(self, connection: Any) -> None:
        if self._channel is None or not self._channel.is_open:
            return
        now = time.monotonic()
        if not self._unconfirmed:
            self._progress_at = now
        if self._stop.is_set() or now - self._progress_at > self._patience_s:
            self._leave(connection)
            return
        publish, waiting, unconfirmed = self._channel.basic_publish, self._waiting, self._unconfirmed
        while waiting and len(unconfirmed) < self._window:
            key, body, properties, exchange = message = waiting.popleft()
            self._tag += 1
            unconfirmed[self._tag] = message
            publish(exchange, key, body, properties, mandatory=True)
        connection.ioloop.call_later(_TICK_S, lambda: self._tick(connection))

    def _on_confirm(self, frame: Any) -> None:
        method, unconfirmed = frame.method, self._unconfirmed
        self._progress_at = time.monotonic()
        if method.multiple:
            tags = list(itertools.takewhile(lambda tag: tag <= method.delivery_tag, unconfirmed))
        else:
            tags = [method.delivery_tag]
        messages = [unconfirmed.pop(tag) for tag in tags]
        if isinstance(method, pika.spec.Basic.Ack):
            self.confirmed += len(messages)
        else:
            self.repeated += len(messages)
            self._waiting.extendleft(reversed(messages))
            # A channel that met a quorum queue without a leader refuses for ever, with a new leader too.
            self._leave(self._channel.connection)

    def _on_return(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self.returned.append(Outgoing(method.routing_key, body, properties, method.exchange))
