"""A real RabbitMQ node on loopback with its own folders, cookie and port mapper."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import programs
from tests.support.process import ServerProcess, accepts, free_ports

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"


class RabbitServer:
    """A node whose data lives in ``folder``; usable as a context manager. User and password are guest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._inter_node_port, self._mapper_port = free_ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._node = f"ifl{secrets.token_hex(4)}@localhost"
        self._mapper = ServerProcess("RabbitMQ's epmd", folder / "epmd.log")
        self._process = ServerProcess("RabbitMQ", folder / "rabbitmq.log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The node's process id."""
        return self._process.pid

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the node, on the same port and data as before if it ran; return once it answers."""
        script, mapper = programs.rabbitmq_server(), programs.epmd()
        self._prepare()
        # A port mapper of its own: the one that Erlang starts by itself is shared and never ends.
        self._mapper.start(
            [mapper, "-port", str(self._mapper_port), "-address", "127.0.0.1"], cwd=self.folder
        )
        self._mapper.wait_ready(lambda: accepts(self._mapper_port), 10)
        self._process.start([script, "-noinput"], cwd=self.folder, env=self._environment())
        self._process.wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the node in order, and its port mapper; twice is fine."""
        self._process.stop(timeout_s=30)
        self._mapper.kill()

    def kill(self) -> None:
        """End the node at once, and its port mapper."""
        self._process.kill()
        self._mapper.kill()

    def pause(self) -> None:
        """Freeze the node: connections stay open, nothing answers."""
        self._process.pause()

    def resume(self) -> None:
        """Let a frozen node go on."""
        self._process.resume()

    def restart(self) -> None:
        """Stop and start again with the same port and data."""
        self.stop()
        self.start()

    def _prepare(self) -> None:
        if self.folder.joinpath("rabbitmq.conf").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{self.port}\n"
            "loopback_users = none\n"
            "log.console = true\nlog.console.level = warning\nlog.file = false\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        (self.folder / "enabled_plugins").write_text("[].\n")

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),  # Erlang reads its cookie there.
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._inter_node_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "no-such-file"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
            # Makes the script become the Erlang machine instead of its parent, so signals reach the node.
            "RABBITMQ_ALLOW_INPUT": "true",
        }

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(_PROTOCOL_HEADER)
                # The node answers with the method frame Connection.Start once it serves clients.
                return connection.recv(1) == b"\x01"
        except OSError:
            return False
