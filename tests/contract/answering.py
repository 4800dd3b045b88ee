"""A stand-in for a worker: takes requests from a real topic and answers through the real Redis outlet.

The answer to ``{"x": rows}`` is each row's sum; a row that holds -1 is an error outcome.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
from confluent_kafka import Consumer

from inferfleet.errors import Code
from inferfleet.ports import Refusal
from inferfleet.records import Results
from inferfleet.redis_access import Place, connect
from inferfleet.results.redis import RedisResults
from inferfleet.wire.encode import error_body
from inferfleet.wire.stored import payload_hash


class Answerer:
    """Answers every request of a topic until it is left; ``held`` makes it keep requests unanswered."""

    def __init__(self, bootstrap: str, redis_url: str, fleet: str, route: str, topic: str) -> None:
        self.held = threading.Event()
        self.seen: list[dict[str, bytes]] = []
        self._route = route
        self._outlet = RedisResults(lambda: connect(Place(redis_url)), fleet, wake=lambda: None)
        self._consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": f"{fleet}.{topic}", "auto.offset.reset": "earliest"}
        )
        self._consumer.subscribe([topic])
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
        waiting: list[Any] = []
        while not self._stop.is_set():
            waiting += self._consumer.consume(100, 0.05)
            if waiting and not self.held.is_set():
                for message in waiting:
                    self._answer(message)
                waiting = []
            self._outlet.poll()
        self._consumer.close()
        self._outlet.close(2)

    def _answer(self, message: Any) -> None:
        headers = dict(message.headers() or [])
        self.seen.append(headers)
        request_id = headers["inferfleet-id"].decode()
        body = _body(message.value(), headers, request_id)
        reply = headers.get("inferfleet-reply")
        row = _Row(self._outlet, self._route, request_id, payload_hash(message.value()), reply)
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
