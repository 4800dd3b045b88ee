"""Envelopes that a destination refused for now: kept, offered again with growing pauses, settled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from inferfleet.ports import Clock, Outlet, Refusal
from inferfleet.records import Envelopes
from inferfleet.worker.settling import EnvelopeReceipt, Settling

log = structlog.get_logger(__name__)

PARKED_RETRY_S = 1.0
PARKED_RETRY_MAX_S = 15.0


@dataclass(slots=True)
class _Parked:
    """Envelopes that a destination refused for now, and when to offer them again."""

    text: str
    groups: list[tuple[Settling, Envelopes, list[int]]] = field(default_factory=list)
    next_at: float = 0.0
    delay_s: float = PARKED_RETRY_S
    routes: set[str] = field(default_factory=set)


class Parking:
    """The parking places of all destinations; its routes are held while theirs is not empty."""

    def __init__(self, outlet: Outlet, clock: Clock) -> None:
        self._outlet = outlet
        self._clock = clock
        self._parked: dict[str, _Parked] = {}

    def park(self, receipt: EnvelopeReceipt, index: int, refusal: Refusal) -> None:
        """Keep envelope ``index`` of a receipt, and its records open, until its destination takes it."""
        settling, envelopes = receipt.settling, receipt.envelopes
        destination, route = envelopes.destination, settling.plan.name
        parked = self._parked.get(destination)
        if parked is None:
            log.error("outlet_refuses", destination=destination, route=route, error=refusal.text)
            parked = self._parked[destination] = _Parked(refusal.text)
            parked.next_at = self._clock.monotonic() + parked.delay_s
        settling.open += 1
        parked.routes.add(route)
        parked.groups.append((settling, envelopes.only(index), [receipt.rows[index]]))

    def retry(self, now: float, *, force: bool = False) -> None:
        """Offer what was refused again, where its pause has ended; a further refusal doubles the pause."""
        for destination in [d for d, parked in self._parked.items() if force or parked.next_at <= now]:
            parked = self._parked.pop(destination)
            log.info("outlet_tried_again", destination=destination, envelopes=len(parked.groups))
            again = _Parked(parked.text)
            again.delay_s = min(parked.delay_s * 2, PARKED_RETRY_MAX_S)
            again.next_at = now + again.delay_s
            live = [group for group in parked.groups if group[0].chunk.wanted]
            if live:
                # Kept while its envelopes are out, so that a further refusal finds the longer pause.
                self._parked[destination] = again
            for settling, envelopes, rows in live:
                again.routes.add(settling.plan.name)
                self._outlet.publish(envelopes, _Again(settling, envelopes, rows, self, destination))
                settling.close()  # the parking place; the receipt above counts for it now

    def accepted(self, destination: str) -> None:
        """A destination took what it had refused: its routes go on."""
        parked = self._parked.get(destination)
        if parked is not None and not parked.groups:
            del self._parked[destination]
            log.info("outlet_accepts_again", destination=destination)

    def held(self) -> dict[str, str]:
        """Return the routes that must not take now, and why."""
        return {
            route: f"{destination} refuses: {parked.text}"
            for destination, parked in self._parked.items()
            for route in parked.routes
        }


class _Again(EnvelopeReceipt):
    """A receipt for parked envelopes: its confirmation ends the parking."""

    __slots__ = ("destination", "parking")

    def __init__(
        self,
        settling: Settling,
        envelopes: Envelopes,
        rows: Sequence[int],
        parking: Parking,
        destination: str,
    ) -> None:
        super().__init__(settling, envelopes, rows)
        self.parking = parking
        self.destination = destination

    def confirmed(self, count: int) -> None:
        """``count`` envelopes are durable after all."""
        self.parking.accepted(self.destination)
        super().confirmed(count)

    def refused(self, index: int, refusal: Refusal) -> None:
        """Still not: park it again."""
        self.settling.delivery.envelope_refused(self, index, refusal)
        super().confirmed(1)
