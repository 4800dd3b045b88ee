"""``inferfleet route``: which versions answer which topic."""

from __future__ import annotations

import time
from typing import Any

import click

from inferfleet.cli import control
from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.cli.route_control import apply, history, revert
from inferfleet.cli.route_views import (
    age,
    as_plain,
    fleet_route,
    moment,
    optional,
    percent,
    shares,
)
from inferfleet.cli.route_views import route_toml as route_toml
from inferfleet.core.revisions import in_force
from inferfleet.errors import BrokerError, InferfleetError
from inferfleet.plane import AuditEntry, Change
from inferfleet.revisions import RouteLog
from inferfleet.routes import Route, RouteTable


@click.group(epilog="Example: inferfleet route list")
def route() -> None:
    """Show the routes and their history; change, pause and resume them."""


@route.command("list", epilog="Example: inferfleet route list --json")
@click.option("--json", "as_json", is_flag=True, help="Print the routes as JSON.")
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List all routes."""
    if session.config.routes_path is None:
        _list_fleet(session, as_json)
        return
    table = session.routes
    if as_json:
        echo_json({"revision": table.revision, "routes": [as_plain(each) for each in table.routes]})
        return
    echo_table(_HEADINGS, [_row(each) for each in table.routes])
    click.echo(f"revision {table.revision}, {session.config.routes_path}")


_HEADINGS = ("route", "source", "results", "model", "versions", "pool")


def _row(each: Route) -> tuple[object, ...]:
    results = ", ".join(map(str, each.results)) or f"shadow of {each.shadow_of}"
    return each.name, each.source, results, each.model, shares(each), each.pool


def _list_fleet(session: Session, as_json: bool) -> None:
    log, now_ms = _log(session), _now_ms()
    found = [view for name in sorted(log.kept) if _stands(view := fleet_route(log, name, now_ms))]
    if as_json:
        echo_json({"epoch": log.head.epoch, "revision": log.head.number, "routes": found})
        return
    rows = []
    for view in found:
        current = in_force(log.kept[view["name"]], now_ms)
        route_now = current.route if current is not None else None
        row = _row(route_now) if route_now is not None else (view["name"], "-", "-", "-", "-", "-")
        stands = view["in_force"]
        number = "-" if stands is None else str(stands["revision"])
        rows.append((*row, number, "-" if current is None else age(now_ms - current.at_ms), _waits(view)))
    echo_table((*_HEADINGS, "revision", "age", "waits"), rows)
    click.echo(f"revision {log.head.number} of epoch {log.head.epoch}, from the control plane")


def _stands(view: dict[str, Any]) -> bool:
    """Say whether there is more of a route than that it was deleted."""
    return any(view[key] is not None and view[key]["route"] for key in ("in_force", "coming", "announced"))


def _waits(view: dict[str, Any]) -> str:
    """Return what is to come of a route, in some words."""
    said = []
    if view["coming"] is not None:
        coming = view["coming"]
        said.append(f"revision {coming['revision']} from {moment(coming['effective_from_ms'])}")
    if view["announced"] is not None:
        said.append(f"revision {view['announced']['revision']} for its workers")
    return "; ".join(said) or "-"


@route.command(epilog="Example: inferfleet route show digits --toml")
@click.argument("name")
@click.option("--toml", "as_toml", is_flag=True, help="Print it as it would stand in routes.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def show(session: Session, name: str, as_toml: bool, as_json: bool) -> None:
    """Show one route with the bucket ranges of its variants.

    From the control plane: what is in force now, since which revision, and what is to come. --toml prints
    what was applied last, which may be in force only in a moment.
    """
    if as_toml and as_json:
        raise click.UsageError("--toml and --json exclude each other")
    if session.config.routes_path is None:
        _show_fleet(session, name, as_toml=as_toml, as_json=as_json)
        return
    found = session.routes.named(name)
    if as_json:
        echo_json(as_plain(found))
    elif as_toml:
        click.echo(route_toml(found), nl=False)
    else:
        _print_route(found)


def _show_fleet(session: Session, name: str, *, as_toml: bool, as_json: bool) -> None:
    with control.opened(session.config) as store:
        log, paused = store.load(), store.paused(name)
    now_ms = _now_ms()
    if as_toml:
        click.echo(route_toml(log.table().named(name)), nl=False)
        return
    if name not in log.kept or not _stands(view := fleet_route(log, name, now_ms)):
        RouteTable("", log.table().routes).named(name)
    view = fleet_route(log, name, now_ms)
    if as_json:
        echo_json({**view, "paused": paused or None})
        return
    current = in_force(log.kept[name], now_ms)
    if current is not None and current.route is not None:
        _print_route(current.route)
    elif current is not None:
        click.echo(f"route {name} is deleted")
    if current is not None:
        click.echo()
        click.echo(
            f"revision {current.number} ({current.action}) by {current.author}, {_why(current.reason)}"
        )
        since, old = moment(current.effective_from_ms), age(now_ms - current.at_ms)
        click.echo(f"in force from {since}, written {old} ago")
    if _waits(view) != "-":
        click.echo(f"waits: {_waits(view)}")
    if paused:
        click.echo(f"paused: {paused}")


def _why(reason: str) -> str:
    return f"reason: {reason}" if reason else "no reason given"


def _log(session: Session) -> RouteLog:
    with control.opened(session.config) as store:
        return store.load()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _print_route(found: Route) -> None:
    click.echo(f"route    {found.name}")
    click.echo(f"source   {found.source}")
    click.echo(f"results  {', '.join(map(str, found.results)) or '-'}")
    click.echo(f"model    {found.model}")
    for key, value in optional(found).items():
        click.echo(f"{key:<8} {', '.join(value) if isinstance(value, tuple) else value}")
    click.echo()
    rows = [
        (
            each.name,
            each.version,
            percent(each.buckets),
            " ".join(f"{low}-{high - 1}" for low, high in each.ranges),
        )
        for each in found.variants
    ]
    echo_table(("variant", "version", "share", "buckets"), rows)
    if found.shadows:
        click.echo()
        rows_of_shadows = [(each.name, each.version, f"{each.sample:.0%}") for each in found.shadows]
        echo_table(("shadow", "version", "sees"), rows_of_shadows)


_ADMIN = click.option(
    "--admin",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Only the worker at this admin address, without Redis. May be repeated.",
)


_ACTOR = click.option("--actor", metavar="NAME", help="Who; by default user@host.")


@route.command(epilog='Example: inferfleet route pause digits --reason "model 7 is wrong"')
@click.argument("name")
@click.option("--reason", default="by hand", show_default=True, help="What status and logs say.")
@_ACTOR
@_ADMIN
@pass_session
def pause(session: Session, name: str, reason: str, actor: str | None, addresses: tuple[str, ...]) -> None:
    """Let no worker take from a route until it is resumed.

    What was taken already is finished. The pause is kept in Redis for the whole pool, with who asked for it;
    it outlives workers. Where routes come from the control plane, its audit log says so too.
    """
    from inferfleet.control.pauses import MAX_REASON

    reason, who = _line(reason, MAX_REASON) or "by hand", _who(actor)
    for address in addresses:
        _tell(address, name, "pause", f"{reason} (by {who})")
        click.echo(f"route {name} is paused at {address}: {reason} (by {who})")
    if addresses:
        return
    from inferfleet.cli.pauses import SharedPauses

    pool = _sharing_pool(session, name)
    with SharedPauses(session.config) as pauses:
        stood = pauses.pause(name, reason, who)
    if stood is None:
        click.echo(f"route {name} is paused for pool {pool}: {reason} (by {who})")
        _audit(session, name, "pause", who, reason, before=None, after=reason)
    else:
        by = f" ({stood.by})" if stood.by and not stood.actor else ""
        click.echo(f"route {name} was paused already: {stood.shown}{by}")
    click.echo(f"`inferfleet route resume {name}` ends it")


@route.command(epilog="Example: inferfleet route resume digits")
@click.argument("name")
@_ACTOR
@_ADMIN
@pass_session
def resume(session: Session, name: str, actor: str | None, addresses: tuple[str, ...]) -> None:
    """End the pause of a route, whether a person, a brake or a worker set it."""
    for address in addresses:
        _tell(address, name, "resume")
        click.echo(f"route {name} goes on at {address}")
    if addresses:
        return
    from inferfleet.cli.pauses import SharedPauses

    pool = _sharing_pool(session, name)
    with SharedPauses(session.config) as pauses:
        stood = pauses.resume(name)
    if stood is None:
        click.echo(f"route {name} was not paused")
    else:
        click.echo(f"route {name} goes on for pool {pool}; it was paused: {stood.shown}")
        _audit(session, name, "resume", _who(actor), "", before=stood.shown, after=None)


def _who(actor: str | None) -> str:
    from inferfleet.control.pauses import MAX_ACTOR

    return _line(actor or "", MAX_ACTOR) or control.actor()


def _line(text: str, most: int) -> str:
    """Return the text as it is kept: one line of so many characters, all of which can be written."""
    return " ".join(text.split())[:most].encode(errors="replace").decode()


def _audit(
    session: Session, name: str, verb: str, who: str, reason: str, *, before: str | None, after: str | None
) -> None:
    """Write into the control plane's audit log what a person did; what is done stands without it too."""
    if session.config.routes_path is not None:
        return
    entry = AuditEntry(
        actor=who, action=f"route {verb}", subject=f"route {name}", reason=reason, before=before, after=after
    )
    try:
        with control.opened(session.config) as store:
            store.commit(Change(actor=who, audit=(entry,)))
    except InferfleetError as error:
        click.echo(f"note: the {verb} is not in the audit log: {error}", err=True)


def _sharing_pool(session: Session, name: str) -> str:
    """Return the pool of a route; raise BrokerError where its workers do not look into Redis."""
    from inferfleet.cli.topology import shares_pauses

    pool = session.routes.named(name).pool
    if not shares_pauses(session.config, session.routes.of_pool(pool)):
        raise BrokerError(
            f"the workers of pool {pool} share no Redis (none of its routes has redis results, and there is "
            f"no [control]); name each of them: --admin HOST:PORT"
        )
    return pool


def _tell(address: str, name: str, verb: str, reason: str = "") -> None:
    from inferfleet.cli.pauses import ask_admin

    ask_admin(address, name, verb, reason)


for _verb in (apply, history, revert):
    route.add_command(_verb)
