"""Chunks, requests and V2 bodies for tests, with every column that a test does not care about filled in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferfleet.datatypes import DATATYPES
from inferfleet.records import (
    Amqp,
    Answer,
    AnswerForm,
    Chunk,
    Failures,
    Headers,
    Lane,
    Requests,
    Served,
    Signature,
    Stream,
    Tensors,
    TensorSpec,
)
from inferfleet.wire.decode import Decoded, Decoder
from inferfleet.wire.request import Limits

STREAM = Stream("digits.requests", 3)
CHANNEL = Stream("rabbitmq:q", 1)
NOW_MS = 1_700_000_000_000


def signature(*inputs: TensorSpec, outputs: Sequence[TensorSpec] = ()) -> Signature:
    """Return a signature; without any output it gives ``y``, FP32 [2]."""
    return Signature(inputs, tuple(outputs) or (TensorSpec("y", "FP32", (2,)),))


def decoder(sig: Signature, **options: Any) -> Decoder:
    """Return a decoder of model ``m`` with versions 1 and 2.

    ``max_bytes``, ``max_rows`` and ``nan_allowed`` are limits; the rest goes to :class:`Decoder`.
    """
    limits = Limits(
        options.pop("max_bytes", 100_000), options.pop("max_rows", 64), options.pop("nan_allowed", False)
    )
    return Decoder("m", frozenset(("1", "2")), sig, limits, **options)


def chunk(
    values: Sequence[bytes | None],
    headers: Sequence[Headers] | None = None,
    *,
    keys: Sequence[bytes | None] | None = None,
    first: int = 100,
    stream: Stream = STREAM,
    timestamp_ms: int = NOW_MS,
) -> Chunk:
    """Return a chunk with positions from ``first`` on and one timestamp for all."""
    count = len(values)
    return Chunk(
        stream,
        1,
        list(range(first, first + count)),
        [b"key-%d" % i for i in range(count)] if keys is None else list(keys),
        list(values),
        [None] * count if headers is None else list(headers),
        [timestamp_ms] * count,
        0.0,
    )


def messages(
    values: Sequence[bytes | None],
    amqp: Sequence[Amqp] | None = None,
    headers: Sequence[Headers] | None = None,
    *,
    first: int = 1,
    stream: Stream = CHANNEL,
    timestamp_ms: int = NOW_MS,
) -> Chunk:
    """Return a chunk of RabbitMQ messages; one without ids is called ``amqp-`` and where it stands."""
    made = chunk(values, headers, first=first, stream=stream, timestamp_ms=timestamp_ms)
    found = [Amqp()] * len(values) if amqp is None else list(amqp)
    made.amqp = found
    made.fallback_ids = [
        each.message_id or each.correlation_id or f"amqp-{stream.partition}-{position}"
        for each, position in zip(found, made.positions, strict=True)
    ]
    return made


def v2(
    data: Any,
    shape: Sequence[int],
    datatype: str = "FP32",
    name: str = "x",
    request_id: str | None = None,
    **members: Any,
) -> bytes:
    """Return a V2 JSON body with one input."""
    body: dict[str, Any] = {} if request_id is None else {"id": request_id}
    body["inputs"] = [{"name": name, "shape": list(shape), "datatype": datatype, "data": data}]
    return json.dumps(body | members).encode()


def binary(inputs: Sequence[tuple[str, str, Sequence[int], bytes]], **members: Any) -> tuple[bytes, Headers]:
    """Return a body of JSON + binary tensors from (name, datatype, shape, bytes), and its headers."""
    body = {
        "inputs": [
            {
                "name": name,
                "shape": list(shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": len(raw)},
            }
            for name, datatype, shape, raw in inputs
        ]
    } | members
    text = json.dumps(body).encode()
    return text + b"".join(raw for *_, raw in inputs), binary_headers(len(text))


def binary_headers(json_length: int) -> Headers:
    """Return the headers of a binary body; 0 is one raw tensor."""
    return [
        ("content-type", b"application/octet-stream"),
        ("inference-header-content-length", b"%d" % json_length),
    ]


def requests(
    of: Chunk,
    rows: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    deadlines_ms: Sequence[int | None] | None = None,
    priority: int = 5,
    costs: Sequence[int] | None = None,
    replies: Sequence[str | None] | None = None,
    traces: Sequence[bytes | None] | None = None,
    form: AnswerForm | None = None,
    served: Served | None = None,
) -> Requests:
    """Return requests with FP32 rows of four elements; each holds its chunk position in every element."""
    made = [1] * len(rows) if counts is None else list(counts)
    values = np.repeat(np.array([of.positions[row] for row in rows], np.float32), made)
    return Requests(
        of,
        list(rows),
        [f"id-{of.positions[row]}" for row in rows],
        {"x": np.repeat(values[:, None], 4, axis=1)},
        None if counts is None else made,
        None if deadlines_ms is None else list(deadlines_ms),
        priority,
        None if replies is None else list(replies),
        None if traces is None else list(traces),
        None if costs is None else list(costs),
        AnswerForm() if form is None else form,
        served,
    )


def lane(
    max_batch_size: int = 8, delay_s: float = 0.005, shape: tuple[int, ...] = (4,), version: str = "1"
) -> Lane:
    """Return a primary lane of model ``m``."""
    return Lane("m", version, "primary", (shape,), max_batch_size, delay_s)


def only_answer(part: Requests, outputs: Tensors) -> Answer:
    """Return an answer after checking that each array has the part's rows."""
    for array in outputs.values():
        if len(array) != part.total_rows:
            raise ValueError(f"{len(array)} rows of output for {part.total_rows} rows of input")
    return Answer(part, outputs)


def by_row(decoded: Decoded) -> dict[int, tuple[Requests, int]]:
    """Return each accepted row's column set and its index there."""
    return {row: (part, index) for part in decoded.requests for index, row in enumerate(part.rows)}


def codes(decoded: Decoded) -> dict[int, str]:
    """Return each rejected row's code."""
    rejected: Failures | None = decoded.rejected
    return {} if rejected is None else dict(zip(rejected.rows, map(str, rejected.codes), strict=True))


def tensor_of(part: Requests, index: int, name: str = "x") -> Any:
    """Return the rows of one request's input."""
    bounds = part.bounds()
    return part.tensors[name][bounds[index] : bounds[index + 1]]


def as_wire(datatype: str, values: Any) -> bytes:
    """Return values as the little-endian bytes of a numeric datatype."""
    return np.asarray(values, DATATYPES[datatype].numpy).tobytes()
