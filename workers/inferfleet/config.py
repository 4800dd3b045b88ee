"""The settings of a fleet: what there is, what it defaults to, and how a file and the environment give it.

Order: environment variable, then file, then default. A value is known with where it came from, so that
``inferfleet config show`` can say it. Nothing here is read at import.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

import msgspec
from msgspec import Meta

from inferfleet import tables
from inferfleet.config_checks import check
from inferfleet.config_sources import collect
from inferfleet.errors import ConfigError
from inferfleet.tables import FILE_SUFFIX, Leaf

PATH_VARIABLE = "INFERFLEET_CONFIG"
DEFAULT_PATH = Path("fleet.toml")

_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_ADDRESS = r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):\d{1,5}"

Name: TypeAlias = Annotated[
    str,
    Meta(
        pattern=rf"^{_NAME}\Z",
        description="a name of small letters, digits and hyphens, at most 63, no hyphen first",
    ),
]
OptionalName: TypeAlias = Annotated[
    str,
    Meta(
        pattern=rf"^({_NAME})?\Z",
        description="empty, or a name of small letters, digits and hyphens, at most 63, no hyphen first",
    ),
]
Address: TypeAlias = Annotated[
    str, Meta(pattern=rf"^{_ADDRESS}\Z", description='an address such as "127.0.0.1:8471"')
]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]
NotNegative: TypeAlias = Annotated[int, Meta(ge=0)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=60_000)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of ``fleet.toml``; secrets are masked wherever it is printed."""

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{key}={tables.masked(key, getattr(self, key))!r}" for key in self.__struct_fields__
        )
        return f"{type(self).__name__}({shown})"

    def __rich_repr__(self) -> Any:
        for key in self.__struct_fields__:
            yield key, tables.masked(key, getattr(self, key))


class Fleet(Section, frozen=True):
    """The fleet: its name is the first part of every derived name."""

    name: Name = "inferfleet"


class Kafka(Section, frozen=True):
    """The Kafka cluster. ``client``, ``consumer`` and ``producer`` hold librdkafka properties."""

    bootstrap_servers: str = "localhost:9092"
    start: str = "earliest"
    group: str = ""
    group_protocol: Literal["classic", "consumer"] = "classic"
    session_timeout_ms: Annotated[int, Meta(ge=1000, le=3_600_000)] = 6000
    static_membership: bool = False
    insecure: bool = False
    client: dict[str, str] = {}
    consumer: dict[str, str] = {}
    producer: dict[str, str] = {}

    @property
    def start_timestamp_ms(self) -> int | None:
        """Epoch milliseconds where ``start`` is an instant; ``None`` for ``earliest`` and ``latest``."""
        if self.start in ("earliest", "latest"):
            return None
        instant = datetime.fromisoformat(self.start)
        return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp() * 1000)


class RabbitMQ(Section, frozen=True):
    """The RabbitMQ broker; ``reply_to`` lists, with ``*``, the queues that a request may name as its own."""

    url: str = "amqp://localhost/"
    username: str = ""
    password: str = ""
    ca_file: str = ""
    insecure: bool = False
    heartbeat_s: Annotated[int, Meta(ge=1, le=600)] = 10
    prefetch: Annotated[int, Meta(ge=0, le=65_535)] = 0
    publish_timeout_s: Annotated[float, Meta(gt=0)] = 15
    consumer_timeout_s: Annotated[float, Meta(gt=0)] = 1800
    reply_to: tuple[str, ...] = ("amq.gen-*", "amq.rabbitmq.reply-to.*")


class Redis(Section, frozen=True):
    """A Redis or Valkey: one server, a cluster (``nodes``), or sentinels (``nodes``, ``sentinel_master``)."""

    url: str = "redis://localhost:6379/0"
    mode: Literal["single", "cluster", "sentinel"] = "single"
    nodes: tuple[Address, ...] = ()
    sentinel_master: str = ""
    username: str = ""
    password: str = ""


class Models(Section, frozen=True):
    """The model repository; ``trusted`` lists what may run code, ``name`` or ``name@sha256:...``.

    ``memory_bytes`` bounds what loaded versions may hold on the worker's device; 0 sets no bound.
    """

    repository: str = "models"
    trusted: tuple[str, ...] = ()
    memory_bytes: NotNegative = 0


class Routes(Section, frozen=True):
    """Where routes come from: ``file:PATH`` or ``fleet`` (the control plane)."""

    source: Annotated[str, Meta(pattern=r"^(file:.+|fleet)\Z", description='"file:PATH" or "fleet"')] = (
        "file:routes.toml"
    )


class Routing(Section, frozen=True):
    """Routes from the control plane: how far back versions stay, and how far ahead a switch is set.

    ``barrier_s`` is how long a change waits for every worker to have its versions ready.
    """

    horizon_s: Positive = 3600
    lead_ms: Annotated[int, Meta(ge=0, le=600_000)] = 2000
    barrier_s: Annotated[float, Meta(gt=0)] = 300


class Reports(Section, frozen=True):
    """How often workers send what they have counted, and say that they live."""

    every_s: Annotated[float, Meta(ge=0.2, le=60)] = 5
    heartbeat_s: Annotated[float, Meta(ge=0.2, le=60)] = 2


class Worker(Section, frozen=True):
    """One worker process. ``threads`` 0 means what the cgroup grants.

    ``state`` is a folder for what must outlive a crash; by default one in the system's temporary folder.
    """

    pool: Name = "default"
    id: OptionalName = ""
    guarantee: Literal["at_least_once", "exactly_once"] = "at_least_once"
    device: Annotated[
        str,
        Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)\Z", description='"auto", "cpu", "cuda" or "cuda:1"'),
    ] = "auto"
    threads: NotNegative = 0
    state: str = ""
    drain_timeout_s: Annotated[float, Meta(gt=0)] = 20
    admin_address: Address = "127.0.0.1:8471"


class Coordinator(Section, frozen=True):
    """One coordinator replica; ``hosts`` are the names under which it is reached besides its address."""

    address: Address = "127.0.0.1:8470"
    admin_address: Address = "127.0.0.1:8472"
    tls: Literal["", "terminated-upstream"] = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    hosts: tuple[str, ...] = ()


class Batching(Section, frozen=True):
    """When a batch closes, unless the route or the model says otherwise."""

    max_batch_size: Positive = 64
    max_queue_delay_ms: Milliseconds = 5


class Limits(Section, frozen=True):
    """Bounds on one request, one result, and all that a worker holds."""

    max_request_bytes: Positive = 1_000_000
    max_request_rows: Positive = 1024
    max_result_bytes: Positive = 1_000_000
    in_flight_rows: Positive = 20_000
    in_flight_bytes: Positive = 268_435_456


class Retry(Section, frozen=True):
    """Delays of further attempts, one retry topic each."""

    delays_ms: tuple[Positive, ...] = (5_000, 30_000, 300_000)


class Brake(Section, frozen=True):
    """When a route stops itself because its model fails."""

    consecutive: Positive = 20
    share: Annotated[float, Meta(gt=0, le=1)] = 0.05


class ResultsSettings(Section, frozen=True):
    """How long a result stays in Redis."""

    ttl_s: Positive = 3600


class Dlt(Section, frozen=True):
    """Codes that get a dead letter although their rule says none."""

    include: tuple[str, ...] = ()


class Names(Section, frozen=True):
    """Templates of derived topic and queue names."""

    dlt: str = "{source}.{group}.dlt"
    retry: str = "{source}.{group}.retry.{ms}"


class Log(Section, frozen=True):
    """How a process logs."""

    format: Literal["auto", "json", "ecs", "console"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    repeat_lines: Positive = 5
    repeat_window_s: Annotated[float, Meta(ge=0, le=86_400)] = 60.0


class Traces(Section, frozen=True):
    """Whether a worker records the way of sampled requests, and where to.

    ``sample_ratio`` is the share of requests without a trace of their own for which one begins.
    """

    exporter: Literal["off", "otlp"] = "off"
    endpoint: str = ""
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Config(Section, frozen=True):
    """All settings of a process, plus where they came from (``base``, ``path``, ``secret_files``)."""

    fleet: Fleet = Fleet()
    kafka: Kafka = Kafka()
    rabbitmq: RabbitMQ = RabbitMQ()
    redis: Redis = Redis()
    control: Redis | None = None
    models: Models = Models()
    routes: Routes = Routes()
    routing: Routing = Routing()
    reports: Reports = Reports()
    worker: Worker = Worker()
    coordinator: Coordinator = Coordinator()
    batching: Batching = Batching()
    limits: Limits = Limits()
    retry: Retry = Retry()
    brake: Brake = Brake()
    results: ResultsSettings = ResultsSettings()
    dlt: Dlt = Dlt()
    names: Names = Names()
    log: Log = Log()
    traces: Traces = Traces()
    base: Path = Path()
    """The folder that relative paths start at: the file's own."""
    path: Path | None = None
    """The file, ``None`` where there was none."""
    secret_files: dict[str, Path] = {}
    """Dotted keys that were given as ``<key>_file``, with the file; see :meth:`current`."""
    known_secrets: set[str] = set()
    """Every secret that this process has read, so that none is ever logged; it grows as files are read."""

    @property
    def group(self) -> str:
        """The Kafka consumer group of this worker's pool."""
        return self.group_of(self.worker.pool)

    def group_of(self, pool: str) -> str:
        """Return the Kafka consumer group of a pool."""
        return self.kafka.group or f"{self.fleet.name}.{pool}"

    @property
    def worker_id(self) -> str:
        """``worker.id``, by default the host name in the alphabet of names."""
        if self.worker.id:
            return self.worker.id
        return re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:63] or "worker"

    @property
    def control_redis(self) -> Redis:
        """The control plane's Redis: ``[control]``, else the same as ``[redis]``."""
        return self.control or self.redis

    @property
    def models_path(self) -> Path:
        """The model repository's folder."""
        return self.base / self.models.repository

    @property
    def routes_path(self) -> Path | None:
        """The routes file; ``None`` when routes come from the control plane."""
        kind, _, name = self.routes.source.partition(":")
        return self.base / name if kind == "file" else None

    @property
    def secrets(self) -> frozenset[str]:
        """Every secret value, so that none of them is ever logged."""
        sections = [getattr(self, name) for name in SECTIONS]
        return frozenset().union(*(tables.secret_values(each) for each in sections if each is not None))

    def current(self, key: str) -> str:
        """Return the string under a dotted key (``redis.password``), read anew if it was given by file."""
        file = self.secret_files.get(key)
        if file is not None:
            found = tables.read_text(file, f"{key}{FILE_SUFFIX}:").rstrip("\r\n")
            if tables.secret_name(key):
                self.known_secrets.add(found)
            return found
        section, _, rest = key.partition(".")
        table, _, prop = rest.partition(".")
        value = getattr(getattr(self, section), table)
        return cast(str, value[prop] if isinstance(value, dict) else value)


SECTIONS: dict[str, type[Section]] = {
    field.name: next(
        kind
        for kind in (field.type, *get_args(field.type))
        if isinstance(kind, type) and issubclass(kind, Section)
    )
    for field in msgspec.structs.fields(Config)
    if field.name not in ("base", "path", "secret_files", "known_secrets")
}


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Return the configuration; ``path`` ``None``: ``$INFERFLEET_CONFIG``, else ``./fleet.toml``.

    Raises :class:`~inferfleet.errors.ConfigError`.
    """
    return load_with_origins(path, environ)[0]


def load_with_origins(path: Path | None, environ: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
    """Return the configuration, and for each dotted key where its value came from.

    An origin is ``default``, the file's name, a variable's name, or the secret file's name in either of them.
    """
    path = path or Path(environ.get(PATH_VARIABLE) or DEFAULT_PATH)
    way_out = f": name yours by --config or {PATH_VARIABLE}, or write one (README.md, Settings)"
    hint = way_out if path.name == str(DEFAULT_PATH) else ""
    text = tables.read_text(path, "config file", hint)
    return _assemble(tables.parse_toml(text, str(path)), path, environ)


def parse(text: str, environ: Mapping[str, str] | None = None, base: Path = Path()) -> Config:
    """Return the configuration that a document's text gives; relative paths start at ``base``."""
    return _assemble(tables.parse_toml(text, "config"), base / "config", environ or {})[0]


def _assemble(
    tree: Mapping[str, Any], path: Path, environ: Mapping[str, str]
) -> tuple[Config, dict[str, str]]:
    collected = collect(tree, path, environ, SECTIONS)
    sections = {
        name: tables.build(SECTIONS[name], leaves, f"[{name}]") for name, leaves in collected.sections.items()
    }
    config = Config(
        **cast(Any, sections),
        base=path.parent,
        path=path if path.is_file() else None,
        secret_files=collected.secret_files,
    )
    config.known_secrets.update(config.secrets)
    check(config, path)
    return config, _origins(config, collected.sections)


def _origins(config: Config, sections: Mapping[str, Mapping[str, Leaf]]) -> dict[str, str]:
    """Say for each dotted key where its value came from."""
    origins: dict[str, str] = {}
    for name, kind in SECTIONS.items():
        leaves = sections.get(name, {})
        if getattr(config, name) is None:
            origins[name] = "default"
            continue
        for key in tables.field_types(kind):
            value = getattr(getattr(config, name), key)
            leaf = leaves.get(key)
            if isinstance(value, dict):
                parts = leaf.parts if leaf and leaf.parts else {}
                origins.update({f"{name}.{key}.{prop}": parts[prop] for prop in value})
            else:
                origins[f"{name}.{key}"] = leaf.origin if leaf else "default"
    return origins


def check_supported(config: Config) -> None:
    """Raise ConfigError for settings that are part of the contract and do not exist yet."""
    where = config.path or "config"
    if config.worker.guarantee == "exactly_once":
        raise ConfigError(
            f'{where}: [worker] guarantee = "exactly_once" does not exist yet; use "at_least_once"'
        )


def dead_letter_topic(config: Config, source: str, group: str | None = None) -> str:
    """Return the name of the dead-letter topic of a source, for this pool's group or another one."""
    return config.names.dlt.format(source=source, group=group or config.group)


def kafka_client_config(config: Config) -> dict[str, object]:
    """Return what every Kafka client of this process starts from: address, security, a quiet log.

    librdkafka prints its own log to standard error; what matters of it reaches the error callback too.
    """
    out: dict[str, object] = {
        "bootstrap.servers": config.kafka.bootstrap_servers,
        "client.id": config.worker_id,
    }
    if "debug" not in config.kafka.client:
        out["log_level"] = 2
    out.update(config.kafka.client)
    for key in config.secret_files:
        if key.startswith("kafka.client."):
            out[key.removeprefix("kafka.client.")] = config.current(key)
    return out
