"""Joins labels with the answers that they are about, by request id, within a horizon. Pure.

Either may come first, and both may come again: the first answer of an id is the one that its reader saw, and
the first value of a metric counts, because a sum that a decision was taken on is not taken back. The result
does not depend on how the two streams are interleaved, so a reader that starts again finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from inferfleet.feedback import ACCURACY, Answered, Feedback, Label, Measured

MOST = 200_000
MOST_OF_ONE = 64
"""How many labels of one id wait for its answer; one that is sent again as it was is not counted."""
AHEAD_MS = 86_400_000
"""How far beyond now, or beyond the horizon if that is longer, a time may lie that is believed."""
_ALL = 2**64


class _Answer:
    """An answer whose labels may still come, and the metrics that it has got."""

    __slots__ = ("answered", "counted")

    def __init__(self, answered: Answered) -> None:
        self.answered = answered
        self.counted: set[str] = set()


class LabelJoin:
    """Labels and answers that wait for each other, at most ``most`` of them.

    Over that bound the join goes on with half of the ids, chosen by their hash, and so for every variant
    alike: fewer labels are joined, none is joined wrongly. ``share`` says which part is left. ``accuracy``
    asks for the metric of that name.
    """

    def __init__(self, horizon_ms: int, *, accuracy: bool = False, most: int = MOST) -> None:
        self._horizon_ms = horizon_ms
        self._accuracy = accuracy
        self._most = most
        self._answers: dict[str, _Answer] = {}
        self._waiting: dict[str, list[Label]] = {}
        self._held = 0
        self._answers_until = 0
        self._labels_until = 0
        self.share = 1.0
        self.joined = 0
        self.late = 0
        """Labels whose answer never came, or came further away than the horizon, or that nobody can keep."""

    def __len__(self) -> int:
        """Return how many answers and labels are remembered."""
        return len(self._answers) + self._held

    def add(self, feedback: Feedback, now_ms: int) -> list[Measured]:
        """Take what came and return the values that are known now."""
        found: list[Measured] = []
        beyond = now_ms + max(self._horizon_ms, AHEAD_MS)
        for answered in feedback.answers:
            if answered.at_ms > beyond:
                continue  # its clock is broken, and nothing that is older could be forgotten before it
            self._answers_until = max(self._answers_until, answered.at_ms)
            if self._kept(answered.id) and answered.id not in self._answers:
                answer = self._answers[answered.id] = _Answer(answered)
                for label in self._taken(answered.id):
                    found += self._join(answer, label)
        for label in feedback.labels:
            if label.at_ms > beyond:
                self.late += 1
                continue
            self._labels_until = max(self._labels_until, label.at_ms)
            if not self._kept(label.id):
                continue
            standing = self._answers.get(label.id)
            if standing is not None:
                found += self._join(standing, label)
            else:
                self._wait(label)
        if feedback.caught_up:
            # Nothing older waits in either stream, so that a quiet one holds nothing back.
            self._answers_until = max(self._answers_until, now_ms)
            self._labels_until = max(self._labels_until, now_ms)
        self._forget(now_ms)
        return found

    def _wait(self, label: Label) -> None:
        waiting = self._waiting.setdefault(label.id, [])
        if label in waiting:
            return
        if len(waiting) >= MOST_OF_ONE:
            self.late += 1
            return
        waiting.append(label)
        self._held += 1

    def _taken(self, request_id: str) -> list[Label]:
        found = self._waiting.pop(request_id, [])
        self._held -= len(found)
        return found

    def _join(self, answer: _Answer, label: Label) -> Iterable[Measured]:
        answered = answer.answered
        if abs(label.at_ms - answered.at_ms) > self._horizon_ms:
            self.late += 1
            return
        values = dict(label.values)
        if self._accuracy and label.classes is not None and answered.classes is not None:
            values[ACCURACY] = _agreement(answered.classes, label.classes)
        self.joined += 1
        for metric, value in values.items():
            if metric not in answer.counted:
                answer.counted.add(metric)
                yield Measured(answered.version, answered.variant, metric, answered.unit, value)

    def _forget(self, now_ms: int) -> None:
        """Let go of what nothing can match any more, and of half of the ids while there are too many.

        A producer whose clock is ahead of ours moves no horizon: those of others may be right.
        """
        oldest = min(self._labels_until, now_ms) - self._horizon_ms
        # Streams are nearly in order of time: what is out of order stays a moment longer.
        while self._answers and next(iter(self._answers.values())).answered.at_ms < oldest:
            del self._answers[next(iter(self._answers))]
        oldest = min(self._answers_until, now_ms) - self._horizon_ms
        while self._waiting and next(iter(self._waiting.values()))[0].at_ms < oldest:
            self.late += len(self._taken(next(iter(self._waiting))))
        while len(self) > self._most:
            self.share /= 2
            self._answers = {key: each for key, each in self._answers.items() if self._kept(key)}
            self._waiting = {key: each for key, each in self._waiting.items() if self._kept(key)}
            self._held = sum(map(len, self._waiting.values()))

    def _kept(self, request_id: str) -> bool:
        if self.share == 1.0:
            return True
        digest: int = xxhash.xxh3_64_intdigest(b"label:" + request_id.encode())
        return digest < self.share * _ALL


def _agreement(given: tuple[int, ...], true: tuple[int, ...]) -> float:
    """Return the share of rows whose class is the true one; an error outcome is right in none."""
    if len(given) != len(true):
        return 0.0
    return sum(a == b for a, b in zip(given, true, strict=True)) / len(true) if true else 0.0
