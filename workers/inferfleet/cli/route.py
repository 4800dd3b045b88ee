"""``inferfleet route``: which versions answer which topic."""

from __future__ import annotations

import json

import click

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.errors import BrokerError
from inferfleet.routes import BUCKETS, Route, Variant

_OPTIONAL = (
    "pool", "split_by", "salt", "input", "goal_p99_ms", "deadline_ms", "ttl_s", "order", "nan", "time",
    "max_batch_size", "max_queue_delay_ms",
)  # fmt: skip


@click.group(epilog="Example: inferfleet route list")
def route() -> None:
    """Show the routes: source, results, model and variants; pause and resume them."""


@route.command("list", epilog="Example: inferfleet route list --json")
@click.option("--json", "as_json", is_flag=True, help="Print the routes as JSON.")
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List all routes."""
    table = session.routes
    if as_json:
        echo_json({"revision": table.revision, "routes": [as_plain(each) for each in table.routes]})
        return
    rows = [
        (
            each.name,
            each.source,
            ", ".join(map(str, each.results)),
            each.model,
            ", ".join(f"{variant.version} {percent(variant)}" for variant in each.variants),
            each.pool,
        )
        for each in table.routes
    ]
    echo_table(("route", "source", "results", "model", "versions", "pool"), rows)
    click.echo(f"revision {table.revision}, {session.config.routes_path}")


@route.command(epilog="Example: inferfleet route show digits --toml")
@click.argument("name")
@click.option("--toml", "as_toml", is_flag=True, help="Print it as it would stand in routes.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def show(session: Session, name: str, as_toml: bool, as_json: bool) -> None:
    """Show one route with the bucket ranges of its variants."""
    if as_toml and as_json:
        raise click.UsageError("--toml and --json exclude each other")
    found = session.routes.named(name)
    if as_json:
        echo_json(as_plain(found))
        return
    if as_toml:
        click.echo(route_toml(found), nl=False)
        return
    click.echo(f"route    {found.name}")
    click.echo(f"source   {found.source}")
    click.echo(f"results  {', '.join(map(str, found.results))}")
    click.echo(f"model    {found.model}")
    for key in _OPTIONAL:
        if getattr(found, key) is not None:
            click.echo(f"{key:<8} {getattr(found, key)}")
    click.echo()
    rows = [
        (each.name, each.version, percent(each), " ".join(f"{low}-{high - 1}" for low, high in each.ranges))
        for each in found.variants
    ]
    echo_table(("variant", "version", "share", "buckets"), rows)


_ADMIN = click.option(
    "--admin",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Only the worker at this admin address, without Redis. May be repeated.",
)


@route.command(epilog='Example: inferfleet route pause digits --reason "model 7 is wrong"')
@click.argument("name")
@click.option("--reason", default="by hand", show_default=True, help="What status and logs say.")
@_ADMIN
@pass_session
def pause(session: Session, name: str, reason: str, addresses: tuple[str, ...]) -> None:
    """Let no worker take from a route until it is resumed.

    What was taken already is finished. The pause is kept in Redis for the whole pool; it outlives workers.
    """
    reason = " ".join(reason.split()) or "by hand"
    for address in addresses:
        _tell(address, name, "pause", reason)
        click.echo(f"route {name} is paused at {address}: {reason}")
    if addresses:
        return
    from inferfleet.cli.pauses import SharedPauses

    pool = _sharing_pool(session, name)
    with SharedPauses(session.config) as pauses:
        stood = pauses.pause(name, reason)
    if stood is not None:
        click.echo(f"route {name} was paused already: {stood.reason}{f' ({stood.by})' if stood.by else ''}")
    else:
        click.echo(f"route {name} is paused for pool {pool}: {reason}")
    click.echo(f"`inferfleet route resume {name}` ends it")


@route.command(epilog="Example: inferfleet route resume digits")
@click.argument("name")
@_ADMIN
@pass_session
def resume(session: Session, name: str, addresses: tuple[str, ...]) -> None:
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
        click.echo(f"route {name} goes on for pool {pool}; it was paused: {stood.reason}")


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


def percent(variant: Variant) -> str:
    """Return the variant's share of the buckets."""
    return f"{variant.buckets * 100 / BUCKETS:g}%"


def as_plain(found: Route) -> dict[str, object]:
    """Return a route in the words of the routes file, plus the bucket ranges."""
    plain: dict[str, object] = {
        "name": found.name,
        "source": str(found.source),
        "results": [str(each) for each in found.results],
        "model": found.model,
        "variants": [each._asdict() for each in found.variants],
    }
    return plain | {key: getattr(found, key) for key in _OPTIONAL if getattr(found, key) is not None}


def route_toml(found: Route) -> str:
    """Return the route as a ``[[route]]`` table that parses to the same route."""
    lines = [
        "[[route]]",
        f"name = {_text(found.name)}",
        f"source = {_text(str(found.source))}",
        f"results = [{', '.join(_text(str(each)) for each in found.results)}]",
        f"model = {_text(found.model)}",
        "variants = [",
        *(
            f"  {{ name = {_text(each.name)}, version = {_text(each.version)}, weight = {each.weight!r} }},"
            for each in found.variants
        ),
        "]",
    ]
    for key in _OPTIONAL:
        value = getattr(found, key)
        if value is not None:
            lines.append(f"{key} = {_text(value) if isinstance(value, str) else repr(value)}")
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    # JSON leaves DEL as it is, which TOML does not allow.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
