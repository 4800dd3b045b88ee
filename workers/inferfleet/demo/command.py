"""The console command as the demo runs it: in a process of its own, with no settings from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from inferfleet.demo.processes import DemoError

_COMMAND_TIMEOUT_S = 60.0


def command(*words: str) -> list[str]:
    """Return the command line of ``inferfleet`` with these words."""
    return [sys.executable, "-m", "inferfleet.cli", *words]


def environment() -> dict[str, str]:
    """Return this process's environment without what would overrule the demo's settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("INFERFLEET_")}


def planned(fleet_toml: Path, *options: str) -> Any:
    """Run ``inferfleet topics plan --json`` on the demo's settings and return what it says.

    With ``--apply`` among the options everything that the routes need stands afterwards. Raises
    :class:`~inferfleet.demo.processes.DemoError` with the command's own last line.
    """
    return json.loads(said_by("--config", str(fleet_toml), "topics", "plan", "--json", *options))


def said_by(*words: str) -> str:
    """Run ``inferfleet`` with these words and return what it prints.

    Raises :class:`~inferfleet.demo.processes.DemoError` with the command's own last line.
    """
    done = subprocess.run(  # noqa: S603 - the demo's own command
        command(*words),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND_TIMEOUT_S,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise DemoError(f"`inferfleet {' '.join(words)}` failed: {said[-1]}")
    return done.stdout
