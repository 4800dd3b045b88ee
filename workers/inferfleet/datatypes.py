"""The tensor datatypes of the Open Inference Protocol V2, and how inferfleet carries each in numpy.

Two names have no numpy type of their own. ``BF16`` is carried as ``uint16``: the upper half of each FP32
value's bits, which is also its form on the wire; :func:`bf16_to_fp32` and :func:`fp32_to_bf16` cross over.
``BYTES`` is carried as an ``object`` array whose elements are all ``bytes``, never ``str``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Datatype(NamedTuple):
    """One V2 datatype.

    ``numpy`` is the type that carries it (little-endian on every platform that is supported). ``width`` is
    bytes per element, ``None`` where elements vary. ``low`` and ``high`` are the smallest and largest finite
    values, ``None`` for BYTES; for BOOL they are 0 and 1. ``is_int`` holds for signed and unsigned integers.
    """

    name: str
    numpy: np.dtype[Any]
    width: int | None
    is_float: bool
    is_int: bool
    low: float | int | None
    high: float | int | None


def _integer(name: str, kind: type[np.integer[Any]]) -> Datatype:
    info = np.iinfo(kind)
    return Datatype(name, np.dtype(kind), np.dtype(kind).itemsize, False, True, int(info.min), int(info.max))


def _float(name: str, kind: type[np.floating[Any]]) -> Datatype:
    info = np.finfo(kind)
    return Datatype(
        name, np.dtype(kind), np.dtype(kind).itemsize, True, False, float(info.min), float(info.max)
    )


_BF16_HIGH = float(np.array([0x7F7F0000], np.uint32).view(np.float32)[0])

DATATYPES: dict[str, Datatype] = {
    datatype.name: datatype
    for datatype in (
        Datatype("BOOL", np.dtype(np.bool_), 1, False, False, 0, 1),
        _integer("UINT8", np.uint8),
        _integer("UINT16", np.uint16),
        _integer("UINT32", np.uint32),
        _integer("UINT64", np.uint64),
        _integer("INT8", np.int8),
        _integer("INT16", np.int16),
        _integer("INT32", np.int32),
        _integer("INT64", np.int64),
        _float("FP16", np.float16),
        _float("FP32", np.float32),
        _float("FP64", np.float64),
        Datatype("BF16", np.dtype(np.uint16), 2, True, False, -_BF16_HIGH, _BF16_HIGH),
        Datatype("BYTES", np.dtype(object), None, False, False, None, None),
    )
}
"""Every datatype by its V2 name."""


def bf16_to_fp32(array: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen BF16 bits to FP32, exactly; NaN and infinities stay what they are."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Narrow to BF16 bits, to nearest with ties to even; NaN stays NaN, overflow becomes infinity."""
    values = np.ascontiguousarray(array, np.float32).reshape(np.shape(array))
    bits = values.view(np.uint32)
    # Half of the dropped part's range, less one unless the kept part is odd: ties go to even.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Rounding could carry a NaN's small payload into infinity, or wrap it to zero: keep its top, set quiet.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
