"""Python modules of a version, executed from the very bytes that were compared with the manifest.

The ``.py`` files of a version form one package with a name of its own, so two versions of the same model
live side by side, and each module finds its neighbours by **relative** imports::

    from .vocabulary import Vocabulary      # vocabulary.py in the version's folder
    from .tools.words import split          # tools/words.py; tools/__init__.py may be left out

Absolute imports mean installed packages only. ``sys.path`` is never touched, nothing is read from the folder
again and no ``.pyc`` is written. Data files are read through the folder that the model is given.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from inferfleet.ports import ModelVersion
from inferfleet.runtimes.loading import refusal, translated

_PREFIX = "inferfleet_model_"
_serial = itertools.count(1)


class ModelCode:
    """The modules of one version, importable until :meth:`close`."""

    def __init__(self, version: ModelVersion) -> None:
        """Read and verify every ``.py`` file; nothing is executed yet."""
        stem = f"{version.name}_{version.version}".replace("-", "_")
        self._package = f"{_PREFIX}{stem}_{next(_serial)}"
        self._version = version
        self._finder = _Finder(self._package, _sources(version))
        sys.meta_path.insert(0, self._finder)

    def load_class(self, module: str, name: str) -> type:
        """Execute ``module`` (dotted, inside the version) and return its class ``name``.

        Raises ModelLoadError when executing fails or there is no such class.
        """
        try:
            with translated(self._version, f"executing {module}.py"):
                loaded = importlib.import_module(f"{self._package}.{module}")
            found = getattr(loaded, name, None)
            if not isinstance(found, type):
                raise refusal(self._version, f"{module}.py has no class {name}")
        except BaseException:
            self.close()
            raise
        return found

    def close(self) -> None:
        """Forget the modules; objects made from them live as long as they are referenced."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == self._package]:
            del sys.modules[name]


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of one package in memory; everything else is left to others."""

    def __init__(self, package: str, sources: Mapping[str, CodeType | None]) -> None:
        self._package = package
        self._sources = sources

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 -- the finder's interface
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Return the spec of a module of this package, ``None`` for all others."""
        package, _, inside = fullname.partition(".")
        if package != self._package or inside not in self._sources:
            return None
        is_package = not inside or any(each.startswith(inside + ".") for each in self._sources)
        return ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:  # noqa: ARG002
        """Leave it to the import system."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Execute the verified code; a package without any stays empty."""
        code = self._sources[module.__name__.partition(".")[2]]
        if code is not None:
            module.__file__ = code.co_filename
            exec(code, module.__dict__)  # noqa: S102 -- trusted, and exactly the bytes that were verified


def _sources(version: ModelVersion) -> dict[str, CodeType | None]:
    """Return each module's code by its dotted name; ``None`` for packages without code."""
    sources: dict[str, CodeType | None] = {"": None}
    for file in version.files:
        if not file.endswith(".py"):
            continue
        parts = file.removesuffix(".py").split("/")
        for depth in range(1, len(parts)):
            sources.setdefault(".".join(parts[:depth]), None)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        raw = version.read(file)
        with translated(version, f"compiling {file}"):
            sources[name] = compile(raw, str(version.path / file), "exec", dont_inherit=True)
    return sources
