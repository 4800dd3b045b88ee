"""A real Kafka on loopback: one KRaft node, plain or with SASL_SSL, SCRAM users and access rules."""

from __future__ import annotations

import subprocess
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from tests.support import programs
from tests.support.acls import parse_acls
from tests.support.certificates import Certificates, write_certificates
from tests.support.process import ServerError, ServerProcess, accepts, free_ports
from tests.support.waiting import wait_until

ClientConfig = dict[str, Any]
ADMIN_USER = "admin"

# One node, so every internal topic has one replica; few partitions, so that it starts at once.
_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "1000",
    # A killed broker is let in again only when its old session has ended (9 s by default).
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "controlled.shutdown.enable": "false",
    "log.cleaner.enable": "false",
    "num.network.threads": "2",
    "num.io.threads": "2",
}

_LOG4J = """Configuration:
  status: warn
  Appenders:
    Console: {name: out, target: SYSTEM_OUT, PatternLayout: {pattern: "%d %p %c{1}: %m%n"}}
  Loggers:
    Root: {level: warn, AppenderRef: {ref: out}}
"""


class KafkaServer:
    """A broker whose data lives in ``folder``; usable as a context manager.

    ``properties`` are laid over the broker's own. With ``sasl_ssl`` clients come in by SASL_SSL with
    SCRAM-SHA-512 only, as one of ``users`` (name to password) or as the super user ``admin``, and what no
    rule allows is denied. Raises :class:`~tests.support.programs.MissingServerError` where Java or the
    jars cannot be had.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sasl_ssl: bool = False,
        properties: Mapping[str, object] | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.sasl_ssl = sasl_ssl
        self.users = {ADMIN_USER: "admin-secret", **(users or {})}
        self.port, self._controller_port, self._internal_port = free_ports(3)
        self.bootstrap_servers = f"127.0.0.1:{self.port}"
        self.certificates: Certificates | None = None
        self._extra = dict(properties or {})
        self._process = ServerProcess("Kafka", folder / "kafka.log")
        self._java = ""
        self._libs = Path()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The broker's process id."""
        return self._process.pid

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the broker, on the same ports and data as before if it ran; return once it answers."""
        if not self._libs.parts:
            self._java, self._libs = programs.java(), programs.kafka_libs()
            self._format()
        command = [self._java, "-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", *self._java_options()]
        self._process.start([*command, "kafka.Kafka", "server.properties"], cwd=self.folder)
        self._process.wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the broker in order; twice is fine."""
        self._process.stop()

    def kill(self) -> None:
        """End the broker at once, as a power cut would."""
        self._process.kill()

    def pause(self) -> None:
        """Freeze the broker: connections stay open, nothing answers."""
        self._process.pause()

    def resume(self) -> None:
        """Let a frozen broker go on."""
        self._process.resume()

    def restart(self) -> None:
        """Stop and start again with the same ports and data."""
        self.stop()
        self.start()

    def client_config(self, user: str = ADMIN_USER) -> ClientConfig:
        """Return the librdkafka properties that a client needs to come in (as ``user`` with SASL_SSL)."""
        config: ClientConfig = {"bootstrap.servers": self.bootstrap_servers}
        if self.sasl_ssl:
            if self.certificates is None:
                raise ServerError("Kafka has no certificates before its first start")
            config |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": user,
                "sasl.password": self.users[user],
                "ssl.ca.location": str(self.certificates.authority),
            }
        return config

    def admin(self) -> AdminClient:
        """Return an administration client (the super user's with SASL_SSL)."""
        return AdminClient(self.client_config())

    def create_topics(
        self, topics: Mapping[str, int], *, config: Mapping[str, str] | None = None, timeout_s: float = 15.0
    ) -> None:
        """Create topics by name and partition count; return once each partition has a leader."""
        admin = self.admin()
        new = [NewTopic(name, count, 1, config=dict(config or {})) for name, count in topics.items()]
        for future in admin.create_topics(new, request_timeout=timeout_s).values():
            future.result(timeout_s)
        wait_until(
            lambda: all(_has_leaders(admin, name) for name in topics),
            timeout_s,
            f"leaders for {list(topics)}",
        )

    def delete_topics(self, names: Iterable[str], *, timeout_s: float = 15.0) -> None:
        """Delete topics; return once the broker has confirmed."""
        admin = self.admin()  # Named, because its results fail once it is collected.
        for future in admin.delete_topics(list(names), request_timeout=timeout_s).values():
            future.result(timeout_s)

    def apply_acls(self, lines: str | Iterable[str], *, timeout_s: float = 15.0) -> None:
        """Add the access rules of ``kafka-acls.sh`` lines (see :func:`~tests.support.acls.parse_acls`)."""
        bindings = parse_acls(lines)
        admin = self.admin()
        for future in admin.create_acls(bindings, request_timeout=timeout_s).values():
            future.result(timeout_s)

    def _answers(self) -> bool:
        if not accepts(self.port):
            return False
        # The log level keeps librdkafka from printing refused connections while the broker starts.
        admin = AdminClient({**self.client_config(), "log_level": 0, "socket.timeout.ms": 2000})
        try:
            return bool(admin.list_topics(timeout=2).brokers)
        except KafkaException:
            return False

    def _format(self) -> None:
        """Write the settings and the empty, formatted data folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.sasl_ssl:
            self.certificates = write_certificates(self.folder / "certificates")
        lines = [f"{key}={value}" for key, value in self._settings().items()]
        (self.folder / "server.properties").write_text("\n".join(lines) + "\n")
        (self.folder / "log4j2.yaml").write_text(_LOG4J)
        # A leading letter: one id in 64 would start with a hyphen, which the tool takes for an option.
        cluster_id = "i" + urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        scram: list[str] = []
        if self.sasl_ssl:
            for name, password in self.users.items():
                scram += ["--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]"]
        tool = [self._java, "-XX:TieredStopAtLevel=1", *self._java_options(), "kafka.tools.StorageTool"]
        options = ["format", "--cluster-id", cluster_id, "--config", "server.properties", *scram]
        done = subprocess.run(
            [*tool, *options], cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise ServerError(f"Kafka: formatting its data folder failed:\n{done.stdout}{done.stderr}")

    def _java_options(self) -> list[str]:
        log4j = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.yaml'}"
        return ["-Djava.awt.headless=true", log4j, "-cp", f"{self._libs}/*"]

    def _settings(self) -> dict[str, object]:
        client_protocol = "SASL_SSL" if self.sasl_ssl else "PLAINTEXT"
        listeners = {
            "CLIENT": f"CLIENT://127.0.0.1:{self.port}",
            "INTERNAL": f"INTERNAL://127.0.0.1:{self._internal_port}",
            "CONTROLLER": f"CONTROLLER://127.0.0.1:{self._controller_port}",
        }
        settings: dict[str, object] = {
            **_PROPERTIES,
            "log.dirs": str(self.folder / "data"),
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": f"{listeners['CLIENT']},{listeners['INTERNAL']}",
            "inter.broker.listener.name": "INTERNAL",
            "listener.security.protocol.map": (
                f"CLIENT:{client_protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"
            ),
        }
        if self.certificates is not None:
            settings |= _sasl_ssl_settings(self.certificates)
        return settings | self._extra


def _sasl_ssl_settings(certificates: Certificates) -> dict[str, object]:
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return {
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.client.scram-sha-512.sasl.jaas.config": login,
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": certificates.key_and_chain,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": certificates.authority,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        # ANONYMOUS is the node itself on its two inner listeners; clients have no plain listener.
        "super.users": f"User:{ADMIN_USER};User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "false",
    }


def _has_leaders(admin: AdminClient, topic: str) -> bool:
    found = admin.list_topics(topic, timeout=5).topics[topic]
    return found.error is None and all(p.leader >= 0 and p.error is None for p in found.partitions.values())
