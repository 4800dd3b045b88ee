"""The demo on Kafka: the embedded broker, or a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import AdminClient, NewTopic

from inferfleet.demo.command import planned
from inferfleet.demo.embedded import PARTITIONS, create_topics
from inferfleet.demo.kafka_wires import KafkaWires
from inferfleet.demo.servers import KAFKA_VERSION
from inferfleet.demo.tally import Tally

_SETTINGS = """\
[kafka]
bootstrap_servers = "{address}"
session_timeout_ms = 6000
"""
_CREATE_TIMEOUT_S = 30.0
_EMBEDDED_CONSUMER = """
[kafka.consumer]
"fetch.wait.max.ms" = 10   # a fetch that waits at the embedded broker does not wake for new records
"""


@dataclass(frozen=True, slots=True)
class KafkaBroker:
    """Implements :class:`~inferfleet.demo.broker.Broker` on the Kafka at ``address``."""

    address: str
    group: str
    embedded: bool

    @property
    def title(self) -> str:
        """Which broker it is and where it listens."""
        return f"{'embedded Kafka broker' if self.embedded else f'Kafka {KAFKA_VERSION}'} on {self.address}"

    @property
    def settings(self) -> str:
        """Address and session; the embedded broker needs short fetches."""
        return _SETTINGS.format(address=self.address) + (_EMBEDDED_CONSUMER if self.embedded else "")

    def source(self, route: str) -> str:
        """Return the topic of a route's requests."""
        return f"kafka:{route}.requests"

    def results(self, route: str) -> str:
        """Return the topic of a route's outcomes."""
        return f"kafka:{route}.results"

    def declare(self, fleet_toml: Path, also: Sequence[str] = ()) -> None:
        """Create every topic of the plan; the embedded broker knows no administration, so it is asked."""
        if self.embedded:
            create_topics(self.address, [*(each["name"] for each in planned(fleet_toml)["topics"]), *also])
            return
        planned(fleet_toml, "--apply", "--partitions", str(PARTITIONS))
        if also:
            admin = AdminClient({"bootstrap.servers": self.address, "log_level": 2})
            for made in admin.create_topics([NewTopic(topic, PARTITIONS, 1) for topic in also]).values():
                made.result(_CREATE_TIMEOUT_S)

    def wires(self, routes: Sequence[str], tally: Tally) -> KafkaWires:
        """Connect a producer and consumers."""
        return KafkaWires(self.address, self.group, routes, tally)

    def takeover(self, victim: str) -> str:
        """A partition waits until the group gives it to somebody else."""
        return f"the partitions of {victim} wait until the group misses it, after 6 s"

    def looks(self) -> list[str]:
        """The last outcomes of each partition."""
        return [f"kcat -b {self.address} -t digits.results -C -e -o -3 -f '%h\\n%s\\n\\n'"]

    def asks(self, body: str) -> list[str]:
        """A record from kcat."""
        return [f"echo '{body}' |", f"  kcat -b {self.address} -t digits.requests -P -k mine"]
