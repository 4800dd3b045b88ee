"""What a process leaves for its own next life: that it ran, and which requests were in flight when it died.

A mark stands from :meth:`running` to :meth:`ended`, so a mark that is found at a start means that the process
before it died. Neither keeper raises: without a mark it takes a crash more to find what kills the process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from inferfleet.control.link import Link, Outage

log = structlog.get_logger(__name__)

KEPT_S = 90 * 86_400
"""A mark that nobody came back for is forgotten: worker ids may never come again."""
LEAST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
PAUSE_FACTOR = 10


def crash_key(fleet: str, pool: str) -> str:
    """Return the Redis key of a pool's marks: a hash with a field for each worker id."""
    return f"{{{fleet}}}:crash:{pool}"


class FileMarks:
    """Implements :class:`~inferfleet.ports.CrashMarks` in one file, which belongs to this worker alone.

    It replaces the file in one step, written through to the disk, so that no crash leaves half a mark.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outage = Outage("crash_marks_away", "crash_marks_back")

    def __repr__(self) -> str:
        return f"FileMarks({self._path})"

    def load(self) -> dict[str, int] | None:
        """Return what stands in the file; a file that cannot be read says nothing."""
        try:
            return _decoded(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._outage.began(error)
            return None

    def running(self) -> None:
        """Create the file, and its folder, if there is none."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stands = self._path.exists()
        except OSError as error:
            self._outage.began(error)
            return
        if not stands:
            self.save({})

    def save(self, mark: Mapping[str, int]) -> None:
        """Replace the file."""
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            with fresh.open("wb") as file:
                file.write(_encoded(mark))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            self._outage.began(error)
        else:
            self._outage.over()

    def ended(self) -> None:
        """Remove the file."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._outage.began(error)


class RedisMarks:
    """Implements :class:`~inferfleet.ports.CrashMarks` in a field of a hash, under this worker's id.

    For workers whose next life has another disk. It is called on the record path, so after a failure Redis is
    not asked for ten times as long as the failure took.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        pool: str,
        worker_id: str,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = Link(connect)
        self._key = crash_key(fleet, pool)
        self._worker_id = worker_id
        self._now = now
        self._outage = Outage("crash_marks_away", "crash_marks_back")
        self._again_at = float("-inf")

    def __repr__(self) -> str:
        return f"RedisMarks({self._key}, {self._worker_id})"

    def load(self) -> dict[str, int] | None:
        """Return what stands in this worker's field."""
        found = self._run("HGET", self._key, self._worker_id)
        return None if found is None else _decoded(found)

    def running(self) -> None:
        """Set the field if there is none."""
        self._run("HSETNX", self._key, self._worker_id, _encoded({}))
        self._run("EXPIRE", self._key, KEPT_S)

    def save(self, mark: Mapping[str, int]) -> None:
        """Set the field."""
        self._run("HSET", self._key, self._worker_id, _encoded(mark))

    def ended(self) -> None:
        """Remove the field, and let go of the connection."""
        self._run("HDEL", self._key, self._worker_id)
        self._link.drop()

    def _run(self, *command: Any) -> Any:
        """Return the answer; ``None`` where Redis does not give one."""
        began = self._now()
        if began < self._again_at:
            return None
        try:
            answer = self._link.run(*command)
        except Exception as error:
            self._outage.began(error)
            now = self._now()
            pause_s = PAUSE_FACTOR * (now - began)
            self._again_at = now + min(MOST_PAUSE_S, max(LEAST_PAUSE_S, pause_s))
            return None
        self._outage.over()
        return answer


def _encoded(mark: Mapping[str, int]) -> bytes:
    # The standard library's JSON takes any text: a request's id may hold what UTF-8 forbids.
    return json.dumps(dict(mark), separators=(",", ":")).encode()


def _decoded(text: bytes) -> dict[str, int]:
    """Return a mark; what cannot be read was left by a process that died, and names nobody."""
    try:
        return {str(name): int(crashes) for name, crashes in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("crash_mark_unreadable", error=str(error))
        return {}
