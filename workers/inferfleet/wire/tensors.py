"""Shapes and elements of single tensors: the checks that stand before any allocation."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from inferfleet.datatypes import DATATYPES, bf16_to_fp32
from inferfleet.errors import Code, RequestError
from inferfleet.records import Array, TensorSpec

MAX_DEPTH = 32
MAX_DIMENSION = 2**31 - 1
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""A whole string, or a bracket outside of strings; possessive, so that no body makes it backtrack."""
_FLOATS = msgspec.json.Decoder(list[float])
_INTEGERS = msgspec.json.Decoder(list[int])
_BOOLS = msgspec.json.Decoder(list[bool])
_STRINGS_LIST = msgspec.json.Decoder(list[str])
_ANY = msgspec.json.Decoder()
_MAGIC = ((b"\x93NUMPY", "a .npy file"), (b"PK\x03\x04", "a zip or .npz file"), (b"\x1f\x8b", "gzip data"))


def clip(text: str, limit: int = 80) -> str:
    """Return ``text`` fit for an error: printable, and no longer than ``limit``."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def check_depth(body: bytes) -> None:
    """Raise ``E_DECODE`` when JSON nests deeper than ``MAX_DEPTH``; never recurses."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _BRACKETS.finditer(body):
        found = token.group()
        depth += (found in b"[{") - (found in b"]}")
        if depth > MAX_DEPTH:
            raise RequestError(Code.DECODE, f"the JSON body nests deeper than {MAX_DEPTH}")


def check_text(body: bytes) -> None:
    """Raise the code of a body that cannot be JSON: foreign formats, byte order marks, bad UTF-8."""
    for magic, what in _MAGIC:
        if body.startswith(magic):
            raise RequestError(Code.CONTENT_TYPE, f"the body is {what}, not JSON")
    if len(body) > 1 and body[0] == 0x80 and body[1] in (2, 3, 4, 5):
        raise RequestError(Code.CONTENT_TYPE, "the body is a pickle, which is never read")
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RequestError(Code.DECODE, "the body starts with a byte order mark")
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise RequestError(Code.DECODE, "the body is not UTF-8") from None


def check_shape(spec: TensorSpec, shape: Sequence[int], max_rows: int) -> int:
    """Return the number of elements of ``shape`` after holding it against ``spec``.

    The first dimension is rows. Raises ``E_SHAPE``, or ``E_TOO_LARGE`` for too many rows.
    """
    if len(shape) != len(spec.shape) + 1:
        raise RequestError(
            Code.SHAPE,
            f"input {spec.name}: {len(shape)} dimensions; expected {len(spec.shape) + 1}: "
            f"rows and {list(spec.shape)}",
        )
    if max(shape) > MAX_DIMENSION:
        raise RequestError(Code.SHAPE, f"input {spec.name}: a dimension is larger than {MAX_DIMENSION}")
    for found, wanted in zip(shape[1:], spec.shape, strict=True):
        if found < 1 or (wanted != -1 and found != wanted):
            raise RequestError(
                Code.SHAPE,
                f"input {spec.name}: shape {clip(str(list(shape)))}; expected rows and {list(spec.shape)}",
            )
    if shape[0] < 1:
        raise RequestError(Code.SHAPE, f"input {spec.name}: the first dimension (rows) must be at least 1")
    if shape[0] > max_rows:
        raise RequestError(Code.TOO_LARGE, f"{shape[0]} rows; at most {max_rows} are allowed")
    return math.prod(shape)


def check_finite(spec: TensorSpec, array: Array, allowed: bool) -> None:
    """Raise ``E_NONFINITE`` when a float array holds NaN or infinity and that is not allowed."""
    if allowed or not DATATYPES[spec.datatype].is_float:
        return
    values = bf16_to_fp32(array) if spec.datatype == "BF16" else array
    if not np.isfinite(values).all():
        raise RequestError(Code.NONFINITE, f"input {spec.name} holds NaN or infinity")


def from_json(
    spec: TensorSpec, shape: Sequence[int], raw: bytes, count: int, encoding: object = None
) -> Array:
    """Return JSON ``data`` (flat or nested) as an array of ``shape``.

    Raises ``E_DTYPE`` for elements of another type or out of range, ``E_SHAPE`` for another number of
    elements, ``E_NONFINITE`` for numbers that overflow, ``E_DECODE`` for broken base64.
    """
    datatype = DATATYPES[spec.datatype]
    if spec.datatype in ("FP16", "BF16"):
        raise RequestError(Code.DTYPE, f"input {spec.name}: {spec.datatype} has no JSON form; send it binary")
    values = _flat(spec, raw)
    if len(values) != count:
        raise RequestError(
            Code.SHAPE, f"input {spec.name}: {len(values)} elements; shape {list(shape)} holds {count}"
        )
    if spec.datatype == "BYTES":
        return _bytes_array(spec, values, shape, encoding)
    try:
        with np.errstate(over="ignore"):
            array: Array = np.array(values, dtype=datatype.numpy).reshape(shape)
    except (OverflowError, ValueError, TypeError):
        raise RequestError(
            Code.DTYPE, f"input {spec.name}: an element is out of range for {spec.datatype}"
        ) from None
    if datatype.is_float and not np.isfinite(array).all():
        raise RequestError(Code.NONFINITE, f"input {spec.name}: a number overflows {spec.datatype}")
    return array


def _flat(spec: TensorSpec, raw: bytes) -> list[Any]:
    decoder: msgspec.json.Decoder[Any]
    datatype = DATATYPES[spec.datatype]
    if datatype.is_float:
        decoder = _FLOATS
    elif datatype.is_int:
        decoder = _INTEGERS
    else:
        decoder = _BOOLS if spec.datatype == "BOOL" else _STRINGS_LIST
    try:
        return list(decoder.decode(raw))
    except msgspec.ValidationError as error:
        if "out of range" in str(error) and datatype.is_float:
            raise RequestError(Code.NONFINITE, f"input {spec.name}: a number overflows") from None
        if "got `array`" in str(error):
            return _flatten(spec, raw)
        raise RequestError(
            Code.DTYPE, f"input {spec.name}: data is not all {spec.datatype} ({clip(str(error))})"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(Code.DECODE, f"input {spec.name}: {clip(str(error))}") from None


def _flatten(spec: TensorSpec, raw: bytes) -> list[Any]:
    """Flatten nested ``data`` whose levels all nest alike: only the innermost hold elements."""
    level: list[Any] = any_json(spec, raw)
    while level and all(type(item) is list for item in level):
        if len({len(item) for item in level}) > 1:
            raise RequestError(Code.SHAPE, f"input {spec.name}: nested data is ragged")
        level = [element for item in level for element in item]
    if any(type(item) is list for item in level):
        raise RequestError(Code.SHAPE, f"input {spec.name}: nested data mixes lists and elements")
    return _flat(spec, msgspec.json.encode(level))


def any_json(spec: TensorSpec, raw: bytes) -> Any:
    """Return ``raw`` read without a type; raises ``E_NONFINITE``, ``E_DTYPE`` or ``E_DECODE``."""
    try:
        return _ANY.decode(raw)
    except msgspec.ValidationError:
        code = Code.NONFINITE if DATATYPES[spec.datatype].is_float else Code.DTYPE
        raise RequestError(code, f"input {spec.name}: a number is out of range") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(Code.DECODE, f"input {spec.name}: {clip(str(error))}") from None


def _bytes_array(spec: TensorSpec, values: list[str], shape: Sequence[int], encoding: object) -> Array:
    if encoding == "base64":
        try:
            elements = [base64.b64decode(value, validate=True) for value in values]
        except (binascii.Error, ValueError):
            raise RequestError(Code.DECODE, f"input {spec.name}: broken base64") from None
    elif encoding is None:
        elements = [value.encode() for value in values]
    else:
        raise RequestError(Code.SCHEMA, f"input {spec.name}: parameters.encoding must be 'base64'")
    return object_array(elements, shape)


def object_array(elements: Sequence[bytes], shape: Sequence[int]) -> Array:
    """Return ``elements`` as an object array of ``shape``."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def from_bytes(spec: TensorSpec, shape: Sequence[int], raw: bytes, count: int) -> Array:
    """Return little-endian bytes as an array of ``shape`` (a copy); raises ``E_SHAPE``, ``E_DTYPE``."""
    datatype = DATATYPES[spec.datatype]
    if datatype.width is None:
        return object_array(split_elements(spec, raw, count), shape)
    if len(raw) != count * datatype.width:
        raise RequestError(
            Code.SHAPE,
            f"input {spec.name}: {len(raw)} bytes; shape {list(shape)} of {spec.datatype} "
            f"takes {count * datatype.width}",
        )
    array: Array = np.frombuffer(raw, dtype=datatype.numpy).reshape(shape).copy()
    if spec.datatype == "BOOL" and not np.isin(array.view(np.uint8), (0, 1)).all():
        raise RequestError(Code.DTYPE, f"input {spec.name}: a BOOL byte is neither 0 nor 1")
    return array


def split_elements(spec: TensorSpec, raw: bytes, count: int) -> list[bytes]:
    """Return the elements of a BYTES tensor: each a 4-byte little-endian length, then its bytes."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) < count:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            break
        elements.append(raw[at + 4 : end])
        at = end
    if at != len(raw) or len(elements) != count:
        raise RequestError(
            Code.SHAPE, f"input {spec.name}: its bytes do not hold exactly {count} length-prefixed elements"
        )
    return elements
