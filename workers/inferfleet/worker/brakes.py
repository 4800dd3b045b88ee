"""Stopping a route whose model fails, instead of emptying its source into the dead letters.

A brake counts failures of first attempts before anything is moved. When it trips, the route is paused, for
the whole pool where the pauses are shared, and what has failed since is held back: it is open, so nothing is
committed past it, and it runs again when somebody resumes the route. Each version has a brake of its own and
the pause names it: a canary that fails is not hidden by what the stable version answers, and a coordinator
takes it back and resumes the route.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import structlog

from inferfleet.core.brake import Brake
from inferfleet.errors import RULES
from inferfleet.plane import braked
from inferfleet.ports import PauseBoard
from inferfleet.records import Failures, Requests, RowFailure
from inferfleet.worker.deadletter import origin_of

log = structlog.get_logger(__name__)


class Brakes:
    """One brake for each version of a route, and what is held back while one is paused; the loop's own."""

    def __init__(self, board: PauseBoard, consecutive: int, share: float) -> None:
        self._board = board
        self._consecutive = consecutive
        self._share = share
        self._brakes: dict[tuple[str, str], Brake] = {}
        self._withheld: dict[str, list[Requests]] = {}
        self._paused: dict[str, str] = {}

    def routes(self, names: Collection[str]) -> None:
        """Follow the pauses of these routes from now on."""
        self._board.watch(sorted(names))

    def answered(self, route: str, version: str, count: int) -> None:
        """Of a batch of ``version`` without failures, ``count`` first attempts succeeded."""
        self._brake(route, version).observe_ok(count)

    def passed(self, route: str, failures: Sequence[RowFailure], answered: int) -> Sequence[RowFailure]:
        """Count what a version's batch became; return the failures that end now: a paused route's do not.

        ``answered`` first attempts of the same batch succeeded: beside them, none failed in a row.
        """
        counted = [failure for failure in failures if RULES[failure.code].brake]
        first = [f for f in counted if origin_of(f.part.chunk, f.part.rows[0]).attempt == 1]
        version = _version_of(failures)
        brake = self._brake(route, version)
        if brake.tripped is not None and route not in self._board.current():
            brake.reset()  # it was resumed since, and has not been looked at
        brake.observe_batch(answered, [f.part.ids[0] for f in first], [f.code for f in first])
        if first:
            self._pull(route, version, brake)
        if not counted or route not in self._board.current():
            return failures
        kept = [failure.part for failure in counted if failure.part.chunk.live]
        self._withheld.setdefault(route, []).extend(kept)
        return [f for f in failures if not (RULES[f.code].brake and f.part.chunk.live)]

    def unread(self, route: str, failures: Failures) -> None:
        """Count first attempts that a fault of ours kept from being read; they end all the same."""
        first = [i for i, row in enumerate(failures.rows) if origin_of(failures.chunk, row).attempt == 1]
        ids = [failures.ids[i] or failures.chunk.called(failures.rows[i]) for i in first]
        brake = self._brake(route, "")
        brake.observe_failures(ids, [failures.codes[i] for i in first])
        self._pull(route, "", brake)

    def _pull(self, route: str, version: str, brake: Brake) -> None:
        if brake.tripped is not None and route not in self._board.current():
            reason = braked(version, brake.tripped)
            log.error("brake_tripped", route=route, version=version, reason=reason)
            self._board.pause(route, reason)

    def held(self) -> dict[str, str]:
        """Return the routes that are paused, and why."""
        return self._paused

    def released(self) -> list[Requests]:
        """Look at the pauses; return what was held back by routes that were resumed since."""
        current = self._board.current()
        # Also what was paused and resumed between two looks.
        resumed = (self._paused.keys() | self._withheld.keys()) - current.keys()
        if not resumed and current == self._paused:
            return []
        again: list[Requests] = []
        for route in resumed:
            for (braked_route, _), brake in self._brakes.items():
                if braked_route == route:
                    brake.reset()
            again += [part for part in self._withheld.pop(route, ()) if part.chunk.live]
        self._paused = dict(current)
        return again

    def withheld(self) -> int:
        """Return how many requests are held back."""
        return sum(part.chunk.live for parts in self._withheld.values() for part in parts)

    def withheld_parts(self) -> list[Requests]:
        """Return what is held back."""
        return [part for parts in self._withheld.values() for part in parts]

    def drop_dead(self) -> list[Requests]:
        """Forget what was held back of streams that were taken away, and return it."""
        dead = [part for parts in self._withheld.values() for part in parts if not part.chunk.live]
        if dead:
            self._withheld = {
                route: [part for part in parts if part.chunk.live] for route, parts in self._withheld.items()
            }
        return dead

    def _brake(self, route: str, version: str) -> Brake:
        brake = self._brakes.get((route, version))
        if brake is None:
            brake = self._brakes[route, version] = Brake(self._consecutive, self._share)
        return brake


def _version_of(failures: Sequence[RowFailure]) -> str:
    """Return the version that failed them; all of a batch are of one."""
    served = next((failure.part.served for failure in failures if failure.part.served is not None), None)
    return "" if served is None else served.version
