"""A worker's life under seeds: started when its models are there, drained when told, idle when done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from inferfleet import config as settings
from inferfleet.control.filefeed import READ_EVERY_S
from inferfleet.errors import BrokerError, ModelLoadError
from inferfleet.plane import WorkerReport
from inferfleet.ports import RefusalKind
from inferfleet.routes import parse_routes
from inferfleet.summaries import Window
from inferfleet.worker.lifecycle import Worker
from tests.simulation.life import RESULTS, SOURCE, Life, table

pytestmark = pytest.mark.usefixtures("silent_logs")

CONFIG = settings.parse("[batching]\nmax_batch_size = 4\n[worker]\ndrain_timeout_s = 3\n")
SEEDS = range(8)
_REDIS_ONLY = """
[[route]]
name = "a"
source = "kafka:a.in"
results = ["redis"]
model = "m"
version = "1"
"""


@pytest.fixture
def life(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Life:
    """A world under the test's seed."""
    spec = getattr(request.node, "callspec", None)
    return Life(spec.params["seed"] if spec else 0, CONFIG, monkeypatch)


def finish(life: Life) -> None:
    """Let a last worker answer what is left, and judge the whole."""
    life.happens.clear()
    assert life.worker("last").run(until_idle_s=1.0) == 0
    assert life.lag == 0
    life.audit.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_until_idle_ends_when_nothing_is_left(life: Life, seed: int) -> None:
    """Everything that was there is answered and committed, and so is what comes while it works."""
    life.produce(40)
    life.happens.append(lambda: life.produce(3) if life.sent < 150 else None)
    assert life.worker().run(until_idle_s=0.5) == 0
    assert life.lag == 0
    life.audit.close()
    assert all(engine.closed for engine in life.engines)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stop_drains_and_leaves_the_rest_to_others(life: Life, seed: int) -> None:
    """Told to stop at any moment it ends in time, gives back what is open, and nothing is lost."""
    worker = life.worker()
    told: list[float] = []

    def stop() -> None:
        if not told and life.rng.random() < 0.1:
            told.append(life.clock.monotonic())
            worker.stop()

    life.happens += [lambda: life.produce(10) if life.sent < 300 else None, stop]
    worker.run()
    assert life.clock.monotonic() - told[0] <= CONFIG.worker.drain_timeout_s + 0.2
    assert all(engine.closed for engine in life.engines)
    finish(life)


def test_a_drain_whose_outlet_is_stuck_ends_in_time(life: Life) -> None:
    """What cannot be confirmed is given back: the next worker answers it."""
    life.produce(20)
    worker = life.worker()
    life.broker.refuse(RESULTS, RefusalKind.LATER)
    life.happens.append(lambda: worker.stop() if worker.loop.held else None)
    assert worker.run() > 0
    life.accept_results()
    finish(life)


@pytest.mark.parametrize("seed", SEEDS)
def test_routes_change_while_it_serves(life: Life, seed: int) -> None:
    """A new version is loaded first and served then; one that does not load changes nothing."""
    life.broken = {"3"}
    worker = life.worker()

    def change() -> None:
        life.routes = table(life.rng.randrange(1, 4))
        # A broken version is never served, and one that serves is never closed under its batches.
        life.audit.versions["a"] = {"1", "2"}

    life.happens += [lambda: life.produce(4), change, lambda: worker.stop() if life.sent > 300 else None]
    worker.run()
    life.routes = table(1)
    finish(life)


def test_a_worker_without_its_model_does_not_join(life: Life) -> None:
    """It says what is wrong, and has taken nothing."""
    life.produce(3)
    life.broken = {"1"}
    with pytest.raises(ModelLoadError, match="version 1 is broken"):
        life.worker().run()
    assert life.broker.group(CONFIG.group).generation == 0
    life.broken = set()
    finish(life)


def test_a_start_that_fails_keeps_what_a_crash_has_left(life: Life) -> None:
    """A broker or a model that is away between two crashes must not hide what kills the process."""
    life.marks.mark = {"a.in-0-7": 1, "a.in-1-2": 2}
    life.broken = {"1"}
    with pytest.raises(ModelLoadError):
        life.worker().run()
    assert life.marks.mark == {"a.in-0-7": 1, "a.in-1-2": 2}
    life.broken = set()
    finish(life)
    assert life.marks.mark is None


def test_a_start_that_fails_is_no_crash(life: Life) -> None:
    """Nothing had run, so the next start need not be careful."""
    life.broken = {"1"}
    with pytest.raises(ModelLoadError):
        life.worker().run()
    assert life.marks.mark is None


def test_a_worker_that_is_stopped_while_loading_never_serves(life: Life) -> None:
    """SIGTERM during the start ends it at once."""
    worker = life.worker()
    worker.stop()
    assert worker.run() == 0
    assert life.broker.group(CONFIG.group).generation == 0


def test_a_group_that_denies_a_worker_is_an_error_of_one_line(life: Life) -> None:
    """It does not wait for ever to be let in."""
    life.broker.group(CONFIG.group).denied = f"no right to read {SOURCE}"
    with pytest.raises(BrokerError, match=r"no right to read a\.in"):
        life.worker().run()


def test_routes_that_need_redis_are_refused_by_a_worker_that_has_none(life: Life) -> None:
    """Nothing would keep their answers, and their records would be settled without any."""
    made = life.worker()
    worker = Worker(made._config, replace(made._to, results=None))
    first = life.routes

    def change() -> None:
        if worker.loop.ledger.streams and life.sent == 0:
            life.routes = parse_routes(_REDIS_ONLY, "inferfleet", "routes.toml")
        waited = life.clock.monotonic() - began
        if waited > 2 * READ_EVERY_S and not life.sent:
            life.produce(20)
        if waited > 4 * READ_EVERY_S:
            worker.stop()

    began = life.clock.monotonic()
    life.happens.append(change)
    worker.run()
    assert worker.status().revision == first.revision
    life.routes = first
    finish(life)


class Told:
    """A reporter that keeps what it was told."""

    dropped = 0

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []
        self.windows: list[Window] = []
        self.closed = False

    def heartbeat(self, report: WorkerReport) -> None:
        self.reports.append(report)

    def append(self, windows: Sequence[Window]) -> None:
        self.windows += windows

    def close(self) -> None:
        self.closed = True


def test_a_worker_says_how_it_is_from_its_start_to_its_drain(life: Life) -> None:
    """Loading first, then what it has taken over, at once; refused versions with their reason."""
    made, told = life.worker(), Told()
    worker = Worker(made._config, replace(made._to, reporter=told))
    life.broken = {"2"}

    def change() -> None:
        if life.sent > 50:
            life.routes = table(2)

    life.happens += [
        lambda: life.produce(4) if life.sent < 100 else None,
        change,
        lambda: worker.stop() if told.reports and told.reports[-1].refused else None,
    ]
    worker.run()
    first, last = told.reports[0], told.reports[-1]
    assert (first.loading, first.adopted, first.draining) == (["m:1"], {}, False)
    assert (last.ready, last.adopted, last.draining) == (["m:1"], {"a": 0}, True)
    assert last.digests == {"m:1": "digest of m:1"}
    assert last.refused == {"m:2": "model m version 2 is broken"}
    assert (last.memory_bytes, last.stale, list(last.lag)) == (100, "", ["a"])
    assert max(report.rows_per_s.get("a", 0) for report in told.reports) > 0
    assert told.closed
    assert sum(window.requests for window in told.windows) > 0
    life.routes = table(1)
    finish(life)
