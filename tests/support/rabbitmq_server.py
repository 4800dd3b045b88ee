"""A real RabbitMQ node on loopback with its own folders, cookie and port mapper."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from tests.support import programs
from tests.support.process import ServerError, ServerProcess, accepts, free_ports
from tests.support.rabbitmq_queues import RabbitQueues

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_WATERMARK = "0.4"
_DISK_LIMIT = "50MB"


class PortMapper:
    """Erlang's port mapper, by which the nodes of a cluster and rabbitmqctl find each other."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        self._folder = folder
        self._process = ServerProcess("RabbitMQ's epmd", folder / "epmd.log")

    def start(self) -> None:
        """Start it; one that runs is left alone."""
        if self._process.running:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # One of our own: the mapper that Erlang starts by itself is shared and never ends.
        command = [programs.epmd(), "-port", str(self.port), "-address", "127.0.0.1"]
        self._process.start(command, cwd=self._folder)
        self._process.wait_ready(lambda: accepts(self.port), 10)

    def kill(self) -> None:
        """End it; twice is fine."""
        self._process.kill()


class RabbitServer(RabbitQueues):
    """A node whose data lives in ``folder``; usable as a context manager. User and password are guest.

    ``config`` holds further lines of ``rabbitmq.conf``, as ``consumer_timeout = 60000``, and ``advanced``
    the terms of the application ``rabbit`` in ``advanced.config``, as ``{channel_tick_interval, 1000}``;
    both may be changed between :meth:`stop` and :meth:`start`. Nodes of a cluster are given one ``mapper``,
    which they do not stop, and one ``cookie``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Sequence[str] = (),
        advanced: str = "",
        mapper: PortMapper | None = None,
        cookie: str | None = None,
    ) -> None:
        self.folder = folder
        self.config = list(config)
        self.advanced = advanced
        self.port, self._inter_node_port = free_ports(2)
        self.url = self.url_of("guest", "guest")
        self.node = f"ifl{secrets.token_hex(4)}@localhost"
        self._cookie = cookie or secrets.token_hex(16)
        self._own_mapper = mapper is None
        self._mapper = mapper or PortMapper(folder)
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

    @property
    def running(self) -> bool:
        """Whether the node's process lives."""
        return self._process.running

    def url_of(self, user: str, password: str) -> str:
        """Return the address for a user."""
        return f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@127.0.0.1:{self.port}/"

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the node, on the same port and data as before if it ran; return once it answers."""
        self.launch()
        self.wait_ready(timeout_s)

    def launch(self) -> None:
        """Start the node without waiting for it; see :meth:`wait_ready`."""
        script = programs.rabbitmq_server()
        self._prepare()
        self._mapper.start()
        self._process.start([script, "-noinput"], cwd=self.folder, env=self._environment())

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once the node answers clients."""
        self._process.wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the node in order, and a port mapper of its own; twice is fine."""
        self._process.stop(timeout_s=30)
        self._end_mapper()

    def kill(self) -> None:
        """End the node at once, and a port mapper of its own.

        Queues survive however young they are: a node keeps the names of new quorum queues in memory for some
        seconds, and without them it answers for the queue but never confirms again. So it writes them first.
        """
        if self.running and not self._process.paused:
            with contextlib.suppress(ServerError):
                self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].", timeout_s=10)
        self.end()

    def end(self) -> None:
        """End the node at once, for good: what it has not written is of no interest any more."""
        self._process.kill()
        self._end_mapper()

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

    def ctl(self, *words: str, timeout_s: float = 60.0) -> str:
        """Run ``rabbitmqctl`` on this node (0.4 s) and return what it prints; raise when it fails."""
        command = [programs.rabbitmqctl(), "--quiet", *words]
        try:
            done = subprocess.run(
                command,
                env=self._environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"rabbitmqctl {words[0]} took longer than {timeout_s:g} s") from error
        if done.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def list_queues(self, *columns: str) -> list[dict[str, Any]]:
        """Return these columns of every queue, as ``name``, ``messages_unacknowledged``, ``leader``."""
        rows: list[dict[str, Any]] = json.loads(self.ctl("list_queues", *columns, "--formatter=json"))
        return rows

    def unacked(self, queue: str) -> int:
        """Return how many messages of a quorum queue consumers hold right now, on a single node.

        ``list_queues`` knows it only as of some seconds ago.
        """
        asked = f"ra:local_query({{'%2F_{queue}', node()}}, fun rabbit_fifo:query_messages_checked_out/1)"
        return int(self.ctl("eval", f"{{ok, {{_, Held}}, _}} = {asked}, Held."))

    def set_memory_alarm(self, on: bool) -> None:
        """Let the node believe that it is short of memory, so that it blocks publishers, or end that."""
        self.ctl("set_vm_memory_high_watermark", "0" if on else _WATERMARK)

    def set_disk_alarm(self, on: bool) -> None:
        """Let the node believe that its disk is full, so that it blocks publishers, or end that."""
        self.ctl("set_disk_free_limit", "1000000GB" if on else _DISK_LIMIT)

    def close_connections(self, reason: str = "closed by a test") -> None:
        """Close every client connection from the node's side."""
        self.ctl("close_all_connections", reason)

    def add_user(self, name: str, password: str, configure: str = "", write: str = "", read: str = "") -> str:
        """Add a user with rights on resources that match, nothing without a pattern; return its address."""
        self.ctl("add_user", name, password)
        self.set_permissions(name, configure, write, read)
        return self.url_of(name, password)

    def set_permissions(self, name: str, configure: str = "", write: str = "", read: str = "") -> None:
        """Replace a user's rights; open channels notice within their cache of rights."""
        self.ctl("set_permissions", name, configure, write, read)

    def policy(self, name: str, pattern: str, apply_to: str = "queues", **definition: Any) -> None:
        """Set a policy; ``delivery_limit=3`` is the key ``delivery-limit``."""
        named = {key.replace("_", "-"): value for key, value in definition.items()}
        self.ctl("set_policy", name, pattern, json.dumps(named), "--apply-to", apply_to)

    def clear_policy(self, name: str) -> None:
        """Take a policy away."""
        self.ctl("clear_policy", name)

    def _end_mapper(self) -> None:
        if self._own_mapper:
            self._mapper.kill()

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(self._cookie)
            cookie.chmod(0o400)
        lines = [
            f"listeners.tcp.local = 127.0.0.1:{self.port}",
            "loopback_users = none",
            "log.console = true",
            "log.console.level = warning",
            "log.file = false",
            f"disk_free_limit.absolute = {_DISK_LIMIT}",
            *self.config,
        ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "advanced.config").write_text(f"[{{rabbit, [{self.advanced}]}}].\n")
        (self.folder / "enabled_plugins").write_text("[].\n")

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),  # Erlang reads its cookie there.
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._mapper.port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._inter_node_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
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
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as client:
            client.sendall(_PROTOCOL_HEADER)
            # The node answers with the method frame Connection.Start once it serves clients.
            return client.recv(1) == b"\x01"
        return False
