"""A fleet for one test: settings, routes, models and topics, and worker processes on real servers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from click.testing import CliRunner

from inferfleet import config as settings_of
from inferfleet.cli import cli
from inferfleet.cli.rabbit_topology import plan_rabbitmq
from inferfleet.cli.rabbitmq import RabbitCluster
from inferfleet.models.repository import Repository
from inferfleet.routes import load_routes
from inferfleet.testing.checksum import write_checksum_model
from tests.support.process import ServerProcess, logged_events
from tests.support.redis_server import RedisServer
from tests.support.servers import KafkaServer, RabbitServer
from tests.support.waiting import wait_until

COMMAND = [sys.executable, "-m", "inferfleet.cli"]
READY_S = 60.0


class Finished(NamedTuple):
    """A command that ran to its end."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are no log events."""
        return [line for line in self.stderr.splitlines() if line and not line.startswith("{")]


class WorkerProcess(ServerProcess):
    """A worker in a process of its own; killed with the test run if nobody ends it."""

    def __init__(self, name: str, fleet: Fleet, arguments: Sequence[str]) -> None:
        super().__init__(name, fleet.folder / f"{name}-{secrets.token_hex(2)}.log")
        self._fleet = fleet
        self._arguments = [*COMMAND, "worker", "--config", str(fleet.config), *arguments]
        self.code: int | None = None
        """The exit code, once :meth:`wait` has seen it; negative for a signal."""

    def __repr__(self) -> str:
        return f"WorkerProcess({self.name})"

    def launch(self, environment: Mapping[str, str]) -> None:
        """Start the process without waiting for anything."""
        env = {**os.environ, "INFERFLEET__WORKER__ID": self.name, **environment}
        self.start(self._arguments, cwd=self._fleet.folder, env=env)

    def wait_ready(self, *_: Any, timeout_s: float = READY_S) -> WorkerProcess:  # type: ignore[override]
        """Return once ``/readyz`` says so; raise with the log's end if the worker ends before."""
        self._wait(lambda: self.ready, timeout_s, f"worker {self.name} is ready")
        return self

    def _wait(self, condition: Any, timeout_s: float, what: str) -> None:
        try:
            wait_until(lambda: condition() or not self.running, timeout_s, what, every_s=0.05)
            assert self.running, f"{self.name} ended"
        except AssertionError as error:
            raise AssertionError(f"{error}; its log ends with:\n{self.log_tail(30)}") from None

    @property
    def ready(self) -> bool:
        """Whether ``/readyz`` answers 200."""
        return self.ask("/readyz")[0] == 200

    @property
    def address(self) -> str:
        """The admin address, empty before it is known."""
        return next((event["admin"] for event in self.events("worker_started")), "")

    def ask(self, path: str) -> tuple[int, bytes]:
        """Return status and body of an admin path; status 0 while nobody answers."""
        if not self.address:
            return 0, b""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def status(self) -> dict[str, Any]:
        """Return what ``/status`` says."""
        code, body = self.ask("/status")
        assert code == 200, (code, body, self.log_tail())
        return dict(json.loads(body))

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry these labels."""
        text = self.ask("/metrics")[1].decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        total = 0.0
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"inferfleet_{name}" and all(each in series for each in wanted):
                total += float(value)
        return total

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log's events, all or those of one name."""
        return logged_events(self.log, name)

    def wait_event(self, name: str, timeout_s: float = 30.0, **fields: Any) -> dict[str, Any]:
        """Return the first event of this name whose fields hold these values."""

        def found() -> dict[str, Any] | None:
            events = self.events(name)
            return next((each for each in events if fields.items() <= each.items()), None)

        self._wait(found, timeout_s, f"{self.name} logs {name} {fields or ''}")
        return found() or {}

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker alone."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 40.0) -> int:
        """Return the exit code once the worker has ended by itself."""
        if self._child is None:
            raise AssertionError(f"{self.name} was never started")
        try:
            self.code = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} did not end within {timeout_s:g} s; its log ends with:\n{self.log_tail(30)}"
            ) from None
        return self.code

    def finish(self, timeout_s: float = 40.0) -> int:
        """Ask it to drain (SIGTERM) and return its exit code."""
        self.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    @property
    def rss_mb(self) -> float:
        """Resident memory in MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Fleet:
    """Writes ``fleet.toml``, ``routes.toml`` and models into ``folder``; runs commands and workers on them.

    ``settings`` are laid over the defaults below, section by section. Names of topics and queues start with
    the fleet's name, which no other test has. Without Kafka routes take from RabbitMQ.
    """

    def __init__(
        self,
        folder: Path,
        kafka: KafkaServer | None,
        redis: RedisServer | None = None,
        *,
        rabbitmq: RabbitServer | None = None,
        user: str = "admin",
        settings: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._kafka = kafka
        self._rabbitmq = rabbitmq
        self.redis = redis
        self.name = f"t{secrets.token_hex(4)}"
        self.config = folder / "fleet.toml"
        self.routes_file = folder / "routes.toml"
        self.trusted: list[str] = []
        self.routes: dict[str, dict[str, object]] = {}
        self.partitions: dict[str, int] = {}
        self.workers: list[WorkerProcess] = []
        self.settings: dict[str, dict[str, object]] = {
            "fleet": {"name": self.name},
            "worker": {"threads": 1, "device": "cpu", "admin_address": "127.0.0.1:0"},
            "log": {"format": "json"},
        }
        if kafka is not None:
            client = {k: v for k, v in kafka.client_config(user).items() if k != "bootstrap.servers"}
            self.settings["kafka"] = {"bootstrap_servers": kafka.bootstrap_servers}
            self.settings["kafka.client"] = client
        if rabbitmq is not None:
            self.settings["rabbitmq"] = {"url": rabbitmq.url}
        if redis is not None:
            self.settings["redis"] = {"url": redis.url}
        for section, values in (settings or {}).items():
            self.settings.setdefault(section, {}).update(values)
        (folder / "models").mkdir(exist_ok=True)
        self.repository = Repository(folder / "models")

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()

    @property
    def kafka(self) -> KafkaServer:
        """The Kafka that it runs on."""
        assert self._kafka is not None, "this fleet has no Kafka"
        return self._kafka

    @property
    def rabbitmq(self) -> RabbitServer:
        """The RabbitMQ that it runs on."""
        assert self._rabbitmq is not None, "this fleet has no RabbitMQ"
        return self._rabbitmq

    # Models and routes

    def checksum(
        self, model: str = "sums", version: str = "1", *, delay_ms: float = 0, size: int = 4
    ) -> None:
        """Add a version of the checksum model."""
        self.trust(model)
        write_checksum_model(self.repository, model, version, delay_ms_per_batch=delay_ms, size=size)

    def handler(self, source: str, model: str = "sums", version: str = "1", **parameters: object) -> None:
        """Add a Python handler with the checksum model's inputs and outputs; ``source`` is ``model.py``."""
        self.trust(model)
        text = "\n".join(f"{key} = {toml(value)}" for key, value in parameters.items())
        settings = (
            'runtime = "python"\nfile = "model.py"\n'
            'input = [{name = "x", datatype = "FP32", shape = [4]}]\n'
            'output = [{name = "check", datatype = "INT64", shape = [2]}]\n'
            f"[parameters]\n{text}\n"
        )
        file = self.folder / "model.py"
        file.write_text(source)
        self.repository.add(model, version, [file], settings=settings)

    def trust(self, model: str) -> None:
        """Let a model run code."""
        if model not in self.trusted:
            self.trusted.append(model)

    def route(
        self,
        name: str = "sums",
        *,
        model: str = "sums",
        partitions: int = 2,
        topic: bool = True,
        redis: bool = False,
        broker: str = "",
        **keys: object,
    ) -> str:
        """Add a route of one version (``version="1"`` unless said) or ``variants``; return its name.

        It takes from ``broker``, by default the one that there is, and answers there too with ``topic``: to
        a topic, or through the fleet's exchange to a queue, of the name :meth:`results`.
        """
        kind = broker or ("kafka" if self._kafka is not None else "rabbitmq")
        answers = self.results(name) if kind == "kafka" else f"{self.name}/{self.results(name)}"
        results = [f"{kind}:{answers}"] * topic + ["redis"] * redis
        chosen = {} if "variants" in keys else {"version": "1"}
        self.routes[name] = {
            "name": name,
            "source": f"{kind}:{self.source(name)}",
            "results": results,
            "model": model,
            **chosen,
            **keys,
        }
        self.partitions[name] = partitions
        return name

    def source(self, route: str) -> str:
        """The topic or queue that a route takes from."""
        return f"{self.name}.{route}.requests"

    def results(self, route: str) -> str:
        """The topic or queue that a route answers to."""
        return f"{self.name}.{route}.results"

    def dead_letters(self, route: str) -> str:
        """The dead-letter topic or queue of a route."""
        return f"{self.source(route)}.{self.name}.default.dlt"

    def retries(self, route: str, delay: int | str) -> str:
        """The topic or queue of a route's retries that wait so many milliseconds (``ready``: no more)."""
        return f"{self.source(route)}.{self.name}.default.retry.{delay}"

    # Files, topics and queues

    def write(self) -> None:
        """Write both files."""
        settings = {**self.settings, "models": {"trusted": self.trusted, **self.settings.get("models", {})}}
        self.config.write_text(
            "".join(
                f"[{section}]\n"
                + "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in values.items())
                for section, values in settings.items()
            )
        )
        self.write_routes()

    def write_routes(self) -> None:
        """Write the routes file, as an editor would: a new file in the place of the old."""
        text = "".join(
            "[[route]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in route.items())
            for route in self.routes.values()
        )
        fresh = self.folder / "routes.new"
        fresh.write_text(text)
        fresh.replace(self.routes_file)

    def create_topics(self) -> None:
        """Create exactly what ``topics plan`` names on both brokers, as their administrator."""
        if self._rabbitmq is not None:
            config = settings_of.load(self.config, {})
            mine = settings_of.RabbitMQ(url=self._rabbitmq.url)
            with RabbitCluster(msgspec.structs.replace(config, rabbitmq=mine)) as cluster:
                cluster.declare(plan_rabbitmq(config, load_routes(self.routes_file, self.name).routes))
        planned: dict[str, int] = {}
        for route, partitions in self.partitions.items():
            arguments = ["topics", "plan", route, "--json", "--partitions", str(partitions)]
            result = CliRunner().invoke(cli, ["--config", str(self.config), *arguments])
            assert result.exit_code == 0, result.output
            planned |= {each["name"]: each["partitions"] for each in json.loads(result.stdout)["topics"]}
        if planned:
            self.kafka.create_topics(planned)

    def prepare(self) -> Fleet:
        """Write the files and create topics and queues."""
        self.write()
        self.create_topics()
        return self

    # Processes

    def run(
        self, *arguments: str, code: int = 0, timeout_s: float = 90.0, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Run the command line to its end and check its exit code."""
        done = subprocess.run(
            [*COMMAND, "--config", str(self.config), *arguments],
            cwd=self.folder,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return Finished(done.returncode, done.stdout, done.stderr)

    def launch(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> WorkerProcess:
        """Start a worker and return at once."""
        worker = WorkerProcess(name, self, arguments)
        worker.launch(env or {})
        self.workers.append(worker)
        return worker

    def worker(self, name: str = "w-1", *arguments: str, **env: str) -> WorkerProcess:
        """Start a worker and return it once it is ready."""
        return self.launch(name, *arguments, env=env).wait_ready()

    @contextlib.contextmanager
    def running(self, name: str = "w-1") -> Iterator[WorkerProcess]:
        """Run one worker meanwhile; it must drain and exit 0 afterwards."""
        worker = self.worker(name)
        yield worker
        assert worker.finish() == 0, worker.log_tail()


def toml(value: object) -> str:
    """Return a value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(each) for each in value) + "]"
    return json.dumps(value)
