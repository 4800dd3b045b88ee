"""``model.toml``: what a version's author says about it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from inferfleet.datatypes import DATATYPES
from inferfleet.errors import ModelRepositoryError
from inferfleet.models.manifest import check_path
from inferfleet.records import Signature, TensorSpec
from inferfleet.tables import nearest

DESCRIPTION = "model.toml"
RUNTIMES = ("onnx", "torch", "python")

_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z", re.ASCII)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`")

Positive: TypeAlias = Annotated[int, Meta(ge=1)]


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[input]]`` or ``[[output]]``; ``shape`` is per row, -1 for a dimension that varies."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    datatype: str
    shape: tuple[Annotated[int, Meta(ge=-1)], ...]


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[batching]``: what suits this version; ``None`` leaves it to the route and to ``fleet.toml``.

    ``max_batch_size`` is the most rows in one call, ``max_rows`` the most rows one request may carry,
    ``sort_by_length`` whether rows of similar length share a batch.
    """

    max_batch_size: Positive | None = None
    max_queue_delay_ms: Annotated[float, Meta(ge=0, le=60_000)] | None = None
    max_rows: Positive | None = None
    sort_by_length: bool | None = None


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of ``model.toml``."""

    runtime: Literal["onnx", "torch", "python"]
    file: str
    entry_point: str | None = None
    input: list[TensorEntry] = []
    output: list[TensorEntry] = []
    batching: Batching = Batching()
    parameters: dict[str, Any] = {}

    @property
    def signature(self) -> Signature | None:
        """What is declared; ``None`` where nothing is."""
        if not self.input:
            return None
        return Signature(_specs(self.input), _specs(self.output))


# Made for its effect: msgspec 0.22 crashes when several threads are the first to use a type.
msgspec.json.Decoder(Description)

_KEYS: dict[str, tuple[str, ...]] = {
    "": Description.__struct_fields__,
    "input": TensorEntry.__struct_fields__,
    "output": TensorEntry.__struct_fields__,
    "batching": Batching.__struct_fields__,
}


def _specs(entries: Iterable[TensorEntry]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(each.name, each.datatype, each.shape) for each in entries)


def parse(raw: bytes, files: Iterable[str], label: str) -> Description:
    """Return the description in ``raw``; ``files`` are the version's files, which it may refer to.

    Raises ModelRepositoryError that starts with ``label`` and names the key, and the nearest known one.
    """
    where = f"{label}: {DESCRIPTION}"
    try:
        description = msgspec.convert(table(raw, label), Description)
    except msgspec.ValidationError as error:
        raise ModelRepositoryError(f"{where}: {_said(error)}") from None
    try:
        _check(description, frozenset(files))
    except ValueError as error:
        raise ModelRepositoryError(f"{where}: {error}") from None
    return description


def table(raw: bytes, label: str) -> dict[str, Any]:
    """Return the document's table, not yet checked against any key."""
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ModelRepositoryError(f"{label}: {DESCRIPTION} is not TOML: {error}") from None


def _check(description: Description, files: frozenset[str]) -> None:
    """Raise ValueError for what the types alone do not rule out."""
    check_path(description.file)
    if description.file not in files:
        raise ValueError(f'file is "{description.file}", which the version does not have')
    if description.entry_point is not None:
        _check_entry_point(description.entry_point, files)
    for kind, entries in (("input", description.input), ("output", description.output)):
        _check_tensors(kind, entries)
    if bool(description.input) != bool(description.output):
        raise ValueError("declare both [[input]] and [[output]], or neither")
    if not description.input and description.runtime != "onnx":
        raise ValueError(
            f"runtime {description.runtime} needs [[input]] and [[output]]: only ONNX files say theirs"
        )


def _check_entry_point(entry_point: str, files: frozenset[str]) -> None:
    if not _ENTRY_POINT.match(entry_point):
        raise ValueError(f'entry_point is "{entry_point}", must be "module:Class"')
    module = entry_point.partition(":")[0].replace(".", "/") + ".py"
    if module not in files:
        raise ValueError(f'entry_point is "{entry_point}", and the version has no {module}')


def _check_tensors(kind: str, entries: list[TensorEntry]) -> None:
    seen = set()
    for entry in entries:
        if entry.datatype not in DATATYPES:
            hint = nearest(entry.datatype.upper(), DATATYPES)
            raise ValueError(f'{kind} {entry.name} has unknown datatype "{entry.datatype}"{hint}')
        if 0 in entry.shape:
            raise ValueError(f"{kind} {entry.name} has shape {list(entry.shape)}; sizes are positive, or -1")
        if entry.name in seen:
            raise ValueError(f"{kind} {entry.name} is declared twice")
        seen.add(entry.name)


def _said(error: msgspec.ValidationError) -> str:
    """Say what msgspec found, with the key's place in front and the nearest known key behind."""
    said = str(error)
    unknown = _UNKNOWN_FIELD.match(said)
    if unknown:
        place = re.sub(r"\[\d+\]", "", unknown[2] or "")
        inside = f" in [{place}]" if place else ""
        return f'unknown key "{unknown[1]}"{inside}{nearest(unknown[1], _KEYS.get(place, ()))}'
    place_match = _PLACE.search(said)
    if place_match and place_match[1]:
        return f"{place_match[1]}: {said[: place_match.start()]}"
    return said
