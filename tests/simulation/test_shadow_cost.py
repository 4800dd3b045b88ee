"""What a shadow costs those who wait, in virtual time: the real loop on one core that both models share.

Requests come at random at half of what the model can do; the shadow is as heavy. Two batches that run at once
take each other's time. No other load of a machine moves these figures.
"""

from __future__ import annotations

import numpy as np
import pytest

from inferfleet.records import Answer, Array, Batch, BatchResult
from inferfleet.routes import Shadow
from inferfleet.worker.engine import Engine, Finished
from tests.support.builders import chunk, v2
from tests.unit.shaded import Shaded

ROW_S = 0.004
LOAD = 0.5
GOAL_MS = 200.0
CAP_S = GOAL_MS / 10_000
SECONDS = 10.0
COVERAGE = 0.3
BODY = v2([1, 2, 3, 4], [1, 4])


class Core:
    """One core: of each engine the oldest batch runs, and those that run share the core evenly."""

    def __init__(self, bench: Shaded) -> None:
        self._bench = bench
        self._left_s: dict[int, float] = {}
        self._began: dict[int, float] = {}

    def _running(self) -> list[tuple[Engine, Batch]]:
        first: dict[int, tuple[Engine, Batch]] = {}
        for engine, batch in self._bench.flying:
            first.setdefault(id(engine), (engine, batch))
        for _, batch in first.values():
            self._left_s.setdefault(id(batch), batch.rows * ROW_S)
            self._began.setdefault(id(batch), self._bench.clock.monotonic())
        return list(first.values())

    def next_end_s(self) -> float:
        """Return in how many seconds the first running batch ends, if nothing changes."""
        running = self._running()
        return min((self._left_s[id(b)] * len(running) for _, b in running), default=float("inf"))

    def pass_time(self, seconds: float) -> list[Batch]:
        """Let time pass; return the batches that have ended."""
        running = self._running()
        self._bench.clock.advance(seconds)
        ended = []
        for engine, batch in running:
            self._left_s[id(batch)] -= seconds / len(running)
            if self._left_s[id(batch)] < 1e-9:
                self._bench.flying.remove((engine, batch))
                spent_s = self._bench.clock.monotonic() - self._began.pop(id(batch))
                del self._left_s[id(batch)]
                answers = [Answer(p, {"y": np.zeros((p.total_rows, 2), np.float32)}) for p in batch.parts]
                self._bench.loop._news.put(Finished(engine, BatchResult(batch, answers, seconds=spent_s)))
                ended.append(batch)
        return ended


def latencies(bench: Shaded, seed: int) -> Array:
    """Return the seconds that each request waited for its answer."""
    random = np.random.default_rng(seed)
    due_s = np.cumsum(random.exponential(ROW_S / LOAD, int(SECONDS * LOAD / ROW_S)))
    core, began = Core(bench), bench.clock.monotonic()
    waited: dict[int, float] = {}
    bench.loop.assigned([chunk([BODY]).stream])
    sent = 0
    while len(waited) < len(due_s):
        now_s = bench.clock.monotonic() - began
        ahead_s = due_s[sent] - now_s if sent < len(due_s) else float("inf")
        ended = core.pass_time(max(0.0, float(min(ahead_s, core.next_end_s()))))
        now_s = bench.clock.monotonic() - began
        for batch in ended:
            if batch.lane.role == "primary":
                for part in batch.parts:
                    number = part.chunk.positions[part.rows[0]]
                    waited[number] = now_s - float(due_s[number])
        while sent < len(due_s) and due_s[sent] <= now_s + 1e-9:
            bench.intake.chunks.append(chunk([BODY], first=sent))
            sent += 1
        for _ in range(3):
            bench.loop.turn(0.0)
    return np.array(list(waited.values()))


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_shadow_costs_one_of_its_batches_at_most(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At half load, as heavy as the primary: p99 is at most one capped batch later; coverage is large."""
    route = {"goal_p99_ms": GOAL_MS, "max_batch_size": 8, "max_queue_delay_ms": 0.0}
    without = Shaded(monkeypatch, Shadow("next", "2", 0.0001, 0.0), **route)
    before = latencies(without, seed)
    shaded = Shaded(monkeypatch, Shadow("next", "2", 1.0, 0.05), **route)
    after = latencies(shaded, seed)
    shaded.close()
    window = shaded.told.of("shadow", "2")
    low, high = (float(np.percentile(each, 99)) for each in (before, after))
    coverage = window.requests / len(after)
    said = f"p99 {low * 1e3:.1f} -> {high * 1e3:.1f} ms, coverage {coverage:.0%}"
    assert high <= low + CAP_S, said
    assert coverage >= COVERAGE, said
