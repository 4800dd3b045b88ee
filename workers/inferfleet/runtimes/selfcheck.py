"""The check every runtime makes after loading: does the model give what its signature says?

Runs one row and then a few, of zeros (empty bytes for BYTES) or of a sample that the handler offers, and
compares names, datatypes, shapes and the first dimension of every output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inferfleet.datatypes import DATATYPES
from inferfleet.errors import ModelLoadError
from inferfleet.ports import LoadedModel
from inferfleet.records import Signature, Tensors, TensorSpec
from inferfleet.runtimes.arrays import as_array
from inferfleet.runtimes.loading import said

ROWS = (1, 3)
VARYING_SIZE = 4
"""How long a dimension that varies is in the check."""


def check(
    model: LoadedModel, label: str, most_rows: int | None, sample: Mapping[str, Any] | None = None
) -> None:
    """Run the model on 1 row and on 3; raise ModelLoadError, starting with ``label``, on any disagreement.

    ``most_rows`` is the version's own ``max_batch_size``, which the check respects. ``sample`` holds at least
    one row of every input; its rows are repeated as needed.
    """
    for rows in ROWS if most_rows is None else dict.fromkeys(min(rows, most_rows) for rows in ROWS):
        if sample is None:
            tensors = _zeros(model.signature, rows)
        else:
            tensors = _rows_of(sample, model.signature, rows, label)
        try:
            outputs = model.run(tensors, rows)
        except Exception as error:
            raise ModelLoadError(
                f"{label}: the self-check with {_rows(rows)} failed: {said(error)}"
            ) from error
        disagreement = compare(model.signature, outputs, rows)
        if disagreement:
            raise ModelLoadError(f"{label}: the self-check with {_rows(rows)} failed: {disagreement}")


def warm_up(model: LoadedModel, rows: int) -> None:
    """Run ``rows`` rows of zeros once, so that arenas and kernels have met a batch of that size."""
    model.run(_zeros(model.signature, rows), rows)


def compare(signature: Signature, outputs: Mapping[str, object], rows: int) -> str | None:
    """Return in words how ``outputs`` differ from the signature, ``None`` if they do not."""
    declared = [spec.name for spec in signature.outputs]
    if set(outputs) != set(declared):
        return f"outputs {', '.join(sorted(declared))} declared, {', '.join(sorted(outputs)) or 'none'} given"
    for spec in signature.outputs:
        array = outputs[spec.name]
        wanted = (rows, *spec.shape)
        if not isinstance(array, np.ndarray):
            return f"output {spec.name} is a {type(array).__name__}, not an array"
        fits = len(array.shape) == len(wanted) and all(
            have == want or want == -1 for have, want in zip(array.shape, wanted, strict=True)
        )
        if array.dtype != DATATYPES[spec.datatype].numpy or not fits:
            return (
                f"output {spec.name} is declared {spec.datatype} {_shape(wanted)}, "
                f"given {array.dtype} {_shape(array.shape)}"
            )
    return None


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _zeros(signature: Signature, rows: int) -> Tensors:
    return {spec.name: _zero(spec, rows) for spec in signature.inputs}


def _zero(spec: TensorSpec, rows: int) -> npt.NDArray[Any]:
    shape = (rows, *(VARYING_SIZE if size == -1 else size for size in spec.shape))
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, DATATYPES[spec.datatype].numpy)


def _rows_of(sample: Mapping[str, Any], signature: Signature, rows: int, label: str) -> Tensors:
    tensors = {}
    for spec in signature.inputs:
        if spec.name not in sample:
            raise ModelLoadError(f"{label}: sample() leaves out input {spec.name}")
        array = as_array(sample[spec.name], spec)
        if array.ndim != len(spec.shape) + 1 or not len(array):
            raise ModelLoadError(
                f"{label}: sample() must give rows of {_shape(spec.shape)} for input {spec.name}"
            )
        tensors[spec.name] = np.resize(array, (rows, *array.shape[1:])) if len(array) < rows else array[:rows]
    return tensors
