"""Whether a failed request gets another attempt later, and when.

Attempts count from 1, the one that every request has; attempt ``n`` is followed by ``delays_ms[n - 1]``. The
jitter is a hash of the id and the attempt, so that requests that failed together do not come back together,
and a decision that is repeated is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

JITTER_SHARE = 5
"""A delay is longer or shorter by up to its fifth part."""


@dataclass(frozen=True, slots=True)
class RetryAt:
    """Another attempt: number ``attempt``, not before ``not_before_ms``; ``index`` says by which delay."""

    index: int
    delay_ms: int
    not_before_ms: int
    attempt: int


class RetryPolicy:
    """The delays between attempts; without any there is only the first attempt."""

    def __init__(self, delays_ms: Sequence[int]) -> None:
        self._delays_ms = tuple(delays_ms)

    def __repr__(self) -> str:
        return f"RetryPolicy(delays_ms={list(self._delays_ms)})"

    @property
    def attempts(self) -> int:
        """How many attempts a request has at most."""
        return len(self._delays_ms) + 1

    def decide(
        self, *, retryable: bool, attempt: int, request_id: str, now_ms: int, deadline_ms: int | None
    ) -> RetryAt | None:
        """Return when to try again after ``attempt`` has failed; ``None`` if that was the last.

        An attempt that could only begin when its deadline has come is not worth a delay. ``attempt`` comes
        from a header: what is below 1 counts as the first.
        """
        index = max(attempt, 1) - 1
        if not retryable or index >= len(self._delays_ms):
            return None
        delay_ms = _jittered(self._delays_ms[index], request_id, index + 1)
        if deadline_ms is not None and now_ms + delay_ms >= deadline_ms:
            return None
        return RetryAt(index, delay_ms, now_ms + delay_ms, index + 2)


def _jittered(delay_ms: int, request_id: str, attempt: int) -> int:
    # An id may hold what UTF-8 forbids; it fails like any other, and is delayed like any other.
    key = f"{attempt}:{request_id}".encode(errors="surrogatepass")
    most = delay_ms // JITTER_SHARE
    digest: int = xxhash.xxh3_64_intdigest(key)
    return delay_ms - most + (digest * (2 * most + 1) >> 64)
