"""``inferfleet model``: the repository. Adding, listing, showing, checking, and whom to trust."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.errors import InferfleetError

if TYPE_CHECKING:
    from inferfleet.models.repository import ModelVersion, Repository
    from inferfleet.records import TensorSpec

_VERSION = re.compile(r"[1-9][0-9]{0,17}\Z", re.ASCII)
_RUNTIMES = ("onnx", "torch", "python")


@click.group(epilog="Example: inferfleet model add digits model.onnx --version 1")
def model() -> None:
    """Add model versions to the repository, list, show and check them."""


def _in_repository(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb ``--repository`` and, as its first argument, the repository that is meant."""

    def with_repository(session: Session, /, *args: Any, path: Path | None, **kwargs: Any) -> None:
        from inferfleet.models.repository import Repository

        if path is None and not _has_settings(session):
            raise InferfleetError(
                "no fleet.toml here says where the models are: name the repository by --repository, "
                "or a settings file by --config"
            )
        trusted = session.config.models.trusted if path is None or _has_settings(session) else ()
        verb(Repository(session.config.models_path if path is None else path, trusted), *args, **kwargs)

    option = click.option(
        "--repository",
        "path",
        type=click.Path(file_okay=False, path_type=Path),
        help="The repository's folder; by default [models] repository of the settings.",
    )
    return option(update_wrapper(pass_session(with_repository), verb))


def _has_settings(session: Session) -> bool:
    from inferfleet.config import DEFAULT_PATH, PATH_VARIABLE

    return session.config_path is not None or PATH_VARIABLE in os.environ or DEFAULT_PATH.exists()


def _version_number(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not _VERSION.match(value):
        raise click.BadParameter(f'"{value}" is no positive integer without leading zeros')
    return value


def _name_and_version(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[str, str | None] | None:
    if value is None:
        return None
    name, colon, version = value.partition(":")
    if colon and not _VERSION.match(version):
        raise click.BadParameter(f'"{value}" is not NAME or NAME:VERSION, such as digits:2')
    return name, version or None


@model.command(
    epilog="Example: inferfleet model add words model.py vocabulary.txt --version 1 --settings words.toml"
)
@click.argument("name")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="FILE..."
)
@click.option("--version", required=True, callback=_version_number, help="A positive integer, not used yet.")
@click.option("--runtime", type=click.Choice(_RUNTIMES), help="By default what the main file's name says.")
@click.option("--entry-point", metavar="MODULE:CLASS", help="The class that runs, for torch and python.")
@click.option(
    "--settings",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A model.toml; what it leaves out is filled in, for ONNX the tensors too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the added version as JSON.")
@_in_repository
def add(
    repository: Repository,
    name: str,
    files: tuple[Path, ...],
    version: str,
    runtime: str | None,
    entry_point: str | None,
    settings: Path | None,
    as_json: bool,
) -> None:
    """Copy files and folders into a new version, which appears complete or not at all."""
    from inferfleet.tables import read_text

    text = None if settings is None else read_text(settings, "the model's settings")
    added = repository.add(name, version, files, runtime=runtime, settings=text, entry_point=entry_point)
    if as_json:
        echo_json(as_plain(added))
        return
    click.echo(f"added {_title(added)}")
    if _runs_code(added) and not added.trusted:
        click.echo(f"it runs code: `inferfleet model trust {name}:{version}` prints what trusts it")


@model.command("list", epilog="Example: inferfleet model list --json")
@click.option("--json", "as_json", is_flag=True, help="Print names and versions as JSON.")
@_in_repository
def list_(repository: Repository, as_json: bool) -> None:
    """List the models and their versions; nothing is verified."""
    found = {name: repository.versions(name) for name in repository.models()}
    if as_json:
        echo_json([{"model": name, "versions": versions} for name, versions in found.items()])
    elif not found:
        click.echo(f"no models in {repository.root}; `inferfleet model add` adds one")
    else:
        echo_table(("model", "versions"), [(name, ", ".join(versions)) for name, versions in found.items()])


@model.command(epilog="Example: inferfleet model show digits:2")
@click.argument("which", metavar="NAME[:VERSION]", callback=_name_and_version)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@_in_repository
def show(repository: Repository, which: tuple[str, str | None], as_json: bool) -> None:
    """Verify one version, by default the newest, and print what it says."""
    found = _newest(repository, which)
    if as_json:
        echo_json(as_plain(found))
        return
    click.echo(_title(found))
    rows = [("input", *_cells(spec)) for spec in found.signature.inputs] if found.signature else []
    rows += [("output", *_cells(spec)) for spec in found.signature.outputs] if found.signature else []
    rows += [(key, str(value), "", "") for key, value in _batching(found).items()]
    trusted = "yes" if found.trusted else "no" if _runs_code(found) else "not needed"
    rows += [("trusted", trusted, "", ""), ("sha256", found.digest, "", "")]
    rows += [("file", path, str(entry.size), entry.sha256[:12]) for path, entry in found.files.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]).rstrip())


@model.command(epilog="Example: inferfleet model check digits:2 --device cpu")
@click.argument("which", metavar="[NAME[:VERSION]]", required=False, callback=_name_and_version)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="0: what is granted.")
@click.option("--no-load", is_flag=True, help="Compare the bytes with the manifest only.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@_in_repository
@click.pass_context
def check(
    context: click.Context,
    repository: Repository,
    which: tuple[str, str | None] | None,
    device: str,
    threads: int,
    no_load: bool,
    as_json: bool,
) -> None:
    """Verify every byte, load with the runtime and run the self-check; one line for each version.

    Without a name all versions of all models are checked. Exits 1 if any is refused.
    """
    verdicts = []
    for name, version in _meant(repository, which):
        error = _refused(repository, name, version, None if no_load else (device, threads))
        verdicts.append({"model": name, "version": version, "ok": error is None, "error": error})
        if not as_json:
            click.echo(
                f"{'ok  ' if error is None else 'FAIL'}  {name}:{version}{f'  {error}' if error else ''}"
            )
    if as_json:
        echo_json(verdicts)
    elif not verdicts:
        click.echo(f"no models in {repository.root}")
    context.exit(0 if all(each["ok"] for each in verdicts) else 1)


@model.command(epilog="Example: inferfleet model trust words:1")
@click.argument("which", metavar="NAME[:VERSION]", callback=_name_and_version)
@_in_repository
@pass_session
def trust(session: Session, repository: Repository, which: tuple[str, str | None]) -> None:
    """Print the `[models] trusted` line that lets exactly these bytes run code; no file is changed.

    Without a version the newest is meant. Read the code first: `inferfleet model show` lists the files.
    """
    found = _newest(repository, which)
    title = f"{found.name}:{found.version}"
    if found.trusted:
        click.echo(f"{title} is trusted already", err=True)
        return
    before = session.config.models.trusted if _has_settings(session) else ()
    entries = [*before, repository.trust_entry(found)]
    click.echo(f"to let {title} run code, put this under [models]:", err=True)
    click.echo(f"trusted = {json.dumps(entries)}")


def as_plain(version: ModelVersion) -> dict[str, Any]:
    """Return what JSON carries of a version."""
    signature = version.signature
    return {
        "model": version.name,
        "version": version.version,
        "runtime": version.runtime,
        "file": version.file,
        "trusted": version.trusted,
        "sha256": version.digest,
        "inputs": [each._asdict() for each in signature.inputs] if signature else None,
        "outputs": [each._asdict() for each in signature.outputs] if signature else None,
        "batching": _batching(version),
        "files": {
            path: {"sha256": entry.sha256, "size": entry.size} for path, entry in version.files.items()
        },
    }


def _batching(version: ModelVersion) -> dict[str, Any]:
    wishes = version.batching
    given = {name: getattr(wishes, name) for name in wishes.__struct_fields__}
    return {name: value for name, value in given.items() if value is not None}


def _title(version: ModelVersion) -> str:
    count = len(version.files)
    files = "1 file" if count == 1 else f"{count} files"
    size = f"{files}, {version.size_bytes:,} bytes"
    return f"{version.name}:{version.version}  {version.runtime}, {version.file}, {size}"


def _runs_code(version: ModelVersion) -> bool:
    return version.runtime != "onnx"


def _cells(spec: TensorSpec) -> tuple[str, str, str]:
    return spec.name, spec.datatype, f"[{', '.join(map(str, spec.shape))}]"


def _newest(repository: Repository, which: tuple[str, str | None]) -> ModelVersion:
    name, version = which
    if version is None:
        versions = repository.versions(name)
        if not versions:
            raise InferfleetError(f"model {name} has no version in {repository.root}")
        version = versions[-1]
    return repository.fetch(name, version)


def _meant(repository: Repository, which: tuple[str, str | None] | None) -> Iterator[tuple[str, str]]:
    """Yield the names and versions that are meant: one, all of a model, or all there are."""
    if which is not None and which[1] is not None:
        yield which[0], which[1]
        return
    for name in repository.models() if which is None else [which[0]]:
        for version in repository.versions(name):
            yield name, version


def _refused(repository: Repository, name: str, version: str, load: tuple[str, int] | None) -> str | None:
    """Return in one line why the version would not be served, ``None`` if it would."""
    from inferfleet.runtimes import registry

    try:
        found = repository.fetch(name, version)
        if load is not None:
            registry.load(found, *load).close()
    except InferfleetError as error:
        return " ".join(str(error).split())
    return None
