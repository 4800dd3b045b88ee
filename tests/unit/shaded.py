"""A loop whose route has a shadow, and a reporter that keeps what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from inferfleet.config import Config, Retry, Worker
from inferfleet.errors import Code
from inferfleet.plane import WorkerReport
from inferfleet.records import Answer, Array, Batch, BatchResult, Chunk, RowFailure
from inferfleet.routes import Shadow, Variant
from inferfleet.summaries import Window, decode_window, encode_window
from inferfleet.worker.engine import Finished
from inferfleet.worker.observing import Observing
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.schedule import Schedule
from tests.support.builders import v2
from tests.support.outlets import route_plan
from tests.unit.test_worker_loop import SIGNATURE, Bench

NEXT = Shadow("next", "2", 1.0, 0.0)
VARIANTS = (Variant("stable", "1", 50, ((0, 5_000),)), Variant("canary", "3", 50, ((5_000, 10_000),)))
GOOD = v2([1, 2, 3, 4], [1, 4])


class Told:
    """A reporter that keeps what it was told, as it would be stored."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.dropped = 0

    def heartbeat(self, report: WorkerReport) -> None:
        """Nobody asks here."""

    def append(self, windows: Sequence[Window]) -> None:
        self.windows += [decode_window(encode_window(window)) for window in windows]

    def close(self) -> None:
        """Nothing is open."""

    def of(self, role: str, version: str) -> Window:
        (window,) = [each for each in self.windows if (each.role, each.version) == (role, version)]
        return window


class Shaded(Bench):
    """A loop whose route has a shadow; answers of versions come from a table."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *shadows: Shadow,
        reports: bool = True,
        crashed: bool = False,
        every_s: float = 1e9,
        **route: Any,
    ) -> None:
        self.shadows = shadows or (NEXT,)
        self.told = Told()
        self._reports, self._crashed, self._every_s = reports, crashed, every_s
        super().__init__(monkeypatch, **route)

    def use(self, version: str = "1", **route: Any) -> RoutePlan:
        config = Config(worker=Worker(id="w"), retry=Retry(delays_ms=()))
        variants = route.pop("variants", (Variant("stable", version, 100, ((0, 10_000),)),))
        plan = route_plan(SIGNATURE, variants=variants, config=config, shadows=self.shadows, **route)
        if self._reports:
            observing = Observing("w", self.told, self.clock, self._every_s, crashed=self._crashed)
            self.loop.observing = self.loop.shadowing.observing = observing
        self.loop.use([Schedule.always(plan)])
        for engine in {each.engine for each in (*plan.variants, *plan.shadows)}:
            self.loop.engines.watch(engine)
        self.plan = plan
        return plan

    def take(self, of: Chunk) -> None:
        """Let a further chunk of a stream arrive, and its requests be given to an engine."""
        if of.stream not in self.loop.ledger.streams:
            self.loop.assigned([of.stream])
        self.intake.chunks.append(of)
        for _ in range(3):
            self.clock.advance(0.6)
            self.loop.turn(0.0)

    def finish(
        self, value: float | Array = 0.0, *, fails: bool = False, seconds: float = 0.01, width: int = 2
    ) -> Batch:
        """Let the oldest batch end, as the device thread would tell it."""
        engine, batch = self.flying.pop(0)
        result = BatchResult(batch, seconds=seconds)
        at = 0
        for part in batch.parts:
            if fails:
                singles = [part.slice(i, i + 1) for i in range(len(part))]
                result.failures += [RowFailure(each, Code.MODEL, "no") for each in singles]
                continue
            outputs = np.broadcast_to(np.asarray(value, np.float32), (batch.rows, width))
            result.answers.append(Answer(part, {"y": outputs[at : at + part.total_rows].copy()}))
            at += part.total_rows
        self.loop._news.put(Finished(engine, result))
        self.loop.turn(0.0)
        return batch

    def close(self) -> None:
        assert self.loop.observing is not None
        self.loop.observing.close()

    def rest(self, value: float = 0.0) -> None:
        """Let everything run to its end."""
        for _ in range(10_000):
            if not self.flying and not self.loop.shadowing.ready:
                return
            self.turn()
            if self.flying:
                self.finish(value)
        raise AssertionError("it does not come to rest")
