"""Chooses the runtime of a version by name; its library is imported only then."""

from __future__ import annotations

import importlib
from typing import cast

from inferfleet.errors import ModelLoadError
from inferfleet.ports import LoadedModel, ModelVersion, Runtime
from inferfleet.runtimes.loading import label, require_trust

_RUNTIMES = {
    "onnx": ("inferfleet.runtimes.onnx", "OnnxRuntime", "pip install '.[onnx]' in a checkout"),
    "torch": ("inferfleet.runtimes.torch", "TorchRuntime", "pip install '.[torch]' in a checkout"),
    "python": ("inferfleet.runtimes.python", "PythonRuntime", "pip install . in a checkout"),
}
_RUNS_CODE = frozenset({"torch", "python"})


def load(version: ModelVersion, device: str = "auto", threads: int = 0) -> LoadedModel:
    """Load, self-check and warm up a version; the arguments are those of :meth:`Runtime.load`.

    Raises :class:`~inferfleet.errors.UntrustedModelError`, :class:`~inferfleet.errors.DeviceError` and
    ModelLoadError, the latter also when the runtime's library is not installed.
    """
    if version.runtime not in _RUNTIMES:
        raise ModelLoadError(
            f'{label(version)}: no runtime "{version.runtime}"; there is: {", ".join(_RUNTIMES)}'
        )
    if version.runtime in _RUNS_CODE:
        # Before the import: torch takes seconds, and a refusal needs none of it.
        require_trust(version)
    module, name, mend = _RUNTIMES[version.runtime]
    try:
        runtime = cast("Runtime", getattr(importlib.import_module(module), name)())
    except ImportError as error:
        raise ModelLoadError(
            f"{label(version)} needs the {version.runtime} runtime, which is not installed: {mend} ({error})"
        ) from error
    return runtime.load(version, device, threads)
