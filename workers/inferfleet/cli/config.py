"""``inferfleet config``: the effective settings and where each came from."""

from __future__ import annotations

import json

import click

from inferfleet import tables
from inferfleet.cli.frame import Session, echo_json, pass_session
from inferfleet.config import SECTIONS, Config, check_supported


@click.group(epilog="Example: inferfleet config show --json")
def config() -> None:
    """Show or check the effective settings."""


@config.command(epilog="Example: inferfleet config show | grep -v default")
@click.option("--json", "as_json", is_flag=True, help="Print keys, values and origins as JSON.")
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Print every setting with where its value came from; secrets are masked."""
    values = effective(session.config)
    origins = session.origins
    if as_json:
        echo_json({key: {"value": value, "origin": origins[key]} for key, value in values.items()})
        return
    heading = ""
    for key, value in values.items():
        section, name = split_key(key)
        if section != heading:
            click.echo(f"{chr(10) if heading else ''}[{section}]")
            heading = section
        click.echo(f"{f'{name} = {_toml(value)}':<44} # {origins[key]}")


@config.command(epilog="Example: inferfleet config check --config fleet.toml")
@pass_session
def check(session: Session) -> None:
    """Read settings and routes, start nothing; fails with the first thing that is wrong."""
    check_supported(session.config)
    click.echo(f"{session.config.path}: ok")
    routes = session.routes
    click.echo(f"{session.routes_origin}: ok, {len(routes.routes)} routes, revision {routes.revision}")


def effective(settings: Config) -> dict[str, object]:
    """Return every setting by its dotted key, secrets masked."""
    values: dict[str, object] = {}
    for name in SECTIONS:
        section = getattr(settings, name)
        if section is None:
            continue
        for key in section.__struct_fields__:
            value = getattr(section, key)
            if isinstance(value, dict):
                values.update(
                    {f"{name}.{key}.{prop}": tables.masked(prop, each) for prop, each in value.items()}
                )
            else:
                values[f"{name}.{key}"] = tables.masked(key, value)
    return values


def split_key(key: str) -> tuple[str, str]:
    """Return the table and the key inside it, as they are written in the file."""
    section, _, rest = key.partition(".")
    table, _, prop = rest.partition(".")
    return (f"{section}.{table}", json.dumps(prop)) if prop else (section, table)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return json.dumps(value, ensure_ascii=False)
