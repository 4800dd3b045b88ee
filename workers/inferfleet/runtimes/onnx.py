"""The ONNX Runtime adapter.

The session is built from bytes that were compared with the manifest, and weights kept in other files are
handed over from memory in the same way: ONNX Runtime itself opens no file. No custom operator is loaded.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime

from inferfleet import onnx_file
from inferfleet.errors import (
    Code,
    DeviceError,
    DeviceOutOfMemoryError,
    RequestError,
)
from inferfleet.ports import ModelVersion
from inferfleet.records import Array, Signature, Tensors, TensorSpec
from inferfleet.runtimes import selfcheck
from inferfleet.runtimes.loading import granted_threads, label, refusal, translated

_DATATYPE_OF_TYPE = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
_BF16_ELEMENT = 16
_WARM_UP_ROWS = 16
_DEVICE = re.compile(r"(auto|cpu|cuda)(?::(\d{1,3}))?\Z")
_NO_MEMORY = re.compile(
    r"failed to allocate|bad_alloc|out of memory|ALLOC_FAILED|smaller than requested", re.IGNORECASE
)


class OnnxRuntime:
    """Loads ``.onnx`` files."""

    def load(self, version: ModelVersion, device: str, threads: int) -> OnnxModel:
        """Build a session, compare it with the declared signature, check and warm it up.

        Asking for ``cuda`` where the installed onnxruntime has none raises DeviceError; ``auto`` takes it
        where it is there.
        """
        session = _session(version, device, granted_threads(threads))
        model = OnnxModel(session, _agreed(version, session))
        selfcheck.check(model, label(version), version.batching.max_batch_size)
        rows = min(_WARM_UP_ROWS, version.batching.max_batch_size or _WARM_UP_ROWS)
        with translated(version, f"warming up with {rows} rows"):
            selfcheck.warm_up(model, rows)
        return model


class OnnxModel:
    """A session with the conversions that its datatypes need; FP32 and the like go in and out untouched."""

    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature) -> None:
        self.signature = signature
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs = [spec.name for spec in signature.outputs]
        self._texts_in = [spec.name for spec in signature.inputs if spec.datatype == "BYTES"]
        self._texts_out = [spec.name for spec in signature.outputs if spec.datatype == "BYTES"]
        self._bf16_in = frozenset(spec.name for spec in signature.inputs if spec.datatype == "BF16")
        has_bf16 = bool(self._bf16_in) or any(spec.datatype == "BF16" for spec in signature.outputs)
        self._call: Callable[[Any, Tensors], list[Array]] = (
            self._call_values if has_bf16 else self._call_arrays
        )

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Run the batch; BYTES must be UTF-8, because ONNX strings are text.

        Raises RequestError for bytes that are not, DeviceOutOfMemoryError when the allocator gives up.
        """
        session = self._session
        if session is None:
            raise RuntimeError("the model is closed")
        if self._texts_in:
            tensors = dict(tensors)
            for name in self._texts_in:
                tensors[name] = _decoded(name, tensors[name])
        try:
            outputs = dict(zip(self._outputs, self._call(session, tensors), strict=True))
        except MemoryError as error:
            raise DeviceOutOfMemoryError(f"no memory for a batch of {rows} rows") from error
        except Exception as error:
            if _NO_MEMORY.search(str(error)):
                raise DeviceOutOfMemoryError(f"no memory for a batch of {rows} rows: {error}") from error
            raise
        for name in self._texts_out:
            outputs[name] = _encoded(outputs[name])
        return outputs

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    def _call_arrays(self, session: Any, tensors: Tensors) -> list[Array]:
        outputs: list[Array] = session.run(self._outputs, tensors)
        return outputs

    def _call_values(self, session: Any, tensors: Tensors) -> list[Array]:
        """Run with ONNX Runtime's own values: its arrays know no BF16, which is carried as uint16."""
        binding = session.io_binding()
        for name, array in tensors.items():
            whole = np.ascontiguousarray(array)
            if name in self._bf16_in:
                value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(whole, _BF16_ELEMENT)
            else:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(whole)
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return [_to_numpy(value) for value in binding.get_outputs()]


def _session(version: ModelVersion, device: str, threads: int) -> onnxruntime.InferenceSession:
    raw = version.read(version.file)
    try:
        locations = onnx_file.external_files(raw)
    except ValueError as error:
        raise refusal(version, f"{version.file}: {error}") from None
    for location in locations:
        if location not in version.files:
            raise refusal(version, f"{version.file} refers to {location!r}, which the version does not have")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would take the core from the thread that decodes and publishes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    weights = [version.read(location) for location in locations]
    if weights:
        sizes = [len(each) for each in weights]
        options.add_external_initializers_from_files_in_memory(locations, weights, sizes)
    providers = _providers(version, device)
    with translated(version, f"reading {version.file}"):
        session = onnxruntime.InferenceSession(raw, options, providers=providers)
    if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(f"{label(version)}: device {device} is not usable by onnxruntime; see its log line")
    return session


def _providers(version: ModelVersion, device: str) -> list[str | tuple[str, dict[str, str]]]:
    asked = _DEVICE.match(device)
    if not asked or (asked[2] and asked[1] != "cuda"):
        raise DeviceError(f'{label(version)}: device "{device}" is none of auto, cpu, cuda, cuda:N')
    available = onnxruntime.get_available_providers()
    has_cuda = "CUDAExecutionProvider" in available
    if asked[1] == "cuda" and not has_cuda:
        raise DeviceError(
            f"{label(version)}: device {device} is asked for, and the installed onnxruntime has no CUDA "
            f"provider (only {', '.join(available)}); install onnxruntime-gpu, or set device to cpu"
        )
    if asked[1] == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": asked[2] or "0"}), "CPUExecutionProvider"]


def _agreed(version: ModelVersion, session: onnxruntime.InferenceSession) -> Signature:
    """Return the declared signature where there is one, after comparing it with the session's."""
    inputs = [_found(version, "input", node) for node in session.get_inputs()]
    outputs = [_found(version, "output", node) for node in session.get_outputs()]
    for found in inputs:
        if found.shape and found.shape[0] != -1:
            raise refusal(
                version,
                f"input {found.name} of {version.file} has a fixed batch of {found.shape[0]}; "
                "export it with a dynamic first dimension",
            )
    declared = version.signature
    if declared is None:
        return Signature(
            tuple(_per_row(version, "input", found) for found in inputs),
            tuple(_per_row(version, "output", found) for found in outputs),
        )
    missing = {found.name for found in inputs} - {spec.name for spec in declared.inputs}
    if missing:
        raise refusal(version, f"{version.file} needs input {min(missing)}, which is not declared")
    _compare(version, "input", declared.inputs, inputs)
    _compare(version, "output", declared.outputs, outputs)
    return declared


def _compare(
    version: ModelVersion, kind: str, declared: Sequence[TensorSpec], found: list[TensorSpec]
) -> None:
    by_name = {spec.name: spec for spec in found}
    for spec in declared:
        has = by_name.get(spec.name)
        if has is None:
            raise refusal(version, f"{kind} {spec.name} is declared, {version.file} has {', '.join(by_name)}")
        wanted = (-1, *spec.shape)
        # An input may be declared narrower than the file takes; an output may be narrower than the file says.
        fits = len(has.shape) == len(wanted) and all(
            size in (-1, want) or (want == -1 and kind == "output")
            for size, want in zip(has.shape, wanted, strict=True)
        )
        unknown_rank = kind == "output" and not has.shape
        if has.datatype != spec.datatype or not (fits or unknown_rank):
            raise refusal(
                version,
                f"{kind} {spec.name} is declared {spec.datatype} {list(wanted)}, "
                f"and {version.file} has {has.datatype} {list(has.shape)}",
            )


def _found(version: ModelVersion, kind: str, node: Any) -> TensorSpec:
    """Return a tensor of the session as it stands, with the batch dimension; -1 where a size is open."""
    datatype = _DATATYPE_OF_TYPE.get(node.type)
    if datatype is None:
        raise refusal(version, f"{kind} {node.name} of {version.file} is a {node.type}, not a tensor")
    return TensorSpec(
        node.name, datatype, tuple(size if isinstance(size, int) else -1 for size in node.shape)
    )


def _per_row(version: ModelVersion, kind: str, found: TensorSpec) -> TensorSpec:
    if not found.shape:
        raise refusal(
            version,
            f"{kind} {found.name} of {version.file} has no shape with a batch dimension; "
            "declare it in model.toml",
        )
    return TensorSpec(found.name, found.datatype, found.shape[1:])


def _to_numpy(value: Any) -> Array:
    if value.element_type() != _BF16_ELEMENT:
        array: Array = value.numpy()
        return array
    out = np.empty(tuple(value.shape()), np.uint16)
    # numpy has no BF16 to name the buffer by, and refuses to convert it: go by its bits.
    ctypes.memmove(out.ctypes.data, value.data_ptr(), out.nbytes)
    return out


def _decoded(name: str, array: Array) -> Array:
    out = np.empty(array.shape, dtype=object)
    try:
        out.reshape(-1)[:] = [element.decode() for element in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        raise RequestError(
            Code.DTYPE, f"input {name}: an element is not UTF-8, which this model needs"
        ) from None
    return out


def _encoded(array: Array) -> Array:
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = [element.encode() for element in array.reshape(-1).tolist()]
    return out
