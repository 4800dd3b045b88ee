"""Changes of the routes: planned against what stands, announced, and given their time behind the barrier.

What decides is in ``core/barrier.py`` and ``core/planning.py``; here the store is read and written, within
bounds. Every write is one compare-and-set on the numbers that were decided on, so of several who finish the
same announcement one wins and the others see that it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from inferfleet.catalogue import Catalogue
from inferfleet.coordinator.announcing import (
    Applied,
    Author,
    Plan,
    Timing,
    activation,
    draft_of,
    entry_of,
    expected_by,
    finished_by_another,
    idle_pools,
    looked_at,
    withdrawal,
)
from inferfleet.coordinator.route_checks import (
    check_moves,
    check_rollouts,
    check_served,
    check_together,
    resolve_latest,
    standing_after,
)
from inferfleet.core import planning
from inferfleet.core.barrier import (
    Barrier,
    Verdict,
    ahead,
    barrier,
    clock_fault,
    pool_of,
)
from inferfleet.core.planning import RouteChange
from inferfleet.core.revisions import timeline
from inferfleet.errors import ConfigError, ConflictError, ControlError, LogLostError
from inferfleet.plane import AuditEntry, Change, Draft, WorkerReport
from inferfleet.revisions import Head, Revision, RouteLog
from inferfleet.routes import Route, RouteTable, route_table

if TYPE_CHECKING:
    from inferfleet.control_ports import ControlStore
    from inferfleet.ports import Clock

LOOK_EVERY_S = 0.25
HEARD_S = 10.0
"""How long after the store was away its workers may be missing from it: each has to report again."""
ACKNOWLEDGE_S = 30.0
MOST_HISTORY = 10_000

Progress = Callable[[Sequence[Barrier]], None]


class RouteControl:
    """Plans and makes changes of the routes; every call waits within a bound.

    ``pause`` lets time pass between two looks at the workers. Whatever a call writes is refused with
    ConflictError where somebody else has changed the same route meanwhile.
    """

    def __init__(
        self,
        store: ControlStore,
        clock: Clock,
        catalogue: Catalogue,
        fleet: str,
        timing: Timing | None = None,
        *,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._catalogue = catalogue
        self._fleet = fleet
        self._timing = timing or Timing()
        self._pause = pause

    def __repr__(self) -> str:
        return f"RouteControl({self._fleet}, {self._timing})"

    # Planning

    def log(self) -> RouteLog:
        """Return the log as it is kept."""
        return self._store.load()

    def plan(self, tree: Mapping[str, Any], origin: str, *, prune: bool = False) -> Plan:
        """Return what making the routes of a parsed document stand would change; nothing is written.

        ``origin`` names the document in errors. Raises ConfigError, ModelRepositoryError for a version that
        does not exist, LogLostError where workers hold more than the store.
        """
        table, latest = self._table(tree, origin)
        log, workers = self._read()
        return self._planned(log, planning.plan(log, table, prune=prune), latest, workers)

    def plan_reset(self, tree: Mapping[str, Any], origin: str) -> Plan:
        """Return what starting a new log with the routes of a document would change; all others go.

        A log that cannot be read any more is taken as empty: it is given up.
        """
        table, latest = self._table(tree, origin)
        workers = self._store.workers()
        log = self._whatever_is_left()
        return self._planned(log, planning.plan(log, table, prune=True), latest, workers)

    def _whatever_is_left(self) -> RouteLog:
        try:
            return self._store.load()
        except (ControlError, ConfigError):
            head = self._store.head()
            return RouteLog(head, {}, str(head.number))

    def plan_revert(self, name: str, to: int | None = None) -> Plan:
        """Return what giving a route the content of an earlier revision again would change.

        Without ``to`` it is the last one that was in force and differs; what an abort has undone was not.
        Raises ConfigError where there is no such revision.
        """
        log, workers = self._read()
        standing = log.newest(name)
        before = None if standing is None else standing.route
        wanted = self._earlier(log, name, standing, to)
        if before is not None:
            least = planning.with_counts(before, wanted, [each.buckets for each in wanted.variants])
            # Each key goes back to what it had met, unless others would have to move for that.
            if planning.moved(before, wanted) > planning.moved(before, least):
                wanted = least
        return self._planned(log, (planning.change_of(log, name, wanted),), {}, workers)

    def _earlier(self, log: RouteLog, name: str, standing: Revision | None, to: int | None) -> Route:
        revisions = self.history(name, limit=MOST_HISTORY)
        if not revisions:
            log.table().named(name)  # says which names there are
        if to is not None:
            found = next((each for each in revisions if each.number == to), None)
            if found is None:
                known = ", ".join(str(each.number) for each in revisions[:10])
                raise ConfigError(f"route {name} has no revision {to}; its last ones are {known or 'none'}")
            if found.route is None:
                raise ConfigError(f"revision {to} took route {name} away; apply --prune deletes a route")
            return found.route
        now = None if standing is None else standing.route
        for each in reversed(timeline(revisions).revisions):
            if each.route is not None and each.route != now:
                return each.route
        raise ConfigError(f"route {name} has no earlier revision that differs from what stands")

    def history(self, name: str, *, before: int = 0, limit: int = 100) -> list[Revision]:
        """Return a route's revisions, newest first, with numbers below ``before`` unless 0."""
        return self._store.history(name, before=before, limit=limit)

    def planned(
        self, entries: Sequence[Mapping[str, Any]], *, prune: bool = False
    ) -> tuple[RouteChange, ...]:
        """Return what happens if these routes, in the words of the routes file, are to stand."""
        return self.plan({"route": list(entries)}, "routes", prune=prune).changes

    def removal(self, name: str) -> RouteChange:
        """Return what happens if a route is to be taken away."""
        log, workers = self._read()
        log.table().named(name)
        change = planning.change_of(log, name, None)
        return self._planned(log, (change,), {}, workers).changes[0]

    def reversal(self, name: str, number: int) -> RouteChange:
        """Return what happens if a route is to be as revision ``number`` says."""
        return self.plan_revert(name, number).changes[0]

    def _table(self, tree: Mapping[str, Any], origin: str) -> tuple[RouteTable, dict[str, str]]:
        resolved, latest = resolve_latest(tree, self._catalogue.latest)
        return route_table(resolved, self._fleet, origin), latest

    def _planned(
        self,
        log: RouteLog,
        changes: tuple[RouteChange, ...],
        latest: Mapping[str, str],
        workers: Sequence[WorkerReport],
    ) -> Plan:
        check_rollouts(changes, self._store.documents())
        check_together(standing_after(log, changes))
        check_moves(changes, workers)
        self._digests(changes)
        return Plan(changes, latest, idle_pools(changes, workers))

    def _digests(self, changes: Iterable[RouteChange]) -> dict[str, str]:
        """Return the digest of each version that a change brings, after looking at each of them."""
        digests: dict[str, str] = {}
        for each in changes:
            if each.changes and each.after is not None:
                digests |= check_served(each.after, self._catalogue)
        return digests

    def _read(self) -> tuple[RouteLog, list[WorkerReport]]:
        """Return the log and the live workers.

        Raises LogLostError where these hold what the log has not, ConfigError where their clocks are others.
        """
        workers = self._store.workers()
        log = self._store.load()
        off = clock_fault(self._clock.utc_ms(), workers)
        if off is not None:
            raise ConfigError(f"the clock here is {off}; a change would take effect at a wrong time: set it")
        lost = ahead(log.head, workers, cache(self._link))
        if lost:
            shown = "; ".join(f"{each.worker} {each.text}" for each in lost[:5])
            raise LogLostError(
                f"the store's log ends with revision {log.head.number} of epoch {log.head.epoch}, and "
                f"{shown}: the store has lost revisions; `route apply --reset FILE` starts a new log"
            )
        return log, workers

    def _link(self, head: Head) -> str | None:
        found = self._store.history(before=head.number + 1, limit=1)
        same = found and (found[0].epoch, found[0].number) == (head.epoch, head.number)
        return found[0].hash if same else None

    # Changing

    def announce(
        self, changes: Sequence[RouteChange], *, author: str, reason: str, action: str = "apply"
    ) -> tuple[Revision, ...]:
        """Write planned changes down as a whole, without waiting for workers; return the new revisions.

        Those without a time wait for the barrier; deletions, and routes of pools without live workers, have
        one. Raises ConflictError where a route has another last revision than the one its change names.
        """
        log, workers = self._read()
        check_rollouts(changes, self._store.documents())
        check_together(standing_after(log, changes))
        digests, idle = self._digests(changes), idle_pools(changes, workers)
        by = Author(author, reason)
        now = self._clock.utc_ms()
        drafts: list[Draft] = []
        entries: list[AuditEntry] = []
        for each in changes:
            draft = draft_of(each, idle, now, self._timing.lead_ms, action) if each.changes else None
            if draft is not None:
                drafts.append(draft)
                entries.append(entry_of(each, draft, by, digests))
        if not drafts:
            return ()
        change = Change(
            actor=author,
            reason=reason,
            audit=tuple(entries),
            expected=expected_by(changes, log),
            drafts=tuple(drafts),
        )
        try:
            return self._store.commit(change)
        except ConflictError as error:
            raise ConflictError(f"{error}; nothing was changed: look at the diff again") from None

    def apply(
        self,
        changes: Sequence[RouteChange],
        *,
        author: str,
        reason: str = "",
        action: str = "apply",
        timeout_s: float | None = None,
        progress: Progress | None = None,
        acknowledge_s: float = ACKNOWLEDGE_S,
    ) -> list[Applied]:
        """Make planned changes come true: announce, wait for the barrier, give each route its time.

        A route that a worker refuses, or that is not ready in time, stays as it was: its announcement is
        withdrawn, and its :class:`Applied` says why. The live workers are waited for ``acknowledge_s`` after
        that. Raises ConflictError where the routes are not those that the changes were planned on any more.
        """
        pending = [each for each in changes if each.changes]
        revisions = self.announce(pending, author=author, reason=reason, action=action)
        by = Author(author, reason)
        done = [Applied(each.name, each) for each in revisions if each.effective_from_ms is not None]
        waiting = {each.name: each for each in revisions if each.effective_from_ms is None}
        waiting |= {each.name: each.pending for each in pending if each.same and each.pending is not None}
        limit_s = self._timing.barrier_s if timeout_s is None else timeout_s
        try:
            done += self._through_the_barrier(waiting, by, limit_s, progress)
        except KeyboardInterrupt:
            for left in list(waiting.values()):
                self._withdrawn(left, by, "interrupted")
            raise
        order = [each.name for each in pending]
        done.sort(key=lambda each: order.index(each.name))
        return self._acknowledged(done, acknowledge_s)

    def reset(self, changes: Sequence[RouteChange], *, author: str, reason: str = "") -> list[Applied]:
        """Start a new epoch, above every head that the store and the workers know, with these routes alone.

        There is no barrier: what workers hold is given up. Raises ConfigError where no route is left.
        """
        workers = self._store.workers()
        now = self._clock.utc_ms()
        kept = [each for each in changes if each.after is not None]
        by = Author(author, reason)
        drafts = [Draft(each.name, each.after, now, "reset") for each in kept]
        digests = {each.name: check_served(each.after, self._catalogue) for each in kept if each.after}
        gone = [each for each in changes if each.after is None]
        entries = [
            entry_of(each, draft, by, digests[each.name]) for each, draft in zip(kept, drafts, strict=True)
        ]
        entries += [entry_of(each, Draft(each.name, None, now, "reset"), by, {}) for each in gone]
        revisions = self._store.commit(
            Change(
                actor=author,
                reason=reason,
                audit=tuple(entries),
                expected={each.name: each.number for each in changes if each.number},
                drafts=tuple(drafts),
                reset=True,
                above=max((each.head.number for each in workers), default=0),
            )
        )
        return [Applied(each.name, each) for each in revisions]

    def _through_the_barrier(
        self, waiting: dict[str, Revision], author: Author, limit_s: float, progress: Progress | None
    ) -> list[Applied]:
        """Return how each announcement ended; what has ended leaves ``waiting``."""
        deadline = self._clock.monotonic() + limit_s
        sure_from = 0.0
        done: list[Applied] = []
        while waiting:
            over = self._clock.monotonic() >= deadline
            found: list[Barrier] = []
            try:
                workers = self._store.workers()
                log = self._store.load()
                found = [barrier(each, workers, pool_of(log, each)) for each in waiting.values()]
                sure = over or self._clock.monotonic() >= sure_from
                for each in [one for one in found if sure or one.waiting or one.refused]:
                    ended = self._ended(each, log, author, over=over, limit_s=limit_s)
                    if ended is not None:
                        done.append(ended)
                        del waiting[each.name]
            except ControlError:
                sure_from = self._clock.monotonic() + HEARD_S
                if over:
                    raise
            if waiting:
                if progress is not None:
                    progress([each for each in found if each.name in waiting])
                self._pause(LOOK_EVERY_S)
        return done

    def _ended(
        self, found: Barrier, log: RouteLog, author: Author, *, over: bool, limit_s: float
    ) -> Applied | None:
        """Finish an announcement that can be; ``None`` while it waits."""
        newest = log.newest(found.name)
        if log.latest(found.name) != found.announcement.number:
            return finished_by_another(found, log)
        verdict = found.verdict(self._clock.utc_ms(), float("inf"))
        if verdict is Verdict.WAITING and over:
            verdict = Verdict.EXPIRED
        try:
            if verdict is Verdict.READY:
                (revision,) = self._store.commit(
                    activation(found.announcement, newest, author, self._clock.utc_ms(), self._timing.lead_ms)
                )
                return Applied(found.name, revision, workers=found.workers)
            if verdict is Verdict.WAITING:
                return None
            why = str(found) if verdict is Verdict.REFUSED else f"not ready within {limit_s:g} s: {found}"
            self._store.commit(withdrawal(found.announcement, newest, author, why))
        except ConflictError:
            return None  # somebody else has finished it: the next look says how
        return Applied(found.name, None, f"{why}; what stood serves on", found.workers)

    def _withdrawn(self, announcement: Revision, author: Author, why: str) -> None:
        log = self._store.load()
        try:
            self._store.commit(withdrawal(announcement, log.newest(announcement.name), author, why))
        except (ConflictError, ControlError):
            return  # it was finished by another, or the coordinators will end it

    def _acknowledged(self, done: list[Applied], limit_s: float) -> list[Applied]:
        deadline = self._clock.monotonic() + limit_s
        while True:
            workers = self._store.workers()
            looked = [looked_at(each, workers) for each in done]
            left = deadline - self._clock.monotonic()
            if left <= 0 or not any(each.unacknowledged for each in looked):
                return looked
            self._pause(min(LOOK_EVERY_S, left))
