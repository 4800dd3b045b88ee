"""Which requests may be what kills the process, found out across its lives.

After an unclean start a worker is *careful*: before a batch runs, a mark is written that outlives the
process. The mark says of each request at how many marked crashes it will have been in flight if the process
dies now:

* A request in flight counts one more than it had before; all others keep what they have.
* One crash makes a *suspect*. It runs alone, with no other batch in flight anywhere, so that the next crash
  is its own or nobody's.
* Three crashes, two of them alone, *condemn* it: it is answered without running. A stop from outside while a
  suspect runs cannot be told from a crash, so one crash alone is not enough.

So ``k`` requests that kill the process cost at most three marked crashes and one unmarked each, and none of
their neighbours is condemned, unless somebody stops the process twice in the moments in which it runs.

A *fingerprint* is the same whenever a request is delivered again, and another for every other request; a dead
letter that somebody sends once more is another request.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

CONDEMNED_AT = 3
CONDEMNED_KEPT = 1_000
CLEAN_BATCHES = 200
UNMET_PATIENCE = 10
"""Careful mode lasts so much longer for suspects that have not come: another worker may have them by now."""


class Sorted(NamedTuple):
    """Indices, ascending: the condemned are answered, suspects run alone, the clean run together."""

    condemned: list[int]
    suspects: list[int]
    clean: list[int]


class Quarantine:
    """What one process knows of the crashes before it; ``left_over`` is the mark of the one that died.

    Careful mode ends when no suspect is left and ``clean_batches`` batches have ended since one was met. The
    last mark still names the condemned: answered but not committed, they come again after the next crash.
    """

    def __init__(
        self, careful: bool, left_over: Mapping[str, int], clean_batches: int = CLEAN_BATCHES
    ) -> None:
        self._active = careful
        self._suspects: dict[str, int] = {}
        self._condemned: dict[str, int] = {}
        self._in_flight: dict[Hashable, tuple[str, ...]] = {}
        self._clean_batches = clean_batches
        self._ended = 0
        if careful:
            self._suspects = {name: n for name, n in left_over.items() if n < CONDEMNED_AT}
            condemned = [(name, crashes) for name, crashes in left_over.items() if crashes >= CONDEMNED_AT]
            self._condemned = dict(condemned[-CONDEMNED_KEPT:])

    def __repr__(self) -> str:
        suspects, condemned = len(self._suspects), len(self._condemned)
        return f"Quarantine(active={self._active}, suspects={suspects}, condemned={condemned})"

    @property
    def active(self) -> bool:
        """Whether marks are to be written and requests to be sorted; once false, it stays so."""
        return self._active

    def sort(self, fingerprints: Sequence[str]) -> Sorted:
        """Divide requests into those never to run again, those to run alone, and all others."""
        if not self._suspects and not self._condemned:
            return Sorted([], [], list(range(len(fingerprints))))
        found = Sorted([], [], [])
        for index, fingerprint in enumerate(fingerprints):
            if fingerprint in self._condemned:
                found.condemned.append(index)
            elif fingerprint in self._suspects:
                found.suspects.append(index)
            else:
                found.clean.append(index)
        if found.suspects:
            self._ended = 0
        return found

    def began(self, batch: Hashable, fingerprints: Sequence[str]) -> dict[str, int] | None:
        """Return the mark that must stand before ``batch`` runs; ``None``: nothing to write."""
        if not self._active:
            return None
        self._in_flight[batch] = tuple(fingerprints)
        return self._mark()

    def ended(self, batch: Hashable) -> dict[str, int] | None:
        """Return the mark from now on, after a batch that ended, well or not; ``None``: nothing to write.

        Suspects among its requests are cleared. Where another batch begins at once, its mark will do.
        """
        fingerprints = self._in_flight.pop(batch, None)
        if not self._active or fingerprints is None:
            return None
        self._ended += 1
        for fingerprint in fingerprints:
            if self._suspects.pop(fingerprint, None) is not None:
                self._ended = 0
        if self._ended >= self._clean_batches * (UNMET_PATIENCE if self._suspects else 1):
            self._active = False
            self._suspects.clear()
            self._in_flight.clear()
        return self._mark()

    def _mark(self) -> dict[str, int]:
        mark = {**self._condemned, **self._suspects}
        for fingerprints in self._in_flight.values():
            for fingerprint in fingerprints:
                mark[fingerprint] = self._suspects.get(fingerprint, 0) + 1
        return mark
