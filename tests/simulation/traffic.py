"""Requests with a known right outcome: what a caller sends, and what the fleet must make of it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inferfleet.brokers.memory import Record
from inferfleet.errors import Code
from inferfleet.records import Header, Stream

POISON = -1.0
LARGE = "large-"
NOWHERE = Stream("", 0)
WIDTH = 4


def is_large_answer(record: Record) -> bool:
    """Say whether a record is an answer that a result topic is told to refuse for its size."""
    headers = dict(record.headers or ())
    named = (headers["inferfleet-id"] or b"").startswith(LARGE.encode())
    return named and headers["inferfleet-status"] == b"ok"


@dataclass
class Request:
    """One input record. ``expected`` holds the outcomes that are right: ``None`` is an answer."""

    route: str
    id: str
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    expected: frozenset[Code | None]
    rows: list[list[float]] = field(default_factory=list)
    binary: bool = False
    reply: str | None = None
    stream: Stream = NOWHERE
    offset: int = -1


Made = tuple[bytes | None, list[Header], frozenset[Code | None], list[list[float]]]


def make(rng: random.Random, number: int, route: str, now_ms: int, *, faults: bool) -> Request:
    """Return the next request of a route; without ``faults`` it is a good one."""
    kinds = _KINDS if faults else _KINDS[:3]
    kind = rng.choices([each for each, _ in kinds], [weight for _, weight in kinds])[0]
    request_id = f"{LARGE if kind is _large else ''}{route}-{number}"
    value, headers, expected, rows = kind(rng, request_id, now_ms)
    reply = None
    if route == "b" and rng.random() < 0.2:
        reply = f"client-{rng.randrange(2)}"
        headers = [*headers, ("inferfleet-reply", reply.encode())]
    key = None if rng.random() < 0.3 else b"key-%d" % rng.randrange(12)
    return Request(route, request_id, key, value, headers, expected, rows, kind is _raw, reply)


def _values(rng: random.Random, rows: int) -> list[list[float]]:
    return [[float(rng.randrange(1, 1 << 20)) for _ in range(WIDTH)] for _ in range(rows)]


def _body(request_id: str, rows: Sequence[Sequence[float]]) -> bytes:
    data = [value for row in rows for value in row]
    tensor = {"name": "x", "shape": [len(rows), WIDTH], "datatype": "FP32", "data": data}
    return json.dumps({"id": request_id, "inputs": [tensor]}).encode()


def _named(request_id: str) -> list[Header]:
    return [("inferfleet-id", request_id.encode())]


def _plain(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, 1)
    return _body(request_id, rows), [], frozenset([None]), rows


def _several_rows(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, rng.randrange(2, 6))
    return _body(request_id, rows), [("other", b"kept")], frozenset([None]), rows


def _raw(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, 1)
    headers = [*_named(request_id), ("inference-header-content-length", b"0")]
    return struct.pack("<4f", *rows[0]), headers, frozenset([None]), rows


def _urgent(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, 1)
    return _body(request_id, rows), [("inferfleet-priority", b"1")], frozenset([None]), rows


def _poison(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, rng.randrange(1, 3))
    rows[-1][0] = POISON
    return _body(request_id, rows), [], frozenset([Code.MODEL]), rows


def _late(rng: random.Random, request_id: str, now_ms: int) -> Made:
    """The deadline falls while it waits or runs, or not: both outcomes are right."""
    rows = _values(rng, 1)
    headers = [("inferfleet-deadline-ms", b"%d" % (now_ms + rng.randrange(1, 3000)))]
    return _body(request_id, rows), headers, frozenset([None, Code.DEADLINE]), rows


def _too_late(rng: random.Random, request_id: str, now_ms: int) -> Made:
    headers = [("inferfleet-deadline-ms", b"%d" % (now_ms - 1))]
    return _body(request_id, _values(rng, 1)), headers, frozenset([Code.DEADLINE]), []


def _garbage(rng: random.Random, request_id: str, now_ms: int) -> Made:
    return b"{\xff" + rng.randbytes(rng.randrange(30)), _named(request_id), frozenset([Code.DECODE]), []


def _tombstone(rng: random.Random, request_id: str, now_ms: int) -> Made:
    return None, [*_named(request_id), ("null", None)], frozenset([Code.EMPTY]), []


def _misshapen(rng: random.Random, request_id: str, now_ms: int) -> Made:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    body = json.dumps({"id": request_id, "inputs": [tensor]}).encode()
    return body, [], frozenset([Code.SHAPE]), []


def _large(rng: random.Random, request_id: str, now_ms: int) -> Made:
    """Its id marks it: the result topics are told to refuse its answer for its size."""
    rows = _values(rng, 1)
    return _body(request_id, rows), [], frozenset([Code.RESULT_TOO_LARGE]), rows


_KINDS: list[tuple[Callable[[random.Random, str, int], Made], int]] = [
    (_plain, 10),
    (_several_rows, 3),
    (_raw, 3),
    (_urgent, 2),
    (_poison, 2),
    (_late, 2),
    (_too_late, 1),
    (_garbage, 1),
    (_tombstone, 1),
    (_misshapen, 1),
    (_large, 1),
]
