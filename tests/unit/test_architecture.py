"""The shape of the package, read from its source: who imports whom, what core may touch, how long is long."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "workers" / "inferfleet"
LONGEST_FILE = 450
LONGEST_FUNCTION = 60

ADAPTERS = ("brokers", "results", "runtimes", "models", "telemetry", "control")
BELOW_ADAPTERS = {"nouns", "core", "wire"}

# Layer -> the other layers it may import. A layer is a folder; "nouns" are the modules beside the folders
# and "package" is the package's own front door.
MAY_IMPORT: dict[str, set[str]] = {
    "nouns": set(),
    "core": {"nouns"},
    "wire": {"nouns"},
    **dict.fromkeys(ADAPTERS, BELOW_ADAPTERS),
    "worker": BELOW_ADAPTERS | {"telemetry"},
    "coordinator": BELOW_ADAPTERS | {"telemetry"},
    "client": BELOW_ADAPTERS | {"telemetry"},
    "testing": BELOW_ADAPTERS,
    "demo": BELOW_ADAPTERS | set(ADAPTERS) | {"worker", "coordinator", "client", "package"},
    "cli": BELOW_ADAPTERS | set(ADAPTERS) | {"worker", "coordinator", "client", "package", "demo"},
    "package": {"client"},
}

# (importing module, imported module) -> why this one arrow is right all the same.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# Core decides and never does: what it would need for doing is not to be had there.
CORE_MAY_NOT_IMPORT = {
    "asyncio", "concurrent", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random",
    "select", "selectors", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading",
    "time",
}  # fmt: skip
CORE_LIBRARIES = {"numpy", "xxhash"}
CLOCK_READS = {"now", "utcnow", "today"}

ENGINES = {"torch", "onnxruntime", "transformers"}
ENGINE_MODULES = (
    "inferfleet.runtimes.torch",
    "inferfleet.runtimes.onnx",
    # A model's own code: copied into its version folder and run from there, imported by nobody.
    "inferfleet.demo.digits_network",
    "inferfleet.demo.sentence_handler",
    "inferfleet.demo.text_handler",
)
LIGHT_MODULES = ("inferfleet", "inferfleet.cli", "inferfleet.client", "inferfleet.core", "inferfleet.worker")


class Import(NamedTuple):
    """One imported module, where it stands, and whether importing the file runs it."""

    importer: str
    imported: str
    line: int
    at_once: bool


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text(), str(path))


def layer_of(module: str) -> str:
    """Return the layer that a module of the package belongs to."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    return parts[1] if (SOURCE / parts[1]).is_dir() else "nouns"


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """Yield what a module imports, anywhere in it, by full dotted name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    later = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types_only(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        at_once = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_once)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(module, whole if whole in modules_by_name() else base, node.lineno, at_once)


def is_for_types_only(node: ast.AST) -> bool:
    """Say whether a statement is an ``if TYPE_CHECKING:`` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@cache
def modules_by_name() -> dict[str, Path]:
    """Return :func:`modules`, read once."""
    return modules()


@cache
def all_imports() -> tuple[Import, ...]:
    """Return every import of the package, each statement's module once."""
    found = (one for module, path in modules_by_name().items() for one in imports_of(module, path))
    return tuple(dict.fromkeys(found))


def test_imports_point_one_way() -> None:
    """Nouns <- core, wire <- adapters and shells <- cli, demo; adapters never import each other."""
    wrong = [
        f"{layer_of(i.importer)} -> {layer_of(i.imported)}: {i.importer}:{i.line} imports {i.imported}"
        for i in all_imports()
        if i.imported.split(".")[0] == "inferfleet"
        and layer_of(i.imported) not in MAY_IMPORT[layer_of(i.importer)] | {layer_of(i.importer)}
        and (i.importer, i.imported) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    """An arrow that is gone leaves the list of exceptions."""
    assert set(EXCEPTIONS) <= {(i.importer, i.imported) for i in all_imports()}


def test_every_folder_has_its_rule() -> None:
    """A new folder has to say what it may know."""
    assert {layer_of(module) for module in modules_by_name()} <= set(MAY_IMPORT)


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Importing any module first works: what runs at import time has no circle."""
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.at_once and found.imported in modules_by_name() and found.imported != found.importer:
            graph.setdefault(found.importer, set()).add(found.imported)
    # A package's front door may gather what its own modules define.
    for module, path in modules_by_name().items():
        if path.name == "__init__.py":
            graph.pop(module, None)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}", pytrace=False)


def test_core_decides_and_never_does() -> None:
    """Core has no clock, thread, socket, file or environment; ``now`` is an argument."""
    wrong = []
    for i in all_imports():
        top = i.imported.split(".")[0]
        known = top in sys.stdlib_module_names or top == "inferfleet" or top in CORE_LIBRARIES
        if layer_of(i.importer) == "core" and (top in CORE_MAY_NOT_IMPORT or not known):
            wrong.append(f"{i.importer}:{i.line} imports {i.imported}")
    for module, path in modules_by_name().items():
        if layer_of(module) == "core":
            wrong += [
                f"{module}:{node.lineno} calls {ast.unparse(node.func)}"
                for node in ast.walk(tree(path))
                if isinstance(node, ast.Call) and does_something(node.func)
            ]
    assert not wrong, "\n".join(wrong)


def does_something(called: ast.expr) -> bool:
    """Say whether a call reads the calendar or opens a file."""
    if isinstance(called, ast.Attribute):
        return called.attr in CLOCK_READS and ast.unparse(called.value).endswith(("datetime", "date"))
    return isinstance(called, ast.Name) and called.id in ("open", "input", "print")


def test_engines_are_imported_by_their_own_runtime_only() -> None:
    """The torch and ONNX runtimes import their engines; nothing else does, not even inside a function."""
    wrong = [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in all_imports()
        if i.imported.split(".")[0] in ENGINES
        and not i.importer.startswith(ENGINE_MODULES)
        and (i.importer, i.imported) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_the_shells_brings_no_engine(module: str) -> None:
    """The command line, the client and core start without loading torch or ONNX Runtime."""
    script = f"import sys, {module}; print(*sorted({ENGINES!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_file_is_long() -> None:
    """A file is read in one sitting."""
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules_by_name().items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_long() -> None:
    """A function fits on a screen, its docstring included."""
    wrong = [
        f"{module}:{node.lineno} {node.name} has {length} lines"
        for module, path in modules_by_name().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)
