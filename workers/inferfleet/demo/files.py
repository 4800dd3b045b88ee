"""Real files and their types: magika's network from its wheel, fed with files of the Python installation.

The network takes the first and last 1,024 bytes of a file, blanks stripped, as int32 [2048], and gives a
probability for each of its content types. Which bytes, is written in the configuration beside it.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

MODEL = "magika"
_WHEEL_MODEL = "standard_v3_3"
_LOOK_AT_MOST = 20_000


@dataclass(frozen=True, slots=True)
class FileTypes:
    """Magika's network: its file, and how to read its input and output."""

    onnx: Path
    labels: list[str]
    head_bytes: int
    tail_bytes: int
    block_bytes: int
    padding: int
    least_bytes: int

    def features(self, path: Path) -> npt.NDArray[np.int32] | None:
        """Return the network's input for a file: int32 [2048]; ``None`` if it says too little."""
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(self.block_bytes).lstrip()[: self.head_bytes]
            file.seek(max(0, size - self.block_bytes))
            tail = file.read(self.block_bytes).rstrip()[-self.tail_bytes :]
        if len(head) < self.least_bytes:
            return None
        row = np.full(self.head_bytes + self.tail_bytes, self.padding, dtype=np.int32)
        row[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        if tail:
            row[-len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
        return row


@dataclass(frozen=True, slots=True)
class SampleFile:
    """A file of the Python installation: its name within it, the network's input and magika's own answer."""

    name: str
    features: npt.NDArray[np.int32]
    label: str


def load_file_types() -> FileTypes:
    """Return magika's network as its wheel carries it."""
    folder = Path(str(importlib.resources.files("magika"))) / "models" / _WHEEL_MODEL
    config = json.loads((folder / "config.min.json").read_text(encoding="utf-8"))
    return FileTypes(
        onnx=folder / "model.onnx",
        labels=config["target_labels_space"],
        head_bytes=config["beg_size"],
        tail_bytes=config["end_size"],
        block_bytes=config["block_size"],
        padding=config["padding_token"],
        least_bytes=config["min_file_size_for_dl"],
    )


def sample_files(types: FileTypes, count: int) -> list[SampleFile]:
    """Return ``count`` files of the Python installation, of many kinds, with magika's own answers.

    Only folders of the running Python are looked at: its standard library and its installed packages.
    """
    from magika import Magika

    judge = Magika()
    samples: list[SampleFile] = []
    for name, path in one_of_each_kind():
        if len(samples) == count:
            break
        features = types.features(path)
        if features is not None:
            samples.append(SampleFile(name, features, str(judge.identify_path(path).prediction.dl.label)))
    return samples


def one_of_each_kind() -> Iterator[tuple[str, Path]]:
    """Yield name and path of the installation's files, one of each kind in turn, always in one order."""
    return _one_of_each_kind_in_turn(_installed_files())


def _installed_files() -> Iterator[tuple[str, Path]]:
    """Yield name and path of the installation's files, in an order that does not change between runs."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    return chain.from_iterable(islice(_walk(root), _LOOK_AT_MOST) for root in roots)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in {"__pycache__", "site-packages"})
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield f"{root.name}/{path.relative_to(root).as_posix()}", path


def _one_of_each_kind_in_turn(files: Iterator[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    kinds: dict[str, list[tuple[str, Path]]] = {}
    for name, path in files:
        kinds.setdefault(path.suffix.lower(), []).append((name, path))
    queues = [iter(kind) for kind in kinds.values()]
    while queues:
        waiting = []
        for queue in queues:
            entry = next(queue, None)
            if entry is not None:
                yield entry
                waiting.append(queue)
        queues = waiting
