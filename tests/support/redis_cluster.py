"""Several real Redis servers on loopback: a cluster whose slots can be moved live, and a watched pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.crc import key_slot

from tests.support import programs
from tests.support.process import ServerProcess, free_ports
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

SLOTS = 16384


class RedisCluster:
    """A cluster of masters without replicas, each a process in its own folder; a context manager."""

    def __init__(self, folder: Path, masters: int = 3, *, config: Iterable[str] = ()) -> None:
        buses = free_ports(masters)
        self.nodes = [
            RedisServer(
                folder / f"node-{number}",
                config=[
                    *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
                    *("--cluster-node-timeout", "2000", "--cluster-port", str(bus)),
                    *config,
                ],
            )
            for number, bus in enumerate(buses)
        ]
        self._ids: list[str] = []
        self._buses = buses

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as started:
            for node in self.nodes:
                started.enter_context(node)
            self._join()
            started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.stop()

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of every node."""
        return tuple(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def url(self) -> str:
        """The first node's address."""
        return self.nodes[0].url

    def client(self) -> redis.RedisCluster:
        """Return a new client of the whole cluster; close it, or use it as a context manager."""
        return redis.RedisCluster.from_url(self.url)

    def owner_of(self, key: str) -> int:
        """Return the number of the node that has the key's slot, as the cluster was formed or last moved."""
        return self._owners[key_slot(key.encode())]

    def move_slots(self, slots: Iterable[int], target: int) -> None:
        """Move slots to node ``target``, with their keys, while clients go on; return when all nodes know.

        A node that is given a slot takes an epoch above all that it knows of, so the next target must have
        heard of this one, or two nodes claim slots by the same epoch.
        """
        for slot in slots:
            if self._owners[slot] != target:
                with self.moving(slot, target):
                    pass
        wait_until(self._agree, 30, "every node knows whose the slots are")

    @contextlib.contextmanager
    def moving(self, slot: int, target: int) -> Iterator[None]:
        """Hold a slot half moved, its keys where they were; on leaving, they follow and the slot is moved.

        Meanwhile the old node answers for the keys that it has, and sends clients to the new one for others.
        """
        source = self._owners[slot]
        with self.nodes[source].client() as old, self.nodes[target].client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[source])
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[target])
            yield
            place = ("127.0.0.1", self.nodes[target].port)
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                old.execute_command("MIGRATE", *place, "", 0, 5000, "KEYS", *keys)
            for client in (new, old):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self._ids[target])
            self._owners[slot] = target

    def on_all(self, *words: Any) -> list[Any]:
        """Run one command on every node and return the answers."""
        answers = []
        for node in self.nodes:
            with node.client() as client:
                answers.append(client.execute_command(*words))
        return answers

    def _join(self) -> None:
        share = -(-SLOTS // len(self.nodes))
        self._owners = [slot // share for slot in range(SLOTS)]
        self._ids = [answer.decode() for answer in self.on_all("CLUSTER", "MYID")]
        for number, node in enumerate(self.nodes):
            low, high = number * share, min(SLOTS, (number + 1) * share) - 1
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", low, high)
                # Epochs that differ from the start: a tie would be settled by a collision, seconds later.
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                first = (self.nodes[0].port, self._buses[0])
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", *first)
        wait_until(self._agree, 30, "every node sees the whole cluster")

    def _agree(self) -> bool:
        ports = [node.port for node in self.nodes]
        wanted = [ports[owner] for owner in self._owners]
        for node in self.nodes:
            with node.client() as client:
                if client.cluster("INFO")["cluster_state"] != "ok":
                    return False
                known = [0] * SLOTS
                for low, high, owner, *_ in client.execute_command("CLUSTER", "SLOTS"):
                    known[low : high + 1] = [owner[1]] * (high + 1 - low)
                if known != wanted:
                    return False
        return True


class RedisSentinel:
    """A master, a replica that follows it, and sentinels that promote the replica; a context manager.

    Replication is as everywhere: what the master confirmed and the replica has not heard yet is lost with it.
    """

    NAME = "main"

    def __init__(self, folder: Path, sentinels: int = 1, *, down_after_ms: int = 500) -> None:
        self.master = RedisServer(folder / "first", config=["--repl-diskless-sync-delay", "0"])
        follow = ["--replicaof", "127.0.0.1", str(self.master.port)]
        self.replica = RedisServer(folder / "second", config=follow)
        self._down_after_ms = down_after_ms
        self._folder = folder
        self._ports = free_ports(sentinels)
        self._sentinels = [
            ServerProcess("Redis sentinel", folder / f"sentinel-{number}.log") for number in range(sentinels)
        ]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as started:
            started.enter_context(self.master)
            started.enter_context(self.replica)
            for process, port in zip(self._sentinels, self._ports, strict=True):
                started.callback(process.stop)
                self._start_sentinel(process, port)
            wait_until(self._watched, 30, "every sentinel knows the replica and its peers")
            started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._sentinels:
            process.stop()
        self.replica.stop()
        self.master.stop()

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of every sentinel."""
        return tuple(f"127.0.0.1:{port}" for port in self._ports)

    def wait_promoted(self, timeout_s: float = 30.0) -> None:
        """Return once the sentinels name the replica as master and it takes writes."""

        def promoted() -> bool:
            # It closes connections when its part changes.
            with contextlib.suppress(redis.ConnectionError), self.replica.client() as client:
                if client.info("replication")["role"] == "master":
                    return all(self._master_of(port)[1] == self.replica.port for port in self._ports)
            return False

        wait_until(promoted, timeout_s, "the replica is promoted", every_s=0.05)

    def _start_sentinel(self, process: ServerProcess, port: int) -> None:
        config = process.log.with_suffix(".conf")
        quorum = len(self._sentinels) // 2 + 1
        config.write_text(
            f'bind 127.0.0.1\nport {port}\ndir "{self._folder}"\n'
            f"sentinel monitor {self.NAME} 127.0.0.1 {self.master.port} {quorum}\n"
            f"sentinel down-after-milliseconds {self.NAME} {self._down_after_ms}\n"
            f"sentinel failover-timeout {self.NAME} 4000\n"
        )
        process.start([programs.redis_server(), str(config), "--sentinel"], cwd=self._folder)
        process.wait_ready(lambda: self._master_of(port) is not None, 20)

    def _watched(self) -> bool:
        for port in self._ports:
            with redis.Redis(port=port) as client:
                state = client.sentinel_masters()[self.NAME]
                if state["num-slaves"] < 1 or state["num-other-sentinels"] < len(self._ports) - 1:
                    return False
        with self.replica.client() as client:
            return bool(client.info("replication")["master_link_status"] == "up")

    def _master_of(self, port: int) -> Any:
        with contextlib.suppress(redis.ConnectionError), redis.Redis(port=port) as client:
            return client.sentinel_get_master_addr_by_name(self.NAME)
        return None
