"""From TOML tables, environment variables and secret files to typed sections, each value with its origin.

This module knows no setting by name: the sections are :class:`msgspec.Struct` types that the caller
passes in. Every failure is a :class:`~inferfleet.errors.ConfigError` that names the file or the variable,
the key, and the nearest name that would have been right.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin
from urllib.parse import unquote

import msgspec
from msgspec import inspect

from inferfleet.errors import ConfigError

ENV_PREFIX = "INFERFLEET__"
FILE_SUFFIX = "_file"

SectionType = TypeVar("SectionType", bound=msgspec.Struct)

_TOML_PLACE = re.compile(r"^(.*?)\s*\(at line (\d+), column \d+\)$", re.DOTALL)
_TOML_END = re.compile(r"^(.*?)\s*\(at end of document\)$", re.DOTALL)
# librdkafka's few property names with an underscore of their own.
_UNDERSCORED = {"ssl.ca": "ssl_ca", "ssl.certificate": "ssl_certificate", "ssl.key": "ssl_key"}


class Leaf(NamedTuple):
    """One value as it was written.

    ``text`` says that it is a string of the environment. A property table keeps in ``parts`` where each of
    its properties came from.
    """

    value: Any
    origin: str
    text: bool = False
    parts: Mapping[str, str] | None = None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "X"?`` for the known name nearest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def read_text(path: Path, what: str, way_out: str = "") -> str:
    """Return the file's text, or raise ConfigError; ``way_out`` is for who has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist{way_out}") from None
    except IsADirectoryError:
        raise ConfigError(f"{what} {path} is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Return the document's table; a syntax error becomes ``origin:line: reason``."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        place = _TOML_PLACE.match(said)
        if place:
            hint = " (text stands in quotes)" if place[1] == "Invalid value" else ""
            raise ConfigError(f"{origin}:{place[2]}: {place[1]}{hint}") from None
        end = _TOML_END.match(said)
        lines = text.count("\n") + 1
        raise ConfigError(f"{origin}:{lines}: {end[1] if end else said}") from None


def expectation(kind: Any) -> str:
    """Say in words what a field of this type takes, for error messages."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(expectation(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Annotated:
        for meta in get_args(kind)[1:]:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in get_args(kind))
    return _expectation(inspect.type_info(kind))


def _expectation(info: inspect.Type) -> str:
    match info:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            words = "a whole number" if isinstance(info, inspect.IntType) else "a number"
            bounds = [
                f"{sign} {bound:g}"
                for sign, bound in ((">=", info.ge), (">", info.gt), ("<=", info.le), ("<", info.lt))
                if bound is not None
            ]
            return " ".join([words, " and ".join(bounds)]).strip()
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return f"a list, each of it {_expectation(item)}"
        case inspect.DictType():
            return "a table"
        case _:
            return "a text"


def convert(leaf: Leaf, kind: Any, where: str) -> Any:
    """Return the leaf's value as ``kind``; ``where`` names the key in the error."""
    value = leaf.value
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    try:
        if leaf.text and isinstance(value, str) and _is_list(kind):
            value = _split(value)
        return msgspec.convert(value, kind, strict=not leaf.text)
    except (msgspec.ValidationError, tomllib.TOMLDecodeError):
        shown = "a secret" if secret_name(where) else msgspec.json.encode(value).decode()
        raise ConfigError(f"{leaf.origin}: {where} is {shown}, must be {expectation(kind)}") from None


def _is_list(kind: Any) -> bool:
    info = inspect.type_info(kind)
    return isinstance(info, inspect.VarTupleType | inspect.ListType)


def is_table(kind: Any) -> bool:
    """Whether a field holds a property table."""
    return isinstance(inspect.type_info(kind), inspect.DictType)


def _split(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        listed = tomllib.loads(f"v = {text}")["v"]
        return listed if isinstance(listed, list) else [listed]
    return [part.strip() for part in text.split(",") if part.strip()]


_SECRET = re.compile(
    r"password|passwd|secret|token|jaas|credential|(?:^|[._])key$|\.pem$|ssl_key", re.IGNORECASE
)
# Up to the last "@" before the path: a password may hold one that nobody has escaped.
_USERINFO = re.compile(r"(?<=://)([^/\s]*)@")


def secret_name(key: str) -> bool:
    """Whether a key holds something that must never be printed; its ``_file`` sibling does not."""
    return not key.endswith((FILE_SUFFIX, ".url")) and _SECRET.search(key) is not None


def url_secrets(text: str) -> set[str]:
    """Return the passwords in a text's URLs, as they are written and as they are meant."""
    written = {found.partition(":")[2] for found in _USERINFO.findall(text)}
    return {each for found in written if found for each in (found, unquote(found))}


def secret_values(section: msgspec.Struct) -> set[str]:
    """Return every secret of a section, passwords in its URLs included."""
    found: set[str] = set()
    for key in section.__struct_fields__:
        value = getattr(section, key)
        for name, each in value.items() if isinstance(value, Mapping) else [(key, value)]:
            if each and secret_name(name):
                found.add(str(each))
            elif "://" in str(each):
                found |= url_secrets(str(each))
    return found


def masked(key: str, value: object) -> object:
    """Return the value as it may be printed: secrets as ``***``, credentials cut out of URLs."""
    if secret_name(key) and value not in ("", None):
        return "***"
    if isinstance(value, str) and "://" in value:
        return _USERINFO.sub("***@", value)
    if isinstance(value, Mapping):
        return {name: masked(name, each) for name, each in value.items()}
    return value


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted names."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        out.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return out


def property_text(value: Any) -> str | None:
    """Return a scalar as librdkafka spells it, ``None`` for what is not a scalar."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else None


def property_name(env_part: str) -> str:
    """Return the property that a variable's last part stands for: ``SASL_USERNAME`` -> ``sasl.username``."""
    stem, suffix = env_part.lower(), ""
    if stem.endswith(FILE_SUFFIX):
        stem, suffix = stem.removesuffix(FILE_SUFFIX), FILE_SUFFIX
    dotted = stem.replace("_", ".")
    return _UNDERSCORED.get(dotted, dotted) + suffix


def field_types(section: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a section's keys with their types."""
    return {each.encode_name: each.type for each in msgspec.structs.fields(section)}


def takes_file(key: str, kinds: Mapping[str, Any]) -> str | None:
    """Return the string key that ``<key>_file`` stands for, ``None`` if it stands for none."""
    stem = key.removesuffix(FILE_SUFFIX)
    if stem == key or key in kinds or stem not in kinds:
        return None
    return stem if isinstance(inspect.type_info(kinds[stem]), inspect.StrType) else None


def build(
    section: type[SectionType],
    leaves: Mapping[str, Leaf],
    where: str,
    *,
    origin: str = "",
    extra: Iterable[str] = (),
) -> SectionType:
    """Return the section from its leaves; unknown keys and values out of bounds raise ConfigError.

    ``extra`` are keys that the caller reads itself: they are known when a nearest name is looked for.
    """
    kinds = field_types(section)
    for key, leaf in leaves.items():
        if key not in kinds:
            mend = nearest(key, [*kinds, *extra])
            raise ConfigError(f'{leaf.origin}: {where} has no key "{key}"{mend}')
    values = {key: convert(leaf, kinds[key], f"{where} {key}") for key, leaf in leaves.items()}
    for field in msgspec.structs.fields(section):
        if field.required and field.name not in values:
            raise ConfigError(f'{origin}: {where} needs the key "{field.name}"')
    return section(**values)
