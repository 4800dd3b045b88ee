"""When a route's model fails so often that the route should stop instead of emptying its topic.

Only what a model or inferfleet itself did wrong counts, on a request's first attempt and once it stood alone:
codes whose rule says ``brake``. A caller's fault says nothing about the model, so a flood of bad requests
counts neither way. A request that comes again (a crash repeats what was not committed) counts once.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from inferfleet.errors import RULES, Code

WINDOW = 1_000
"""First-attempt outcomes that the share is taken of."""


class Brake:
    """Outcomes of one route, as runs: a number of good ones, or the id of one that failed.

    Trips at ``consecutive`` failures in a row, or when ``share`` of a whole window has failed; fewer outcomes
    than a window need as many failures. A tripped brake stays so until :meth:`reset`.
    """

    def __init__(self, consecutive: int, share: float) -> None:
        self._consecutive = consecutive
        # A share such as 0.07 has no exact value: times 1,000 it is a little more than 70.
        self._most = max(1, math.ceil(share * WINDOW - 1e-6))
        self.reset()

    def __repr__(self) -> str:
        return f"Brake(in_a_row={self._in_a_row}, failed={len(self._failed)}/{self._outcomes})"

    def reset(self) -> None:
        """Forget everything: the route goes on, and may fail anew."""
        self._runs: deque[int | str] = deque()
        self._failed: dict[str, Code] = {}
        self._outcomes = 0
        self._in_a_row = 0
        self._tripped: str | None = None

    @property
    def tripped(self) -> str | None:
        """Why the route should stop, in one line; ``None`` while it should not."""
        return self._tripped

    def observe_ok(self, count: int) -> None:
        """Count ``count`` first attempts that were answered."""
        if count <= 0:
            return
        self._in_a_row = 0
        if self._runs and isinstance(last := self._runs[-1], int):
            self._runs[-1] = last + count
        else:
            self._runs.append(count)
        self._outcomes += count
        if self._outcomes > WINDOW:
            self._slide()

    def observe_failures(self, ids: Sequence[str], codes: Sequence[Code]) -> None:
        """Count first attempts that failed alone, in their order; one that failed in this window is known."""
        for request_id, code in zip(ids, codes, strict=True):
            self._failure(request_id, code)

    def observe_batch(self, ok: int, ids: Sequence[str], codes: Sequence[Code]) -> None:
        """Count the outcomes of one batch, whose order among each other nobody knows.

        Beside a request that the same batch answered, failures are not failures in a row.
        """
        self.observe_ok(ok)
        for request_id, code in zip(ids, codes, strict=True):
            self._failure(request_id, code)
            if ok > 0:
                self._in_a_row = 0

    def _failure(self, request_id: str, code: Code) -> None:
        if not RULES[code].brake or request_id in self._failed:
            return
        self._failed[request_id] = code
        self._runs.append(request_id)
        self._outcomes += 1
        self._in_a_row += 1
        if self._outcomes > WINDOW:
            self._slide()
        self._judge()

    def _slide(self) -> None:
        """Let the oldest outcomes leave the window."""
        excess = self._outcomes - WINDOW
        self._outcomes = WINDOW
        while excess > 0:
            oldest = self._runs[0]
            if isinstance(oldest, str):
                del self._failed[oldest]
                excess -= 1
                self._runs.popleft()
            elif oldest > excess:
                self._runs[0] = oldest - excess
                return
            else:
                excess -= oldest
                self._runs.popleft()

    def _judge(self) -> None:
        if self._tripped is not None:
            return
        if self._in_a_row >= self._consecutive:
            many = f"{self._in_a_row} requests in a row" if self._in_a_row > 1 else "1 request"
            counted = f"{many} failed"
        elif len(self._failed) >= self._most:
            counted = f"{len(self._failed)} of the last {self._outcomes} requests failed"
        else:
            return
        ((code, _),) = Counter(self._failed.values()).most_common(1)
        self._tripped = f"{counted}, most often with {code}"
