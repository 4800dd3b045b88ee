"""The end of the audit log: how many entries there are, found with few looks and remembered."""

from __future__ import annotations

import threading

from inferfleet.coordinator.services import FleetService


class AuditTail:
    """Knows the number of the last audit entry; any thread may ask.

    The store reads forward from a number only. So the end is searched for in doubling steps from where it
    was last seen: a handful of looks at first, two when little has come since.
    """

    def __init__(self, fleet: FleetService) -> None:
        self._fleet = fleet
        self._lock = threading.Lock()
        self._seen = 0

    def last(self) -> int:
        """Return the number of the last entry; 0 where there is none."""
        with self._lock:
            known = self._seen
        if known and not self._exists(known):
            known = 0  # The store is another one, or was restored from an older copy.
        step = 1
        while self._exists(known + step):
            step *= 2
        low, beyond = known + step // 2, known + step
        while beyond - low > 1:
            middle = (low + beyond) // 2
            low, beyond = (middle, beyond) if self._exists(middle) else (low, middle)
        with self._lock:
            self._seen = low
        return low

    def _exists(self, number: int) -> bool:
        return bool(self._fleet.audit(after=number - 1, limit=1))
