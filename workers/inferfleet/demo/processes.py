"""Processes that the demo starts: each with its log, all written to one file, ended by process id.

A process is remembered with the moment it was born, so that an id which the system has given to
somebody else since is never signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from inferfleet.errors import InferfleetError

_POLL_S = 0.05
_KILL_WAIT_S = 5.0


class DemoError(InferfleetError):
    """Something that the demo needs is missing or did not come up; names it and the mend."""


class Target(NamedTuple):
    """A process to end: ``born`` tells it from a later one with the same id."""

    name: str
    pid: int
    born: str | None
    rank: int


@dataclass(frozen=True, slots=True)
class Started:
    """A process of the demo: its name, its handle and the log that holds its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    rank: int

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def ended(self) -> str | None:
        """Return one line that says how it ended, with its last words; ``None`` while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"{self.name} ended with code {code}; the end of {self.log}: {last_line(self.log)}"


class Processes:
    """Starts processes and ends them again, the highest rank first; every start is written to ``record``.

    Workers have rank 1 and servers 0, so that workers can still hand over and leave when they drain.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._started: list[Started] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        rank: int = 0,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> Started:
        """Start ``command`` in a session of its own, so that Ctrl-C reaches the demo alone."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            process = subprocess.Popen(  # noqa: S603 - the commands are the demo's own
                list(command),
                stdin=stdin,
                stdout=sink if stdout is None else stdout,
                stderr=sink,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        started = Started(name, process, log, rank)
        self._started.append(started)
        self._write()
        return started

    def kill(self, started: Started) -> None:
        """End one process with SIGKILL, as a crash would, and forget it."""
        started.process.kill()
        started.process.wait()
        self._started.remove(started)
        self._write()

    def stop(self, grace_s: float = 15.0) -> None:
        """End every process: SIGTERM first, SIGKILL for what outlives ``grace_s``; the record goes too."""
        handles = {started.pid: started.process for started in self._started}
        targets = [Target(each.name, each.pid, birth(each.pid), each.rank) for each in self._started]
        _end_by_rank(targets, grace_s, lambda pid: handles[pid].poll())
        self._started.clear()
        self._record.unlink(missing_ok=True)

    def _write(self) -> None:
        entries = [
            Target(each.name, each.pid, birth(each.pid), each.rank)._asdict() for each in self._started
        ]
        part = self._record.with_suffix(".part")
        part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        part.replace(self._record)


def last_line(log: Path) -> str:
    """Return the last line of a log that says something, ``nothing`` if there is none."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "nothing")


def recorded(record: Path) -> list[Target]:
    """Return every recorded process that still runs."""
    if not record.is_file():
        return []
    targets = [Target(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))]
    return [target for target in targets if _runs(target)]


def stop_recorded(record: Path, grace_s: float = 15.0) -> list[str]:
    """End what an earlier demo left running; returns the names."""
    running = recorded(record)
    _end_by_rank(running, grace_s, lambda _: None)
    record.unlink(missing_ok=True)
    return [target.name for target in running]


def _end_by_rank(targets: Sequence[Target], grace_s: float, reap: Callable[[int], object]) -> None:
    for rank in sorted({target.rank for target in targets}, reverse=True):
        running = [target for target in targets if target.rank == rank]
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_WAIT_S)):
            running = [target for target in running if _runs(target)]
            for target in running:
                os.kill(target.pid, number)
            give_up_at = time.monotonic() + wait_s
            while any(_runs(target) for target in running) and time.monotonic() < give_up_at:
                time.sleep(_POLL_S)
        for target in targets:
            reap(target.pid)


def _runs(target: Target) -> bool:
    return target.born is not None and birth(target.pid) == target.born


def birth(pid: int) -> str | None:
    """Return a mark of when the process ``pid`` began; ``None`` if there is none, or only its remains."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    found = subprocess.run(  # noqa: S603 - fixed command, a number as its only variable part
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)],  # noqa: S607 - ps is where the system has it
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, began = found.stdout.strip().partition(" ")
    return None if not began or state.startswith("Z") else began.strip()
