"""Who waits for what, and which value may answer: the rules that both clients share, without any I/O.

An id alone does not make a value *this* request's answer: another payload may have been answered under it.
So a value that stands is taken only if its payload mark is the one that was sent. A reply in the client's own
stream is the outcome of a request that this client sent; it is compared in the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from inferfleet.client.outcome import DuplicateIdError, Outcome, Result
from inferfleet.errors import Code
from inferfleet.wire.encode import error_body
from inferfleet.wire.stored import duplicate_text, is_error, payload_of

Done: TypeAlias = Callable[[Outcome], None]


@dataclass(slots=True)
class _Expected:
    route: str
    payload: str
    waiters: list[Done] = field(default_factory=list)


class Inbox:
    """Outcomes that are expected, and those that came before anybody asked.

    Not safe for threads: its owner calls it from one thread or under one lock. At most ``max_unclaimed``
    outcomes that nobody asked for are kept, the newest; older ones still stand in Redis.
    """

    def __init__(self, max_unclaimed: int = 100_000) -> None:
        self._expected: dict[str, _Expected] = {}
        self._unclaimed: OrderedDict[str, Outcome] = OrderedDict()
        self._max_unclaimed = max_unclaimed

    def __len__(self) -> int:
        """Return how many ids are expected."""
        return len(self._expected)

    def expect(self, request_id: str, route: str, payload: str, done: Done | None = None) -> None:
        """Expect an outcome; ``done`` is called with it, and without one it is kept for ``claim``.

        Raises DuplicateIdError while another payload or route is expected under the id.
        """
        known = self._expected.get(request_id)
        if known is None:
            self._unclaimed.pop(request_id, None)
            known = self._expected[request_id] = _Expected(route, payload)
        elif (known.route, known.payload) != (route, payload):
            raise DuplicateIdError(
                f"{Code.DUP_ID.value}: id {request_id} is in flight with another payload; use a new id",
                request_id,
            )
        if done is not None:
            known.waiters.append(done)

    def route_of(self, request_id: str) -> str | None:
        """Return the route of an id that is expected or unclaimed."""
        if (known := self._expected.get(request_id)) is not None:
            return known.route
        found = self._unclaimed.get(request_id)
        return found.route if isinstance(found, Result) else None

    def claim(self, request_id: str, done: Done) -> bool:
        """Hand over the outcome as soon as there is one, perhaps now; false if the id is unknown here."""
        if request_id in self._unclaimed:
            done(self._unclaimed.pop(request_id))
            return True
        if request_id not in self._expected:
            return False
        self._expected[request_id].waiters.append(done)
        return True

    def leave(self, request_id: str, done: Done) -> None:
        """Take back a claim; the outcome is kept for the next one."""
        known = self._expected.get(request_id)
        if known is not None and done in known.waiters:
            known.waiters.remove(done)

    def forget(self, request_id: str) -> None:
        """Expect the id no more."""
        self._expected.pop(request_id, None)

    def replied(self, request_id: str, body: bytes) -> None:
        """Take an entry of the reply stream; what is not expected (a repetition) is dropped."""
        known = self._expected.get(request_id)
        if known is not None and self._fits(known, body):
            self._finish(request_id, Result(request_id, known.route, body))

    def stands(self, request_id: str, body: bytes, *, last: bool = False) -> None:
        """Take a value that stands under the id's key; ``last`` when there is no more time to wait.

        Before that only an ``ok`` counts: an error may be that of an earlier attempt, which the one that is
        under way can still replace.
        """
        known = self._expected.get(request_id)
        if known is None:
            return
        fits = self._fits(known, body)
        if fits and (last or not is_error(body)):
            self._finish(request_id, Result(request_id, known.route, body))
        elif last and not is_error(body):
            refusal = error_body(duplicate_text(request_id), Code.DUP_ID, request_id)
            self._finish(request_id, Result(request_id, known.route, refusal))

    def failed(self, request_id: str, outcome: Outcome) -> None:
        """End the waiting for an id that was never delivered."""
        if request_id in self._expected:
            self._finish(request_id, outcome)

    def oldest(self, count: int) -> list[tuple[str, str]]:
        """Return up to ``count`` expected (route, id) pairs, longest expected first."""
        ids = list(self._expected)[:count]
        return [(self._expected[request_id].route, request_id) for request_id in ids]

    def end(self, outcome_of: Callable[[str], Outcome]) -> None:
        """Give every waiter an outcome and expect nothing more."""
        for request_id in list(self._expected):
            self._finish(request_id, outcome_of(request_id))

    @staticmethod
    def _fits(known: _Expected, body: bytes) -> bool:
        marked = payload_of(body)
        return not marked or marked == known.payload

    def _finish(self, request_id: str, outcome: Outcome) -> None:
        waiters = self._expected.pop(request_id).waiters
        for done in waiters:
            done(outcome)
        if not waiters:
            self._unclaimed[request_id] = outcome
            if len(self._unclaimed) > self._max_unclaimed:
                self._unclaimed.popitem(last=False)
