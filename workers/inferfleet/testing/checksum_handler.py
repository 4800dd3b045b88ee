"""A Python handler whose answer names the version that gave it and the row it belongs to.

This file is copied into the model folders that :mod:`inferfleet.testing.checksum` writes, so it imports
nothing but numpy. Crossed answers, stale versions and mixed-up batches show in the answer itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_PRIME = 0x100000001B3
_START = 0xCBF29CE484222325


def checksums(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return one number per row: FNV-1a over the row's 32-bit words, its upper 53 bits.

    53 bits survive JSON readers that know doubles only.
    """
    words = np.ascontiguousarray(rows, "<f4").reshape(len(rows), -1).view("<u4").astype(np.uint64)
    sums = np.full(len(rows), _START, np.uint64)
    prime = np.uint64(_PRIME)
    for column in range(words.shape[1]):
        sums = (sums ^ words[:, column]) * prime
    return (sums >> np.uint64(11)).astype(np.int64)


class Model:
    """Input ``x`` FP32 [k], output ``check`` INT64 [2] = (version, checksum of the row)."""

    def load(self, folder: Path, device: str, parameters: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Take the version and the model time from the parameters."""
        self._version = int(parameters["version"])
        self._delay_s = float(parameters.get("delay_ms_per_batch", 0)) / 1000

    def predict(self, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the version and the checksum of each row, after the model time."""
        if self._delay_s:
            time.sleep(self._delay_s)
        sums = checksums(tensors["x"])
        return {"check": np.stack([np.full(len(sums), self._version, np.int64), sums], axis=1)}
