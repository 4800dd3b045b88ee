"""``manifest.json``: which files a model version has, and what their bytes must be.

The document is canonical JSON (sorted keys, no spaces, one line feed at the end)::

    {"files":{"model.onnx":{"sha256":"9f86…","size":14020}},"format":1}

A folder matches its manifest when it holds exactly these files, each a regular file with one name (no
symbolic link, no hard link), and every byte is as written. Nothing else of a version is read before that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from inferfleet.errors import ChecksumMismatchError, ModelRepositoryError

MANIFEST = "manifest.json"
FORMAT = 1

_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_READ_BYTES = 1024 * 1024
_MAX_PARTS = 8
# Letters, digits and ._-+ at most: no separator of another system, no control character, no hidden file.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}\Z")
_OPEN_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OPEN_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file must be: ``size`` in bytes and the lower-case hexadecimal ``sha256``."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every file of a version but the manifest itself, by its path in the folder (``/`` between parts)."""

    files: dict[str, FileEntry]
    format: int = FORMAT

    def encode(self) -> bytes:
        """Return the canonical document."""
        return msgspec.json.encode(self, order="sorted") + b"\n"

    @property
    def digest(self) -> str:
        """Return the sha256 of the canonical document, the version's identity."""
        return hashlib.sha256(self.encode()).hexdigest()


# Made at import: msgspec 0.22 crashes when several threads are the first to use a type, and each device
# thread reads the manifest of its own version.
_DECODER = msgspec.json.Decoder(Manifest)


def check_path(path: str) -> str:
    """Return ``path`` if it is a plain relative one that stays inside its folder, else raise ValueError."""
    parts = path.split("/")
    if not all(_PART.match(part) for part in parts) or len(parts) > _MAX_PARTS or path == MANIFEST:
        raise ValueError(f"{path!r} is not a plain file path (letters, digits, . _ + -, parts joined by /)")
    return path


def read(folder: Path, model: str, version: str) -> Manifest:
    """Return the folder's manifest, checked by itself only; raises ModelRepositoryError."""
    label = f"model {model} version {version}: {MANIFEST}"
    try:
        raw = _read_plain(folder / MANIFEST, _MAX_MANIFEST_BYTES)
        manifest = _DECODER.decode(raw)
        for path in manifest.files:
            check_path(path)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ModelRepositoryError(f"{label} cannot be used: {_reason(error)}") from None
    if manifest.format != FORMAT:
        raise ModelRepositoryError(f"{label} has format {manifest.format}, this release reads {FORMAT}")
    # One meaning per document: duplicate keys and the like are lost in decoding and show here.
    if manifest.encode() != raw:
        raise ModelRepositoryError(f"{label} is not canonical JSON; write it with `inferfleet model add`")
    return manifest


def build(folder: Path) -> Manifest:
    """Return the manifest of the files that are in ``folder`` now; raises ValueError on odd ones."""
    files = {}
    for path, full in _scan(folder):
        found = hashlib.sha256()
        size = 0
        for block in _blocks(full, None):
            found.update(block)
            size += len(block)
        files[check_path(path)] = FileEntry(found.hexdigest(), size)
    return Manifest(dict(sorted(files.items())))


def verify(folder: Path, manifest: Manifest, model: str, version: str) -> None:
    """Compare every byte of ``folder`` with its manifest.

    Raises ChecksumMismatchError for a file that differs, ModelRepositoryError for one that is missing,
    extra, a link or not a regular file.
    """
    label = f"model {model} version {version}"
    try:
        present = dict(_scan(folder))
    except (OSError, ValueError) as error:
        raise ModelRepositoryError(f"{label}: {_reason(error)}") from None
    for path in sorted(present.keys() - manifest.files.keys()):
        raise ModelRepositoryError(f"{label}: {path} is not listed in {MANIFEST}; remove the file")
    for path in sorted(manifest.files.keys() - present.keys()):
        raise ModelRepositoryError(f"{label}: {path} is listed in {MANIFEST} and missing")
    for path, entry in manifest.files.items():
        found = hashlib.sha256()
        try:
            for block in _blocks(present[path], entry.size + 1):
                found.update(block)
        except (OSError, ValueError) as error:
            raise ModelRepositoryError(f"{label}: {path}: {_reason(error)}") from None
        _compare(model, version, path, entry, found.hexdigest())


def read_verified(folder: Path, files: Mapping[str, FileEntry], path: str, model: str, version: str) -> bytes:
    """Return one listed file's bytes after comparing them with its entry; the caller parses these bytes."""
    entry = files.get(path)
    if entry is None:
        raise ModelRepositoryError(f"model {model} version {version}: {path!r} is not listed in {MANIFEST}")
    try:
        raw = _read_plain(folder / path, entry.size)
    except (OSError, ValueError) as error:
        raise ModelRepositoryError(f"model {model} version {version}: {path}: {_reason(error)}") from None
    _compare(model, version, path, entry, hashlib.sha256(raw).hexdigest())
    return raw


def _compare(model: str, version: str, path: str, entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        raise ChecksumMismatchError(model, version, path, entry.sha256, found)


def _scan(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each file below ``folder`` but the manifest; raise ValueError on anything that is not plain."""

    def walk(below: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        with os.scandir(below) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                path = prefix + entry.name
                if path.count("/") >= _MAX_PARTS:
                    raise ValueError(f"{prefix!r} is nested too deep")
                mode = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(mode.st_mode):
                    yield from walk(below / entry.name, path + "/")
                elif not stat.S_ISREG(mode.st_mode):
                    raise ValueError(f"{path!r} is not a regular file; links and devices are refused")
                elif mode.st_nlink != 1:
                    raise ValueError(
                        f"{path!r} has {mode.st_nlink} names (hard links); copy the file instead"
                    )
                elif path != MANIFEST:
                    yield path, below / entry.name

    return walk(folder, "")


def _open_plain(path: Path) -> int:
    """Open a regular file without following a link in its last part; never blocks on a pipe."""
    descriptor = os.open(path, _OPEN_FILE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name!r} is not a regular file")
    return descriptor


def _blocks(path: Path, most: int | None) -> Iterator[bytes]:
    """Yield the bytes, no further than ``most``: a file that grew is refused without reading it all."""
    left = most
    with open(_open_plain(path), "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES if left is None else min(left, _READ_BYTES)):
            yield block
            if left is not None:
                left -= len(block)


def _read_plain(path: Path, most: int) -> bytes:
    """Return the file's bytes; one byte over ``most`` is enough for any comparison to fail."""
    with open(_open_plain(path), "rb") as file:
        raw = file.read(most + 1)
    if path.name == MANIFEST and len(raw) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return raw


def sync(path: Path) -> None:
    """Make a file's or folder's content durable."""
    descriptor = os.open(path, _OPEN_FOLDER if path.is_dir() else _OPEN_FILE)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        if error.errno == errno.ELOOP:
            return "it is a symbolic link; links are refused"
        return error.strerror or type(error).__name__
    return str(error)
