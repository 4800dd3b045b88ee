"""How long the faults in tests last: short by default, at full length with ``INFERFLEET_FAULTS=full``."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def full() -> bool:
    """Say whether faults run at full length."""
    return os.environ.get("INFERFLEET_FAULTS", "") == "full"


def pick(short: T, long: T) -> T:
    """Return ``long`` where faults run at full length, else ``short``."""
    return long if full() else short
