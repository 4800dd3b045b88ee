"""A real Redis (or Valkey) on loopback with its own folder and append-only file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from tests.support import programs
from tests.support.process import ServerProcess, free_ports


class RedisServer:
    """A server whose data lives in ``folder``; usable as a context manager.

    ``config`` holds further words of the command line, as ``("--maxmemory", "10mb")``. Every write is in
    the append-only file before it is answered, so :meth:`restart` and even :meth:`kill` keep the data.
    """

    def __init__(self, folder: Path, *, config: Sequence[str] = ()) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._config = list(config)
        self._process = ServerProcess("Redis", folder / "redis.log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def start(self, timeout_s: float = 20.0) -> None:
        """Start the server, on the same port and data as before if it ran; return once it answers."""
        binary = programs.redis_server()
        self.folder.mkdir(parents=True, exist_ok=True)
        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process.start([binary, *place, *durable, "--daemonize", "no", *self._config], cwd=self.folder)
        self._process.wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the server in order; twice is fine."""
        self._process.stop()

    def kill(self) -> None:
        """End the server at once."""
        self._process.kill()

    def pause(self) -> None:
        """Freeze the server: connections stay open, nothing answers."""
        self._process.pause()

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._process.resume()

    def restart(self) -> None:
        """Stop and start again with the same port and data."""
        self.stop()
        self.start()

    def client(self) -> redis.Redis:
        """Return a new client that answers in bytes; close it, or use it as a context manager."""
        return redis.Redis.from_url(self.url)

    def _answers(self) -> bool:
        with redis.Redis.from_url(self.url, socket_timeout=2, retry=None) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True  # It is up; ``config`` asked for a password.
            except (redis.ConnectionError, redis.TimeoutError):
                return False
