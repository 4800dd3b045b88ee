"""``inferfleet dlt``: what became a dead letter, why, and how it is sent again."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.errors import Code
from inferfleet.naming import dead_letter_name
from inferfleet.tables import nearest

if TYPE_CHECKING:
    from inferfleet.cli.dead_queue import DeadQueue
    from inferfleet.cli.deadletters import DeadLetters
    from inferfleet.cli.letters import Choice, DeadLetter, Wanted
    from inferfleet.routes import Route

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PLACE = re.compile(r"\d{1,9}:\d{1,18}")
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(?:/(s|m|h))?")
_PER_SECOND = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

Command = TypeVar("Command", bound=Callable[..., object])


@click.group(epilog="Example: inferfleet dlt list digits")
def dlt() -> None:
    """List, show and redrive dead letters."""


def _codes(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> frozenset[str]:
    for value in values:
        if value not in set(Code):
            raise click.BadParameter(f'there is no code "{value}"{nearest(value, set(Code))}')
    return frozenset(values)


def _instant(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from inferfleet.cli.letters import instant_ms

    try:
        return instant_ms(value, now_ms())
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f'"{value}" is neither an instant such as 2026-11-01T08:00:00Z nor a time ago such as 90m or 2h'
        ) from None


def _rate(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    match = None if value is None else _RATE.fullmatch(value)
    if value is None or (match is not None and float(match[1]) > 0):
        return None if match is None else float(match[1]) / _PER_SECOND[match[2] or ""]
    raise click.BadParameter(f'"{value}" is no rate such as 50/s or 30/m')


def _filters(command: Command) -> Command:
    """Add the options that say which letters are meant."""
    options = (
        click.option(
            "--until",
            "until_ms",
            callback=_instant,
            help="Only those that failed until then: an ISO instant, or 2h for two hours ago.",
        ),
        click.option("--since", "since_ms", callback=_instant, help="Only those that failed since then."),
        click.option("--model", default="", help="Only those that this model, or model:version, failed."),
        click.option(
            "--code",
            "codes",
            multiple=True,
            callback=_codes,
            help="Only those with this code, such as E_SHAPE; several times for several codes.",
        ),
    )
    for option in options:
        command = option(command)
    return command


@dlt.command("list", epilog="Example: inferfleet dlt list digits --code E_SHAPE --since 2h --limit 100")
@click.argument("route_name", metavar="ROUTE")
@_filters
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print them whole, as JSON.")
@pass_session
def list_(
    session: Session,
    route_name: str,
    codes: frozenset[str],
    model: str,
    since_ms: int | None,
    until_ms: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the newest dead letters of a route, the newest last.

    On Kafka nothing is committed. A RabbitMQ queue can only be read by taking: its letters are held for a
    moment and given back, each counted as delivered once more.
    """
    from inferfleet.cli.letters import Wanted

    wanted = Wanted(codes, model, since_ms, until_ms)
    route = session.routes.named(route_name)
    with _letters(session, route) as letters:
        found = letters.newest(limit, wanted)
        where = letters.seen
    if as_json:
        echo_json([each.as_plain() for each in found])
    elif not found:
        click.echo(f"no dead letters{_said(wanted)} in {where}")
    else:
        headings = ("place", "code", "id", "failed at", "origin", "redriven", "error")
        echo_table(headings, [_row(each) for each in found])
        click.echo(f"{len(found)} in {where}; `inferfleet dlt show {route_name} {found[-1].place}` shows one")


@dlt.command(epilog="Example: inferfleet dlt show digits 0:17")
@click.argument("route_name", metavar="ROUTE")
@click.argument("place", metavar="PLACE")
@click.option("--raw", is_flag=True, help="Write the request's original bytes and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def show(session: Session, route_name: str, place: str, raw: bool, as_json: bool) -> None:
    """Show one dead letter: why it failed, its headers and its body.

    PLACE is PARTITION:OFFSET on Kafka; on RabbitMQ it is the request's id, or where the letter stands in the
    queue, counted from 1.
    """
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    route = session.routes.named(route_name)
    if route.source.kind == "kafka" and not _PLACE.fullmatch(place):
        raise click.UsageError(f'"{place}" is not PARTITION:OFFSET, such as 0:17')
    with _letters(session, route) as letters:
        letter = letters.named(place)
    if raw:
        click.echo(letter.body, nl=False)
    elif as_json:
        echo_json(letter.as_plain())
    else:
        _print(letter)


@dlt.command(epilog="Example: inferfleet dlt redrive digits --code E_MODEL --since 2h --rate 50/s --dry-run")
@click.argument("route_name", metavar="ROUTE")
@click.argument("places", metavar="[PLACE]...", nargs=-1)
@_filters
@click.option("--limit", type=click.IntRange(1), help="Send at most so many, the oldest first.")
@click.option("--rate", callback=_rate, help="Send no faster than this, such as 50/s or 30/m.")
@click.option("--again", is_flag=True, help="Send the letters named by PLACE even if they were redriven.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@pass_session
def redrive(
    session: Session,
    route_name: str,
    places: tuple[str, ...],
    codes: frozenset[str],
    model: str,
    since_ms: int | None,
    until_ms: int | None,
    limit: int | None,
    rate: float | None,
    again: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Send dead letters to the route's workers again, each once.

    They go through the pool's own retry topic or queue, so nobody else who reads the source sees them, and
    a good answer replaces the error in Redis. PLACE names single letters as `dlt show` does, or by id.
    Letters whose caller is at fault go only if a --code or a PLACE names them.
    """
    if again and not places:
        raise click.UsageError("--again goes with the PLACE of each letter that is meant")
    if not (dry_run or yes or sys.stdin.isatty()):
        raise click.UsageError("this is no terminal to ask on; give --yes, or --dry-run")
    from inferfleet.cli.letters import Choice, Wanted
    from inferfleet.cli.pace import Pace
    from inferfleet.cli.redriving import redriving

    route = session.routes.named(route_name)
    wanted = Wanted(codes, model, since_ms, until_ms)
    with redriving(session.config, route) as run:
        choice = Choice(route, wanted, places, again=again, limit=limit)
        run.choose(choice, now_ms())
        if not as_json:
            click.echo("\n".join(run.plan(choice)))
        sent = choice.chosen.total()
        if sent and not dry_run:
            if not yes:
                click.confirm(f"Send {sent} to {run.to}?", abort=True, err=as_json)
            # What came in between was not asked about.
            sent = run.send(Choice(route, wanted, places, again=again, limit=sent), now_ms(), Pace(rate))
        if as_json:
            echo_json(run.as_plain(choice, sent, dry_run=dry_run))
        elif not dry_run:
            click.echo(f"sent {sent}")
        _fail_for(run.refused, choice)


def _fail_for(refused: Mapping[str, str], choice: Choice) -> None:
    """End with exit code 1 where something that was to be sent could not be."""
    if refused:
        place, text = next(iter(refused.items()))
        raise click.ClickException(f"{len(refused)} refused and kept; the first is {place}: {clean(text)}")
    if choice.named and choice.cut:
        raise click.ClickException(f"{', '.join(choice.cut[:5])}: a letter that was cut cannot be sent again")


@contextlib.contextmanager
def _letters(session: Session, route: Route) -> Iterator[DeadLetters | DeadQueue]:
    config = session.config
    name = dead_letter_name(config, route)
    if route.source.kind == "rabbitmq":
        from inferfleet.cli.dead_queue import DeadQueue

        yield DeadQueue(config, name)
        return
    from inferfleet.cli.deadletters import DeadLetters
    from inferfleet.cli.kafka import Cluster

    cluster = Cluster(config)
    try:
        yield DeadLetters(cluster, config.group_of(route.pool), name)
    finally:
        cluster.close()


def _said(wanted: Wanted) -> str:
    from inferfleet.cli.letters import EVERYTHING

    if wanted._replace(codes=frozenset()) != EVERYTHING:
        return " that fit"
    return f" with {', '.join(sorted(wanted.codes))}" if wanted.codes else ""


def now_ms() -> int:
    """Return the time, epoch milliseconds."""
    return time.time_ns() // 1_000_000


def _row(letter: DeadLetter) -> tuple[str, ...]:
    from inferfleet.cli.letters import failed_at

    error = clean(letter.header("inferfleet-error"))
    return (
        clean(letter.place),
        clean(letter.code),
        clean(letter.id),
        clean(failed_at(letter)),
        clean(letter.origin),
        "yes" if letter.redriven else "",
        error if len(error) <= 80 else error[:79] + "…",
    )


def _print(letter: DeadLetter) -> None:
    kafka = letter.amqp is None
    where = f"partition {letter.partition} offset {letter.offset}" if kafka else f"letter {letter.offset}"
    click.echo(f"{letter.topic} {where}")
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
