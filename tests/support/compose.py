"""``deploy/compose.yaml`` under a container engine: up, scaled, asked, broken on purpose, and down again."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "deploy" / "compose.yaml"
KINDS = ("container", "volume", "network")


class ComposeError(AssertionError):
    """A command of the engine failed; the text has its last lines."""


class Ports(NamedTuple):
    """Where the project is published on loopback."""

    kafka: int
    redis: int
    api: int
    prometheus: int
    grafana: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables that ``deploy/compose.yaml`` reads them from."""
        return {
            "KAFKA_PORT": str(self.kafka),
            "REDIS_PORT": str(self.redis),
            "API_PORT": str(self.api),
            "PROMETHEUS_PORT": str(self.prometheus),
            "GRAFANA_PORT": str(self.grafana),
        }


class Compose:
    """One project of the compose file.

    ``engine`` is the command of the engine, ``compose`` the one that reads compose files; ``environment`` is
    what both need beside this process's own. With ``in_any_order`` nothing waits for anything but by itself.
    """

    def __init__(
        self,
        engine: Sequence[str],
        compose: Sequence[str],
        environment: Mapping[str, str],
        project: str,
        ports: Ports,
        services: Sequence[str],
        *,
        in_any_order: bool = False,
    ) -> None:
        self.engine = list(engine)
        self.ports = ports
        self.services = list(services)
        self._project = project
        self._seen: set[str] = set()
        self._compose = [*compose, "-p", project, "-f", str(FILE)]
        self._up = ["up", "-d", "--no-build", *(["--no-deps"] if in_any_order else [])]
        self._environment = {**os.environ, **environment, **ports.environment}

    def up(self) -> None:
        """Start all services that this project has."""
        self.run([*self._compose, *self._up, *self.services], 900)

    def scale(self, service: str, count: int) -> None:
        """Change how many containers a service has; none of those that stay is started anew."""
        scaled = ["--no-recreate", "--no-deps", "--scale", f"{service}={count}", service]
        self.run([*self._compose, *self._up, *scaled], 600)
        # podman-compose adds containers and never takes any away; docker compose has done both by now.
        for container in self.containers(service)[count:]:
            self.engine_says("stop", "--time", "30", container)
            self.engine_says("rm", "-v", container)

    def down(self) -> None:
        """Remove containers, networks and volumes of the project, those without a name too."""
        self._seen |= set(self._mounted())
        self.run([*self._compose, "down", "-v", "--remove-orphans", "--timeout", "30"], 300)
        # podman-compose leaves those that an image asks for and nobody named.
        for volume in self._volumes_left():
            self.engine_says("volume", "rm", volume)

    def _mounted(self) -> list[str]:
        """Return the volumes of all containers of the project, by name."""
        found = self.containers(running=False)
        if not found:
            return []
        form = '{{range .Mounts}}{{if eq .Type "volume"}}{{.Name}} {{end}}{{end}}'
        return self.engine_says("inspect", "--format", form, *found).split()

    def _volumes_left(self) -> list[str]:
        return sorted(self._seen & set(self.engine_says("volume", "ls", "-q").split()))

    def containers(self, service: str = "", *, running: bool = True) -> list[str]:
        """Return the containers of a service, of all where none is named."""
        label = "com.docker.compose.service"
        only = ["--filter", f"label={label}={service}"] if service else []
        every = [] if running else ["-a"]
        return self.engine_says("ps", "-q", *every, *self._mine, *only).split()

    def left(self) -> list[str]:
        """Return what there is of the project, as ``kind name``."""
        labelled = {
            f"{kind} {name}"
            for kind in KINDS
            for name in self.engine_says(
                kind, "ls", "-q", *(["-a"] if kind == "container" else []), *self._mine
            ).split()
        }
        return sorted(labelled | {f"volume {name}" for name in self._volumes_left()})

    @property
    def _mine(self) -> list[str]:
        return ["--filter", f"label=com.docker.compose.project={self._project}"]

    def engine_says(self, *words: str, timeout_s: float = 120, given: str | None = None) -> str:
        """Return what a command of the engine prints."""
        return self.run([*self.engine, *words], timeout_s, given=given)

    def inside(self, container: str, *words: str, given: str | None = None) -> str:
        """Run a command in a container and return what it prints; ``given`` is its standard input."""
        return self.engine_says("exec", "-i", container, *words, given=given)

    def logs(self, container: str) -> str:
        """Return what a container has written to both of its streams."""
        done = subprocess.run(
            [*self.engine, "logs", container],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout

    def run(self, command: Sequence[str], timeout_s: float, *, given: str | None = None) -> str:
        """Run a command and return what it prints; raises ComposeError with its last lines."""
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self._environment,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise ComposeError(f"`{' '.join(command)}` ended with {done.returncode}:\n{said}")
        return done.stdout


def ask(url: str, token: str = "") -> tuple[int, Any]:
    """Return status and JSON of a page, 0 where nobody answers."""
    request = urllib.request.Request(url)
    if token:
        request.add_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None
    except (OSError, ValueError):
        return 0, None
