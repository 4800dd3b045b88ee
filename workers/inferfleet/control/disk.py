"""The route log on a worker's disk: what it goes on with when Redis is away at its start, or has lost it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec
import structlog

from inferfleet.control.logbook import Parser
from inferfleet.errors import ConfigError
from inferfleet.revisions import Head, RouteLog

log = structlog.get_logger(__name__)


class _Copy(msgspec.Struct):
    """The file: the head, and each route's kept documents as text."""

    epoch: int
    number: int
    hash: str
    kept: dict[str, list[str]]


class DiskCopy:
    """One file that is replaced in one step; the workers of a pool on one host may share it.

    None of it raises: without the copy a worker that starts needs Redis, and that is all.
    """

    def __init__(self, path: Path, parse: Parser) -> None:
        self._path = path
        self._parse = parse

    def __repr__(self) -> str:
        return f"DiskCopy({self._path})"

    def load(self) -> RouteLog | None:
        """Return the log that stands there; ``None`` where there is none that can be understood whole."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Copy)
            kept = {
                name: tuple(self._parse(body.encode()) for body in bodies)
                for name, bodies in found.kept.items()
            }
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError, ConfigError) as error:
            log.warning("routes_copy_unreadable", file=str(self._path), error=str(error))
            return None
        head = Head(found.epoch, found.number, found.hash)
        # The last revision of a log is always kept, so a copy proves itself.
        if not any(each.head == head for revisions in kept.values() for each in revisions):
            log.warning("routes_copy_unreadable", file=str(self._path), error="its head is not in it")
            return None
        return RouteLog(head, kept, str(head.number))

    def save(self, routes: RouteLog) -> None:
        """Put ``routes`` in the place of what stands there."""
        head = routes.head
        plain = _Copy(
            head.epoch,
            head.number,
            head.hash,
            {name: [each.body.decode() for each in kept] for name, kept in routes.kept.items()},
        )
        # Workers in containers have the same process id each, and may share the folder.
        fresh = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}.new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(msgspec.json.encode(plain))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            log.warning("routes_copy_failed", file=str(self._path), error=str(error))
