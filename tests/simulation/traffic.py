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
FLAKY = -2.0
"""Begins a row that fails, as what may pass, until its request has had as many attempts as the row says."""
KILLER = -3.0
"""Begins a row that ends the process."""
NEVER = 99
ATTEMPTS = 4
LARGE = "large-"
BULKY = "bulky-"
NOWHERE = Stream("", 0)
WIDTH = 4


def is_large_answer(record: Record) -> bool:
    """Say whether a record is an answer that a result topic is told to refuse for its size."""
    headers = dict(record.headers or ())
    named = (headers["inferfleet-id"] or b"").startswith(LARGE.encode())
    return named and headers["inferfleet-status"] == b"ok"


def is_bulky(record: Record) -> bool:
    """Say whether a record is an attempt that a retry topic is told to refuse for its size."""
    return b'"' + BULKY.encode() in (record.value or b"")


@dataclass
class Request:
    """One input record. ``expected`` holds the outcomes that are right: ``None`` is an answer.

    ``fails`` says how many attempts fail as what may pass; without a name of its own its ``id`` is its place.
    """

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
    timestamp_ms: int = 0
    named: bool = True
    fails: int = 0

    @property
    def attempts(self) -> int:
        """How many attempts it has at most; what is too large for a retry topic has one."""
        return 1 if self.id.startswith(BULKY) else min(self.fails + 1, ATTEMPTS)


Made = tuple[bytes | None, list[Header], frozenset[Code | None], list[list[float]]]


def make(
    rng: random.Random,
    number: int,
    route: str,
    now_ms: int,
    *,
    faults: bool,
    failing: bool | None = None,
    deadly: bool = False,
) -> Request:
    """Return the next request of a route; without ``faults`` it is a good one.

    ``failing``: it may also fail for a while, or without it no model fails it at all; ``deadly``: it ends
    the process that runs it.
    """
    kinds = (_KINDS if faults else _KINDS[:3]) + (_RETRIED if failing else [])
    if failing is False:
        kinds = [kind for kind in kinds if kind[0] is not _poison]
    kind = rng.choices([each for each, _ in kinds], [weight for _, weight in kinds])[0]
    if deadly:
        kind = _killer
    request_id = f"{_PREFIXES.get(kind, '')}{route}-{number}"
    value, headers, expected, rows = kind(rng, request_id, now_ms)
    reply = None
    if route == "b" and rng.random() < 0.2:
        reply = f"client-{rng.randrange(2)}"
        headers = [*headers, ("inferfleet-reply", reply.encode())]
    key = None if rng.random() < 0.3 else b"key-%d" % rng.randrange(12)
    made = Request(route, request_id, key, value, headers, expected, rows, kind is _raw, reply)
    made.named = kind is not _nameless
    if rows and rows[0][0] == FLAKY:
        made.fails = int(rows[0][2])
    return made


def _values(rng: random.Random, rows: int) -> list[list[float]]:
    return [[float(rng.randrange(1, 1 << 20)) for _ in range(WIDTH)] for _ in range(rows)]


def _body(request_id: str | None, rows: Sequence[Sequence[float]]) -> bytes:
    data = [value for row in rows for value in row]
    tensor = {"name": "x", "shape": [len(rows), WIDTH], "datatype": "FP32", "data": data}
    return json.dumps(({} if request_id is None else {"id": request_id}) | {"inputs": [tensor]}).encode()


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


def number_of(request_id: str) -> int:
    """Return the number of a request, which its rows carry for a model that fails for a while."""
    return int(request_id.rsplit("-", 1)[1])


def _until(rng: random.Random, request_id: str, times: int) -> list[list[float]]:
    rows = _values(rng, rng.randrange(1, 3))
    rows[0][:3] = [FLAKY, float(number_of(request_id)), float(times)]
    return rows


def _flaky(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _until(rng, request_id, rng.randrange(1, ATTEMPTS))
    forged: list[Header] = [("inferfleet-attempt", b"3"), ("inferfleet-origin-offset", b"0"), ("mine", None)]
    headers = rng.choice([[], [("a", b"1"), ("a", b"2")], forged, _named(request_id)])
    in_body = None if headers == _named(request_id) else request_id
    return _body(in_body, rows), headers, frozenset([None]), rows


def _nameless(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _until(rng, request_id, rng.choice([1, 2, NEVER]))
    return _body(None, rows), [], frozenset([Code.MODEL if rows[0][2] == NEVER else None]), rows


def _hopeless(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _until(rng, request_id, NEVER)
    return _body(request_id, rows), [("other", b"kept")], frozenset([Code.MODEL]), rows


def _bulky(rng: random.Random, request_id: str, now_ms: int) -> Made:
    """Its retry topics are told to refuse it for its size: its first failure is its last."""
    return _hopeless(rng, request_id, now_ms)


def _killer(rng: random.Random, request_id: str, now_ms: int) -> Made:
    rows = _values(rng, 1)
    rows[0][0] = KILLER
    return _body(request_id, rows), [], frozenset([Code.MODEL]), rows


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
_RETRIED: list[tuple[Callable[[random.Random, str, int], Made], int]] = [
    (_flaky, 4),
    (_nameless, 1),
    (_hopeless, 1),
    (_bulky, 1),
]
_PREFIXES: dict[Callable[[random.Random, str, int], Made], str] = {_large: LARGE, _bulky: BULKY}
