"""The ``inferfleet`` command: the only place where adapters are chosen and joined."""

from __future__ import annotations

from pathlib import Path

import click

from inferfleet import __version__
from inferfleet.cli.frame import LazyGroup, Session

_VERBS = {
    "worker": ("inferfleet.cli.worker:worker", "Run one worker until SIGTERM."),
    "coordinator": (
        "inferfleet.cli.coordinator:coordinator",
        "Run one coordinator: API, dashboard, rollouts.",
    ),
    "submit": ("inferfleet.cli.submit:submit", "Send requests to a route."),
    "result": ("inferfleet.cli.submit:result", "Read results from Redis."),
    "route": ("inferfleet.cli.route:route", "Which versions answer which topic."),
    "rollout": ("inferfleet.cli.rollout:rollout", "Let a new version onto a route, by evidence."),
    "model": ("inferfleet.cli.model:model", "The model repository."),
    "dlt": ("inferfleet.cli.dlt:dlt", "Dead letters."),
    "topics": ("inferfleet.cli.topics:topics", "Every topic and right that the routes need."),
    "config": ("inferfleet.cli.config:config", "The effective settings."),
    "status": ("inferfleet.cli.status:status", "Workers, partitions, lag, paused routes."),
    "audit": ("inferfleet.cli.audit:audit", "Who changed what: verify and export."),
    "doctor": ("inferfleet.cli.doctor:doctor", "Check everything that a worker needs."),
    "demo": ("inferfleet.cli.demo:demo", "The main job for real, on this machine, in a minute."),
}


@click.group(
    cls=LazyGroup,
    verbs=_VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: inferfleet --config fleet.toml doctor",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The settings; by default $INFERFLEET_CONFIG, else ./fleet.toml.",
)
@click.option("--debug", is_flag=True, help="Show a traceback where something fails.")
@click.version_option(__version__, prog_name="inferfleet")
@click.pass_context
def cli(context: click.Context, config_path: Path | None, debug: bool) -> None:
    """Requests in Kafka or RabbitMQ become predictions in Kafka, RabbitMQ and Redis, batch by batch."""
    context.obj = Session(config_path, debug)


def main() -> None:
    """Run the command line; exits 0 done, 1 failed, 2 wrong use."""
    cli(prog_name="inferfleet")
