"""RabbitMQ under seeds: whatever channels are lost, all is answered, and what was answered is known again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from inferfleet.records import Amqp, Chunk
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.loop import WorkerLoop
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.reading import Reading
from inferfleet.worker.recent import Recent, Seen
from tests.simulation.audit import ViolationError
from tests.simulation.channels import ChannelWorld

SEEDS = 60
MOST_SEEDS = 150
MUST_HAPPEN = (
    "ok",
    "channel lost",
    "redelivered",
    "retry",
    "route held",
    "route braked",
    "E_ROUTE",
    "E_MODEL",
)

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_schedule_keeps_the_promises(seed: int) -> None:
    """No invariant is broken at any step, and when all is mended everything comes to rest."""
    ChannelWorld(seed).run()


@pytest.mark.usefixtures("silent_logs")
def test_the_faults_bite() -> None:
    """Over a few seeds everything happens that the promises are about; else they would prove little."""
    seen: Counter[str] = Counter()
    for seed in range(10):
        world = ChannelWorld(seed)
        world.run()
        seen += world.seen
    assert not {what for what in MUST_HAPPEN if seen[what] < 3}, seen


# The judge is judged


def forgets_what_it_answered(patch: pytest.MonkeyPatch) -> None:
    """Whatever comes again runs again."""
    patch.setattr(Recent, "seen", lambda *_: Seen([], []))


def remembers_no_orphan(patch: pytest.MonkeyPatch) -> None:
    """What still runs for a lost channel is not known when it comes again."""

    def forgetful(self: Recent, chunk: Chunk, ids: Any, gone: Any) -> int:
        chunk.orphaned = True
        return 1

    patch.setattr(Recent, "orphaned", forgetful)


def takes_an_orphan_for_answered(patch: pytest.MonkeyPatch) -> None:
    """What still runs is settled as if its outcome were safe."""
    right = Recent.seen

    def hasty(self: Recent, part: Any) -> Seen:
        answered, running = right(self, part)
        return Seen(sorted(answered + running), [])

    patch.setattr(Recent, "seen", hasty)


def leaves_out_who_shares_an_end(patch: pytest.MonkeyPatch) -> None:
    """The message that came again is not settled with the run that its first delivery began."""
    right = Recent.settled

    def deaf(self: Recent, settling: Any) -> list[Any]:
        right(self, settling)
        return []

    patch.setattr(Recent, "settled", deaf)


def drops_what_an_orphan_became(patch: pytest.MonkeyPatch) -> None:
    """Its records are remembered as running, and their outcomes are not wanted."""
    patch.setattr(Chunk, "wanted", property(lambda self: self.live))


def answers_whoever_is_named(patch: pytest.MonkeyPatch) -> None:
    """A request may name any queue as its own."""

    def trusting(self: RoutePlan, amqp: Amqp) -> bool:
        return bool(amqp.reply_to)

    patch.setattr(RoutePlan, "may_reply", trusting)


def holds_back_what_is_gone(patch: pytest.MonkeyPatch) -> None:
    """What a brake held back of a lost channel is told to run on."""
    patch.setattr(Brakes, "drop_dead", lambda _: [])


def goes_on_with_a_lost_channel(patch: pytest.MonkeyPatch) -> None:
    """Nobody hears that it is gone."""
    patch.setattr(WorkerLoop, "lost", lambda *_: None)


def loses_its_patience_with_retries(patch: pytest.MonkeyPatch) -> None:
    """What comes from the ready queue is read as it stands there."""
    patch.setattr("inferfleet.worker.reading.restore", lambda _: None)


def charges_orphans_for_ever(patch: pytest.MonkeyPatch) -> None:
    """What a lost channel had taken counts as in flight."""
    right = Reading.release
    patch.setattr(Reading, "release", lambda self, chunk: right(self, chunk) if chunk.live else None)


BUGS: dict[Patch, str] = {
    forgets_what_it_answered: "I2",
    remembers_no_orphan: "I2",
    takes_an_orphan_for_answered: "I5",
    leaves_out_who_shares_an_end: "I6",
    drops_what_an_orphan_became: "I6",
    answers_whoever_is_named: "I3 I12",
    holds_back_what_is_gone: "I6",
    goes_on_with_a_lost_channel: "I2 I6",
    loses_its_patience_with_retries: "I3 I12",
    charges_orphans_for_ever: "I6 I14",
}


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_fault_put_in_on_purpose_is_found(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few seeds, and under the name of a promise that it breaks."""
    bug(monkeypatch)
    found = list(_first_violation(range(MOST_SEEDS)))
    assert found, f"{MOST_SEEDS} seeds have not found it"
    promise = found[0].split(": ")[1]
    assert promise in BUGS[bug].split(), found[0]


def _first_violation(seeds: Iterable[int]) -> Iterable[str]:
    for seed in seeds:
        try:
            ChannelWorld(seed).run()
        except ViolationError as violation:
            yield str(violation)
            return
