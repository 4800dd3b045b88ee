"""Bounded waiting on conditions, the only way a test may let time pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float, what: str, *, every_s: float = 0.02) -> T:
    """Return the first truthy value of ``condition()``; raise ``AssertionError`` if none comes in time.

    ``what`` says what was expected, as in ``"the worker is ready"``. The condition is asked at least
    once, and every ``every_s`` seconds until ``timeout_s`` have passed.
    """
    gives_up_at = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= gives_up_at:
            raise AssertionError(f"within {timeout_s:g} s this did not happen: {what} (last seen: {value!r})")
        time.sleep(every_s)
