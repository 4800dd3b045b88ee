"""A shadow is invisible (I11): whatever it does, the same seed gives the same outcomes, to the byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from inferfleet.routes import RouteTable, Shadow
from inferfleet.testing.puppet import Script
from tests.simulation.engine import SimEngine, SimModel
from tests.simulation.fleet import RESULTS
from tests.simulation.traffic import POISON
from tests.simulation.world import World

SEEDS = range(10)
SHADOW = "9"


class ShadedWorld(World):
    """A world whose routes have a shadow that is well, fails on everything, hangs, or is not there.

    What the shadow's engine does is drawn apart from all else, so that the schedule stays what it is.
    ``secondary`` is the share that runs again on the engines of those who answered.
    """

    def __init__(self, seed: int, how: str, secondary: float = 0.0) -> None:
        self._how = how
        self._shadow = Shadow("shade", SHADOW, 0.7, secondary)
        self._side = random.Random(f"side {seed}")
        self._shades: dict[str, SimEngine] = {}
        self.shown = 0
        super().__init__(seed)

    def start(self, name: str = "") -> str:
        told = super().start(name)
        worker = self.workers[-1]
        model = SimModel(SHADOW, Script(fail_on=frozenset([POISON])), attempts=lambda _: 99)
        model.broken = self._how == "fails"
        engine = self._shades[worker.name] = SimEngine("m", model, worker.news, self.clock)
        if self._how != "absent":
            engines, use = dict(worker.engines), worker.use

            def shaded(table: RouteTable) -> None:
                worker.engines = engines | {("m", SHADOW): engine}
                routes = tuple(
                    msgspec.structs.replace(route, shadows=(self._shadow,)) for route in table.routes
                )
                use(table._replace(routes=routes))
                worker.engines = engines

            worker.use = shaded  # type: ignore[method-assign]  # as every later change of routes
            worker.loop.engines.watch(engine)
        worker.use(self.table)
        return told

    def _do(self, action: Callable[[], str]) -> None:
        super()._do(action)
        for worker in self.workers:
            engine = self._shades[worker.name]
            slow = self._side.random() < (0.05 if self._how == "slow" else 0.6)
            if engine.queued and self._how != "hangs" and slow:
                self.shown += len(engine.queued[0].parts)
                engine.finish(self._side.random())

    def outcomes(self) -> list[Any]:
        """Return everything that anybody may read, as it stands at the end."""
        topics = [*RESULTS.values(), *self.dead_letters, *self.retries]
        return [
            *[(topic, self.broker.records(topic)) for topic in topics],
            sorted(self._results.items()),
            sorted(self._replies.items()),
            sorted(self.broker.group(self.config.group).committed.items()),
        ]


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_shadow_changes_no_outcome(seed: int) -> None:
    """Well, failing, slow or hanging: not one byte, place, time or commit of anybody's answers."""
    plain = ShadedWorld(seed, "absent")
    plain.run()
    for how in ("well", "fails", "slow", "hangs"):
        shaded = ShadedWorld(seed, how)
        shaded.run()
        assert shaded.outcomes() == plain.outcomes(), how


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_repetition_on_the_answering_engine_breaks_no_promise(seed: int) -> None:
    """It takes an engine's time, so the schedule differs; what is promised does not."""
    world = ShadedWorld(seed, "well", secondary=1.0)
    world.run()
    for topic in (*RESULTS.values(), *world.dead_letters):
        for record in world.broker.records(topic):
            served = dict(record.headers or ()).get("inferfleet-served") or b""
            assert b"version=%b;" % SHADOW.encode() not in served


@pytest.mark.usefixtures("silent_logs")
def test_the_shadows_saw_something() -> None:
    shown = {}
    for how in ("well", "fails", "slow"):
        worlds = [ShadedWorld(seed, how) for seed in SEEDS]
        for world in worlds:
            world.run()
        shown[how] = sum(world.shown for world in worlds)
    assert min(shown.values()) > 4, shown
