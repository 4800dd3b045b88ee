"""A RabbitMQ node for the demo, found or installed: its own name, ports, folders, cookie and port mapper.

Nothing of a RabbitMQ that may run on this machine already is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from inferfleet.demo.processes import DemoError, Processes
from inferfleet.demo.servers import free_ports, wait_until

PACKAGE = "rabbitmq-server"
MISSING = (
    "RabbitMQ is not installed here: apt-get install rabbitmq-server (Debian, Ubuntu), dnf install "
    "rabbitmq-server (Fedora) or brew install rabbitmq (macOS), then start the demo again"
)
# Packages put a script on the path that changes user and folder; the one behind it obeys its caller.
_PACKAGED = Path("/usr/lib/rabbitmq")
_BEHIND = ("bin/rabbitmq-server", "lib/rabbitmq_server-*/sbin/rabbitmq-server")
_FOLDERS = ("/opt/homebrew/sbin", "/opt/homebrew/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/sbin")
_SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
_START_TIMEOUT_S = 60.0
_CTL_TIMEOUT_S = 60.0
_INSTALL_TIMEOUT_S = 600.0
_LAST = -1
"""The port mapper's rank: it is ended after the node that is known to it."""
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

_CONFIG = """\
listeners.tcp.local = 127.0.0.1:{port}
log.console = true
log.console.level = warning
log.file = false
disk_free_limit.absolute = 50MB
"""
# How often a queue says how many messages it holds: the demo's end waits for that.
_ADVANCED = "[{rabbit, [{quorum_tick_interval, 200}]}].\n"


@dataclass(frozen=True, slots=True)
class Programs:
    """The three programs that a node needs."""

    server: str
    ctl: str
    epmd: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node that runs; user and password are guest, which RabbitMQ allows on the loopback address."""

    port: int
    programs: Programs
    environment: dict[str, str]

    @property
    def url(self) -> str:
        """Its address for clients; with a slash behind it, some would ask for a host without a name."""
        return f"amqp://127.0.0.1:{self.port}"

    def ctl(self, *words: str) -> str:
        """Run ``rabbitmqctl`` on the node, which takes half a second, and return what it prints."""
        done = subprocess.run(  # noqa: S603 - fixed command over the demo's own node
            [self.programs.ctl, "--quiet", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_CTL_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise DemoError(f"rabbitmqctl {words[0]} failed: {_last_line(done)}")
        return done.stdout


def find_programs() -> Programs | None:
    """Return RabbitMQ's programs, ``None`` unless all are here."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_FOLDERS))
    behind = [str(found) for pattern in _BEHIND for found in _PACKAGED.glob(pattern)]
    server = behind[0] if behind else shutil.which(PACKAGE, path=path)
    epmd = shutil.which("epmd", path=path)
    if server is None or epmd is None:
        return None
    return Programs(server, str(Path(server).with_name("rabbitmqctl")), epmd)


def programs(say: Callable[[str], None]) -> Programs:
    """Return RabbitMQ's programs, installed first where that may be done.

    Raises :class:`DemoError` in one line that says how to install them where it may not.
    """
    found = find_programs()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        say(f"installing {PACKAGE} with apt-get; the service that comes with it is not started")
        _apt_install()
        found = find_programs()
    if found is None:
        raise DemoError(MISSING)
    return found


def start_node(processes: Processes, folder: Path, logs: Path, say: Callable[[str], None]) -> Node:
    """Start a node whose data lives below ``folder``; returns when it answers clients."""
    found = programs(say)
    home = (folder / "rabbitmq").absolute()
    home.mkdir(parents=True, exist_ok=True)
    port, inter_node_port, mapper_port = free_ports(3)
    _write_settings(home, port)
    environment = _environment(home, found, port, inter_node_port, mapper_port)
    # One of our own: the mapper that Erlang starts by itself is shared and never ends.
    mapper = [found.epmd, "-port", str(mapper_port), "-address", "127.0.0.1"]
    started = processes.start("epmd", mapper, logs / "epmd.log", rank=_LAST)
    wait_until(lambda: _accepts(mapper_port), started, "Erlang's port mapper")
    started = processes.start("rabbitmq", [found.server, "-noinput"], logs / "rabbitmq.log", env=environment)
    wait_until(lambda: _serves(port), started, f"RabbitMQ on port {port}", _START_TIMEOUT_S)
    return Node(port, found, environment)


def _write_settings(home: Path, port: int) -> None:
    cookie = home / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(16), encoding="ascii")
    cookie.chmod(0o400)
    (home / "rabbitmq.conf").write_text(_CONFIG.format(port=port), encoding="ascii")
    (home / "advanced.config").write_text(_ADVANCED, encoding="ascii")
    (home / "enabled_plugins").write_text("[].\n", encoding="ascii")


def _environment(
    home: Path, found: Programs, port: int, inter_node_port: int, mapper_port: int
) -> dict[str, str]:
    beside = str(Path(found.epmd).parent)
    return {
        "PATH": f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{beside}",
        "HOME": str(home),  # Erlang reads its cookie there.
        "LANG": "C.UTF-8",
        "ERL_EPMD_PORT": str(mapper_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"inferfleet-demo-{secrets.token_hex(4)}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(inter_node_port),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(home / "no-such-file"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": str(home / "rabbitmq.pid"),
        # Makes the script become the Erlang machine instead of its parent, so signals reach the node.
        "RABBITMQ_ALLOW_INPUT": "true",
    }


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def _serves(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2.0) as client:
        client.sendall(_PROTOCOL_HEADER)
        # The node answers with the method frame Connection.Start once it serves clients.
        return client.recv(1) == b"\x01"
    return False


def _apt_install() -> None:
    """Install the package without letting it start its service. Raises DemoError."""
    # dpkg refuses to work without the administrator's folders on the path.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": path}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", PACKAGE]
    with _services_denied():
        if _run(install, env).returncode == 0:
            return
        _run(["apt-get", "update", "-q"], env)
        done = _run(install, env)
    if done.returncode != 0:
        raise DemoError(f"apt-get could not install {PACKAGE}: {_last_line(done)}")


@contextmanager
def _services_denied() -> Iterator[None]:
    """Keep packages from starting services; a policy that stands already is the owner's and stays."""
    if _SERVICE_POLICY.exists():
        yield
        return
    _SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    _SERVICE_POLICY.chmod(0o755)
    try:
        yield
    finally:
        _SERVICE_POLICY.unlink()


def _run(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - fixed commands
        words, env=env, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else "it said nothing"
