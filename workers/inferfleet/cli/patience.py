"""The option of processes that wait at their start for what is not there yet."""

from __future__ import annotations

import signal
import sys
import threading

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


def end_when_told() -> None:
    """Let SIGTERM end a process with code 0 while it starts: it has taken nothing yet.

    Without a handler process 1 of a container would not notice the signal, and would be killed when its
    grace is over. What runs later puts handlers of its own in this one's place.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(_number: int, _frame: object) -> None:
    # Nothing is logged: the signal may have come in the middle of a line.
    sys.exit(0)
