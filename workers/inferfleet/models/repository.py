"""The repository: ``<root>/<model>/<version>/`` folders, looked up, verified whole, then described.

Names that come from outside are compared with names that a listing gave, and paths are built from the
latter only: neither ``../x`` nor a URI can reach the file system.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferfleet.errors import ModelRepositoryError
from inferfleet.models import addition, description, manifest
from inferfleet.models.description import DESCRIPTION, Batching
from inferfleet.models.manifest import MANIFEST, FileEntry
from inferfleet.records import Signature
from inferfleet.tables import nearest

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
VERSION = re.compile(r"[1-9][0-9]{0,17}\Z", re.ASCII)
_TRUST = re.compile(r"([a-z0-9][a-z0-9-]{0,62})(?:@sha256:([0-9a-f]{64}))?\Z")


@dataclass(frozen=True, eq=False)
class ModelVersion:
    """A version whose every byte matched its manifest when it was fetched.

    ``digest`` is the sha256 of ``manifest.json`` and so stands for all bytes of the version. ``options``
    holds what belongs to the runtime: ``parameters``, and ``entry_point`` where it is given.
    """

    name: str
    version: str
    path: Path
    runtime: str
    file: str
    signature: Signature | None
    trusted: bool
    options: Mapping[str, object]
    batching: Batching
    digest: str
    files: Mapping[str, FileEntry]

    def read(self, file: str) -> bytes:
        """Return a listed file's bytes, compared with the manifest once more: load these, not the file.

        Raises :class:`~inferfleet.errors.ChecksumMismatchError` when the file has changed since.
        """
        return manifest.read_verified(self.path, self.files, file, self.name, self.version)

    @property
    def size_bytes(self) -> int:
        """The sum of all files' sizes."""
        return sum(entry.size for entry in self.files.values())


class Repository:
    """The model versions below ``root``; ``trusted`` holds ``name`` or ``name@sha256:<digest>`` entries."""

    def __init__(self, root: Path, trusted: Sequence[str] = ()) -> None:
        for entry in trusted:
            if not _TRUST.match(entry):
                raise ModelRepositoryError(
                    f'[models] trusted has "{entry}", must be "name" or "name@sha256:<digest>"'
                )
        self.root = root
        self._trusted = frozenset(trusted)

    def __repr__(self) -> str:
        return f"Repository({str(self.root)!r})"

    def models(self) -> list[str]:
        """Return the names of the models that have a version, in order."""
        return [
            name for name in self._folders(self.root) if NAME.match(name) and self._listed(self.root / name)
        ]

    def versions(self, model: str) -> list[str]:
        """Return the model's versions in numeric order; a folder without a manifest is not one.

        Raises ModelRepositoryError if there is no such model.
        """
        return self._listed(self._model_folder(model))

    def fetch(self, model: str, version: str) -> ModelVersion:
        """Return the version after comparing its every byte with its manifest.

        Raises :class:`~inferfleet.errors.ChecksumMismatchError` for a byte that differs and
        ModelRepositoryError for all else: an unknown name, a file too many or too few, a link, a bad key.
        """
        path, listed = self._found(model, version)
        manifest.verify(path, listed, path.parent.name, path.name)
        return self._describe(path.parent.name, path, listed)

    def look(self, model: str, version: str) -> ModelVersion:
        """Return what a version says of itself; its other files are not read, so they may differ from it.

        Raises what :meth:`fetch` raises for the manifest and the description. Load what ``fetch`` returns.
        """
        path, listed = self._found(model, version)
        return self._describe(path.parent.name, path, listed)

    def _found(self, model: str, version: str) -> tuple[Path, manifest.Manifest]:
        folder = self._model_folder(model)
        versions = self._listed(folder)
        if version not in versions:
            if VERSION.match(version) and version in self._folders(folder):
                raise ModelRepositoryError(
                    f"model {model}: the folder {version} has no {MANIFEST}, so it is not a version; "
                    "remove it, and add it with `inferfleet model add`"
                )
            known = ", ".join(versions) or "none"
            raise ModelRepositoryError(f"model {model} has no version {_shown(version)}; there is: {known}")
        path = folder / versions[versions.index(version)]
        return path, manifest.read(path, folder.name, path.name)

    def add(
        self,
        model: str,
        version: str,
        files: Sequence[Path],
        *,
        runtime: str | None = None,
        settings: str | None = None,
        entry_point: str | None = None,
    ) -> ModelVersion:
        """Copy ``files`` into a new version and return it; it appears complete or not at all.

        A folder among ``files`` is copied with its name. ``settings`` is the text of a ``model.toml``; keys
        that it leaves out are filled from the other arguments, the file names and, for ONNX, the file itself.
        Raises ModelRepositoryError if the version exists or does not add up.
        """
        if not NAME.match(model):
            raise ModelRepositoryError(
                f"{_shown(model)} is no model name: small letters, digits, hyphens, at most 63"
            )
        if not VERSION.match(version):
            raise ModelRepositoryError(
                f"{_shown(version)} is no version: a positive integer without leading zeros"
            )
        content = addition.Content(tuple(files), runtime, settings, entry_point)
        addition.add(self.root, model, version, content)
        return self.fetch(model, version)

    def trust_entry(self, version: ModelVersion) -> str:
        """Return what ``[models] trusted`` must hold for exactly these bytes to run code."""
        return f"{version.name}@sha256:{version.digest}"

    def _describe(self, model: str, path: Path, listed: manifest.Manifest) -> ModelVersion:
        label = f"model {model} version {path.name}"
        if DESCRIPTION not in listed.files:
            raise ModelRepositoryError(f"{label} has no {DESCRIPTION}")
        raw = manifest.read_verified(path, listed.files, DESCRIPTION, model, path.name)
        said = description.parse(raw, listed.files, label)
        options: dict[str, object] = {"parameters": said.parameters}
        if said.entry_point is not None:
            options["entry_point"] = said.entry_point
        digest = listed.digest
        return ModelVersion(
            name=model,
            version=path.name,
            path=path,
            runtime=said.runtime,
            file=said.file,
            signature=said.signature,
            trusted=model in self._trusted or f"{model}@sha256:{digest}" in self._trusted,
            options=options,
            batching=said.batching,
            digest=digest,
            files=listed.files,
        )

    def _model_folder(self, model: str) -> Path:
        names = [name for name in self._folders(self.root) if NAME.match(name)]
        if model not in names:
            hint = nearest(model, names) or f"; there is: {', '.join(names) or 'none'}"
            raise ModelRepositoryError(f"model {_shown(model)} is not in the repository {self.root}{hint}")
        return self.root / names[names.index(model)]

    def _listed(self, folder: Path) -> list[str]:
        found = [
            name
            for name in self._folders(folder)
            if VERSION.match(name) and (folder / name / MANIFEST).is_file()
        ]
        return sorted(found, key=int)

    def _folders(self, folder: Path) -> list[str]:
        """Return the real folders in ``folder``; links to folders are not followed."""
        try:
            with os.scandir(folder) as entries:
                return sorted(each.name for each in entries if each.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            raise ModelRepositoryError(
                f"the model repository {folder} does not exist; set [models] repository, or run this where "
                "the models are"
            ) from None
        except OSError as error:
            raise ModelRepositoryError(
                f"the model repository {folder} cannot be read: {error.strerror}"
            ) from None


def _shown(text: str) -> str:
    """Return foreign text as it may stand in one line of an error."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
