"""A request as it goes into a topic: inputs or a ready body, and the headers beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import msgspec
import numpy as np

from inferfleet.client.tracing import current_trace
from inferfleet.datatypes import DATATYPES
from inferfleet.errors import RequestError
from inferfleet.records import Array
from inferfleet.wire import headers as names
from inferfleet.wire.headers import check_id

Inputs: TypeAlias = Mapping[str, Any]
"""Input name to array, rows first; or a whole V2 document, known by its list of ``inputs``."""

_V2_NAMES = {entry.numpy: name for name, entry in DATATYPES.items() if name not in ("BF16", "BYTES")}
_EPOCH_2001_MS = 1_000_000_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request and what is said beside it.

    ``inputs`` are arrays or lists by name (first dimension: rows), a whole V2 document, or ready bytes.
    Lists of floats become FP32, of integers INT64, of text BYTES: give numpy arrays where that is not
    meant. ``deadline_ms`` is an instant in epoch milliseconds, ``priority`` 1 (highest) to 9, ``topic``
    overrules the route's own source: ``TOPIC`` or ``rabbitmq:QUEUE``.
    """

    inputs: Inputs | bytes
    id: str | None = None
    key: bytes | str | None = None
    headers: Mapping[str, str | bytes] | None = None
    deadline_ms: int | None = None
    priority: int | None = None
    binary: bool = False
    topic: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping | bytes):
            raise TypeError(
                "inputs are a dict of arrays by name, a V2 document or bytes, "
                f"not {type(self.inputs).__name__}"
            )
        if self.deadline_ms is not None and 0 <= self.deadline_ms < _EPOCH_2001_MS:
            raise ValueError(
                f"deadline_ms is an instant in epoch milliseconds, {self.deadline_ms} is long past; "
                f"for {self.deadline_ms} ms from now give int(time.time() * 1000) + {self.deadline_ms}, "
                f"which is {int(time.time() * 1000) + self.deadline_ms}"
            )
        if self.priority is not None and not 1 <= self.priority <= 9:
            raise ValueError(f"priority is 1 (highest) to 9, not {self.priority}")
        if self.id is not None:
            try:
                check_id(self.id)
            except RequestError as error:
                raise ValueError(f"{error.text}: {self.id[:40]!r}") from None


class RequestOptions(TypedDict, total=False):
    """What may be said beside the inputs; the fields of :class:`Request`."""

    id: str | None
    key: bytes | str | None
    headers: Mapping[str, str | bytes] | None
    deadline_ms: int | None
    priority: int | None
    binary: bool
    topic: str | None


def body_of(request: Request, *, columns: bool) -> tuple[bytes, dict[str, bytes]]:
    """Return the record's value and the headers that say how to read it.

    ``columns`` is the route's ``input = "columns"``. Raises ValueError for inputs that no tensor holds.
    """
    inputs = request.inputs
    if isinstance(inputs, bytes | bytearray | memoryview):
        return bytes(inputs), {}
    if isinstance(inputs.get("inputs"), list):
        return msgspec.json.encode(inputs), {}
    if columns:
        return msgspec.json.encode({name: _plain(value) for name, value in inputs.items()}), {}
    tensors = {name: to_array(name, value) for name, value in inputs.items()}
    if request.binary:
        return _binary(tensors)
    entries = [
        _described(name, array) | {"data": _plain(array.reshape(-1))} for name, array in tensors.items()
    ]
    return msgspec.json.encode({"inputs": entries}), {}


def headers_of(request: Request, request_id: str, reply: str | None) -> dict[str, bytes]:
    """Return the headers that a request needs beside its body's own; ``reply`` names a reply stream.

    Where the caller gives no trace, the current one of the calling thread goes along, if there is one.
    """
    headers = {names.ID: request_id.encode()}
    if reply is not None:
        headers[names.REPLY] = reply.encode()
    if request.deadline_ms is not None:
        headers[names.DEADLINE] = b"%d" % request.deadline_ms
    if request.priority is not None:
        headers[names.PRIORITY] = b"%d" % request.priority
    for name, value in (request.headers or {}).items():
        if name.lower() in (names.ID, names.REPLY):
            raise ValueError(f"header {name.lower()} is the client's own; give the id as id=")
        headers[name.lower()] = value.encode() if isinstance(value, str) else bytes(value)
    if names.TRACEPARENT not in headers:
        headers |= current_trace()
    return headers


def to_array(name: str, value: Any) -> Array:
    """Return ``value`` as the array that goes over the wire; rows are its first dimension."""
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if not isinstance(value, np.ndarray):
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        elif array.dtype.kind == "i":
            array = array.astype(np.int64)
    if array.dtype.kind in "USO":
        array = array.astype(object)
    elif array.dtype.newbyteorder("<") not in _V2_NAMES:
        raise ValueError(f"input {name}: {array.dtype} has no datatype in the protocol; convert it first")
    if array.ndim == 0:
        raise ValueError(f"input {name} has no dimension; the first one is rows, so write [value]")
    return array


def _datatype(array: Array) -> str:
    return "BYTES" if array.dtype == object else _V2_NAMES[array.dtype.newbyteorder("<")]


def _described(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": _datatype(array)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _texts(value.tolist()) if value.dtype == object else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(each) for each in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8 need binary=True") from None


def _binary(tensors: Mapping[str, Array]) -> tuple[bytes, dict[str, bytes]]:
    entries: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, array in tensors.items():
        blob = _blob(array)
        entries.append(_described(name, array) | {"parameters": {"binary_data_size": len(blob)}})
        blobs.append(blob)
    head = msgspec.json.encode({"inputs": entries})
    described = {names.CONTENT_TYPE: b"application/octet-stream", names.JSON_LENGTH: b"%d" % len(head)}
    return head + b"".join(blobs), described


def _blob(array: Array) -> bytes:
    if array.dtype != object:
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    elements = [
        each if isinstance(each, bytes) else str(each).encode() for each in array.reshape(-1).tolist()
    ]
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)
