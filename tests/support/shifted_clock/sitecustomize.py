"""Gives a Python process another wall clock: this folder on its PYTHONPATH, and by how much in CLOCK_SHIFT_S.

Every Python reading of the wall clock is moved before the program is imported; the monotonic clock is not.
libfaketime would move the clock of the C libraries as well, and librdkafka's timed waits never end under it.
"""

from __future__ import annotations

import os
import time

_shift_ns = round(float(os.environ.get("CLOCK_SHIFT_S", "0")) * 1e9)
_time_ns = time.time_ns


def _shifted_ns() -> int:
    return _time_ns() + _shift_ns


def _shifted() -> float:
    return _shifted_ns() / 1e9


time.time_ns = _shifted_ns
time.time = _shifted
