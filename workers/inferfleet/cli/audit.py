"""``inferfleet audit``: who changed what, kept as a chain that shows when somebody has touched it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
import msgspec

from inferfleet.cli import control
from inferfleet.cli.frame import Session, echo_json, pass_session
from inferfleet.core.audit_chain import Chain, digest, follow
from inferfleet.errors import ControlError
from inferfleet.plane import AuditEntry

if TYPE_CHECKING:
    from inferfleet.control_ports import ControlStore

PAGE = 1_000


class _Line(msgspec.Struct):
    """One line of an export; the entry's own bytes are what its hash is taken over."""

    id: int
    hash: str
    entry: msgspec.Raw


@click.group(epilog="Example: inferfleet audit verify")
def audit() -> None:
    """Verify and export the audit log: every change with actor, reason, before and after."""


@audit.command(epilog="Example: inferfleet audit export --output audit.jsonl")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="By default standard output.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="ID", help="Only what comes behind it.")
@pass_session
def export(session: Session, output: Path | None, after: int) -> None:
    """Print the log as lines of JSON, oldest first: id, hash, and the entry as it is stored.

    A file appears whole or not at all. `audit verify FILE` checks it anywhere, without the control plane.
    """
    with control.opened(session.config) as store:
        if output is None:
            _write(sys.stdout.buffer, store, after)
            return
        partial = output.with_name(output.name + ".part")
        try:
            with partial.open("wb") as file:
                count = _write(file, store, after)
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    click.echo(f"{output}: {count} entries")


@audit.command(epilog="Example: inferfleet audit verify audit.jsonl")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--last-hash", metavar="HASH", help="A hash that was noted: an entry of the chain must have it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@pass_session
def verify(session: Session, file: Path | None, last_hash: str | None, as_json: bool) -> None:
    """Walk the whole chain, of the control plane or of an exported FILE; name the first broken entry.

    The chain cannot show that its end was cut off: note the last hash elsewhere, and give it as --last-hash.
    """
    entries: Iterable[tuple[AuditEntry, bytes] | str]
    with contextlib.ExitStack() as until:
        if file is None:
            entries = _stored(until.enter_context(control.opened(session.config)))
        else:
            entries = _exported(until.enter_context(file.open("rb")), str(file))
        chain, fault, seen = _walk(entries, last_hash)
    if fault is None and not seen:
        fault = f"no entry has the hash {last_hash}: the log was cut off or written anew"
    if as_json:
        echo_json({"ok": fault is None, "fault": fault, **chain._asdict()})
    elif fault is None and not chain.entries:
        click.echo("the audit log is empty")
    elif fault is None:
        click.echo(
            f"ok: {chain.entries} entries, {chain.first} to {chain.last}; the last hash is {chain.hash}"
        )
    if fault is not None:
        raise ControlError(f"audit log{f' {file}' if file else ''}: {fault}")


def _walk(
    entries: Iterable[tuple[AuditEntry, bytes] | str], wanted: str | None
) -> tuple[Chain, str | None, bool]:
    """Return the chain, what is wrong with its first broken entry, and whether the wanted hash came."""
    chain, seen = Chain(), wanted is None
    for each in entries:
        found = each if isinstance(each, str) else follow(chain, *each)
        if isinstance(found, str):
            return chain, found, seen
        chain = found
        seen = seen or chain.hash == wanted
    return chain, None, seen


def _stored(store: ControlStore, after: int = 0) -> Iterator[tuple[AuditEntry, bytes]]:
    while page := store.audit(after=after, limit=PAGE):
        yield from page
        after = page[-1][0].number


def _exported(lines: Iterable[bytes], name: str) -> Iterator[tuple[AuditEntry, bytes] | str]:
    """Yield the entries of an export; the text of what is wrong where a line is no entry."""
    for number, line in enumerate(lines, 1):
        try:
            found = msgspec.json.decode(line, type=_Line)
            body = bytes(found.entry)
            entry = msgspec.json.decode(body, type=AuditEntry)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            yield f"{name}, line {number}: {error}"
            return
        if digest(body) != found.hash or entry.number != found.id:
            yield f"entry {found.id} is not what its hash says: it was changed"
            return
        yield entry, body


def _write(file: IO[bytes], store: ControlStore, after: int) -> int:
    count = 0
    for entry, body in _stored(store, after):
        file.write(b'{"id":%d,"hash":"%b","entry":%b}\n' % (entry.number, digest(body).encode(), body))
        count += 1
    file.flush()
    return count
