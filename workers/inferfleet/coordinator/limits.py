"""How often one identity may ask: a token bucket for each, and a bound on how many are remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MAX_IDENTITIES = 10_000


class RateLimit:
    """Lets each identity ask ``burst`` times at once and ``per_s`` times a second in the long run.

    ``clock`` returns monotonic seconds. The identity that has been quiet for longest is forgotten first,
    which can only be to its advantage. Not for several threads.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, identity: str) -> float:
        """Take one; return 0 where it may ask now, else how many seconds until it may."""
        now = self._clock()
        left, at = self._left.pop(identity, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self._per_s)
        granted = left >= 1
        self._left[identity] = (left - 1 if granted else left, now)
        while len(self._left) > MAX_IDENTITIES:
            self._left.popitem(last=False)
        return 0.0 if granted else (1 - left) / self._per_s
