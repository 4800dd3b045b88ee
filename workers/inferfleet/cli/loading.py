"""Model versions from the repository for one worker, and what each of them holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from inferfleet.config import Config
from inferfleet.errors import ModelRepositoryError
from inferfleet.ports import BatchingWishes, LoadedModel

if TYPE_CHECKING:
    from inferfleet.models.repository import ModelVersion

_STATM = Path("/proc/self/statm")


class RepositoryModels:
    """Model versions from the repository, on one device.

    What a version holds is by how much the process has grown while it alone was loaded, and never less
    than the size of its files: memory of another device, and what an allocator had left over, do not show.
    """

    def __init__(self, config: Config) -> None:
        from inferfleet.models.repository import Repository

        self._repository = Repository(config.models_path, config.models.trusted)
        self._device = config.worker.device
        self._threads = config.worker.threads
        self._found: dict[tuple[str, str], ModelVersion] = {}
        self._grown: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._loads = 0
        self._begun = 0

    def load(self, model: str, version: str) -> LoadedModel:
        """Verify, load, check and warm up."""
        from inferfleet.runtimes import registry

        with self._lock:
            self._loads += 1
            self._begun += 1
            alone, begun = self._loads == 1, self._begun
        before = resident_bytes()
        try:
            found = self._repository.fetch(model, version)
            self._found[model, version] = found
            loaded = registry.load(found, self._device, self._threads)
            with self._lock:
                if alone and begun == self._begun:
                    self._grown[model, version] = resident_bytes() - before
        finally:
            with self._lock:
                self._loads -= 1
        return loaded

    def wishes(self, model: str, version: str) -> BatchingWishes:
        """Return a loaded version's ``[batching]``; the worker loop asks, so no file is read."""
        return self._found[model, version].batching

    def holds_bytes(self, model: str, version: str) -> int:
        """Return what a version holds, as measured, or the size of its files; 0 where it cannot be found."""
        found = self._found.get((model, version))
        if found is None:
            try:
                found = self._repository.look(model, version)
            except ModelRepositoryError:
                return 0
        return max(found.size_bytes, self._grown.get((model, version), 0))

    def digest(self, model: str, version: str) -> str:
        """Return the digest of a version that was loaded."""
        found = self._found.get((model, version))
        return "" if found is None else found.digest


def resident_bytes() -> int:
    """Return how much memory this process holds; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
