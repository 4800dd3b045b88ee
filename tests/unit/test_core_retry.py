"""Retries: attempts are bounded, a delay never passes the deadline, and a decision repeats itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.retry import RetryAt, RetryPolicy

NOW_MS = 1_790_000_000_000
DELAYS_MS = [5_000, 30_000, 300_000]

_DELAYS = st.lists(st.integers(1, 10_000_000), max_size=6)
_IDS = st.text(st.characters(), max_size=40)


def decide(
    policy: RetryPolicy, attempt: int, *, request_id: str = "id", deadline_ms: int | None = None
) -> RetryAt | None:
    return policy.decide(
        retryable=True, attempt=attempt, request_id=request_id, now_ms=NOW_MS, deadline_ms=deadline_ms
    )


@given(_DELAYS, _IDS)
def test_attempts_are_bounded(delays_ms: list[int], request_id: str) -> None:
    """Who follows the decisions has one attempt more than there are delays, each with the next delay."""
    policy = RetryPolicy(delays_ms)
    attempt, used = 1, []
    while (retry := decide(policy, attempt, request_id=request_id)) is not None:
        assert retry.attempt == attempt + 1
        attempt = retry.attempt
        used.append(retry.index)
    assert attempt == policy.attempts == len(delays_ms) + 1
    assert used == list(range(len(delays_ms)))


@given(_DELAYS, st.integers(-3, 8), _IDS, st.none() | st.integers(NOW_MS - 100, NOW_MS + 12_000_000))
def test_a_delay_stays_within_its_jitter_and_before_the_deadline(
    delays_ms: list[int], attempt: int, request_id: str, deadline_ms: int | None
) -> None:
    """A fifth more or less; no attempt begins when its answer is worthless already."""
    retry = decide(RetryPolicy(delays_ms), attempt, request_id=request_id, deadline_ms=deadline_ms)
    index = max(attempt, 1) - 1
    if index >= len(delays_ms):
        assert retry is None
    elif retry is not None:
        assert abs(retry.delay_ms - delays_ms[index]) * 5 <= delays_ms[index]
        assert retry.not_before_ms == NOW_MS + retry.delay_ms
        assert deadline_ms is None or retry.not_before_ms < deadline_ms
    else:
        assert deadline_ms is not None
        assert deadline_ms <= NOW_MS + delays_ms[index] * 1.2


@given(_DELAYS, st.integers(1, 7), _IDS, st.none() | st.integers(NOW_MS, NOW_MS + 1_000_000))
def test_a_decision_repeats_itself(
    delays_ms: list[int], attempt: int, request_id: str, deadline_ms: int | None
) -> None:
    """The jitter is a hash of id and attempt: no run and no worker decides otherwise."""
    first = decide(RetryPolicy(delays_ms), attempt, request_id=request_id, deadline_ms=deadline_ms)
    again = decide(RetryPolicy(tuple(delays_ms)), attempt, request_id=request_id, deadline_ms=deadline_ms)
    assert first == again


@given(_DELAYS, st.integers(1, 7), _IDS)
def test_what_cannot_pass_is_not_retried(delays_ms: list[int], attempt: int, request_id: str) -> None:
    """Whoever calls a failure final is obeyed, whatever attempts are left."""
    policy = RetryPolicy(delays_ms)
    assert (
        policy.decide(
            retryable=False, attempt=attempt, request_id=request_id, now_ms=NOW_MS, deadline_ms=None
        )
        is None
    )


def test_requests_that_failed_together_come_back_spread() -> None:
    """The delays of a thousand ids fill the whole range evenly."""
    retries = [decide(RetryPolicy(DELAYS_MS), 1, request_id=f"order-{n}") for n in range(1_000)]
    delays = sorted(retry.delay_ms for retry in retries if retry is not None)
    assert len(delays) == 1_000
    assert 4_000 <= delays[0] < 4_050
    assert 5_950 < delays[-1] <= 6_000
    for quarter in range(4):
        low = 4_000 + 500 * quarter
        assert 190 < sum(low <= delay < low + 500 for delay in delays) < 310


def test_the_jitter_of_a_later_attempt_is_another() -> None:
    """A request that was early once is not early for ever."""
    policy = RetryPolicy([10_000, 10_000])
    pairs = [(decide(policy, 1, request_id=f"{n}"), decide(policy, 2, request_id=f"{n}")) for n in range(50)]
    assert sum(a is not None and b is not None and a.delay_ms == b.delay_ms for a, b in pairs) < 5


def test_no_delays_mean_no_retries() -> None:
    """An empty list in the configuration turns delayed attempts off."""
    assert decide(RetryPolicy([]), 1) is None
    assert repr(RetryPolicy(DELAYS_MS)) == "RetryPolicy(delays_ms=[5000, 30000, 300000])"
