"""Finding the bad requests of a failed batch by halving it, so that their neighbours are answered.

The whole batch has failed once before isolation begins. Spans are offered left to right; a span that
fails is halved; a single request gets a second try alone before it is given up, so a passing fault does
not condemn it (a batch of one has had its first try already). ``k`` bad requests among ``n`` cost
O(k log n) runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Requests ``low`` to ``high`` (exclusive) of the failed batch."""

    low: int
    high: int


class Isolation:
    """The spans still to run, and the single requests that failed for good."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a batch of {count} requests cannot be isolated")
        self._todo: list[Span] = []
        self._tried: set[int] = {0} if count == 1 else set()
        self.condemned: list[int] = []
        self._split(Span(0, count))

    def __repr__(self) -> str:
        return f"Isolation(todo={self._todo}, condemned={self.condemned})"

    def next_span(self) -> Span | None:
        """Return the next span to run, or ``None`` when every request is answered or condemned."""
        return self._todo.pop() if self._todo else None

    def failed(self, span: Span) -> None:
        """``span`` failed: halve it, try a single request once more, or condemn it."""
        if span.high - span.low > 1:
            self._split(span)
        elif span.low in self._tried:
            self.condemned.append(span.low)
        else:
            self._tried.add(span.low)
            self._todo.append(span)

    def _split(self, span: Span) -> None:
        if span.high - span.low == 1:
            self._todo.append(span)
            return
        middle = (span.low + span.high) // 2
        self._todo.append(Span(middle, span.high))
        self._todo.append(Span(span.low, middle))
