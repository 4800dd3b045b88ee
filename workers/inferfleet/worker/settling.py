"""Counting confirmations: records are settled when every outlet has confirmed their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inferfleet.errors import Code
from inferfleet.ports import Refusal
from inferfleet.records import Chunk, Envelopes, Failures, Results, Served
from inferfleet.worker.plan import RoutePlan

Outcome = tuple[str, str, str]
"""Version, variant, and ``ok`` or the code: what an outcome is counted under."""


class OutcomeListener(Protocol):
    """Hears what outlets say; the delivery."""

    def complete(self, settling: Settling) -> None:
        """Every outlet has confirmed."""

    def envelope_refused(self, receipt: EnvelopeReceipt, index: int, refusal: Refusal) -> None:
        """An outlet did not take one envelope."""

    def result_refused(self, receipt: ResultReceipt, index: int, refusal: Refusal) -> None:
        """The result store did not take one result."""


class Settling:
    """Records of one chunk whose outcomes are on their way; ``open`` counts receipts that are out.

    ``ids`` are the requests' own (``None`` where one could not be read); without ``outcomes`` the records go
    on to another attempt, which is no outcome yet. ``instead`` is how they end if that cannot be published.
    ``served`` is the version that answered or failed them, where one did. ``given_at`` is when the outlets
    were given their outcomes, monotonic seconds; 0 where they wait for something else first. ``traces`` and
    ``codes`` are columns beside ``rows``, where there are any.
    """

    __slots__ = (
        "chunk",
        "codes",
        "delivery",
        "given_at",
        "ids",
        "instead",
        "open",
        "outcomes",
        "plan",
        "replaced",
        "rows",
        "served",
        "traces",
    )

    def __init__(
        self,
        delivery: OutcomeListener,
        plan: RoutePlan,
        chunk: Chunk,
        rows: list[int],
        outcomes: dict[Outcome, int],
        ids: Sequence[str | None],
        served: Served | None = None,
        given_at: float = 0.0,
    ) -> None:
        self.delivery = delivery
        self.plan = plan
        self.chunk = chunk
        self.rows = rows
        self.outcomes = outcomes
        self.ids = ids
        self.served = served
        self.given_at = given_at
        self.traces: Sequence[bytes | None] | None = None
        self.codes: Sequence[Code] | None = None
        self.instead: Failures | None = None
        self.replaced: dict[int, Code] = {}
        self.open = 1  # the hand-over itself; closed when every outlet has been given its share

    def replace(self, row: int, code: Code) -> bool:
        """Count ``row`` under ``code`` instead of ``ok``; return whether that is new."""
        if row in self.replaced:
            return False
        self.replaced[row] = code
        for version, variant, outcome in [key for key in self.outcomes if key[2] == "ok"]:
            self.outcomes[version, variant, outcome] -= 1
            key = (version, variant, code.value)
            self.outcomes[key] = self.outcomes.get(key, 0) + 1
        return True

    def close(self) -> None:
        """One receipt is complete."""
        self.open -= 1
        if not self.open:
            self.delivery.complete(self)


class EnvelopeReceipt:
    """Implements :class:`~inferfleet.ports.Receipt` for one column set of envelopes."""

    __slots__ = ("envelopes", "left", "rows", "settling")

    def __init__(self, settling: Settling, envelopes: Envelopes, rows: Sequence[int]) -> None:
        self.settling = settling
        self.envelopes = envelopes
        self.rows = rows
        self.left = len(envelopes)
        settling.open += 1

    def confirmed(self, count: int) -> None:
        """``count`` envelopes are durable."""
        self.left -= count
        if not self.left:
            self.settling.close()

    def refused(self, index: int, refusal: Refusal) -> None:
        """Envelope ``index`` was not accepted: deal with it, then count it as done here."""
        self.settling.delivery.envelope_refused(self, index, refusal)
        self.confirmed(1)


class ResultReceipt:
    """What the result store says about one column set of results."""

    __slots__ = ("left", "results", "rows", "settling")

    def __init__(self, settling: Settling, results: Results, rows: Sequence[int]) -> None:
        self.settling = settling
        self.results = results
        self.rows = rows
        self.left = len(results)
        settling.open += 1

    def confirmed(self, count: int) -> None:
        """``count`` results are stored."""
        self.left -= count
        if not self.left:
            self.settling.close()

    def refused(self, index: int, refusal: Refusal) -> None:
        """Result ``index`` was not stored: the id holds an answer to another payload."""
        self.settling.delivery.result_refused(self, index, refusal)
        self.confirmed(1)
