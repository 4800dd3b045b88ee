"""Collects what the file and the environment say, key by key, before anything is typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from inferfleet import tables
from inferfleet.errors import ConfigError
from inferfleet.tables import ENV_PREFIX, FILE_SUFFIX, Leaf


class Collected(NamedTuple):
    """Leaves per section and key, and the files that secrets were read from, per dotted key."""

    sections: dict[str, dict[str, Leaf]]
    secret_files: dict[str, Path]


class _Section:
    """What is known about one section while it is collected: plain keys and property tables apart."""

    def __init__(self, name: str, kind: type[msgspec.Struct]) -> None:
        self.name = name
        self.kinds = tables.field_types(kind)
        self.leaves: dict[str, Leaf] = {}
        self.properties: dict[str, dict[str, Leaf]] = {
            key: {} for key, each in self.kinds.items() if tables.is_table(each)
        }

    def put(self, key: str, leaf: Leaf) -> None:
        """Take a key of the file or of the environment; unknown ones raise ConfigError."""
        if key in self.properties:
            self._put_table(key, leaf)
        elif key in self.kinds or tables.takes_file(key, self.kinds):
            self._replace(self.leaves, key, leaf, f"[{self.name}]")
        else:
            mend = tables.nearest(key, self.kinds)
            raise ConfigError(f'{leaf.origin}: [{self.name}] has no key "{key}"{mend}')

    def put_property(self, table: str, key: str, leaf: Leaf) -> None:
        """Take one librdkafka property of a property table."""
        self._replace(self.properties[table], key, leaf, f"[{self.name}.{table}]")

    def _put_table(self, key: str, leaf: Leaf) -> None:
        if not isinstance(leaf.value, Mapping):
            raise ConfigError(f"{leaf.origin}: [{self.name}] {key} must be a table of properties")
        for prop, value in tables.flatten(leaf.value).items():
            text = tables.property_text(value)
            if text is None:
                raise ConfigError(
                    f'{leaf.origin}: [{self.name}.{key}] "{prop}" must be a text, a number or a bool'
                )
            self.put_property(key, prop, Leaf(text, leaf.origin))

    @staticmethod
    def _replace(leaves: dict[str, Leaf], key: str, leaf: Leaf, where: str) -> None:
        """Set a key: a ``_file`` sibling of a weaker origin goes, one of the same origin is a conflict."""
        sibling = key.removesuffix(FILE_SUFFIX) if key.endswith(FILE_SUFFIX) else key + FILE_SUFFIX
        other = leaves.pop(sibling, None)
        if other is not None and other.text == leaf.text:
            plain = key.removesuffix(FILE_SUFFIX)
            raise ConfigError(f"{leaf.origin}: {where} has both {plain} and {plain}{FILE_SUFFIX}; keep one")
        leaves[key] = leaf


def collect(
    tree: Mapping[str, Any],
    path: Path,
    environ: Mapping[str, str],
    sections: Mapping[str, type[msgspec.Struct]],
) -> Collected:
    """Return every key that the document or the environment sets; unknown names raise ConfigError.

    ``path`` is the document's own: its folder is where relative secret files are looked for.
    """
    known = {name: _Section(name, kind) for name, kind in sections.items()}
    for name, table in tree.items():
        if name not in known:
            raise ConfigError(f"{path}: there is no section [{name}]{tables.nearest(name, known)}")
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: {name} must be a section, written [{name}]")
        for key, value in table.items():
            known[name].put(key, Leaf(value, str(path)))
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX):
            _put_variable(known, variable, environ[variable])
    return _read_files(known, path.parent)


def _put_variable(known: Mapping[str, _Section], variable: str, text: str) -> None:
    parts = variable.removeprefix(ENV_PREFIX).split("__")
    name, keys = parts[0].lower(), parts[1:]
    section = known.get(name)
    leaf = Leaf(text, variable, text=True)
    if section is not None and len(keys) == 2 and keys[0].lower() in section.properties:
        section.put_property(keys[0].lower(), tables.property_name(keys[1]), leaf)
    elif (
        section is not None
        and len(keys) == 1
        and (keys[0].lower() in section.kinds or tables.takes_file(keys[0].lower(), section.kinds))
    ):
        section.put(keys[0].lower(), leaf)
    else:
        raise ConfigError(f"{variable} names no setting{tables.nearest(variable, _variables(known))}")


def _variables(known: Mapping[str, _Section]) -> list[str]:
    return [
        f"{ENV_PREFIX}{section.name}__{key}".upper() for section in known.values() for key in section.kinds
    ]


def _read_files(known: Mapping[str, _Section], base: Path) -> Collected:
    """Replace every ``<key>_file`` by what the file holds, without its last line end."""
    out = Collected({}, {})
    for name, section in known.items():
        leaves = _read(section.leaves, section.kinds, f"{name}.", f"[{name}]", base, out)
        for table, properties in section.properties.items():
            read = _read(properties, None, f"{name}.{table}.", f"[{name}.{table}]", base, out)
            if read:
                values = {prop: leaf.value for prop, leaf in read.items()}
                origins = {prop: leaf.origin for prop, leaf in read.items()}
                leaves[table] = Leaf(values, "", parts=origins)
        if leaves:
            out.sections[name] = leaves
    return out


def _read(
    leaves: Mapping[str, Leaf],
    kinds: Mapping[str, Any] | None,
    prefix: str,
    where: str,
    base: Path,
    out: Collected,
) -> dict[str, Leaf]:
    read: dict[str, Leaf] = {}
    for key, leaf in leaves.items():
        is_file = key.endswith(FILE_SUFFIX) and (kinds is None or key not in kinds)
        if not is_file:
            read[key] = leaf
            continue
        if not isinstance(leaf.value, str) or not leaf.value:
            raise ConfigError(f"{leaf.origin}: {where} {key} must be a file's name")
        file = base / leaf.value
        plain = key.removesuffix(FILE_SUFFIX)
        text = tables.read_text(file, f"{leaf.origin}: {where} {key}:").rstrip("\r\n")
        read[plain] = Leaf(text, f"{leaf.origin} ({key} = {leaf.value})", text=True)
        out.secret_files[prefix + plain] = file
    return read
