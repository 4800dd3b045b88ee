"""A fleet of worker processes that members leave and join while requests flow."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from inferfleet.models.repository import Repository
from inferfleet.testing.checksum import write_checksum_model
from loadtest.subjects import REPOSITORY_ROOT, Subject
from loadtest.workloads import Fleet, write_fleet

MODEL = "lt-checksum"
_DRAIN_S = 40.0


@dataclass
class Squad:
    """Worker processes of one fleet, oldest first; ``settings`` are laid over its file as environment.

    Start workers from a thread that outlives them: the kernel ends a child whose starter has ended.
    """

    config: Path
    group: str
    settings: dict[str, str] = field(default_factory=dict)
    alive: list[Subject] = field(default_factory=list)
    draining: list[Subject] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    """Exit codes of the workers that were asked to drain."""
    started: int = 0

    def start(self) -> str:
        """Start one more worker and return its name."""
        self.started += 1
        name = f"w-{self.started}"
        worker = Subject(name, self.config.parent / f"{name}.log")
        self._launch(worker)
        self.alive.append(worker)
        return name

    def _launch(self, worker: Subject) -> None:
        env = {**os.environ, **self.settings, "INFERFLEET__WORKER__ID": worker.name, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "inferfleet.cli", "worker", "--config", str(self.config)]
        worker.start(command, cwd=REPOSITORY_ROOT, env=env)

    def kill(self, at: int = 0) -> str:
        """End a worker at once (SIGKILL) and return its name."""
        worker = self.alive.pop(at)
        worker.kill()
        return worker.name

    def drain(self, at: int = 0) -> str:
        """Ask a worker to drain (SIGTERM) and return its name without waiting."""
        worker = self.alive.pop(at)
        os.kill(worker.pid, signal.SIGTERM)
        self.draining.append(worker)
        return worker.name

    def check(self) -> None:
        """Raise with the end of its log when a worker has ended that nobody ended."""
        for worker in self.alive:
            worker.check()

    def revive(self) -> list[str]:
        """Start every worker again that has ended by itself, as a supervisor does; return their names."""
        ended = [worker for worker in self.alive if not worker.running]
        for worker in ended:
            self._launch(worker)
        return [worker.name for worker in ended]

    def wait_members(self, admin: AdminClient, count: int, timeout_s: float = 60.0) -> None:
        """Return once ``count`` members of the group hold partitions."""
        gives_up_at = time.monotonic() + timeout_s
        while (holding := self._members(admin)) != count:
            self.check()
            if time.monotonic() > gives_up_at:
                raise RuntimeError(f"{holding} of {count} workers hold partitions after {timeout_s:g} s")
            time.sleep(0.1)

    def _members(self, admin: AdminClient) -> int:
        return members(admin, self.group)

    def finish(self) -> None:
        """Let every worker drain; ``codes`` is complete afterwards, -9 for one that took too long."""
        while self.alive:
            self.drain()
        gives_up_at = time.monotonic() + _DRAIN_S
        while any(worker.running for worker in self.draining) and time.monotonic() < gives_up_at:
            time.sleep(0.05)
        for worker in self.draining:
            self.codes.append(worker.terminate(0.1) if not worker.running else -signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End whatever is left."""
        for worker in [*self.alive, *self.draining]:
            worker.kill()
        self.alive.clear()
        self.draining.clear()


def write_squad(fleet: Fleet, delay_ms: float, protocol: str = "") -> Squad:
    """Write the checksum model and the settings beside ``fleet.repository``; return an empty squad.

    Each batch takes ``delay_ms`` in the model, so that rows are in flight at any instant.
    """
    fleet.repository.mkdir(parents=True, exist_ok=True)
    write_checksum_model(Repository(fleet.repository), fleet.model, "1", delay_ms_per_batch=delay_ms)
    config = write_fleet(fleet, fleet.repository.parent)
    settings = {"INFERFLEET__KAFKA__GROUP_PROTOCOL": protocol} if protocol else {}
    return Squad(config, f"{fleet.name}.default", settings)


def members(admin: AdminClient, group: str) -> int:
    """Return how many members of ``group`` hold partitions; 0 for a group that does not exist yet."""
    future = admin.describe_consumer_groups([group], request_timeout=10)[group]
    try:
        found = future.result().members
    except KafkaException:
        return 0
    return sum(bool(member.assignment and member.assignment.topic_partitions) for member in found)
