"""The demo's folder: settings, routes, model repository, logs; and the workers that run on them."""

from __future__ import annotations

import shutil
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from inferfleet.demo import digits, files, live, sentences
from inferfleet.demo.broker import Broker
from inferfleet.demo.command import command, environment, said_by
from inferfleet.demo.processes import DemoError, Processes, Started
from inferfleet.demo.servers import free_port
from inferfleet.models.repository import Repository

FLEET = "inferfleet"
GROUP = "inferfleet.default"
_READY_TIMEOUT_S = 180.0
_POLL_S = 0.1
_MARK = ".inferfleet-demo"

SETTINGS = """\
[fleet]
name = "{fleet}"

{broker}
[redis]
url = "redis://127.0.0.1:{redis}/0"

[models]
repository = "models"
trusted = [{trusted}]

[routes]
source = "fleet"   # from the control plane: `inferfleet route apply routes.toml` puts them there

[routing]
lead_ms = 500

[reports]
every_s = 0.5
heartbeat_s = 0.5

[coordinator]
address = "127.0.0.1:{api}"
admin_address = "127.0.0.1:0"

[worker]
threads = 1
state = "data/state"   # of this demo alone: an earlier one's routes are not to be remembered
admin_address = "127.0.0.1:0"   # any free one; each worker of the demo is given its own
"""

ROUTE = """\
[[route]]
name = "{name}"
source = "{source}"
results = ["{results}", "redis"]
{answers}"""

_DIGITS = """\
model = "digits"
variants = [
  { name = "stable", version = "1", weight = 50 },   # linear
  { name = "canary", version = "2", weight = 50 },   # a network with two hidden layers
]
"""
_FILES = """\
model = "magika"
version = "1"
max_batch_size = 8   # this network gains nothing from larger batches
"""
_SENTENCES = """\
model = "minilm"
version = "1"
max_batch_size = 32
"""
_LIVE = """\
model = "digits"
version = "1"   # the demo's second act rolls others out
"""
_PROMOTED = """\
model = "digits"
version = "{version}"   # what the demo's second act has promoted
"""
ANSWERS = {"digits": _DIGITS, "files": _FILES, sentences.ROUTE: _SENTENCES, live.ROUTE: _LIVE}
"""Which model versions answer each route."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The places inside the demo's folder, and which routes it shows.

    ``rollouts`` says that there is a second act, on a route of its own. ``api`` is the coordinator's address.
    """

    folder: Path
    routes: tuple[str, ...]
    rollouts: bool = False
    api: str = "127.0.0.1:8470"

    @property
    def fleet_toml(self) -> Path:
        """The settings that the workers run with."""
        return self.folder / "fleet.toml"

    @property
    def record(self) -> Path:
        """The process ids of all that the demo started."""
        return self.folder / "pids.json"

    @property
    def logs(self) -> Path:
        """One log for each process."""
        return self.folder / "logs"

    @property
    def data(self) -> Path:
        """What the servers keep while they run."""
        return self.folder / "data"

    def clear(self) -> None:
        """Make the folder new; what an earlier demo left in it goes, what is no demo's is refused."""
        mark = self.folder / _MARK
        if self.folder.exists() and any(self.folder.iterdir()) and not mark.is_file():
            raise DemoError(f"{self.folder} holds something that no demo wrote; name another --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        for name in ("models", "logs", "data"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for folder in (self.folder / "models", self.logs, self.data):
            folder.mkdir()

    def write_settings(self, broker: Broker, redis_port: int) -> None:
        """Write ``fleet.toml`` and ``routes.toml``."""
        trusted = f'"{sentences.MODEL}"' if sentences.ROUTE in self.routes else ""
        self.fleet_toml.write_text(
            SETTINGS.format(
                fleet=FLEET,
                broker=broker.settings,
                redis=redis_port,
                trusted=trusted,
                api=self.api.rpartition(":")[2],
            ),
            encoding="utf-8",
        )
        routes = [
            ROUTE.format(
                name=name, source=broker.source(name), results=broker.results(name), answers=ANSWERS[name]
            )
            for name in (*self.routes, *([live.ROUTE] if self.rollouts else []))
        ]
        (self.folder / "routes.toml").write_text("\n".join(routes), encoding="utf-8")

    def apply_routes(self) -> None:
        """Put ``routes.toml`` into the control plane."""
        file = str(self.folder / "routes.toml")
        said_by("--config", str(self.fleet_toml), "route", "apply", file, "--reason", "the demo begins")

    def promoted(self, version: str) -> None:
        """Write what a rollout has promoted into ``routes.toml``: the next ``apply`` would take it back."""
        file = self.folder / "routes.toml"
        text = file.read_text(encoding="utf-8").replace(_LIVE, _PROMOTED.format(version=version))
        file.write_text(text, encoding="utf-8")

    def add_digits(self, layers: dict[str, list[digits.Layer]]) -> None:
        """Put both versions of the digits classifier into the repository."""
        repository = Repository(self.folder / "models")
        with tempfile.TemporaryDirectory() as folder:
            for version, each in layers.items():
                file = Path(folder, "model.onnx")
                digits.write_onnx(each, file)
                repository.add(digits.MODEL, version, [file])

    def add_file_types(self, types: files.FileTypes) -> None:
        """Put magika's network into the repository."""
        Repository(self.folder / "models").add(files.MODEL, "1", [types.onnx])

    def add_sentence_encoder(self) -> None:
        """Put the sentence encoder into the repository."""
        repository = Repository(self.folder / "models")
        repository.add(sentences.MODEL, "1", sentences.model_files(), settings=sentences.SETTINGS)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process and its admin address."""

    name: str
    started: Started
    admin: str

    def is_ready(self) -> bool:
        """Whether ``/readyz`` says yes; raises DemoError once the process has ended."""
        ended = self.started.ended()
        if ended is not None:
            raise DemoError(ended)
        return _get(f"http://{self.admin}/readyz") is not None

    def batches(self) -> dict[tuple[str, str], Batches]:
        """Return how many batches and rows it ran per model and version; empty if it does not answer."""
        return batches_of(_get(f"http://{self.admin}/metrics") or "")


@dataclass(frozen=True, slots=True)
class Batches:
    """How many batches ran, with how many rows together."""

    count: int = 0
    rows: int = 0

    def __add__(self, other: Batches) -> Batches:
        return Batches(self.count + other.count, self.rows + other.rows)


def start_worker(processes: Processes, stage: Stage, name: str) -> Worker:
    """Start ``inferfleet worker`` as a process of its own, with settings of nobody else's environment."""
    admin = f"127.0.0.1:{free_port()}"
    env = environment() | {"INFERFLEET__WORKER__ID": name, "INFERFLEET__WORKER__ADMIN_ADDRESS": admin}
    words = command("worker", "--config", str(stage.fleet_toml))
    return Worker(name, processes.start(name, words, stage.logs / f"{name}.log", rank=1, env=env), admin)


def wait_until_ready(workers: list[Worker]) -> None:
    """Return when every worker is ready; raises DemoError if one ends or takes too long."""
    give_up_at = time.monotonic() + _READY_TIMEOUT_S
    for worker in workers:
        while not worker.is_ready():
            if time.monotonic() > give_up_at:
                raise DemoError(
                    f"{worker.name} was not ready after {_READY_TIMEOUT_S:.0f} s; see {worker.started.log}"
                )
            time.sleep(_POLL_S)


def batches_of(metrics: str) -> dict[tuple[str, str], Batches]:
    """Return batches and rows per model and version from a ``/metrics`` page."""
    out: dict[tuple[str, str], Batches] = {}
    for family in text_string_to_metric_families(metrics):
        if family.name != "inferfleet_batch_rows":
            continue
        for sample in family.samples:
            key = (sample.labels.get("model", ""), sample.labels.get("version", ""))
            if sample.name.endswith("_count"):
                out[key] = out.get(key, Batches()) + Batches(count=int(sample.value))
            elif sample.name.endswith("_sum"):
                out[key] = out.get(key, Batches()) + Batches(rows=int(sample.value))
    return out


def _get(url: str) -> str | None:
    """Return the page, ``None`` unless it answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 - a loopback http address
            body: bytes = answer.read()
    except (urllib.error.URLError, OSError):
        return None
    return body.decode()
