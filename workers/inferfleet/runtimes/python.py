"""Plain Python handlers: any library, any tokenizer, one class.

A trusted version with ``runtime = "python"`` and ``file = "model.py"`` holds::

    class Model:
        def load(self, folder, device, parameters): ...   # once; folder is a pathlib.Path of verified files
        def prepare(self, tensors): ...    # optional: tensors -> items, e.g. tokenizing
        def predict(self, items): ...      # items (or tensors) -> {output name: array or list}
        def sample(self): ...              # optional: tensors for the self-check, where zeros make no sense
        def close(self): ...               # optional

``entry_point = "module:Class"`` names another class. ``device`` is what the worker was told (``auto``,
``cpu``, ``cuda``, ``cuda:N``): the handler decides what ``auto`` means. ``tensors`` map input names to arrays
whose first dimension is rows; each output must have as many rows, in the same order. A handler may write to
its inputs and use its outputs' memory again: both are copied. An error whose attribute ``retryable`` is true,
a TimeoutError and an OSError mean that trying again later can help; a MemoryError, that fewer rows may fit.
Modules beside the handler are found as :mod:`.code` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inferfleet.errors import DeviceOutOfMemoryError, ModelLoadError
from inferfleet.ports import ModelVersion
from inferfleet.records import Signature, Tensors
from inferfleet.runtimes import selfcheck
from inferfleet.runtimes.arrays import as_array
from inferfleet.runtimes.code import ModelCode
from inferfleet.runtimes.loading import (
    declared_signature,
    label,
    parameters,
    refusal,
    require_trust,
    said,
    translated,
)


class PythonRuntime:
    """Loads handlers; ``threads`` is left to the libraries that they use."""

    def load(self, version: ModelVersion, device: str, threads: int) -> PythonModel:  # noqa: ARG002
        """Execute the verified sources, call ``load``, and check against the declared signature."""
        require_trust(version)
        signature = declared_signature(version)
        module, name = _entry_point(version)
        code = ModelCode(version)
        handler_class = code.load_class(module, name)
        try:
            with translated(version, f"constructing {name}"):
                handler = handler_class()
            if not callable(getattr(handler, "predict", None)):
                raise refusal(version, f"class {name} of {module}.py has no method predict")
            if hasattr(handler, "load"):
                with translated(version, f"{name}.load"):
                    handler.load(version.path, device, parameters(version))
            model = PythonModel(handler, signature, code)
            most_rows = version.batching.max_batch_size
            selfcheck.check(model, label(version), most_rows, _sample(version, handler))
        except BaseException:
            code.close()
            raise
        return model


class PythonModel:
    """A handler behind the port of a loaded model."""

    def __init__(self, handler: Any, signature: Signature, code: ModelCode) -> None:
        self.signature = signature
        self._handler: Any = handler
        self._code = code
        self._prepare: Callable[[Tensors], Any] | None = getattr(handler, "prepare", None)
        self._predict: Callable[[Any], Mapping[str, Any]] = handler.predict
        self._specs = {spec.name: spec for spec in signature.outputs}

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Run the handler on copies; lists become arrays of the declared datatype, arrays keep theirs.

        A request may run again, and an answer is written while the next batch runs: a handler that works in
        place would change either.
        A lack of memory becomes DeviceOutOfMemoryError; whatever else the handler raises comes out as it is.
        """
        try:
            items = {name: array.copy() for name, array in tensors.items()}
            outputs = self._predict(items if self._prepare is None else self._prepare(items))
        except SystemExit as error:
            # It would end the device's thread without a word.
            raise RuntimeError(f"the handler called exit({error.code!r})") from error
        except Exception as error:
            if not _lacks_memory(error):
                raise
            raise DeviceOutOfMemoryError(f"no memory for a batch of {rows} rows: {said(error)}") from error
        if not isinstance(outputs, Mapping):
            raise TypeError(f"predict returned a {type(outputs).__name__}, must be a dict of arrays")
        return {name: as_array(value, self._specs.get(name)) for name, value in outputs.items()}

    def close(self) -> None:
        """Close the handler and forget its modules."""
        handler, self._handler = self._handler, None
        self._predict = _closed
        self._prepare = None
        self._code.close()
        if hasattr(handler, "close"):
            handler.close()


def _lacks_memory(error: Exception) -> bool:
    """Whether a smaller batch may fit; torch's error is no MemoryError, and torch may not be installed."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _closed(_: Any) -> Mapping[str, Any]:
    raise RuntimeError("the model is closed")


def _entry_point(version: ModelVersion) -> tuple[str, str]:
    entry_point = version.options.get("entry_point")
    if isinstance(entry_point, str):
        module, _, name = entry_point.partition(":")
        return module, name
    if not version.file.endswith(".py"):
        raise refusal(
            version, f'file is "{version.file}"; a Python handler is a .py file, or name an entry_point'
        )
    return version.file.removesuffix(".py").replace("/", "."), "Model"


def _sample(version: ModelVersion, handler: Any) -> Mapping[str, Any] | None:
    if not hasattr(handler, "sample"):
        return None
    with translated(version, "sample"):
        sample = handler.sample()
    if not isinstance(sample, Mapping):
        raise ModelLoadError(f"{label(version)}: sample() must return a dict of arrays")
    return sample
