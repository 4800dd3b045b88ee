"""``inferfleet route apply / history / revert``: changes of the control plane's routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from inferfleet import tables
from inferfleet.cli import control
from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.cli.route_views import (
    as_revision,
    change_lines,
    change_plain,
    history_rows,
    moment,
)
from inferfleet.coordinator.announcing import Applied, Plan
from inferfleet.coordinator.routes import RouteControl
from inferfleet.core.barrier import Barrier
from inferfleet.core.planning import RouteChange
from inferfleet.errors import InferfleetError

QUIET_LOOKS = 8
"""Workers answer within a second or two; only who takes longer is worth a line."""

_REASON = click.option("--reason", default="", metavar="TEXT", help="Why; kept in the log and in the audit.")
_ACTOR = click.option("--actor", metavar="NAME", help="Who; by default user@host.")
_TIMEOUT = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long workers may take to load; by default [routing] barrier_s.",
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
_YES = click.option("--yes", is_flag=True, help="Do not ask, for --prune and --reset.")


@click.command(epilog='Example: inferfleet route apply routes.toml --reason "canary at 5 %"')
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_DRY_RUN
@click.option("--prune", is_flag=True, help="Delete the routes that the file does not name.")
@click.option("--reset", "is_reset", is_flag=True, help="Start a new log above all that workers hold.")
@_REASON
@_ACTOR
@_TIMEOUT
@_YES
@_JSON
@pass_session
def apply(
    session: Session,
    file: Path,
    dry_run: bool,
    prune: bool,
    is_reset: bool,
    reason: str,
    actor: str | None,
    timeout_s: float | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Make the routes of FILE stand, all workers at one instant.

    Shows the difference, announces it, waits until every live worker of each pool has the versions ready,
    and lets it take effect a moment ahead. What a worker refuses stays as it was. Routes that FILE does not
    name are left alone. "latest" becomes the number that it means now.
    """
    config = session.config
    tree = tables.parse_toml(tables.read_text(file, "routes file"), str(file))
    with control.opened(config) as store:
        routes = control.route_control(config, store)
        made = routes.plan_reset(tree, str(file)) if is_reset else routes.plan(tree, str(file), prune=prune)
        if not as_json:
            _print_plan(made, is_reset)
            _note_source(session)
        author = actor or control.actor()
        deletes = any(each.kind == "deleted" for each in made.changes)

        def change() -> list[Applied]:
            if is_reset:
                return routes.reset(made.changes, author=author, reason=reason)
            return _applied(routes, made.changes, author, reason, "apply", timeout_s, quiet=as_json)

        sure = yes or dry_run or not (is_reset or (prune and deletes))
        _carry_out(made, change, dry_run=dry_run, sure=sure, as_json=as_json, is_reset=is_reset)


@click.command(epilog='Example: inferfleet route revert digits --reason "version 2 is wrong"')
@click.argument("name")
@click.option("--to", type=click.IntRange(1), metavar="REVISION", help="By default what stood before.")
@_DRY_RUN
@_REASON
@_ACTOR
@_TIMEOUT
@_JSON
@pass_session
def revert(
    session: Session,
    name: str,
    to: int | None,
    dry_run: bool,
    reason: str,
    actor: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Give a route the content of an earlier revision again, as a new revision.

    Keys that need not move stay. It takes effect as any change does, behind the ready barrier.
    """
    config = session.config
    with control.opened(config) as store:
        routes = control.route_control(config, store)
        made = routes.plan_revert(name, to)
        if not as_json:
            _print_plan(made, is_reset=False)
        author = actor or control.actor()

        def change() -> list[Applied]:
            return _applied(routes, made.changes, author, reason, "revert", timeout_s, quiet=as_json)

        _carry_out(made, change, dry_run=dry_run, sure=True, as_json=as_json, is_reset=False)


@click.command(epilog="Example: inferfleet route history digits")
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@_JSON
@pass_session
def history(session: Session, name: str, limit: int, as_json: bool) -> None:
    """Show a route's revisions, newest first: who changed it, when, why, and what answered from when on."""
    with control.opened(session.config) as store:
        found = store.history(name, limit=limit)
        if not found:
            store.load().table().named(name)
    if as_json:
        echo_json([as_revision(each) for each in found])
        return
    echo_table(("revision", "at", "in force from", "action", "versions", "by", "reason"), history_rows(found))


def _applied(
    routes: RouteControl,
    changes: Sequence[RouteChange],
    author: str,
    reason: str,
    action: str,
    timeout_s: float | None,
    *,
    quiet: bool,
) -> list[Applied]:
    told: set[str] = set()
    looks: Counter[str] = Counter()

    def progress(found: Sequence[Barrier]) -> None:
        looks.update(each.name for each in found)
        for each in found:
            line = f"route {each.name} waits: {each}"
            if line not in told and not quiet and looks[each.name] > QUIET_LOOKS:
                told.add(line)
                click.echo(line, err=True)

    return routes.apply(
        changes, author=author, reason=reason, action=action, timeout_s=timeout_s, progress=progress
    )


def _carry_out(
    made: Plan,
    change: Callable[[], list[Applied]],
    *,
    dry_run: bool,
    sure: bool,
    as_json: bool,
    is_reset: bool,
) -> None:
    """Ask where it must be asked, make the change, and say how it ended; a problem is exit code 1."""
    any_change = is_reset or any(each.changes for each in made.changes)
    if not sure and any_change:
        what = "This gives up the log that workers hold. Go on?" if is_reset else "Delete these routes?"
        click.confirm(what, abort=True, err=True)
    done = change() if any_change and not dry_run else []
    if as_json:
        echo_json(_plain(made, done, dry_run))
    elif not any_change:
        click.echo("nothing to change")
    elif dry_run:
        click.echo("nothing was changed (--dry-run)")
    for each in done:
        if not as_json and each.revision is not None:
            click.echo(_outcome(each))
    problems = [f"route {each.name}: {each.problem}" for each in done if each.problem]
    if problems:
        raise InferfleetError("; ".join(problems))


def _print_plan(made: Plan, is_reset: bool) -> None:
    if is_reset:
        click.echo("a new log that holds these routes alone:")
    for each in made.changes:
        for line in change_lines(each):
            click.echo(line)
    for model, version in made.latest.items():
        click.echo(f"latest version of model {model}: {version}")
    for pool in sorted(made.idle):
        click.echo(f"pool {pool} has no live worker: its routes change at once")


def _note_source(session: Session) -> None:
    if session.config.routes.source != "fleet":
        click.echo(
            f'note: [routes] source = "{session.config.routes.source}": workers with these settings read the '
            'file and do not follow the control plane; source = "fleet" does',
            err=True,
        )


def _outcome(done: Applied) -> str:
    revision = done.revision
    if revision is None:
        return ""
    said = "is deleted" if revision.route is None else "is in force"
    line = f"route {done.name}: revision {revision.number} {said} from {moment(revision.effective_from_ms)}"
    if done.unacknowledged:
        return f"{line}; not acknowledged yet by {', '.join(done.unacknowledged)}"
    if done.workers:
        return f"{line}; acknowledged by {done.workers} worker{'' if done.workers == 1 else 's'}"
    return line


def _plain(made: Plan, done: Sequence[Applied], dry_run: bool) -> Mapping[str, Any]:
    return {
        "dry_run": dry_run,
        "changes": [change_plain(each) for each in made.changes],
        "latest": dict(made.latest),
        "pools_without_workers": sorted(made.idle),
        "applied": [
            {
                "route": each.name,
                "revision": None if each.revision is None else each.revision.number,
                "effective_from_ms": None if each.revision is None else each.revision.effective_from_ms,
                "workers": each.workers,
                "unacknowledged": list(each.unacknowledged),
                "problem": each.problem,
            }
            for each in done
        ],
    }
