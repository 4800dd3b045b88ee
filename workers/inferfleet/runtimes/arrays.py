"""From what a handler gives to the arrays that travel on."""

from __future__ import annotations

from typing import Any

import numpy as np

from inferfleet.datatypes import DATATYPES
from inferfleet.records import Array, TensorSpec


def as_array(value: Any, spec: TensorSpec | None) -> Array:
    """Return ``value`` as an array of its own memory: lists get the declared datatype, arrays keep theirs.

    For BYTES every str becomes UTF-8 bytes, in lists and arrays alike; anything else there raises TypeError.
    """
    if spec is not None and spec.datatype == "BYTES":
        return _bytes_array(value, len(spec.shape) + 1)
    if isinstance(value, np.ndarray):
        return value.copy()
    return np.array(value, None if spec is None else DATATYPES[spec.datatype].numpy)


def _bytes_array(value: Any, dimensions: int) -> Array:
    """Return nested lists or an array of str and bytes as an object array of bytes."""
    array = np.asarray(value, dtype=object)
    if array.ndim != dimensions:
        return array
    flat = [each.encode() if isinstance(each, str) else each for each in array.reshape(-1).tolist()]
    odd = next((each for each in flat if not isinstance(each, bytes)), None)
    if odd is not None:
        raise TypeError(f"a BYTES output holds a {type(odd).__name__}, must be bytes or str")
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = flat
    return out
