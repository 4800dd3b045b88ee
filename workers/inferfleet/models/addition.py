"""Adding a version: copied beside its place, described, made durable, listed, and renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inferfleet import onnx_file
from inferfleet.errors import ModelRepositoryError
from inferfleet.models import description, manifest
from inferfleet.models.description import DESCRIPTION, RUNTIMES
from inferfleet.models.manifest import MANIFEST
from inferfleet.records import Signature, TensorSpec

# Which runtime a main file speaks for; the first suffix that is present decides.
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch", ".safetensors": "torch", ".py": "python"}


class Content(NamedTuple):
    """What goes into a version: files and folders, and what is said beside them."""

    files: tuple[Path, ...]
    runtime: str | None = None
    settings: str | None = None
    entry_point: str | None = None


def add(root: Path, model: str, version: str, content: Content) -> None:
    """Make ``root/model/version`` appear whole; raises ModelRepositoryError and leaves nothing otherwise."""
    label = f"model {model} version {version}"
    place = root / model / version
    if place.exists() or place.is_symlink():
        raise ModelRepositoryError(f"{label} exists; versions never change, choose the next number")
    # The name matches no version, and the folder lies in the same file system as its place.
    arriving = root / model / f".arriving-{uuid.uuid4().hex}"
    try:
        arriving.mkdir(parents=True)
        _fill(arriving, label, content)
        _seal(arriving)
        arriving.rename(place)
        manifest.sync(place.parent)
        manifest.sync(root)
    except OSError as error:
        raise ModelRepositoryError(f"{label} was not added: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ModelRepositoryError(f"{label} was not added: {error}") from None
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()  # Only an empty one goes: that of a first version that was not added.


def _fill(folder: Path, label: str, content: Content) -> None:
    for source in content.files:
        _copy(source, folder)
    given = folder / DESCRIPTION
    if given.exists() and content.settings is not None:
        raise ModelRepositoryError(f"{label}: {DESCRIPTION} is given twice, as a file and as settings")
    text = given.read_text("utf-8") if given.exists() else content.settings or ""
    listed = manifest.build(folder)
    completed = _completed(folder, label, text, content, sorted(listed.files)).encode()
    description.parse(completed, listed.files, label)
    given.write_bytes(completed)


def _seal(folder: Path) -> None:
    """Make the files durable first and the manifest last: it vouches for what is on the disk."""
    listed = manifest.build(folder)
    for path in listed.files:
        manifest.sync(folder / path)
    for below, _, _ in os.walk(folder, topdown=False):
        manifest.sync(Path(below))
    (folder / MANIFEST).write_bytes(listed.encode())
    manifest.sync(folder / MANIFEST)
    manifest.sync(folder)


def _copy(source: Path, folder: Path) -> None:
    """Copy a file, or a folder with its name; links inside a folder are refused."""
    name = source.resolve().name if source.name in ("", "..") else source.name
    target = folder / name
    if target.exists():
        raise ValueError(f"two of the files are named {name}")
    if not source.is_dir():
        manifest.check_path(name)
        if not stat.S_ISREG(source.stat().st_mode):
            raise ValueError(f"{source} is not a regular file")
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for each in sorted(source.iterdir()):
        if each.is_symlink():
            raise ValueError(f"{each} is a symbolic link")
        if each.name != "__pycache__":
            _copy(each, target)


def _completed(folder: Path, label: str, text: str, content: Content, files: list[str]) -> str:
    """Return ``text`` with the keys added that it leaves out; what it says stays as it was written."""
    said = description.table(text.encode(), label)
    head = []
    runtime, file = _main_file(label, said, content.runtime, [each for each in files if each != DESCRIPTION])
    if "runtime" not in said:
        head.append(f'runtime = "{runtime}"')
    if "file" not in said:
        head.append(f"file = {_quoted(file)}")
    if "entry_point" not in said and content.entry_point is not None:
        head.append(f"entry_point = {_quoted(content.entry_point)}")
    lines = [*head, text.strip("\n")] if text.strip() else head
    if runtime == "onnx" and file in files and not said.get("input") and not said.get("output"):
        try:
            found = onnx_file.read_signature((folder / file).read_bytes())
        except ValueError as error:
            raise ModelRepositoryError(f"{label}: {file}: {error}") from None
        lines.append(signature_toml(found))
    return "\n".join(lines).strip("\n") + "\n"


def _main_file(label: str, said: Mapping[str, Any], runtime: str | None, files: list[str]) -> tuple[str, str]:
    """Return the runtime and the main file, from what is said or else from the suffixes."""
    if runtime is not None and said.get("runtime", runtime) != runtime:
        raise ModelRepositoryError(
            f'{label}: {DESCRIPTION} says runtime "{said["runtime"]}", not "{runtime}"'
        )
    runtime = said.get("runtime", runtime)
    if runtime is not None and runtime not in RUNTIMES:
        raise ModelRepositoryError(f"{label}: unknown runtime {runtime!r}; there is: {', '.join(RUNTIMES)}")
    if "file" in said:
        suffix = Path(str(said["file"])).suffix
        return str(runtime or _SUFFIXES.get(suffix) or _undecided(label, "runtime")), str(said["file"])
    for suffix, speaks_for in _SUFFIXES.items():
        found = [each for each in files if each.endswith(suffix) and runtime in (None, speaks_for)]
        if f"model{suffix}" in found:
            found = [f"model{suffix}"]
        if len(found) == 1:
            return speaks_for, found[0]
        if found:
            raise ModelRepositoryError(
                f"{label}: any of {', '.join(found)} could be the main file; name it by `file` in settings"
            )
    return _undecided(label, "file"), ""


def _undecided(label: str, key: str) -> str:
    suffixes = ", ".join(_SUFFIXES)
    raise ModelRepositoryError(
        f"{label}: no main file is among the files ({suffixes}); name the `{key}` in settings"
    )


def signature_toml(signature: Signature) -> str:
    """Return the ``[[input]]`` and ``[[output]]`` tables of a signature."""

    def entry(kind: str, spec: TensorSpec) -> str:
        shape = ", ".join(map(str, spec.shape))
        return f'\n[[{kind}]]\nname = {_quoted(spec.name)}\ndatatype = "{spec.datatype}"\nshape = [{shape}]'

    tables = [entry("input", spec) for spec in signature.inputs]
    return "\n".join([*tables, *(entry("output", spec) for spec in signature.outputs)])


def _quoted(text: str) -> str:
    """Return a TOML basic string: JSON's escapes are a part of TOML's, but for DEL and surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
