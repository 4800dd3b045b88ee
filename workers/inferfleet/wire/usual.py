"""The usual form of a request: one input of a fixed shape as V2 JSON, in types that decode fast.

Whatever has another member, another type or another form is left to the general reader.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inferfleet.datatypes import DATATYPES

FORMATS = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP32": "f",
    "FP64": "d",
}
"""How ``struct`` packs each datatype that the usual form may have."""


class _FloatTensor(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class _IntegerTensor(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[int]


class _BoolTensor(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[bool]


class _FloatRequest(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    inputs: list[_FloatTensor]
    id: str | None = None


class _IntegerRequest(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    inputs: list[_IntegerTensor]
    id: str | None = None


class _BoolRequest(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    inputs: list[_BoolTensor]
    id: str | None = None


def request_type(datatype: str) -> Any:
    """Return the type of a request whose input is ``datatype``, one of ``FORMATS``."""
    found = DATATYPES[datatype]
    return _FloatRequest if found.is_float else _IntegerRequest if found.is_int else _BoolRequest
