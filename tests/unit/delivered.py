"""A delivery with scripted outlets, and what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from inferfleet.records import (
    Answer,
    Chunk,
    Requests,
    Signature,
    TensorSpec,
)
from inferfleet.results.memory import MemoryResults
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.delivery import Settling
from inferfleet.worker.plan import RoutePlan
from tests.support.builders import chunk, requests
from tests.support.outlets import Published, ScriptedOutlet, delivery, route_plan

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
DLT = "digits.requests.inferfleet.default.dlt"
BOTH = ("kafka:out", "redis")


class Bench:
    """A delivery with scripted outlets, and the settlings it completes."""

    def __init__(
        self,
        results: Sequence[str] = ("kafka:out",),
        *,
        signature: Signature = SIGNATURE,
        at_once: bool = False,
        route: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.clock = FakeClock()
        self.outlet = ScriptedOutlet(at_once=at_once)
        self.store = MemoryResults()
        self.metrics = PrometheusMetrics()
        self.plan: RoutePlan = route_plan(signature, results=results, **(route or {}))
        self.delivery = delivery(self.outlet, self.store, self.metrics, self.clock, **options)
        self.settled: list[Settling] = []
        self.delivery.on_settled = self.settled.append

    def part(self, count: int = 3, of: Chunk | None = None, **columns: Any) -> Requests:
        made = chunk([b"body-%d" % i for i in range(count)]) if of is None else of
        part = requests(made, range(count), **columns)
        self.plan.steer(part)
        return part

    def answer(self, part: Requests, outputs: Any = None) -> None:
        array = np.zeros((part.total_rows, 2), np.float32) if outputs is None else np.asarray(outputs)
        failed = self.delivery.answer(self.plan, self.plan.variants[0], Answer(part, {"y": array}))
        self.delivery.row_failures(self.plan, failed)

    def finish(self) -> None:
        """Let every outlet confirm all it has, until nothing is left."""
        for _ in range(10):
            self.outlet.confirm_all()
            self.store.poll()

    @property
    def rows(self) -> list[int]:
        """The settled rows, each as often as it was settled."""
        return sorted(row for settling in self.settled for row in settling.rows)

    @property
    def outcomes(self) -> dict[str, int]:
        """How the settled rows are counted."""
        counts: dict[str, int] = {}
        for settling in self.settled:
            for (_, _, outcome), count in settling.outcomes.items():
                counts[outcome] = counts.get(outcome, 0) + count
        return {outcome: count for outcome, count in counts.items() if count}

    def codes(self, destination: str = "out") -> list[str | None]:
        """The code of each outcome that a topic kept, ``None`` for answers."""
        return [code_of(each) for each in self.outlet.to(destination)]


def code_of(each: Published) -> str | None:
    code = each.header("inferfleet-code")
    return None if code is None else code.decode()


def counted(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0
