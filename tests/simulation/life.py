"""One whole worker, start to end, in virtual time: whenever it waits, the world goes on around it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest

from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_outlet import MemoryOutlet
from inferfleet.config import Config, dead_letter_topic
from inferfleet.control.filefeed import FileFeed
from inferfleet.control.pauses import LocalPauses
from inferfleet.control_ports import RouteFeed
from inferfleet.errors import ModelLoadError
from inferfleet.ports import BatchingWishes, Clock, LoadedModel, RefusalKind
from inferfleet.records import Batch
from inferfleet.results.memory import MemoryResults
from inferfleet.routes import RouteTable, parse_routes
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.testing.puppet import PuppetModel, Script
from inferfleet.worker import lifecycle, versions
from inferfleet.worker.engine import BatchRunner, Engine, Finished, Loaded
from inferfleet.worker.lifecycle import Adapters, Worker
from tests.simulation.audit import Audit
from tests.simulation.engine import VirtualNews
from tests.simulation.traffic import POISON, is_large_answer, make
from tests.simulation.worker import NoWishes, WatchedIntake

SOURCE, RESULTS = "a.in", "a.out"
MOST_WAITS = 200_000

_ROUTES = """
[[route]]
name = "a"
source = "kafka:a.in"
results = ["kafka:a.out"]
model = "m"
version = "{version}"
"""


def table(version: int) -> RouteTable:
    """Return routes whose one route is answered by ``version``."""
    return parse_routes(_ROUTES.format(version=version), "inferfleet", "routes.toml")


class HandEngine(Engine):
    """An engine that loads and runs when the world lets it."""

    made: list[HandEngine]

    def __init__(
        self, model: str, version: str, load: Callable[[], LoadedModel], news: VirtualNews, clock: Clock
    ) -> None:
        super().__init__(model, version, load, news, clock)
        self.loading = False
        self.closed = False
        self.queued: list[Batch] = []
        self.made.append(self)

    def start(self) -> None:
        self.loading = True

    def submit(self, batch: Batch) -> None:
        assert not self.closed, f"a batch for {self}, which was closed"
        self.in_flight += 1
        self.queued.append(batch)

    def step(self) -> None:
        """Finish loading, or the oldest batch."""
        if self.loading:
            self.loading = False
            try:
                model = self._load()
            except ModelLoadError as error:
                self._news.put(Loaded(self, error))
            else:
                self.signature = model.signature
                self._runner = BatchRunner(model)
                self._news.put(Loaded(self, None))
        elif self.queued:
            self._news.put(Finished(self, self._runner.run(self.queued.pop(0))))

    def close(self) -> None:
        self.closed = True

    def join(self, timeout_s: float) -> bool:
        return True


class Life:
    """A topic, its requests, and one worker after another."""

    strict = True
    running: Worker

    def __init__(self, seed: int, config: Config, patch: pytest.MonkeyPatch) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, wait=self._wait)
        self.config = config
        dead_letters = dead_letter_topic(config, SOURCE)
        for name, partitions in ((SOURCE, 3), (RESULTS, 2), (dead_letters, 1)):
            self.broker.create_topic(name, partitions)
        self.accept_results()
        self.audit = Audit(self.broker, config.group, {RESULTS: "a", dead_letters: ""}, {}, {})
        self.routes = table(1)
        self.broken: set[str] = set()
        self.engines: list[HandEngine] = []
        self.outlet = MemoryOutlet(self.broker)
        self.marks = MemoryMarks()
        self.happens: list[Callable[[], object]] = []
        """What may happen while the worker waits, besides its own work going on."""
        self.sent = 0
        self.waits = 0
        patch.setattr(HandEngine, "made", self.engines, raising=False)
        patch.setattr(versions, "Engine", HandEngine)
        # The collector's settings belong to a whole process, which here is the test run's.
        nothing = SimpleNamespace(collect=int, freeze=int, set_threshold=lambda *_: None)
        patch.setattr(lifecycle, "gc", nothing)

    def accept_results(self) -> None:
        """Let the result topic take everything but answers that are too large."""
        self.broker.accept(RESULTS)
        self.broker.refuse(RESULTS, RefusalKind.TOO_LARGE, when=is_large_answer)

    def worker(self, name: str = "w") -> Worker:
        """Return a worker, not yet running."""
        news = VirtualNews()
        news.wait = self._wait
        self.outlet = MemoryOutlet(self.broker, holding=True)
        self.engines.clear()
        settings = msgspec.structs.replace(
            self.config, worker=msgspec.structs.replace(self.config.worker, id=name)
        )
        self.running = Worker(
            settings,
            Adapters(
                intake=WatchedIntake(self.broker, self.config.group, self.audit.may_repeat),
                outlet=self.outlet,
                results=MemoryResults(),
                models=self,
                metrics=PrometheusMetrics(),
                clock=self.clock,
                news=news,
                feed=self.feed(),
                pauses=LocalPauses(),
                marks=self.marks,
                brokers=frozenset({"kafka"}),
                strict=self.strict,
            ),
        )
        return self.running

    def feed(self) -> RouteFeed:
        """Return where the next worker's routes come from."""
        return FileFeed(lambda: self.routes, self.clock)

    def load(self, model: str, version: str) -> LoadedModel:
        """Give a puppet out, or refuse a version that is broken."""
        if version in self.broken:
            raise ModelLoadError(f"model {model} version {version} is broken")
        return PuppetModel(version, Script(fail_on=frozenset([POISON])))

    def wishes(self, model: str, version: str) -> BatchingWishes:
        """Nothing in particular."""
        return NoWishes()

    def holds_bytes(self, model: str, version: str) -> int:
        """As much as its number says."""
        return int(version) * 100

    def digest(self, model: str, version: str) -> str:
        """Its name will do."""
        return f"digest of {model}:{version}"

    def produce(self, count: int = 5) -> None:
        """Send requests."""
        for _ in range(count):
            self.sent += 1
            request = make(self.rng, self.sent, "a", self.clock.utc_ms(), faults=True)
            place = self.broker.append(SOURCE, request.value, key=request.key, headers=request.headers)
            self.audit.sent(request, *place)

    @property
    def lag(self) -> int:
        """What the group has not committed."""
        return self.broker.lag(self.config.group, SOURCE)

    def _wait(self, seconds: float) -> None:
        self.waits += 1
        if self.waits > MOST_WAITS:
            raise AssertionError(f"the worker waits for ever: lag {self.lag}, {self.outlet}, {self.engines}")
        self.clock.advance(seconds)
        for engine in self.engines:
            if self.rng.random() < 0.5:
                engine.step()
        self.outlet.let_through(self.rng.choice([0, 1, 20]))
        if self.happens and self.rng.random() < 0.2:
            self.rng.choice(self.happens)()
        self.audit.look()
