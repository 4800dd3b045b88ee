"""The demo on RabbitMQ: a node of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferfleet.demo.command import planned
from inferfleet.demo.processes import Processes
from inferfleet.demo.rabbitmq_node import Node, start_node
from inferfleet.demo.rabbitmq_wires import RabbitWires
from inferfleet.demo.tally import Tally

_EXCHANGE = "results"


@dataclass(frozen=True, slots=True)
class RabbitBroker:
    """Implements :class:`~inferfleet.demo.broker.Broker` on a node."""

    node: Node

    @property
    def title(self) -> str:
        """Which broker it is and where it listens."""
        return f"RabbitMQ on {self.node.url}"

    @property
    def settings(self) -> str:
        """The node's address; without a user in it, every client takes guest."""
        return f'[rabbitmq]\nurl = "{self.node.url}"\n'

    def source(self, route: str) -> str:
        """Return the queue of a route's requests."""
        return f"rabbitmq:{route}.requests"

    def results(self, route: str) -> str:
        """Return exchange and routing key of a route's outcomes; the plan binds a queue named as the key."""
        return f"rabbitmq:{_EXCHANGE}/{route}.results"

    def declare(self, fleet_toml: Path, also: Sequence[str] = ()) -> None:  # noqa: ARG002 - Kafka's
        """Declare queues, exchange and bindings by ``inferfleet topics plan --apply``."""
        planned(fleet_toml, "--apply")

    def wires(self, routes: Sequence[str], tally: Tally) -> RabbitWires:
        """Connect a publisher and consumers."""
        return RabbitWires(self.node.url, routes, tally, self._held)

    def takeover(self, victim: str) -> str:
        """Nothing waits: the broker sees the connection break."""
        return f"what {victim} held went back into the queues when its connection broke"

    def looks(self) -> list[str]:
        """Nothing: a queue that was read is empty."""
        return []

    def asks(self, body: str) -> list[str]:
        """A message from amqp-tools, and its answer from the queue."""
        return [
            f"amqp-publish -u {self.node.url} -r digits.requests -b '{body}'",
            f"amqp-get -u {self.node.url} -q digits.results",
        ]

    def _held(self) -> dict[str, int]:
        """Return how many messages each queue holds, with those that workers have not acknowledged."""
        rows = json.loads(self.node.ctl("list_queues", "name", "messages", "--formatter=json"))
        return {row["name"]: row["messages"] for row in rows}


def start_rabbitmq(
    processes: Processes, folder: Path, logs: Path, say: Callable[[str], None]
) -> RabbitBroker:
    """Start a node, installed first where that may be done; ``say`` is told of it."""
    return RabbitBroker(start_node(processes, folder, logs, say))
