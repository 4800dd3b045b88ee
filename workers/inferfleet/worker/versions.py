"""The model versions of one worker: which are loaded, which may be let go, and what there is room for.

With a bound on memory (``[models] memory_bytes``) versions load one after another, so that each is measured
by itself and there is room for it before it begins. A version that routes need now, later, or are announced
to need is never let go for another one; what left force lately goes first, least recently used first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import structlog

from inferfleet.errors import InferfleetError, ModelLoadError
from inferfleet.plane import version_name
from inferfleet.ports import BatchingWishes, Clock, LoadedModel
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.dispatching import Dispatching
from inferfleet.worker.engine import Engine, Loaded, News

log = structlog.get_logger(__name__)

REFUSED_AGAIN_S = 20.0
"""A refused version is tried again after this long: it may have been copied since."""

Version = tuple[str, str]


class Models(Protocol):
    """Where model versions come from; loading verifies before it parses."""

    def load(self, model: str, version: str) -> LoadedModel:
        """Fetch, load, check and warm up; blocks, called from the version's device thread."""

    def wishes(self, model: str, version: str) -> BatchingWishes:
        """Return what the ``[batching]`` of a loaded version asks for."""

    def holds_bytes(self, model: str, version: str) -> int:
        """Return what a version holds: as measured when it was loaded, before that the size of its files.

        Reads a manifest at most, and returns 0 where there is none.
        """

    def digest(self, model: str, version: str) -> str:
        """Return the sha256 of a loaded version's manifest."""


class Wanted(NamedTuple):
    """Versions by who wants them.

    ``live``: revisions in force now or later; ``announced``: what is to be served next; ``past``: revisions
    that left force within the horizon, for records that come late.
    """

    live: Collection[Version] = ()
    announced: Collection[Version] = ()
    past: Collection[Version] = ()


class _Refusal(NamedTuple):
    error: InferfleetError
    at: float


class Versions:
    """Engines of versions, from load to close; owned by the worker loop's thread."""

    def __init__(
        self,
        models: Models,
        running: Dispatching,
        news: SimpleQueue[News],
        metrics: PrometheusMetrics,
        clock: Clock,
        memory_bytes: int,
    ) -> None:
        self._models = models
        self._running = running
        self._news = news
        self._metrics = metrics
        self._clock = clock
        self._bound = memory_bytes
        self._engines: dict[Version, Engine] = {}
        self._leaving: list[Engine] = []
        self._refused: dict[Version, _Refusal] = {}
        self._wanted = Wanted()
        self._evicted: set[Version] = set()
        self.changes = 0
        """Rises whenever a version was loaded, refused, or let go."""

    # What there is

    @property
    def loaded(self) -> dict[Version, Engine]:
        """The versions that can answer."""
        return {key: engine for key, engine in list(self._engines.items()) if engine.signature is not None}

    @property
    def loading(self) -> list[Version]:
        """The versions that do not answer yet, those included that wait for their turn."""
        waiting = [key for key in self._in_order() if key not in self._engines and key not in self._refused]
        return [
            *(key for key, engine in list(self._engines.items()) if engine.signature is None),
            *waiting,
        ]

    @property
    def refused(self) -> dict[Version, InferfleetError]:
        """The versions that do not load, and why."""
        return {key: refusal.error for key, refusal in dict(self._refused).items()}

    @property
    def all(self) -> list[Engine]:
        """Every engine, those that leave included."""
        return [*self._engines.values(), *self._leaving]

    @property
    def held_bytes(self) -> int:
        """What all versions hold together."""
        return sum(self._models.holds_bytes(engine.model, engine.version) for engine in self.all)

    def digests(self) -> dict[str, str]:
        """Return the digests of the loaded versions by their names."""
        return {version_name(*key): self._models.digest(*key) for key in self.loaded}

    # What is wanted

    def want(self, wanted: Wanted) -> None:
        """Load what is wanted and not there, and let go what nobody wants."""
        self._wanted = wanted
        everything = {*wanted.live, *wanted.announced, *wanted.past}
        now = self._clock.monotonic()
        for key in self._refused.keys() - everything:
            self._metrics.model_gone(*key)
        self._refused = {
            key: refusal
            for key, refusal in self._refused.items()
            if key in everything and now - refusal.at < REFUSED_AGAIN_S
        }
        self._evicted &= everything
        self._evicted -= {*wanted.live, *wanted.announced}
        for key in [key for key in self._engines if key not in everything]:
            self._let_go(key)
        self._load_next()

    def _in_order(self) -> Iterable[Version]:
        wanted = self._wanted
        past = [key for key in wanted.past if key not in self._evicted]
        return dict.fromkeys((*wanted.live, *wanted.announced, *past))

    def _load_next(self) -> None:
        for key in self._in_order():
            if key in self._engines or key in self._refused or key in self._evicted:
                continue
            leaving = next((e for e in self._leaving if (e.model, e.version) == key), None)
            if leaving is not None:  # still warm: a version never has two engines
                self._leaving.remove(leaving)
                self._engines[key] = leaving
                self.changes += 1
            elif not self._bound:
                self._start(key)
            elif any(engine.signature is None for engine in self.all):
                return
            elif self._has_room(key):
                self._start(key)
                return

    def _start(self, key: Version) -> None:
        engine = Engine(*key, lambda: self._models.load(*key), self._news, self._clock)
        engine.used_at = self._clock.monotonic()
        self._engines[key] = engine
        self._metrics.model_loading(*key)
        engine.start()

    def _has_room(self, key: Version) -> bool:
        """Make room for a version; refuse one that is announced, and leave one of the past, if there is none.

        What is in force already is loaded in any case: without it nobody would answer.
        """
        needed = self._models.holds_bytes(*key)
        self._evict(needed)
        free = self._bound - self.held_bytes
        if needed <= free:
            return True
        if self._leaving:  # its memory comes back when its last batch has ended
            return False
        if key in self._wanted.live:
            log.warning(
                "memory_budget_exceeded", model=key[0], version=key[1], needed=needed, bound=self._bound
            )
            return True
        error = ModelLoadError(
            f"model {key[0]} version {key[1]} needs {needed:,} bytes and {max(0, free):,} are free: "
            f"what routes need holds {self.held_bytes:,} of [models] memory_bytes = {self._bound:,}"
        )
        self._refuse(key, error)
        return False

    def _evict(self, needed: int) -> None:
        """Let versions go that only late records may want, until ``needed`` bytes will be free."""
        kept = {*self._wanted.live, *self._wanted.announced}
        spare = [key for key in self.loaded if key not in kept]
        spare.sort(key=lambda key: self._engines[key].used_at)
        staying = sum(self._models.holds_bytes(*key) for key in self._engines)
        for key in spare:
            if staying + needed <= self._bound:
                return
            staying -= self._models.holds_bytes(*key)
            self._evicted.add(key)
            log.info("model_evicted", model=key[0], version=key[1], bound=self._bound)
            self._let_go(key)

    def _let_go(self, key: Version) -> None:
        self._leaving.append(self._engines.pop(key))
        self.changes += 1

    # What happens

    def heard(self, items: Iterable[Loaded], kept: str) -> None:
        """Hear that versions have loaded, or have not; ``kept`` names the routes that go on meanwhile."""
        for item in items:
            engine = item.engine
            if item.error is None:
                log.info("model_ready", model=engine.model, version=engine.version)
                self._metrics.model_loaded(engine.model, engine.version, True)
                self._running.watch(engine)
                self.changes += 1
            else:
                self._engines.pop((engine.model, engine.version), None)
                self._leaving = [each for each in self._leaving if each is not engine]
                self._refuse((engine.model, engine.version), load_error(item), kept)
        if self._bound:
            self._evict(0)
        self._load_next()

    def _refuse(self, key: Version, error: InferfleetError, kept: str = "") -> None:
        log.error("model_refused", model=key[0], version=key[1], error=str(error), kept=kept)
        self._metrics.model_loaded(*key, False)
        self._refused[key] = _Refusal(error, self._clock.monotonic())
        self.changes += 1

    def retire(self) -> None:
        """Close engines that nobody wants any longer, once nothing of theirs is under way."""
        idle = [e for e in self._leaving if self._running.watches(e) and not self._running.busy(e)]
        for engine in idle:
            self._leaving.remove(engine)
            self._running.forget(engine)
            engine.close()
            self._metrics.model_gone(engine.model, engine.version)
            log.info("model_unloaded", model=engine.model, version=engine.version)
        if idle:
            self._load_next()


def load_error(item: Loaded) -> InferfleetError:
    """Return why a version did not load, as a person is told."""
    if isinstance(item.error, InferfleetError):
        return item.error
    return ModelLoadError(
        f"model {item.engine.model} version {item.engine.version} did not load: "
        f"{type(item.error).__name__}: {item.error}"
    )
