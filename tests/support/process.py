"""One server process: started on a leash, waited for, paused, killed, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

# Run by a fresh interpreter, which then becomes the server: the kernel kills it when its parent ends.
# A wrapper rather than preexec_fn, which can deadlock in a process that has threads.
_LEASH = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the parent ended first")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerError(RuntimeError):
    """A server did not start or stop as it should; the text says which, and shows the end of its log."""


_given_ports: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Return ``count`` different loopback ports on which nobody listens, none of them twice in a process.

    They lie below the range from which the system gives ports to outgoing connections, so that a server
    that is away for a restart finds its port free again.
    """
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(range(20000, 32000), 2000):
            if port in _given_ports:
                continue
            candidate = held.enter_context(socket.socket())
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                _given_ports.update(ports)
                return ports
    raise ServerError("no free loopback port between 20000 and 32000")


def accepts(port: int) -> bool:
    """Say whether somebody accepts connections on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _stands_still(pid: int) -> bool:
    """Say whether all threads of a process are stopped (assumed where there is no /proc)."""
    states = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # it may end while we look
            states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"T", "t"}


def logged_events(log: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a log in JSON lines, all or those of one name; other lines are left out."""
    found: list[dict[str, Any]] = []
    if log.exists():
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and (name is None or event.get("event") == name):
                    found.append(event)
    return found


class ServerProcess:
    """A child process in its own session with a log file; ``name`` is used in errors.

    Start it from a thread that lives as long as the server shall: on Linux the kernel kills the child
    when the thread that started it ends.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def pid(self) -> int:
        """The process id; raises :class:`ServerError` while it does not run."""
        if self._child is None:
            raise ServerError(f"{self.name} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process lives (a paused one does)."""
        return self._child is not None and self._child.poll() is None

    @property
    def paused(self) -> bool:
        """Whether the process was frozen and not yet resumed."""
        return self._paused

    def start(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        """Start ``command``; it is not yet ready, see :meth:`wait_ready`."""
        if self.running:
            raise ServerError(f"{self.name} runs already")
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [*leash, *command],
                cwd=cwd,
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._paused = False

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once ``ready()`` is true; stop the process and raise if it ends or takes too long."""
        gives_up_at = time.monotonic() + timeout_s
        while not ready():
            if not self.running or time.monotonic() > gives_up_at:
                what = f"did not answer within {timeout_s:g} s" if self.running else "ended while starting"
                self.kill()
                raise ServerError(f"{self.name} {what}; {self.log} ends with:\n{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout_s: float = 20.0) -> None:
        """End the process in order (SIGTERM), or by force after ``timeout_s``; twice is fine."""
        if self._child is None:
            return
        if self.running:
            self.resume()
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the process and what it started at once (SIGKILL); twice is fine."""
        if self._child is None:
            return
        # The group outlives its leader, so helpers of a process that has ended are reached as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._child = None
        self._paused = False

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): its connections stay open and nothing answers.

        Returns once every thread stands still: the signal reaches a running one a moment later.
        """
        os.killpg(self.pid, signal.SIGSTOP)
        self._paused = True
        wait_until(lambda: _stands_still(self.pid), 10, f"{self.name} stands still", every_s=0.001)

    def resume(self) -> None:
        """Let a frozen process go on (SIGCONT); one that is not frozen is left alone."""
        if self._paused:
            os.killpg(self.pid, signal.SIGCONT)
            self._paused = False
