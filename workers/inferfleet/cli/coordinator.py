"""``inferfleet coordinator``: the place where a coordinator's adapters are chosen and joined."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from inferfleet import __version__
from inferfleet.cli.frame import Session, pass_session
from inferfleet.cli.patience import end_when_told, wait_option
from inferfleet.config import Config
from inferfleet.errors import ConfigError, ModelRepositoryError
from inferfleet.patience import Patience

if TYPE_CHECKING:
    from inferfleet.control_ports import ControlStore
    from inferfleet.coordinator.messages import ModelView, VersionView
    from inferfleet.coordinator.process import Replica
    from inferfleet.models.repository import Repository

STORE_S = 2.0
"""How long the control plane's Redis may take for one answer: less than a third of the lease."""
DAY_S = 86_400


@click.group(invoke_without_command=True)
@wait_option
@click.pass_context
def coordinator(context: click.Context, wait_s: float | None) -> None:
    """Run one coordinator replica until SIGTERM: API, dashboard, rollouts.

    Any number of replicas may run; one of them leads and steps rollouts.

    \b
    Example:
      inferfleet coordinator
      inferfleet coordinator token alice --role deployer --expires 90
    """
    if context.invoked_subcommand is None:
        session = context.find_object(Session)
        if session is None:
            raise ConfigError("the coordinator was called without its settings")
        _run(session.config, Patience(wait_s))


@coordinator.command()
@click.argument("name")
@click.option(
    "--role", required=True, help="viewer, operator, deployer or admin; each may do what those before may."
)
@click.option(
    "--expires",
    type=click.FloatRange(min=0, min_open=True),
    metavar="DAYS",
    help="After how many days it ends.",
)
@click.option("--routes", metavar="A,B", help="The only routes that it may change; reading is not limited.")
@pass_session
def token(session: Session, name: str, role: str, expires: float | None, routes: str | None) -> None:
    """Make a token, print it once, and add its hash to the token file.

    Running coordinators on this file know it at once. To take a token away, delete its line.

    \b
    Example:
      inferfleet coordinator token alice --role deployer --expires 90 --routes digits
    """
    from inferfleet.coordinator.tokens import Caller, append_line, new_token, parse_role, token_line

    config = session.config
    if not config.coordinator.token_file:
        raise ConfigError(f'{config.path}: [coordinator] token_file names no file, such as "tokens"')
    scope = None if routes is None else frozenset(routes.split(","))
    made = new_token()
    until = None if expires is None else time.time() + expires * DAY_S
    line = token_line(made, Caller(name, parse_role(role), scope), until)
    append_line(config.base / config.coordinator.token_file, line)
    click.echo(made)


def _run(config: Config, patience: Patience) -> None:
    from inferfleet.cli.control import open_store
    from inferfleet.coordinator.process import run
    from inferfleet.coordinator.tokens import TokenBook
    from inferfleet.telemetry.logs import configure_process

    holder = holder_name()
    configure_process(config, "coordinator", holder, __version__)
    end_when_told()
    tokens = config.coordinator.token_file
    if patience.given and tokens:
        patience.until("waiting_for_tokens", lambda: TokenBook(config.base / tokens, time.time))
    with contextlib.closing(open_store(config, STORE_S)) as store:
        run(_replica(config, store, holder))


def holder_name() -> str:
    """Return a name that no other replica has, not even this one after a restart."""
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:40] or "coordinator"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _replica(config: Config, store: ControlStore, holder: str) -> Replica:
    """Return the parts of this replica; its two addresses are bound."""
    from inferfleet.cli.control import RepositoryCatalogue, route_control
    from inferfleet.cli.feeds import label_feeds
    from inferfleet.coordinator.announcing import Timing
    from inferfleet.coordinator.app import Application
    from inferfleet.coordinator.exposure import expose
    from inferfleet.coordinator.gate import Gate
    from inferfleet.coordinator.handlers import Handlers
    from inferfleet.coordinator.leader import Leadership
    from inferfleet.coordinator.leading import Leader
    from inferfleet.coordinator.pages import pages
    from inferfleet.coordinator.process import Replica, health_of
    from inferfleet.coordinator.rollouts import RolloutControl
    from inferfleet.models.repository import Repository
    from inferfleet.telemetry.admin import AdminServer
    from inferfleet.telemetry.coordinator import CoordinatorMetrics
    from inferfleet.worker.clock import SystemClock

    clock = SystemClock()
    metrics = CoordinatorMetrics(__version__)
    repository = Repository(config.models_path, config.models.trusted)
    timing = Timing(config.routing.lead_ms, config.routing.barrier_s)
    routes = route_control(config, store)
    rollouts = RolloutControl(store, RepositoryCatalogue(repository), clock)
    leader = Leader(store, clock, timing, label_feeds(config), shown=metrics.rollouts)
    leadership = Leadership(store, holder, clock, metrics, leader)
    handlers = Handlers(routes, rollouts, store, RepositoryView(repository), pages(), clock.utc_ms)
    exposure = expose(config.coordinator, config.base, time.time)
    admin = AdminServer(
        config.coordinator.admin_address,
        metrics.registry,
        lambda: health_of(leadership),
        key="[coordinator] admin_address",
    )
    gate = Gate(exposure.tokens, exposure.hosts, clock.monotonic)
    return Replica(Application(gate, handlers, metrics), leadership, exposure, admin)


class RepositoryView:
    """What the API tells of a model repository: every version, and what keeps it from being served."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def models(self) -> Sequence[ModelView]:
        """Return all models; no model file is read."""
        from inferfleet.coordinator.messages import ModelView

        names = self._repository.models()
        return [
            ModelView(
                name=name,
                versions=[self._version(name, each) for each in self._repository.versions(name)],
            )
            for name in names
        ]

    def _version(self, name: str, version: str) -> VersionView:
        from inferfleet.coordinator.messages import VersionView

        try:
            found = self._repository.look(name, version)
        except ModelRepositoryError:
            return VersionView(version=version, problem="cannot be read; `inferfleet model check` says why")
        return VersionView(
            version=version, runtime=found.runtime, digest=found.digest, size_bytes=found.size_bytes
        )
