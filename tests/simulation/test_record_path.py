"""Many seeds, one promise: what is sent is answered, once unless it was in flight, and rightly."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.world import World

SEEDS = 150
MUST_HAPPEN = (
    "answer",
    "repeated outcome",
    "commit",
    "commit refused",
    "assigned",
    "revoked",
    "lost",
    "route held",
    "full",
    "E_MODEL",
    "E_DEADLINE",
    "E_DECODE",
    "E_EMPTY",
    "E_SHAPE",
    "E_RESULT_TOO_LARGE",
    "retry",
    "used up",
    "killed",
    "spoilt",
    "route braked",
)
KEPT = Path(__file__).with_name("seeds.txt")


def _seeds() -> list[int]:
    """Return the usual seeds and those kept; INFERFLEET_SIMULATION_SEEDS=LOW-HIGH replaces both."""
    if asked := os.environ.get("INFERFLEET_SIMULATION_SEEDS"):
        low, _, high = asked.partition("-")
        return list(range(int(low), int(high or low) + 1))
    kept = [line.split("#")[0].strip() for line in KEPT.read_text().splitlines()]
    return sorted({*range(SEEDS), *(int(line) for line in kept if line)})


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("seed", _seeds())
def test_every_schedule_keeps_the_promises(seed: int) -> None:
    """No invariant is broken at any step, and when all is mended everything comes to rest."""
    World(seed).run()


@pytest.mark.usefixtures("silent_logs")
def test_the_faults_bite() -> None:
    """Over a few seeds everything happens that the promises are about; else they would prove little."""
    seen: Counter[str] = Counter()
    for seed in range(30):
        world = World(seed)
        world.run()
        seen += world.seen
    rare = {what for what in MUST_HAPPEN if seen[what] < 3}
    assert not rare, seen
