"""What the control plane asks a model repository: which versions there are, and what each one is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from inferfleet.records import Signature


class VersionFacts(NamedTuple):
    """One version: ``digest`` stands for all its bytes; a signature that only loading tells is ``None``."""

    model: str
    version: str
    digest: str
    signature: Signature | None


class Catalogue(Protocol):
    """A model repository, looked at without reading the models themselves."""

    def latest(self, model: str) -> str:
        """Return the highest version; raises ModelRepositoryError where there is no such model or none."""

    def version(self, model: str, version: str) -> VersionFacts:
        """Return what a version is; raises ModelRepositoryError where it cannot be used."""
