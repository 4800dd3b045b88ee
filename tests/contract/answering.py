"""A stand-in for a worker: takes requests from a real topic or queue and answers by the real Redis outlet.

The answer to ``{"x": rows}`` is each row's sum; a row that holds -1 is an error outcome.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import msgspec
import numpy as np
import pika
from confluent_kafka import Consumer

from inferfleet.errors import Code
from inferfleet.ports import Refusal
from inferfleet.records import Results
from inferfleet.redis_access import Place, open_redis
from inferfleet.results.redis import RedisResults
from inferfleet.wire.encode import error_body
from inferfleet.wire.stored import payload_hash
from tests.support.waiting import wait_until


class Taken(NamedTuple):
    """One request as it came; ``properties`` are AMQP's where it came from a queue."""

    headers: dict[str, bytes]
    value: bytes
    properties: Any = None


class Source(Protocol):
    """Where an answerer takes requests from; used on its thread only."""

    def take(self) -> list[Taken]: ...
    def close(self) -> None: ...


class TopicSource:
    """A Kafka topic, read from its start."""

    def __init__(self, bootstrap: str, topic: str, group: str) -> None:
        self._consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "earliest"}
        )
        self._consumer.subscribe([topic])

    def take(self) -> list[Taken]:
        """Return what has come within a moment."""
        taken = self._consumer.consume(100, 0.05)
        return [Taken(dict(each.headers() or []), each.value()) for each in taken]

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()


class QueueSource:
    """A RabbitMQ queue; what was taken is acknowledged at once."""

    def __init__(self, url: str, queue: str) -> None:
        self._url, self._queue = url, queue
        self._connection: Any = None
        self._messages: Any = None
        self.channel: Any = None

    def take(self) -> list[Taken]:
        """Return what has come within a moment."""
        if self._connection is None:
            self._connection = pika.BlockingConnection(pika.URLParameters(self._url))
            self.channel = self._connection.channel()
            self.channel.basic_qos(prefetch_count=500)
            self._messages = self.channel.consume(self._queue, inactivity_timeout=0.02)
        taken: list[Taken] = []
        for method, properties, body in self._messages:
            if method is None:
                break
            self.channel.basic_ack(method.delivery_tag)
            headers = {name: _bytes(value) for name, value in (properties.headers or {}).items()}
            taken.append(Taken(headers, body, properties))
            if len(taken) == 100:
                break
        return taken

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None and self._connection.is_open:
            self._connection.close()


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


class Answerer:
    """Answers every request of a source until it is left; ``held`` makes it keep requests unanswered."""

    def __init__(self, source: Source, redis: str | Place, fleet: str, route: str) -> None:
        place = redis if isinstance(redis, Place) else Place(redis)
        self.held = threading.Event()
        self.seen: list[dict[str, bytes]] = []
        self.taken: list[Taken] = []
        self._route = route
        self._source = source
        self._outlet = RedisResults(lambda: open_redis(place), fleet, wake=lambda: None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        waiting: list[Taken] = []
        while not self._stop.is_set():
            waiting += self._source.take()
            if waiting and not self.held.is_set():
                for message in waiting:
                    self._answer(message)
                waiting = []
            self._outlet.poll()
        self._source.close()
        wait_until(self._drained, 10, "every outcome is confirmed or refused")
        self._outlet.close(2)

    def _drained(self) -> bool:
        """Hear of what was published; a refusal makes one more outcome, so before the outlet closes."""
        self._outlet.poll()
        return not self._outlet.pending()

    def _answer(self, request: Taken) -> None:
        headers = request.headers
        self.seen.append(headers)
        self.taken.append(request)
        request_id = headers["inferfleet-id"].decode()
        body = _body(request.value, headers, request_id)
        if isinstance(self._source, QueueSource) and request.properties.reply_to:
            said = pika.BasicProperties(correlation_id=request.properties.correlation_id)
            self._source.channel.basic_publish("", request.properties.reply_to, body, said)
            return
        reply = headers.get("inferfleet-reply")
        row = _Row(self._outlet, self._route, request_id, payload_hash(request.value), reply)
        row.publish(body, reply_only=False)


class _Row:
    """One outcome on its way; a refusal becomes what a worker makes of it, an error for the client alone."""

    def __init__(self, outlet: RedisResults, route: str, id_: str, payload: str, reply: bytes | None) -> None:
        self._outlet, self._route, self._id, self._payload = outlet, route, id_, payload
        self._reply = None if reply is None else reply.decode()

    def publish(self, body: bytes, *, reply_only: bool) -> None:
        good = not body.startswith(b'{"error"')
        columns = [self._id], [body], [good], [self._payload], [self._reply]
        self._outlet.publish(Results(self._route, *columns, 600, reply_only), self)

    def confirmed(self, count: int) -> None:
        assert count == 1

    def refused(self, index: int, refusal: Refusal) -> None:
        self.publish(error_body(refusal.text, Code.DUP_ID, self._id), reply_only=True)


def _body(value: bytes, headers: dict[str, bytes], request_id: str) -> bytes:
    length = int(headers.get("inference-header-content-length", len(value)))
    document = msgspec.json.decode(value[:length])
    if "inputs" in document:
        (tensor,) = document["inputs"]
        flat = tensor.get("data")
        if flat is None:
            flat = np.frombuffer(value[length:], "<f4")
        rows = np.array(flat, np.float32).reshape(tensor["shape"])
    else:
        rows = np.array([document["x"]], np.float32)
    if (rows == -1).any():
        return error_body("a row holds -1", Code.MODEL, request_id)
    sums = rows.sum(axis=1)
    output = {"name": "sum", "shape": [len(sums), 1], "datatype": "FP32", "data": sums.tolist()}
    return msgspec.json.encode(
        {"model_name": "sum", "model_version": "1", "id": request_id, "outputs": [output]}
    )
