"""Benches for the control plane's adapters: a fleet's store, and what follows and reports, of each kind."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from inferfleet.control.feed import FeedOptions, RedisRouteFeed
from inferfleet.control.memory import MemoryControlStore, MemoryReporter, MemoryRouteFeed
from inferfleet.control.reporter import RedisReporter
from inferfleet.control.store import RedisControlStore
from inferfleet.control_ports import ControlStore, Reporter, RouteFeed
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import NO_HASH
from inferfleet.testing.clock import FakeClock
from tests.support.redis_cluster import RedisCluster
from tests.support.waiting import wait_until

PATIENCE_S = 10.0
QUICK = FeedOptions(
    block_s=0.05, backoff_first_s=0.02, backoff_max_s=0.05, start_s=5.0, copy_start_s=0.2, close_s=2.0
)
KINDS = [
    "memory",
    pytest.param("redis", marks=pytest.mark.service),
    pytest.param("cluster", marks=pytest.mark.service),
]


class StoreBench:
    """One fleet's store, more views of the same, reporters, and the passing of time."""

    def __init__(self, kind: str, where: Place | None) -> None:
        self.kind = kind
        self.fleet = f"test-{secrets.token_hex(4)}"
        self.clock = FakeClock()
        self._where = where
        self._memory = MemoryControlStore(self.clock)
        self._made: list[Any] = []

    @property
    def connect(self) -> Callable[[], Any]:
        where = self._where
        assert where is not None
        return lambda: open_redis(where)

    def store(self) -> ControlStore:
        """Return one more coordinator's view."""
        if self._where is None:
            return self._memory
        made = RedisControlStore(
            self.connect, self.fleet, address=self._where.shown, utc_ms=self.clock.utc_ms
        )
        self._made.append(made)
        return made

    def reporter(self, worker: str = "w-1", pool: str = "default") -> Reporter:
        """Return a worker's reporter."""
        if self._where is None:
            return MemoryReporter(self._memory)
        made = RedisReporter(self.connect, self.fleet, pool, worker)
        self._made.append(made)
        return made

    def redis(self) -> Any:
        """Return a client that answers in bytes."""
        made = self.connect()
        self._made.append(made)
        return made

    def lapse(self, ms: int) -> None:
        """Let the lease and registrations of so many milliseconds expire."""
        if self._where is None:
            self.clock.advance(ms / 1000)
            return
        client = self.redis()
        client.pexpire(f"{{{self.fleet}}}:lease", 1)
        for key in client.zrange(f"{{{self.fleet}}}:workers:index", 0, -1):
            client.pexpire(f"{{{self.fleet}}}:workers:{key.decode()}", 1)
        wait_until(lambda: not client.exists(f"{{{self.fleet}}}:lease"), PATIENCE_S, "the lease is gone")

    def close(self) -> None:
        for each in self._made:
            each.close()


class FeedBench:
    """A fleet's store, feeds that follow it, and what an operator may do to the store."""

    def __init__(self, where: Place | None, folder: Path) -> None:
        self.fleet = f"test-{secrets.token_hex(4)}"
        self.copy = folder / "state" / f"{self.fleet}.default.routes.json"
        self.clock = FakeClock()
        self.woken = threading.Event()
        self._where = where
        self._memory = MemoryControlStore(self.clock)
        self._feeds: list[RouteFeed] = []
        self.store: ControlStore = (
            self._memory
            if where is None
            else RedisControlStore(
                lambda: open_redis(where), self.fleet, address=where.shown, utc_ms=self.clock.utc_ms
            )
        )

    def feed(self, options: FeedOptions = QUICK, copy: bool = False) -> RouteFeed:
        """Return a worker's feed that has started."""
        where = self._where
        if where is None:
            return MemoryRouteFeed(self._memory)
        made = RedisRouteFeed(
            lambda: open_redis(where),
            self.fleet,
            address=where.shown,
            copy=self.copy if copy else None,
            wake=self.woken.set,
            options=options,
            utc_ms=self.clock.utc_ms,
        )
        self._feeds.append(made)
        made.start()
        return made

    def backup(self) -> Callable[[], None]:
        """Return what makes the store again what it is now."""
        if self._where is None:
            log = self._memory.copy()
            return lambda: self._memory.restore(log)
        with open_redis(self._where) as client:
            names = [f"{{{self.fleet}}}:{name}" for name in ("head", "routes", "revisions", "audit")]
            copies = {name: client.dump(name) for name in names}

        def restore() -> None:
            with open_redis(self._where) as client:
                client.delete(*names)
                for name, copy in copies.items():
                    if copy is not None:
                        client.restore(name, 0, copy)

        return restore

    def close(self) -> None:
        for each in self._feeds:
            each.close()
        self.store.close()


def place_of(kind: str, request: pytest.FixtureRequest) -> Place | None:
    """Return where the servers of a kind are; ``None`` for memory."""
    if kind == "redis":
        return Place(request.getfixturevalue("redis_server").url)
    if kind == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        return Place(mode="cluster", nodes=cluster.addresses)
    return None


def assert_chained(store: ControlStore) -> None:
    """Every entry names the hash of the one before, from the first one on."""
    found = store.audit(limit=10_000)
    assert [each.number for each, _ in found] == list(range(1, len(found) + 1))
    assert found[0][0].previous == NO_HASH
    for (_, body), (after, _) in pairwise(found):
        assert after.previous == hashlib.sha256(body).hexdigest()
