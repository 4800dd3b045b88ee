"""One route over time: which of its plans answers a record, by the record's own timestamp.

A route's log says from when on which revision is in force (:mod:`inferfleet.core.revisions`); here each of
these revisions is a plan. Most chunks lie under one of them, and cost no more than their earliest and latest
time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from inferfleet.worker.plan import RoutePlan


class Way(NamedTuple):
    """Records that one plan answers: by their indices, ascending, or ``None`` for all of them."""

    plan: RoutePlan
    rows: list[int] | None


class Schedule:
    """The plans of one route: ``plans[i]`` from ``starts_ms[i]`` on, until the next; before all, the first.

    ``plan`` is the one in force now: it says where the route's records come from.
    """

    def __init__(self, plan: RoutePlan, starts_ms: Sequence[int], plans: Sequence[RoutePlan]) -> None:
        if plan not in plans or len(plans) != len(starts_ms) or list(starts_ms) != sorted(set(starts_ms)):
            raise ValueError(f"no schedule: {plan} of {list(plans)} from {list(starts_ms)}")
        self.plan = plan
        self.name = plan.name
        self.sources = plan.sources
        self.plans = tuple(plans)
        self.redis = any(each.redis for each in plans)
        self._own = frozenset(each.source for each in plans)
        self._starts = tuple(starts_ms)
        self._always = [Way(plan, None)]

    @classmethod
    def always(cls, plan: RoutePlan) -> Schedule:
        """Return the schedule of a route that has one plan for all times."""
        return cls(plan, (0,), (plan,))

    def __repr__(self) -> str:
        return f"Schedule({self.name}, {[each.revision for each in self.plans]})"

    def brings_retries(self, source: str) -> bool:
        """Return whether what comes from ``source`` comes for another attempt."""
        return source not in self._own

    def at(self, time_ms: int) -> RoutePlan:
        """Return the plan of a routing time."""
        return self.plans[self._index(time_ms)]

    def ways(self, times_ms: Sequence[int]) -> list[Way]:
        """Return which plans answer records of these times, and which records each of them."""
        if len(self.plans) == 1:
            return self._always
        first, last = self._index(min(times_ms)), self._index(max(times_ms))
        if first == last:
            return [Way(self.plans[first], None)]
        rows: dict[int, list[int]] = {}
        for row, time_ms in enumerate(times_ms):
            rows.setdefault(self._index(time_ms), []).append(row)
        return [Way(self.plans[index], rows[index]) for index in sorted(rows)]

    def _index(self, time_ms: int) -> int:
        return max(0, bisect_right(self._starts, time_ms) - 1)
