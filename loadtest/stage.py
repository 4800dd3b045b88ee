"""What every load test stands on: a broker on its own cores, and a folder for models, settings and logs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.cluster import Cluster
from loadtest.rabbit import Rabbit
from loadtest.subjects import Cores, on_cores
from tests.support.servers import KafkaServer, RabbitServer

_BROKER_PROPERTIES = {
    "log.retention.check.interval.ms": "2000",
    "log.segment.delete.delay.ms": "1000",
    "socket.send.buffer.bytes": "1048576",
    "socket.receive.buffer.bytes": "1048576",
}


@dataclass(frozen=True)
class Stage:
    """A cluster to measure at, a folder to work in, and who runs on which core."""

    cluster: Cluster
    folder: Path
    cores: Cores


@dataclass(frozen=True)
class RabbitStage:
    """A RabbitMQ node to measure at; ``server`` is the process, where it was started for the test."""

    rabbit: Rabbit
    folder: Path
    cores: Cores
    server: RabbitServer | None


@contextlib.contextmanager
def stage(bootstrap: str | None = None, folder: Path | None = None) -> Iterator[Stage]:
    """Yield a stage and take everything away afterwards.

    Without ``bootstrap`` a real Kafka is started for the test. This process and the broker stay off the
    subject's core. ``folder`` is kept, without one a temporary folder is used.
    """
    with contextlib.ExitStack() as leaving:
        cores, folder = _floor(leaving, folder)
        if bootstrap is None:
            server = KafkaServer(folder / "kafka", properties=_BROKER_PROPERTIES)
            bootstrap = leaving.enter_context(server).bootstrap_servers
        cluster = Cluster(bootstrap)
        leaving.callback(cluster.close)
        yield Stage(cluster, folder, cores)


@contextlib.contextmanager
def rabbit_stage(url: str | None = None, folder: Path | None = None) -> Iterator[RabbitStage]:
    """Yield a stage with RabbitMQ: the node at ``url``, or a real one that is started for the test."""
    with contextlib.ExitStack() as leaving:
        cores, folder = _floor(leaving, folder)
        server: RabbitServer | None = None
        if url is None:
            server = leaving.enter_context(RabbitServer(folder / "rabbitmq"))
            url = server.url
        rabbit = Rabbit(url)
        leaving.callback(rabbit.close)
        yield RabbitStage(rabbit, folder, cores, server)


def _floor(leaving: contextlib.ExitStack, folder: Path | None) -> tuple[Cores, Path]:
    """Stay off the subject's core and make the folder, until ``leaving`` ends."""
    cores = Cores.split()
    leaving.enter_context(on_cores(cores.others))
    if folder is None:
        folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="inferfleet-loadtest-")))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return cores, folder
