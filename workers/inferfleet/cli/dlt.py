"""``inferfleet dlt``: what became a dead letter, and why."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.config import dead_letter_topic
from inferfleet.errors import Code
from inferfleet.tables import nearest

if TYPE_CHECKING:
    from inferfleet.cli.deadletters import DeadLetter, DeadLetters

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@click.group(epilog="Example: inferfleet dlt list digits")
def dlt() -> None:
    """List and show dead letters; reading them commits nothing."""


def _code(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value not in set(Code):
        raise click.BadParameter(f'there is no code "{value}"{nearest(value, set(Code))}')
    return value


@dlt.command("list", epilog="Example: inferfleet dlt list digits --code E_SHAPE --limit 100")
@click.argument("route_name", metavar="ROUTE")
@click.option("--code", callback=_code, help="Only those with this code, such as E_SHAPE.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print them whole, as JSON.")
@pass_session
def list_(session: Session, route_name: str, code: str | None, limit: int, as_json: bool) -> None:
    """List the newest dead letters of a route, the newest last."""
    with _letters(session, route_name) as letters:
        found = letters.newest(limit, code)
        topic = letters.topic
    if as_json:
        echo_json([each.as_plain() for each in found])
    elif not found:
        click.echo(f"no dead letters{f' with {code}' if code else ''} in {topic}")
    else:
        echo_table(("place", "code", "id", "failed at", "origin", "error"), [_row(each) for each in found])
        click.echo(f"{len(found)} in {topic}; `inferfleet dlt show {route_name} {found[-1].place}` shows one")


@dlt.command(epilog="Example: inferfleet dlt show digits 0:17")
@click.argument("route_name", metavar="ROUTE")
@click.argument("place", metavar="PARTITION:OFFSET")
@click.option("--raw", is_flag=True, help="Write the request's original bytes and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def show(session: Session, route_name: str, place: str, raw: bool, as_json: bool) -> None:
    """Show one dead letter: why it failed, its headers and its body."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,18})", place)
    if match is None:
        raise click.UsageError(f'"{place}" is not PARTITION:OFFSET, such as 0:17')
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    with _letters(session, route_name) as letters:
        letter = letters.at(int(match[1]), int(match[2]))
    if raw:
        click.echo(letter.body, nl=False)
    elif as_json:
        echo_json(letter.as_plain())
    else:
        _print(letter)


@contextlib.contextmanager
def _letters(session: Session, route_name: str) -> Iterator[DeadLetters]:
    route = session.routes.named(route_name)
    from inferfleet.cli.deadletters import DeadLetters
    from inferfleet.cli.kafka import Cluster

    config = session.config
    group = config.group_of(route.pool)
    cluster = Cluster(config)
    try:
        yield DeadLetters(cluster, group, dead_letter_topic(config, route.source.name, group))
    finally:
        cluster.close()


def _row(letter: DeadLetter) -> tuple[str, ...]:
    from inferfleet.cli.deadletters import failed_at

    error = clean(letter.header("inferfleet-error"))
    return (
        letter.place,
        clean(letter.header("inferfleet-code")),
        clean(letter.id),
        clean(failed_at(letter)),
        clean(letter.origin),
        error if len(error) <= 80 else error[:79] + "…",
    )


def _print(letter: DeadLetter) -> None:
    click.echo(f"{letter.topic} partition {letter.partition} offset {letter.offset}")
    click.echo(f"key  {'none' if letter.key is None else clean(letter.key.decode(errors='replace'))}")
    for name, value in letter.headers:
        click.echo(f"{clean(name)}: {'' if value is None else clean(value.decode(errors='replace'))}")
    click.echo()
    try:
        click.echo(clean(letter.body.decode()))
    except UnicodeDecodeError:
        click.echo(f"{len(letter.body)} bytes that are no text; --raw writes them:")
        click.echo(letter.body[:256].hex(" ", 4))


def clean(text: str) -> str:
    """Take out what could steer a terminal: requests are written by strangers."""
    return _CONTROL.sub("�", text)
