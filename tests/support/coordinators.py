"""Coordinator replicas in processes of their own, over a fleet whose only server is a Redis."""

from __future__ import annotations

import json
import os
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inferfleet.cli.control import open_store
from inferfleet.config import load
from inferfleet.control.reporter import RedisReporter
from inferfleet.control_ports import ControlStore
from inferfleet.models.repository import Repository
from inferfleet.plane import WorkerReport
from inferfleet.redis_access import control_place_of, open_redis
from inferfleet.testing.checksum import write_checksum_model
from tests.support.fleet import COMMAND, toml
from tests.support.process import ServerProcess, logged_events
from tests.support.waiting import wait_until

READY_S = 60.0
ROUTE = {
    "name": "sums",
    "source": "kafka:sums.requests",
    "results": ["kafka:sums.results"],
    "model": "sums",
    "version": "1",
}


class Answer(NamedTuple):
    """What a replica answers."""

    status: int
    body: Any
    headers: Mapping[str, str]


class Coordinator(ServerProcess):
    """One replica; its addresses are those that it prints."""

    def __init__(self, name: str, plane: ControlPlane, env: Mapping[str, str]) -> None:
        super().__init__(name, plane.folder / f"{name}-{secrets.token_hex(2)}.log")
        self._plane = plane
        self._env = env
        self.at = ""
        self.tls: ssl.SSLContext | None = None

    def launch(self) -> Coordinator:
        """Start it without waiting for anything."""
        command = [*COMMAND, "coordinator", "--config", str(self._plane.config)]
        self.start(command, cwd=self._plane.folder, env=self._plane.environment(self._env))
        return self

    def up(self) -> Coordinator:
        """Return once it serves, whether or not its store answers."""
        self.wait_ready(lambda: bool(self.events("coordinator_started")), READY_S)
        wait_until(lambda: self.ask("GET", "/").status == 200, READY_S, f"{self.name} serves")
        return self

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log's events, all or those of one name."""
        return logged_events(self.log, name)

    @property
    def url(self) -> str:
        """Where the API is, without a slash at its end; ``at`` says another name for it."""
        return self.at or str(self.events("coordinator_started")[0]["address"])

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Ask the API; status 0 where nobody answers."""
        return self._ask(self.url + path, method, body, headers)

    def admin(self, path: str) -> Answer:
        """Ask the admin address."""
        return self._ask(f"http://{self.events('coordinator_started')[0]['admin']}{path}", "GET", None, {})

    def _ask(self, url: str, method: str, body: object, headers: Mapping[str, str]) -> Answer:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        if body is not None:
            named.setdefault("content-type", "application/json")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=15, context=self.tls) as found:
                return _answer(found.status, found.read(), found.headers)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error.read(), error.headers)
        except (OSError, ValueError):
            return Answer(0, None, {})

    @property
    def ready(self) -> bool:
        """Whether it says so."""
        return self.admin("/readyz").status == 200

    @property
    def leads(self) -> bool:
        """Whether it says so."""
        return "inferfleet_coordinator_leading 1.0" in str(self.admin("/metrics").body)

    def end(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM and return the exit code."""
        assert self._child is not None
        self._child.terminate()
        return self._child.wait(timeout_s)


def _answer(status: int, data: bytes, headers: Any) -> Answer:
    text = data.decode()
    try:
        return Answer(status, json.loads(text), headers)
    except ValueError:
        return Answer(status, text, headers)


class ControlPlane:
    """Settings, a repository with versions 1 and 2 of ``sums``, and a name of its own in a Redis."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder = folder
        self.config = folder / "fleet.toml"
        self.name = f"f-{secrets.token_hex(4)}"
        self.config.write_text(
            f"[fleet]\nname = {toml(self.name)}\n[redis]\nurl = {toml(redis_url)}\n"
            "[models]\ntrusted = ['sums']\n"
            '[coordinator]\naddress = "127.0.0.1:0"\nadmin_address = "127.0.0.1:0"\n'
            '[log]\nformat = "json"\n'
        )
        (folder / "models").mkdir()
        repository = Repository(folder / "models", ["sums"])
        for version in ("1", "2"):
            write_checksum_model(repository, "sums", version)
        self._settings = load(self.config, {})

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process of this fleet."""
        return {**os.environ, **more}

    def coordinator(self, name: str, **env: str) -> Coordinator:
        """Return a replica that is not started; ``env`` are variables of its own."""
        return Coordinator(name, self, env)

    def store(self) -> ControlStore:
        """Return a store over the same Redis; close it."""
        return open_store(self._settings)

    def reporter(self, worker: str) -> RedisReporter:
        """Return the voice of a worker that is not there; close it."""
        place = control_place_of(self._settings)
        return RedisReporter(lambda: open_redis(place), self.name, "default", worker)

    def report(self, worker: str, revision: int, *ready: str) -> WorkerReport:
        """Return what a worker says that has adopted a revision of the route and has versions ready."""
        with_head = self.store()
        try:
            head = with_head.head()
        finally:
            with_head.close()
        return WorkerReport(
            worker=worker, pool="default", head=head, adopted={"sums": revision}, ready=list(ready)
        )
