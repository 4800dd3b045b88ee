"""Remembers what was confirmed lately, and asks a Redis that was connected anew whether it still has it.

Redis replicates and writes to disk after it has answered, so a failover or a crash may lose what it confirmed
last. Nobody can bring that back from here, its requests are settled; but it is counted, never passed over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from inferfleet.results.scripts import STANDS
from inferfleet.results.servers import Call, Servers
from inferfleet.wire.stored import result_key

KEYS_PER_RUN = 200


class Lost(NamedTuple):
    """Results that Redis had confirmed and does not have."""

    rows: list[tuple[str, str]]
    """Route and id of each."""
    checked: int

    @property
    def by_route(self) -> Counter[str]:
        """How many of each route."""
        return Counter(route for route, _ in self.rows)


class _Confirmed(NamedTuple):
    route: str
    ids: Sequence[str]
    written_at: float
    expires_at: float


class Recall:
    """The last ``max_ids`` ids that were written and confirmed, over ``max_age_s`` before the newest."""

    def __init__(self, fleet: str, max_ids: int, max_age_s: float) -> None:
        self._fleet = fleet
        self._max_ids = max_ids
        self._max_age_s = max_age_s
        self._confirmed: deque[_Confirmed] = deque()
        self._count = 0

    def note(self, route: str, ids: Sequence[str], ttl_s: float, written_at: float) -> None:
        """Remember ids that were written, at the earliest at ``written_at``, and confirmed."""
        if not ids:
            return
        self._confirmed.append(_Confirmed(route, ids, written_at, written_at + ttl_s))
        self._count += len(ids)
        oldest_at = written_at - self._max_age_s
        while len(self._confirmed) > 1 and (
            self._count > self._max_ids or self._confirmed[0].written_at < oldest_at
        ):
            self._count -= len(self._confirmed.popleft().ids)

    def look_back(self, servers: Servers, now: float) -> Lost:
        """Return what does not stand any more of what must, and forget it.

        What expires about now is left out: it may be gone in good order. Raises what a call failed with.
        """
        rows = [
            (route, request_id)
            for route, ids, _, expires_at in self._confirmed
            if expires_at > now + 1.0
            for request_id in ids
        ]
        gone: list[tuple[str, str]] = []
        for low in range(0, len(rows), KEYS_PER_RUN):
            gone += self._missing(servers, rows[low : low + KEYS_PER_RUN])
        self._confirmed.clear()
        self._count = 0
        return Lost(gone, len(rows))

    def _missing(self, servers: Servers, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        keys = [result_key(self._fleet, route, request_id) for route, request_id in rows]
        width = len(keys) if servers.joins_keys else 1
        starts = range(0, len(keys), width)
        answers = servers.run(STANDS, [Call(keys[at : at + width], ()) for at in starts])
        gone: list[tuple[str, str]] = []
        for at, answer in zip(starts, answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            gone += [rows[at + number - 1] for number in answer]
        return gone
