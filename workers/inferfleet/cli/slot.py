"""A worker's default id: the host name and a slot that is locked, so that two on a host never share one."""

from __future__ import annotations

import fcntl
import getpass
import os
import tempfile
from pathlib import Path
from typing import IO

from msgspec.structs import replace

from inferfleet.config import Config
from inferfleet.errors import ConfigError

MAX_SLOTS = 1024
_held: list[IO[bytes]] = []
"""Locks live as long as the process: the kernel gives them back, however it ends."""


def with_worker_id(config: Config) -> Config:
    """Return ``config`` with a worker id of its own; one that is set is kept.

    The lowest free slot is taken, so that a restarted worker gets its old id back. Raises ConfigError
    when no slot is free or the folder for the locks cannot be written.
    """
    if config.worker.id:
        return config
    folder = state_folder(config)
    host = config.worker_id
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for slot in range(MAX_SLOTS):
            if _claim(folder / f"{config.fleet.name}.{config.worker.pool}.{slot}.lock"):
                name = f"{host[:58]}-{slot}"
                return replace(config, worker=replace(config.worker, id=name))
    except OSError as error:
        raise ConfigError(
            f"[worker] id: no slot can be locked in {folder} ({error}); set worker.id"
        ) from None
    raise ConfigError(f"[worker] id: all {MAX_SLOTS} slots of this host are taken; set worker.id")


def state_folder(config: Config) -> Path:
    """Return the folder for what must outlive a process: locks, and the marks of a crash."""
    if config.worker.state:
        return config.base / config.worker.state
    return Path(tempfile.gettempdir()) / f"inferfleet-{_user()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


def _claim(path: Path) -> bool:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _held.append(file)
    return True
