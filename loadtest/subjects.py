"""The processes that are measured: the bare loop and the worker, each pinned to a core of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from loadtest.bareloop import Job
from loadtest.workloads import Fleet, Workload, derived, write_fleet, write_model
from tests.support.process import ServerProcess

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
BARE = "bare loop"
WORKER = "inferfleet"
NAMES = (BARE, WORKER)


class Subject(ServerProcess):
    """A measured process."""

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM, wait, and return the exit code; -9 if it had to be killed."""
        child = self._child
        if child is None:
            raise RuntimeError(f"{self.name} was never started")
        child.terminate()
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.kill()
        return code

    def check(self) -> None:
        """Raise with the end of the log when the process has ended by itself."""
        if not self.running:
            raise RuntimeError(f"{self.name} ended by itself; its log ends with:\n{self.log_tail()}")


@dataclass(frozen=True)
class Cores:
    """Which cores the subject may use, and which the broker, the generator and the observer."""

    subject: frozenset[int]
    others: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """Give the last usable core to the subject and the rest to everything else."""
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            return cls(frozenset(usable), frozenset(usable))
        return cls(frozenset(usable[-1:]), frozenset(usable[:-1]))


@contextlib.contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Run the body, and whatever it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Run:
    """One run of one subject over a request topic into a result topic of its own."""

    workload: Workload
    bootstrap: str
    requests: str
    results: str
    folder: Path
    latency: bool = False

    @property
    def name(self) -> str:
        """A name for the run's consumer group that no other run has."""
        return self.results.rsplit(".", 1)[-1]

    @property
    def derived(self) -> list[str]:
        """The topics of dead letters and retries that the worker's route needs; nothing should go there."""
        return derived(self.requests, f"lt-{self.name}.default")


def start(subject: str, run: Run, cores: frozenset[int]) -> Subject:
    """Start the bare loop or the worker for ``run``; it joins its group by itself a moment later."""
    command = bare_command(run) if subject == BARE else worker_command(run)
    with on_cores(cores):
        return launch(subject, command, run.folder / f"{subject.replace(' ', '-')}-{run.name}.log")


def launch(name: str, command: Sequence[str], log: Path) -> Subject:
    """Start a command in the repository's root with one thread for each numeric library."""
    process = Subject(name, log)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process.start(command, cwd=REPOSITORY_ROOT, env=env)
    return process


def bare_command(run: Run) -> list[str]:
    """Write the bare loop's job and return its command line."""
    job = Job(
        workload=run.workload.name,
        bootstrap=run.bootstrap,
        requests=run.requests,
        results=run.results,
        group=f"bare-{run.name}",
        model_folder=str(write_model(run.workload, run.folder / "models")),
        batch=run.workload.bare_batch,
        latency=run.latency,
    )
    path = run.folder / f"job-{run.name}.json"
    path.write_bytes(msgspec.json.encode(job))
    return [sys.executable, "-m", "loadtest.bareloop", str(path)]


def fleet_of(run: Run) -> Fleet:
    """Return the fleet settings that a run asks for."""
    write_model(run.workload, run.folder / "models")
    fleet = Fleet(
        name=f"lt-{run.name}",
        bootstrap=run.bootstrap,
        repository=run.folder / "models",
        requests=run.requests,
        results=run.results,
        model=run.workload.model,
        max_batch_size=run.workload.drain_batch,
    )
    if run.latency:
        return replace(fleet, max_queue_delay_ms=0, producer={"linger.ms": 0})
    return fleet


def worker_command(run: Run) -> list[str]:
    """Write the worker's configuration and return its command line."""
    config = write_fleet(fleet_of(run), run.folder / f"fleet-{run.name}")
    return [sys.executable, "-m", "inferfleet.cli", "worker", "--config", str(config)]
