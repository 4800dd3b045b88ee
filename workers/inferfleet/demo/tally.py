"""Who was answered, how often, by whom, and whether rightly: the demo's bookkeeping, without I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from inferfleet.demo.traffic import Answer, Load


@dataclass(slots=True)
class VersionTally:
    """What one version of one route answered; ``hits`` of ``judged`` predictions were true."""

    answered: int = 0
    judged: int = 0
    hits: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of true predictions among those that prove something; ``None`` if none does."""
        return self.hits / self.judged if self.judged else None


@dataclass(slots=True)
class Tally:
    """Counts outcomes against what was sent. Times are seconds on one monotonic clock."""

    loads: Mapping[str, Load]
    sent_at: dict[tuple[str, str], float] = field(default_factory=dict)
    answered_at: dict[tuple[str, str], float] = field(default_factory=dict)
    versions: dict[tuple[str, str], VersionTally] = field(default_factory=dict)
    workers: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    strangers: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """How many requests the broker has taken."""
        return len(self.sent_at)

    @property
    def answered(self) -> int:
        """How many requests have an outcome; further outcomes of one request do not count."""
        return len(self.answered_at)

    @property
    def unanswered(self) -> list[tuple[str, str]]:
        """Route and id of every request without an outcome."""
        return [request for request in self.sent_at if request not in self.answered_at]

    @property
    def slowest_s(self) -> float:
        """The longest time from sending a request to its first outcome."""
        return max((at - self.sent_at[request] for request, at in self.answered_at.items()), default=0.0)

    def note_sent(self, route: str, request_id: str, now: float) -> None:
        """A request is on its way."""
        self.sent_at[route, request_id] = now

    def note_answer(self, answer: Answer, now: float) -> None:
        """An outcome arrived: the first one of a request is judged, any other is a duplicate."""
        request = (answer.route, answer.id)
        if request not in self.sent_at:
            self.strangers += 1
        elif request in self.answered_at:
            self.duplicates += 1
        else:
            self.answered_at[request] = now
            self.workers[answer.worker] += 1
            self._judge(answer)

    def _judge(self, answer: Answer) -> None:
        if answer.error is not None:
            self.errors.append(f"{answer.route} {answer.id}: {answer.error}")
            return
        load = self.loads[answer.route]
        if not load.is_right(answer):
            self.wrong.append(f"{answer.route} {answer.id}")
        tally = self.versions.setdefault((answer.route, answer.version), VersionTally())
        tally.answered += 1
        hit = load.is_hit(answer)
        if hit is not None:
            tally.judged += 1
            tally.hits += hit
