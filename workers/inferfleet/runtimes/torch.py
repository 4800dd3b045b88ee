"""The PyTorch adapter: ``model.safetensors`` with a class beside it, or a ``.pt2`` of ``torch.export``.

Both run code and need a trusted version. Weights in safetensors go into the class that ``entry_point`` names
(``network:Network`` in ``network.py``), constructed with ``[parameters]`` as keyword arguments. Inputs are
passed **by position, in the order in which model.toml declares them**. A module may return one tensor, a
tuple or list in the declared order of the outputs, or a mapping by their names. It must not write to its
inputs: on the CPU they share memory with the requests.
"""

from __future__ import annotations

import inspect
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from inferfleet.errors import DeviceError, DeviceOutOfMemoryError, InferfleetError
from inferfleet.ports import ModelVersion
from inferfleet.records import Array, Signature, Tensors
from inferfleet.runtimes import selfcheck
from inferfleet.runtimes.code import ModelCode
from inferfleet.runtimes.loading import (
    declared_signature,
    granted_threads,
    label,
    parameters,
    refusal,
    require_trust,
    translated,
)

_TORCH_OF_DATATYPE = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
_WARM_UP_ROWS = 16
_DEVICE = re.compile(r"(auto|cpu|cuda)(?::(\d{1,3}))?\Z")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)

Module = Callable[..., Any]


class TorchRuntime:
    """Loads trusted torch versions; the number of threads is one for the whole process, the last load's."""

    def load(self, version: ModelVersion, device: str, threads: int) -> TorchModel:
        """Build the module on the device, check it against the declared signature and warm it up.

        Raises DeviceError where ``cuda`` is asked for and there is none; ``auto`` takes it where it is.
        """
        require_trust(version)
        signature = declared_signature(version)
        for spec in (*signature.inputs, *signature.outputs):
            if spec.datatype not in _TORCH_OF_DATATYPE:
                raise refusal(version, f"{spec.name} is {spec.datatype}, which torch has no tensors of")
        place = _place(version, device)
        torch.set_num_threads(granted_threads(threads))
        if version.file.endswith(".pt2"):
            module, code = _exported(version, place), None
        else:
            module, code = _from_safetensors(version, place)
        model = TorchModel(module, signature, place, code)
        try:
            selfcheck.check(model, label(version), version.batching.max_batch_size)
            rows = min(_WARM_UP_ROWS, version.batching.max_batch_size or _WARM_UP_ROWS)
            with translated(version, f"warming up with {rows} rows"):
                selfcheck.warm_up(model, rows)
        except InferfleetError:
            model.close()
            raise
        return model


class TorchModel:
    """A module on a device; on the CPU arrays are shared with torch both ways, nothing is copied."""

    def __init__(
        self, module: Module, signature: Signature, place: torch.device, code: ModelCode | None = None
    ) -> None:
        self.signature = signature
        self._module: Module | None = module
        self._place = place
        self._code = code
        self._inputs = [(spec.name, spec.datatype == "BF16") for spec in signature.inputs]
        self._outputs = [(spec.name, spec.datatype == "BF16") for spec in signature.outputs]
        self._names = [spec.name for spec in signature.outputs]
        self._stream: Any = None
        if place.type == "cuda":
            # The weights were copied on the default stream, which this one does not wait for.
            torch.cuda.synchronize(place)
            self._stream = torch.cuda.Stream(place)

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Run the batch; raises DeviceOutOfMemoryError when the device has no memory for it."""
        module = self._module
        if module is None:
            raise RuntimeError("the model is closed")
        try:
            if self._stream is None:
                with torch.inference_mode():
                    given = module(*[_shared(tensors[name], is_bf16) for name, is_bf16 in self._inputs])
                    return self._arrays(given)
            return self._run_on_stream(module, tensors)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
                raise
            reason = str(error)
        # Outside the handler: the error's frames held the batch's tensors.
        if self._stream is not None:
            torch.cuda.empty_cache()
        raise DeviceOutOfMemoryError(f"no memory for a batch of {rows} rows: {reason}")

    def close(self) -> None:
        """Give the weights' memory back to the device."""
        self._module = None
        if self._code is not None:
            self._code.close()
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.empty_cache()

    def _run_on_stream(self, module: Module, tensors: Tensors) -> Tensors:
        """Copy in, run and copy out on the model's own stream, through torch's cache of pinned memory."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            inputs = []
            for name, is_bf16 in self._inputs:
                pinned = _pinned_copy(tensors[name], is_bf16)
                inputs.append(pinned.to(self._place, non_blocking=True))
            outputs = {}
            for name, tensor in zip(self._names, self._tensors(module(*inputs)), strict=True):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                outputs[name] = host.copy_(tensor, non_blocking=True)
            self._stream.synchronize()
            return {name: _numpy(outputs[name], is_bf16) for name, is_bf16 in self._outputs}

    def _arrays(self, given: Any) -> Tensors:
        return {
            name: _numpy(tensor, is_bf16)
            for (name, is_bf16), tensor in zip(self._outputs, self._tensors(given), strict=True)
        }

    def _tensors(self, given: Any) -> list[torch.Tensor]:
        """Return the outputs in declared order, whichever of the three forms the module uses."""
        names = self._names
        if isinstance(given, torch.Tensor):
            given = (given,)
        if isinstance(given, Mapping):
            missing = [name for name in names if name not in given]
            if missing:
                raise ValueError(
                    f"the module returned {', '.join(map(str, given))}, not {', '.join(missing)}"
                )
            return [given[name] for name in names]
        if not isinstance(given, tuple | list):
            raise TypeError(f"the module returned a {type(given).__name__}, must be tensors")
        if len(given) != len(names):
            raise ValueError(f"the module returned {len(given)} tensors, {len(names)} are declared")
        return list(given)


def _shared(array: Array, is_bf16: bool) -> torch.Tensor:
    # torch writes where a module tells it to, so read-only memory (a request's own bytes) is copied first.
    flags = array.flags
    if not (flags.writeable and flags.c_contiguous):
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bf16 else tensor


def _pinned_copy(array: Array, is_bf16: bool) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.view(torch.bfloat16) if is_bf16 else pinned


def _numpy(tensor: torch.Tensor, is_bf16: bool) -> Array:
    if is_bf16 and tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array


def _place(version: ModelVersion, device: str) -> torch.device:
    asked = _DEVICE.match(device)
    if not asked or (asked[2] and asked[1] != "cuda"):
        raise DeviceError(f'{label(version)}: device "{device}" is none of auto, cpu, cuda, cuda:N')
    if asked[1] == "cpu" or (asked[1] == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(asked[2] or 0)
    if index >= count:
        raise DeviceError(
            f"{label(version)}: device {device} is asked for, and torch sees {count} CUDA devices; "
            "set device to cpu or auto"
        )
    return torch.device("cuda", index)


def _from_safetensors(version: ModelVersion, place: torch.device) -> tuple[Module, ModelCode]:
    """Return the class of ``entry_point`` with exactly the weights of the file, and its code."""
    import safetensors.torch

    entry_point = version.options.get("entry_point")
    if not version.file.endswith(".safetensors") or not isinstance(entry_point, str):
        raise refusal(
            version,
            'runtime torch takes a .pt2 file, or a .safetensors file with entry_point = "module:Class"',
        )
    module_name, _, class_name = entry_point.partition(":")
    code = ModelCode(version)
    network = code.load_class(module_name, class_name)
    try:
        with translated(version, f"reading {version.file}"):
            weights = safetensors.torch.load(version.read(version.file))
        with translated(version, f"constructing {class_name}"):
            module = network(**parameters(version))
        if not isinstance(module, torch.nn.Module):
            raise refusal(version, f"{class_name} in {module_name}.py is no torch.nn.Module")
        with translated(version, f"loading the weights into {class_name}"):
            module.load_state_dict(weights, strict=True)
            module.requires_grad_(False).eval().to(place)
    except InferfleetError:
        code.close()
        raise
    return module, code


def _exported(version: ModelVersion, place: torch.device) -> Module:
    """Return the program of a ``.pt2``; archives with native code are refused."""
    raw = version.read(version.file)
    with translated(version, f"reading {version.file}"):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            native = [name for name in archive.namelist() if re.search(r"\.(so|dll|dylib|cubin)(\.|$)", name)]
        if native:
            raise refusal(
                version, f"{version.file} holds native code ({native[0]}); export without AOTInductor"
            )
        # Asked for wherever torch.export knows it; the loader of the archive's weights has had it longer.
        guarded = (
            {"weights_only": True}
            if "weights_only" in inspect.signature(torch.export.load).parameters
            else {}
        )
        program = torch.export.load(io.BytesIO(raw), **guarded)
        if place.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, place)
        module: Module = program.module()
    return module
