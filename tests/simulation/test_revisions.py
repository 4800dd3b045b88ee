"""Routes that change while records flow: who answers is a matter of a record's own time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from inferfleet import config as settings
from inferfleet.core.revisions import Adoption
from inferfleet.core.routing import Steering
from inferfleet.worker import adopting, lifecycle
from inferfleet.worker.adopting import Adopting
from inferfleet.worker.schedule import Schedule, Way
from inferfleet.worker.steered import Steered
from inferfleet.worker.versions import Versions
from tests.simulation.audit import ViolationError
from tests.simulation.revisions import run

pytestmark = pytest.mark.usefixtures("silent_logs")

_TEXT = """
[batching]
max_batch_size = {batch}
max_queue_delay_ms = {delay}
[worker]
drain_timeout_s = 3
[routing]
horizon_s = {horizon}
[models]
memory_bytes = {memory}
"""
SEEDS = range(20)


def config(seed: int) -> settings.Config:
    """Return settings that differ from seed to seed."""
    return settings.parse(
        _TEXT.format(
            batch=(1, 4, 16)[seed % 3],
            delay=(0, 200, 2_000)[seed // 3 % 3],
            horizon=(30, 3_600)[seed % 2],
            memory=(0, 0, 900)[seed // 2 % 3],
        )
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_record_meets_the_revision_of_its_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every batch, over promotions, aborts, late news, wrong clocks, old logs and restarts."""
    run(seed, config(seed), monkeypatch)


def test_everything_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a few seeds; else the judgement would prove little."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        with monkeypatch.context() as patch:
            seen += run(seed, config(seed), patch).seen
    wanted = (
        "timed", "grown", "promoted", "aborted", "blue/green", "older log offered", "fallback", "unloaded",
    )  # fmt: skip
    assert not {what for what in wanted if seen[what] < 3}, seen


# The judge is judged


def steers_all_by_the_newest(patch: pytest.MonkeyPatch) -> None:
    """Whatever a record's own time is."""
    patch.setattr(Schedule, "ways", lambda self, _: [Way(self.plan, None)])


def leaves_what_waits_to_the_bad_version(patch: pytest.MonkeyPatch) -> None:
    """An abort takes nothing back that was steered before."""
    patch.setattr(Steered, "moved", lambda *_: False)


def takes_over_what_is_not_loaded(patch: pytest.MonkeyPatch) -> None:
    """A revision counts as taken over before anything is steered by it."""
    right = Adopting.adopted.fget
    assert right is not None
    patch.setattr(Adopting, "adopted", property(lambda self: {n: self.log.latest(n) for n in right(self)}))


def follows_an_older_log(patch: pytest.MonkeyPatch) -> None:
    """Whatever the store offers is believed."""
    patch.setattr(lifecycle, "adoption", lambda *_: Adoption.NEWER)
    patch.setattr(adopting, "_order", lambda _: (0, 0))


def steers_by_a_salt_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """Each worker draws its own canary."""
    right = Steering.over
    patch.setattr(Steering, "over", lambda _, ranges: right("mine", ranges))


def forgets_the_horizon(patch: pytest.MonkeyPatch) -> None:
    """A version goes as soon as another one is newer, needed or not."""
    right = Versions.want
    patch.setattr(Versions, "want", lambda self, wanted: right(self, wanted._replace(live=wanted.live[-1:])))


BUGS = {
    steers_all_by_the_newest: "I7 I10",
    leaves_what_waits_to_the_bad_version: "I7",
    takes_over_what_is_not_loaded: "I7",
    follows_an_older_log: "I7",
    steers_by_a_salt_of_its_own: "I10",
    forgets_the_horizon: "memory",
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_fault_put_in_on_purpose_is_found(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a few seeds, and under the name of a promise that it breaks."""
    found = next(filter(None, (_violation(bug, seed, monkeypatch) for seed in range(40))), "")
    assert found, "40 seeds have not found it"
    assert found.split(": ")[0] in BUGS[bug].split(), found


def _violation(bug: Callable[[pytest.MonkeyPatch], None], seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        bug(patch)
        try:
            run(seed, config(seed), patch)
        except ViolationError as violation:
            return str(violation)
    return ""
