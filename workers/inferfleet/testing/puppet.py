"""A model that does what a test tells it, and only then: it waits, fails, runs out of memory, answers wrong.

The default answer of a puppet is the checksum of :mod:`inferfleet.testing.checksum`: (version, checksum of
the row), so that a test can see which version answered which row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from inferfleet.errors import DeviceOutOfMemoryError, ModelLoadError
from inferfleet.ports import ModelVersion
from inferfleet.records import Array, Signature, Tensors, TensorSpec
from inferfleet.testing.checksum_handler import checksums

CHECKSUM_SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("check", "INT64", (2,)),))
_MOST_WAIT_S = 30.0


class PuppetError(Exception):
    """What a puppet raises on a row it was told to fail; ``retryable`` is as the script says."""

    def __init__(self, text: str, retryable: bool = False) -> None:
        super().__init__(text)
        self.retryable = retryable


@dataclass
class Script:
    """What a puppet does; change it at any time, it counts from the next run on.

    ``answer`` gives the right outputs. A batch with a row whose first input holds one of ``fail_on`` raises
    ``error``; one with more rows than ``oom_above`` has no memory. Then the answer is spoilt: ``nan_on`` puts
    NaN into the rows that hold such a value, ``missing_rows`` cuts rows off the end (negative: adds some),
    ``row_shape`` replaces the outputs' row shape, ``renamed`` their names.
    """

    answer: Callable[[Tensors], Tensors] | None = None
    fail_on: frozenset[float] = frozenset()
    error: BaseException = field(default_factory=lambda: PuppetError("told to fail"))
    oom_above: int | None = None
    nan_on: frozenset[float] = frozenset()
    missing_rows: int = 0
    row_shape: tuple[int, ...] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


class PuppetModel:
    """A loaded model for tests. ``runs`` lists the rows of each run that began.

    Any thread may pull the strings. After :meth:`hold` each run blocks until :meth:`release` lets it go on;
    30 s without that fail the run.
    """

    def __init__(
        self, version: str = "1", script: Script | None = None, signature: Signature = CHECKSUM_SIGNATURE
    ) -> None:
        self.signature = signature
        self.version = version
        self.script = script if script is not None else Script()
        self.runs: list[int] = []
        self.closed = False
        self._changed = threading.Condition()
        self._held = False
        self._permits = 0
        self._waiting = 0

    def hold(self) -> None:
        """Make every run from now on wait for a permit."""
        with self._changed:
            self._held = True
            self._permits = 0

    def release(self, runs: int | None = None) -> None:
        """Let ``runs`` runs go on, waiting ones first; ``None`` ends holding."""
        with self._changed:
            if runs is None:
                self._held = False
            else:
                self._permits += runs
            self._changed.notify_all()

    def wait_until_held(self, runs: int = 1, timeout_s: float = 10.0) -> None:
        """Return when ``runs`` runs are waiting for a permit; raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting >= runs, timeout_s):
                raise TimeoutError(f"{self._waiting} runs are held, {runs} expected")

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Do as the script says."""
        if self.closed:
            raise RuntimeError("the model is closed")
        self._wait(rows)
        script = self.script
        if script.oom_above is not None and rows > script.oom_above:
            raise DeviceOutOfMemoryError(f"told to have no memory for more than {script.oom_above} rows")
        first = next(iter(tensors.values()))
        if _holding(first, script.fail_on).any():
            raise script.error
        outputs = self._checksums(tensors) if script.answer is None else script.answer(tensors)
        return {
            script.renamed.get(name, name): _spoilt(array, script, _holding(first, script.nan_on))
            for name, array in outputs.items()
        }

    def close(self) -> None:
        """Be closed; a later run fails."""
        self.closed = True

    def _wait(self, rows: int) -> None:
        with self._changed:
            self.runs.append(rows)
            if not self._held:
                return
            self._waiting += 1
            self._changed.notify_all()
            passed = self._changed.wait_for(lambda: not self._held or self._permits > 0, _MOST_WAIT_S)
            self._waiting -= 1
            if not passed:
                raise TimeoutError("held, and nobody released the run")
            if self._held:
                self._permits -= 1

    def _checksums(self, tensors: Tensors) -> Tensors:
        sums = checksums(tensors[self.signature.inputs[0].name])
        return {
            self.signature.outputs[0].name: np.stack([np.full_like(sums, int(self.version)), sums], axis=1)
        }


class PuppetRuntime:
    """Gives puppets out. ``models`` holds each loaded one by (name, version); prepare ``scripts`` alike.

    A version in ``broken`` fails to load with that text.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], PuppetModel] = {}
        self.scripts: dict[tuple[str, str], Script] = {}
        self.broken: dict[tuple[str, str], str] = {}

    def load(self, version: ModelVersion, device: str, threads: int) -> PuppetModel:  # noqa: ARG002
        """Return a puppet with the declared signature, or the checksum model's where none is declared."""
        key = (version.name, version.version)
        if key in self.broken:
            raise ModelLoadError(f"model {version.name} version {version.version}: {self.broken[key]}")
        puppet = PuppetModel(version.version, self.scripts.get(key), version.signature or CHECKSUM_SIGNATURE)
        self.models[key] = puppet
        return puppet


def _holding(array: Array, values: frozenset[float]) -> Array:
    """Return for each row whether it holds one of the values."""
    if not values:
        return np.zeros(len(array), np.bool_)
    found = np.isin(array.reshape(len(array), -1), list(values))
    return np.asarray(found.any(axis=1))


def _spoilt(array: Array, script: Script, nan_rows: Array) -> Array:
    if nan_rows.any():
        array = array.astype(np.float32) if array.dtype.kind != "f" else array.copy()
        array[nan_rows] = np.nan
    if script.row_shape is not None:
        array = np.zeros((len(array), *script.row_shape), array.dtype)
    if script.missing_rows > 0:
        array = array[: -script.missing_rows]
    elif script.missing_rows < 0:
        array = np.concatenate([array, array[:1].repeat(-script.missing_rows, axis=0)])
    return array
