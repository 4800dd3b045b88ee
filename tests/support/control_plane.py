"""A control plane in memory for tests: its store, its clock, workers that obey when told, a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from inferfleet.catalogue import VersionFacts
from inferfleet.control.memory import MemoryControlStore
from inferfleet.coordinator.announcing import Author, Timing, activate_ready
from inferfleet.coordinator.routes import RouteControl
from inferfleet.core.barrier import needed
from inferfleet.errors import ConflictError, ModelRepositoryError
from inferfleet.plane import WorkerReport
from inferfleet.records import Signature, TensorSpec
from inferfleet.revisions import Head
from inferfleet.testing.clock import FakeClock

TTL_MS = 6_000
TIMING = Timing(2_000, 60.0)
INPUTS = (TensorSpec("x", "FP32", (4,)),)


class FakeCatalogue:
    """Versions 1 to 9 of any model but ``absent``; those of ``odd`` have inputs of their own."""

    def __init__(self) -> None:
        self.newest = "3"
        self.odd: set[str] = set()
        self.unknown: set[str] = set()

    def latest(self, model: str) -> str:
        """Return the highest version."""
        self.version(model, self.newest)
        return self.newest

    def version(self, model: str, version: str) -> VersionFacts:
        """Return what a version is."""
        if model == "absent" or len(version) > 1 or version in self.unknown:
            raise ModelRepositoryError(f"model {model} has no version '{version}'")
        inputs = (TensorSpec(f"x{version}", "FP32", (4,)),) if version in self.odd else INPUTS
        return VersionFacts(model, version, f"digest-{model}-{version}", Signature(inputs, ()))


class FakeWorker:
    """A worker that follows the log when :meth:`step` is called, and loads what it is told that it can."""

    def __init__(self, store: MemoryControlStore, name: str, pool: str = "default") -> None:
        self.store = store
        self.name = name
        self.pool = pool
        self.refuses: dict[str, str] = {}
        self.loads = True
        self.draining = False
        self.lag: dict[str, int] = {}
        self.stale = ""
        self.at_ms = 0
        self.head = Head()
        self._ready: set[str] = set()
        self._adopted: dict[str, int] = {}
        self._refused: dict[str, str] = {}

    def step(self) -> None:
        """Look at the log, load, report."""
        log = self.store.load()
        self.head = log.head
        for route, revisions in log.kept.items():
            last = revisions[-1]
            wanted = set(needed(last))
            self._refused |= {each: self.refuses[each] for each in wanted if each in self.refuses}
            if self.loads:
                self._ready |= {each for each in wanted if each not in self.refuses}
            if wanted <= self._ready:
                self._adopted[route] = last.number
        self.report()

    def report(self) -> None:
        """Say how it is, without looking at the log."""
        self.store.report(
            WorkerReport(
                worker=self.name,
                pool=self.pool,
                head=self.head,
                adopted=dict(self._adopted),
                ready=sorted(self._ready),
                refused=dict(self._refused),
                draining=self.draining,
                lag=dict(self.lag),
                stale=self.stale,
                at_ms=self.at_ms,
            ),
            TTL_MS,
        )


class Plane:
    """A store with workers; while a change waits, time passes and the workers step."""

    def __init__(self, workers: Iterable[str] = (), *, fleet: str = "f") -> None:
        self.clock = FakeClock()
        self.store = MemoryControlStore(self.clock)
        self.catalogue = FakeCatalogue()
        self.workers = [FakeWorker(self.store, name) for name in workers]
        self.between: Callable[[], None] = lambda: None
        self.control = RouteControl(self.store, self.clock, self.catalogue, fleet, TIMING, pause=self.pause)
        self.step()

    def lead(self) -> list[str]:
        """Look once at every announcement, as the leading coordinator does; return what was committed."""
        workers = self.store.workers()
        changes = activate_ready(
            self.store.load(), workers, self.clock.utc_ms(), TIMING, Author("coordinator")
        )
        done: list[str] = []
        for change, found in changes:
            try:
                (revision,) = self.store.commit(change)
            except ConflictError:
                continue
            done.append(f"{revision.action} {found.name}: {found}".rstrip(": "))
        return done

    def step(self) -> None:
        """Let every worker look once."""
        for each in self.workers:
            each.step()

    def pause(self, seconds: float) -> None:
        """Let time pass and the workers work."""
        self.clock.advance(seconds)
        self.between()
        self.step()
