"""A model whose answers can be checked one by one: which version gave it, and for which row."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from inferfleet.ports import ModelVersion
from inferfleet.testing import checksum_handler


class Shelf(Protocol):
    """A model repository that takes new versions."""

    def add(
        self, model: str, version: str, files: Sequence[Path], *, settings: str | None = None
    ) -> ModelVersion:
        """Copy files into a new version."""


def write_checksum_model(
    repository: Shelf, name: str, version: str, *, size: int = 4, delay_ms_per_batch: float = 0
) -> ModelVersion:
    """Add the checksum model as a Python handler: ``x`` FP32 [size] -> ``check`` INT64 [2].

    The repository must trust ``name``. Each batch takes ``delay_ms_per_batch``, whatever its size.
    """
    settings = f"""
runtime = "python"
file = "model.py"
[[input]]
name = "x"
datatype = "FP32"
shape = [{size}]
[[output]]
name = "check"
datatype = "INT64"
shape = [2]
[parameters]
version = {int(version)}
delay_ms_per_batch = {float(delay_ms_per_batch)}
"""
    with tempfile.TemporaryDirectory() as folder:
        handler = Path(folder) / "model.py"
        handler.write_bytes(Path(checksum_handler.__file__).read_bytes())
        return repository.add(name, version, [handler], settings=settings)


def expected_checksum(version: str | int, row: Iterable[float]) -> tuple[int, int]:
    """Return what the model must answer for one row, computed apart from the handler, in plain integers."""
    total = 0xCBF29CE484222325
    for value in row:
        (word,) = struct.unpack("<I", struct.pack("<f", value))
        total = ((total ^ word) * 0x100000001B3) % (1 << 64)
    return int(version), total >> 11
