"""What an open loop proves, worked out afterwards from when each request was planned, sent and answered.

Everything here is pure. Instants are epoch milliseconds; request ``n`` goes to partition ``n % partitions``,
and an array over requests has NaN where nothing was sent or nothing came back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

Instants = npt.NDArray[np.float64]
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_HIGHEST_US = 600_000_000


def planned_times(rate: float, seconds: float, *, poisson: bool = False, seed: int = 1) -> Instants:
    """Return when each request is due, seconds from the start, all of them before ``seconds``.

    Even steps of ``1 / rate``, or with ``poisson`` exponential ones of that mean; same seed, same times.
    """
    if not poisson:
        return np.arange(int(rate * seconds), dtype=np.float64) / rate
    likely = rate * seconds
    steps = np.random.default_rng(seed).exponential(1 / rate, int(likely + 10 * likely**0.5 + 10))
    times = np.cumsum(steps)
    return times[times < seconds]


class Arrival(NamedTuple):
    """One outcome in the result topic; ``number`` is -1 for an id that nobody sent, ``code`` an error's."""

    number: int
    at_ms: float
    value: bytes
    code: str = ""


class Tally(NamedTuple):
    """What became of the requests.

    ``duplicates`` counts every copy after the first, ``unequal`` requests whose copies differ, ``wrong``
    outcomes that are no answer to their own input, ``foreign`` outcomes of requests that nobody sent.
    """

    sent: int
    answered: int
    lost: int
    duplicates: int
    unequal: int
    wrong: int
    foreign: int


def judge(sent: int, arrivals: Sequence[Arrival], is_right: Callable[[int, bytes], bool]) -> Tally:
    """Compare every outcome with its own request; ``is_right`` gets a request's number and an answer."""
    first: dict[int, bytes] = {}
    unequal: set[int] = set()
    duplicates = wrong = foreign = 0
    for number, _, value, code in arrivals:
        if not 0 <= number < sent:
            foreign += 1
            continue
        if number in first:
            duplicates += 1
            if value != first[number]:
                unequal.add(number)
        else:
            first[number] = value
        if code or not is_right(number, value):
            wrong += 1
    return Tally(sent, len(first), sent - len(first), duplicates, len(unequal), wrong, foreign)


def first_answers(sent: int, arrivals: Sequence[Arrival]) -> tuple[Instants, Instants]:
    """Return when each request was first answered, and the instants of all further copies, ascending."""
    first = np.full(sent, np.nan)
    copies: list[float] = []
    for number, at_ms, _, _ in sorted(arrivals, key=lambda arrival: arrival.at_ms):
        if not 0 <= number < sent:
            continue
        if np.isnan(first[number]):
            first[number] = at_ms
        else:
            copies.append(at_ms)
    return first, np.array(copies, dtype=np.float64)


def longest_silences(first: Instants, partitions: int, since_ms: float, until_ms: float) -> list[float]:
    """Return, for each partition, the longest gap in seconds between two first answers in a row.

    Gaps that reach into the span count in full; requests must flow from ``since_ms`` to ``until_ms``.
    """
    out: list[float] = []
    for partition in range(partitions):
        stamps = first[partition::partitions]
        stamps = np.sort(stamps[~np.isnan(stamps)])
        low, high = np.searchsorted(stamps, [since_ms, until_ms], side="right")
        before = stamps[low - 1] if low else since_ms
        after = stamps[high] if high < len(stamps) else until_ms
        edges = np.concatenate([[before], stamps[low:high], [after]])
        out.append(float(np.diff(edges).max()) / 1000)
    return out


def unanswered(sent_ms: Instants, first: Instants, at_ms: float) -> int:
    """Return how many requests were sent and not yet answered at an instant."""
    return int((sent_ms <= at_ms).sum() - (first <= at_ms).sum())


def latency(planned_ms: Instants, first: Instants) -> dict[str, float]:
    """Return percentiles in ms from the planned time to the answer, over requests that have one.

    A request that was sent late counts from when it should have been, so a stall is not hidden.
    """
    histogram = HdrHistogram(1, _HIGHEST_US, 3)
    for value_us in ((first - planned_ms)[~np.isnan(first)] * 1000).tolist():
        histogram.record_value(max(1, int(value_us)))
    shown = {f"p{p:g}": histogram.get_value_at_percentile(p) / 1000 for p in PERCENTILES}
    return {"count": histogram.get_total_count(), **shown, "max": histogram.get_max_value() / 1000}


@dataclass
class Event:
    """Something done to the fleet while requests flowed, and what followed until the next event.

    ``uncommitted`` holds for each partition the requests sent but not committed right after it: what a dead
    worker may have answered without being able to say so, so no kill can repeat more rows. ``silences``
    are seconds for each partition; none may exceed ``limit_s``.
    """

    what: str
    at_s: float
    at_ms: float
    limit_s: float
    uncommitted: list[int]
    unanswered: int = 0
    duplicates: int = 0
    silences: Sequence[float] = ()

    @property
    def in_flight(self) -> int:
        """Rows that the event may repeat."""
        return sum(self.uncommitted)

    @property
    def longest_s(self) -> float:
        """The longest silence of any partition."""
        return max(self.silences, default=0.0)

    def figures(self) -> dict[str, Any]:
        """Return all of it by name."""
        return {**asdict(self), "in_flight": self.in_flight, "longest_s": self.longest_s}


def settle_events(
    events: Sequence[Event], sent_ms: Instants, first: Instants, copies: Instants, until_ms: float
) -> None:
    """Fill in what followed each event; ``until_ms`` is when the last request was due."""
    for event, ends_ms in zip(events, [*[each.at_ms for each in events[1:]], until_ms], strict=True):
        event.unanswered = unanswered(sent_ms, first, event.at_ms)
        event.silences = longest_silences(first, len(event.uncommitted), event.at_ms, ends_ms)
        # Copies may come after the last request was due; the last event answers for those.
        ends_ms = np.inf if event is events[-1] else ends_ms
        event.duplicates = int(((copies >= event.at_ms) & (copies < ends_ms)).sum())


def shortfalls(tally: Tally, events: Sequence[Event], codes: Sequence[int] = ()) -> list[str]:
    """Return what does not hold, a line each; empty when all does.

    ``codes`` are the exit codes of the workers that were asked to drain.
    """
    named: dict[str, Any] = {
        "requests without an outcome": tally.lost,
        "requests with differing copies": tally.unequal,
        "wrong answers": tally.wrong,
        "outcomes of requests that nobody sent": tally.foreign,
        "drained workers that did not exit 0": sum(code != 0 for code in codes),
    }
    out = [f"{count} {what}" for what, count in named.items() if count]
    bound = sum(event.in_flight for event in events)
    if tally.duplicates > bound:
        out.append(f"{tally.duplicates} duplicates, but only {bound} rows were in flight at the events")
    for event in events:
        if event.longest_s > event.limit_s:
            out.append(f"{event.what}: silence of {event.longest_s:.1f} s, limit {event.limit_s:g} s")
        if not event.unanswered:
            out.append(f"{event.what}: no row was in flight, so it shows nothing")
    return out
