"""A RabbitMQ cluster of local nodes, whose members are stopped, killed and started one by one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.process import ServerError
from tests.support.rabbitmq_server import PortMapper, RabbitServer
from tests.support.waiting import wait_until


class RabbitCluster:
    """``nodes`` nodes under ``folder`` with one cookie and one port mapper; usable as a context manager.

    Quorum queues that are declared while all nodes run have a member on each. ``config`` and ``advanced``
    are those of :class:`RabbitServer`, for every node.
    """

    def __init__(
        self, folder: Path, nodes: int = 3, *, config: Sequence[str] = (), advanced: str = ""
    ) -> None:
        self._mapper = PortMapper(folder)
        self._formed = False
        cookie = secrets.token_hex(16)
        self.nodes = [
            RabbitServer(folder / f"node-{number}", advanced=advanced, mapper=self._mapper, cookie=cookie)
            for number in range(nodes)
        ]
        first = self.nodes[0]
        first.config = list(config)
        for node in self.nodes[1:]:
            # The first node waits for nobody and the others for the first, whichever of them is slow.
            node.config = [
                f"cluster_formation.classic_config.nodes.1 = {first.node}",
                f"cluster_formation.classic_config.nodes.2 = {node.node}",
                "cluster_formation.discovery_retry_limit = 500",
                "cluster_formation.discovery_retry_interval = 200",
                *config,
            ]

    def __enter__(self) -> Self:
        self.start_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    @property
    def urls(self) -> list[str]:
        """The address of each node, up or down."""
        return [node.url for node in self.nodes]

    def start_all(self, timeout_s: float = 120.0) -> None:
        """Start every node that is down; return once all have found each other.

        The first time one after the other: nodes that join at once may meet a schema that is half changed.
        Later all together: a node that was not the last to stop waits for one that was.
        """
        for node in self.nodes:
            if not node.running:
                node.launch()
            if not self._formed:
                node.wait_ready(timeout_s)
        for node in self.nodes:
            node.wait_ready(timeout_s)
        self._formed = True
        wait_until(self._is_whole, timeout_s, "every node knows of all others", every_s=0.1)

    def stop_all(self) -> None:
        """End every node and the port mapper; twice is fine."""
        for node in reversed(self.nodes):
            node.end()
        self._mapper.kill()

    def stop(self, number: int) -> None:
        """End a node in order."""
        self.nodes[number].stop()

    def kill(self, number: int) -> None:
        """End a node at once."""
        self.nodes[number].kill()

    def start(self, number: int, timeout_s: float = 60.0) -> None:
        """Start a node that was stopped; return once it answers and its quorum queues' members are up."""
        self.nodes[number].start(timeout_s)
        self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once every quorum queue has a leader and a member on each node that runs."""
        wait_until(self._queues_are_ready, timeout_s, "all members of quorum queues are up", every_s=0.1)

    def leader(self, queue: str) -> int:
        """Return the number of the node that leads a quorum queue."""
        for row in self.up().list_queues("name", "leader"):
            if row["name"] == queue and row["leader"]:
                return [node.node for node in self.nodes].index(row["leader"])
        raise ServerError(f"the quorum queue {queue} has no leader")

    def up(self) -> RabbitServer:
        """Return the first node that runs."""
        for node in self.nodes:
            if node.running:
                return node
        raise ServerError("no node of the RabbitMQ cluster runs")

    def _is_whole(self) -> bool:
        shown = self.up().ctl("eval", "length(rabbit_nodes:all_running()).")
        return int(shown) == len(self.nodes)

    def _queues_are_ready(self) -> bool:
        running = {node.node for node in self.nodes if node.running}
        rows = self.up().list_queues("name", "type", "leader", "online")
        return all(
            row["leader"] in running and running <= set(row["online"])
            for row in rows
            if row["type"] == "quorum"
        )
