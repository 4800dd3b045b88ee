"""The option of processes that wait at their start for what is not there yet."""

from __future__ import annotations

import click

from inferfleet.patience import SERVER_S

wait_option = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Wait S seconds in all for what is not there yet, servers, topics, models and files; "
    f"by default {SERVER_S:g} for each server, and for nothing else.",
)
