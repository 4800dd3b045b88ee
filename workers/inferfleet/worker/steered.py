"""Which plan and variant a request was steered by, for as long as anything that is open names them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from inferfleet.records import Requests, Served
from inferfleet.worker.plan import RoutePlan, VariantPlan
from inferfleet.worker.schedule import Schedule

MOST_SERVED = 256
"""How many variants, over all revisions, are remembered before those that nothing names are forgotten."""


class Steered:
    """The variants of all revisions that requests may name; owned by the worker loop's thread."""

    def __init__(self) -> None:
        self._known: dict[Served, tuple[RoutePlan, VariantPlan]] = {}

    def __len__(self) -> int:
        """Return how many variants are remembered."""
        return len(self._known)

    def serve(self, schedules: Collection[Schedule], still_open: Callable[[], Iterable[Requests]]) -> None:
        """Know the variants of these routes; of the others keep what ``still_open`` names."""
        for schedule in schedules:
            for plan in schedule.plans:
                for variant in plan.variants:
                    self._known[variant.served] = (plan, variant)
        if len(self._known) > MOST_SERVED:
            used = {part.served for part in still_open()}
            used.update(v.served for each in schedules for plan in each.plans for v in plan.variants)
            self._known = {served: found for served, found in self._known.items() if served in used}

    def of(self, part: Requests) -> tuple[RoutePlan, VariantPlan]:
        """Return what a request was steered by; raises LookupError for one that never was."""
        if part.served is None:
            raise LookupError(f"{part.chunk} was never steered")
        return self._known[part.served]

    def moved(self, part: Requests, schedule: Schedule | None) -> bool:
        """Return whether another revision than the one that steered a request is in force at its time now."""
        found = None if part.served is None else self._known.get(part.served)
        if schedule is None or found is None:
            return False
        times_ms = [part.chunk.timestamps_ms[row] for row in part.rows]
        return any(way.plan.number != found[0].number for way in schedule.ways(times_ms))
