"""Outcomes as they stand in result topics and in Redis, read back into tensors."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from inferfleet.datatypes import DATATYPES, fp32_to_bf16
from inferfleet.records import Array, Tensors, TensorSpec


class Outcome(NamedTuple):
    """One outcome: the outputs that could be read, or an error's code; neither where it is no outcome."""

    outputs: Tensors
    code: str = ""


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] = []
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct):
    outputs: list[_Output] = []
    code: str = ""


_BODY = msgspec.json.Decoder(_Body)
_NOTHING = Outcome({})


def read_outcome(body: bytes, json_length: int | None, specs: Mapping[str, TensorSpec]) -> Outcome:
    """Return what an outcome's body says of the outputs in ``specs``; others are left out.

    ``json_length`` is the length of the JSON where binary tensors follow. What cannot be read, or is of
    another datatype or rank, is left out: it was written by another release, or not by a worker.
    """
    try:
        said = _BODY.decode(body if json_length is None else body[:json_length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _NOTHING
    if said.code:
        return Outcome({}, said.code)
    outputs: Tensors = {}
    at = len(body) if json_length is None else json_length
    for output in said.outputs:
        size = output.parameters.get("binary_data_size")
        blob: bytes | None = None
        if isinstance(size, int):
            blob, at = body[at : at + size], at + size
        spec = specs.get(output.name)
        array = None if spec is None else _array(spec, output, blob)
        if array is not None:
            outputs[output.name] = array
    return Outcome(outputs)


def _array(spec: TensorSpec, output: _Output, blob: bytes | None) -> Array | None:
    widened = output.datatype == "FP32" and spec.datatype in ("FP16", "BF16")
    if (output.datatype != spec.datatype and not widened) or len(output.shape) != len(spec.shape) + 1:
        return None
    try:
        flat = _elements(output, blob).reshape(output.shape)
    except (ValueError, TypeError, AttributeError, OverflowError, binascii.Error):
        return None
    if widened:
        return fp32_to_bf16(flat) if spec.datatype == "BF16" else flat.astype(np.float16)
    return flat


def _elements(output: _Output, blob: bytes | None) -> Array:
    kind = DATATYPES[output.datatype].numpy
    if output.datatype != "BYTES":
        return np.array(output.data, kind) if blob is None else np.frombuffer(blob, kind)
    if blob is not None:
        found = _cut(blob)
    elif output.parameters.get("encoding") == "base64":
        found = [base64.b64decode(text) for text in output.data]
    else:
        found = [text.encode() for text in output.data]
    array = np.empty(len(found), object)
    array[:] = found
    return array


def _cut(blob: bytes) -> list[bytes]:
    """Return the elements of a binary BYTES tensor: each behind its length, 4 bytes, little-endian."""
    found: list[bytes] = []
    at = 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "little")
        if end > len(blob):
            raise ValueError("an element passes the end")
        found.append(blob[at + 4 : end])
        at = end
    return found
