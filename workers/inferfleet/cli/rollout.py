"""``inferfleet rollout``: a new version is let onto a route step by step, and taken back if it is worse."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import click
import msgspec

from inferfleet import tables
from inferfleet.cli import control
from inferfleet.cli.frame import Session, echo_json, pass_session, with_common_options
from inferfleet.cli.rollout_views import list_lines, rollout_lines
from inferfleet.errors import ConfigError
from inferfleet.policies import Kind, policy_of

if TYPE_CHECKING:
    from inferfleet.control_ports import ControlStore
    from inferfleet.coordinator.messages import RolloutView
    from inferfleet.coordinator.rollouts import RolloutControl

WATCH_S = 1.0
VERSION = re.compile(r"[1-9][0-9]{0,17}\Z", re.ASCII)
NOBODY_LEADS = "no coordinator leads: nothing goes on until one runs (`inferfleet coordinator`)"

_REASON = click.option("--reason", default="", metavar="TEXT", help="Why; kept with it and in the audit.")
_ACTOR = click.option("--actor", metavar="NAME", help="Who; by default user@host.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
_NAME = click.argument("name", metavar="ROUTE|ID")


class _Verbs(click.Group):
    """The verbs; ``simulate`` is imported when it is called, because it brings numerics along."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in the order of a rollout's life."""
        return [*self.commands, "simulate"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb; ``None`` for one that does not exist."""
        if cmd_name == "simulate":
            from inferfleet.cli.simulate import simulate

            return with_common_options(simulate)
        return super().get_command(ctx, cmd_name)


class _Open(NamedTuple):
    store: ControlStore
    rollouts: RolloutControl


@click.group(cls=_Verbs, epilog="Example: inferfleet rollout start digits --to 2 --reason 'more data'")
def rollout() -> None:
    """Let a new version onto a route, by evidence: canary, blue/green, A/B test, shadow.

    The verbs work on the control plane's Redis; a running coordinator takes the steps.
    """


@rollout.command(epilog="Example: inferfleet rollout start digits --to latest --policy canary.toml")
@click.argument("route")
@click.option("--to", "version", required=True, metavar="VERSION", help='A number, or "latest".')
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="How it goes on and what ends it; by default the kind's own.",
)
@click.option("--kind", type=click.Choice(get_args(Kind)), help="By default the policy's, else canary.")
@_REASON
@_ACTOR
@_JSON
@pass_session
def start(
    session: Session,
    route: str,
    version: str,
    policy_file: Path | None,
    kind: Kind | None,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """Begin a rollout of a version on ROUTE.

    Its versions are announced; once every live worker has them ready, the first step takes effect. "latest"
    becomes the number that it means now.
    """
    from inferfleet.coordinator.messages import RolloutRequest

    policy = _policy(policy_file, kind)
    with _opened(session) as (store, rollouts):
        if version == "latest":
            version = _latest(session, store, route)
        if not VERSION.match(version):
            raise ConfigError(f'--to "{version}" is no version: a whole number such as 2, or latest')
        request = RolloutRequest(
            route=route, version=version, kind=policy["kind"], policy=policy, reason=_line(reason)
        )
        view = rollouts.start(request, author=actor or control.actor())
        _print(view, store, as_json=as_json)


@rollout.command(epilog="Example: inferfleet rollout status digits --watch")
@click.argument("name", required=False, metavar="[ROUTE|ID]")
@click.option("--watch", is_flag=True, help="Show it again and again until it has ended.")
@_JSON
@pass_session
def status(session: Session, name: str | None, watch: bool, as_json: bool) -> None:
    """Show where a rollout stands, what it is judged by and what it waits for; without a name all of them."""
    if watch and (name is None or as_json):
        raise click.UsageError("--watch needs a route or an id, and shows it to people")
    with _opened(session) as (store, rollouts):
        if name is None:
            found = rollouts.list()
            if as_json:
                echo_json({"leader": _leader(store), "rollouts": found})
            else:
                _echo([*list_lines(found), *_notes(store, found)])
            return
        known = _named(rollouts, name)
        view = rollouts.get(known)
        while watch and not view.ended:
            click.clear()
            _print(view, store, as_json=False)
            time.sleep(WATCH_S)
            view = rollouts.get(known)
        _print(view, store, as_json=as_json)


@rollout.command(epilog="Example: inferfleet rollout pause digits --reason 'until the sale is over'")
@_NAME
@_REASON
@_ACTOR
@_JSON
@pass_session
def pause(session: Session, /, **asked: Any) -> None:
    """Let a rollout stay where it is until it is resumed; what ends it by itself still does."""
    _act(session, "pause", **asked)


@rollout.command(epilog="Example: inferfleet rollout resume digits")
@_NAME
@_REASON
@_ACTOR
@_JSON
@pass_session
def resume(session: Session, /, **asked: Any) -> None:
    """Let a paused rollout go on, also one that paused itself after too many holds."""
    _act(session, "resume", **asked)


@rollout.command(epilog="Example: inferfleet rollout promote digits --reason 'measured elsewhere'")
@_NAME
@_REASON
@_ACTOR
@_JSON
@pass_session
def promote(session: Session, /, **asked: Any) -> None:
    """Let the new version answer everything now, whatever the evidence says; the bake follows."""
    _act(session, "promote", **asked)


@rollout.command(epilog="Example: inferfleet rollout abort digits --reason 'wrong labels'")
@_NAME
@_REASON
@_ACTOR
@_JSON
@pass_session
def abort(session: Session, /, **asked: Any) -> None:
    """Take a rollout back, at once and for records that still wait."""
    _act(session, "abort", **asked)


@rollout.command(epilog="Example: inferfleet rollout approve digits --reason 'looked at 40 examples'")
@_NAME
@click.option("--digest", default="", help="Of the new version's bytes that you have looked at.")
@_REASON
@_ACTOR
@_JSON
@pass_session
def approve(session: Session, /, digest: str, **asked: Any) -> None:
    """Let a rollout pass the gate that it waits at. It holds for these bytes and this policy alone."""
    _act(session, "approve", digest, **asked)


def _act(
    session: Session,
    verb: str,
    digest: str = "",
    *,
    name: str,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    from inferfleet.coordinator.rollouts import Seen

    with _opened(session) as (store, rollouts):
        before = rollouts.get(_named(rollouts, name))
        seen = Seen(digest or before.digest, before.policy_hash)
        view = rollouts.act(before.id, verb, author=actor or control.actor(), reason=_line(reason), seen=seen)
        _print(view, store, as_json=as_json)


@contextmanager
def _opened(session: Session) -> Iterator[_Open]:
    from inferfleet.coordinator.rollouts import RolloutControl
    from inferfleet.models.repository import Repository
    from inferfleet.worker.clock import SystemClock

    config = session.config
    catalogue = control.RepositoryCatalogue(Repository(config.models_path, config.models.trusted))
    with control.opened(config) as store:
        yield _Open(store, RolloutControl(store, catalogue, SystemClock()))


def _policy(path: Path | None, kind: Kind | None) -> dict[str, Any]:
    """Return the keys of a policy with its kind; wrong ones are refused here, by the name of their file."""
    tree = tables.parse_toml(tables.read_text(path, "policy file"), str(path)) if path is not None else {}
    if kind is not None and tree.setdefault("kind", kind) != kind:
        raise ConfigError(f'{path}: policy kind is "{tree["kind"]}", and --kind {kind} is asked for')
    tree.setdefault("kind", "canary")
    policy_of(tree, "the policy" if path is None else str(path))
    return dict(tree)


def _latest(session: Session, store: ControlStore, route: str) -> str:
    from inferfleet.models.repository import Repository

    config = session.config
    model = store.load().table().named(route).model
    return control.RepositoryCatalogue(Repository(config.models_path)).latest(model)


def _named(rollouts: RolloutControl, name: str) -> str:
    try:
        return rollouts.named(name)
    except LookupError as error:
        raise ConfigError(str(error.args[0])) from None


def _print(view: RolloutView, store: ControlStore, *, as_json: bool) -> None:
    if as_json:
        echo_json({"leader": _leader(store), **msgspec.to_builtins(view)})
        return
    _echo([*rollout_lines(view, time.time_ns() // 1_000_000), *_notes(store, [view])])


def _leader(store: ControlStore) -> str:
    lease = store.leader()
    return "" if lease is None else lease.holder


def _notes(store: ControlStore, views: Sequence[RolloutView]) -> list[str]:
    """Say that nobody leads, where somebody would have to."""
    waits = any(not each.ended for each in views)
    return ["", NOBODY_LEADS] if waits and not _leader(store) else []


def _echo(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)


def _line(reason: str) -> str:
    return " ".join(reason.split())
