"""What the leading coordinator does every second: announcements get their time, rollouts take their steps.

Each step is one commit under the lease, decided on what was read in the same turn. Nothing that matters is
only in memory: whoever leads next goes on from what is stored, after a moment in which nothing is promoted.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from inferfleet.control_ports import ControlStore
from inferfleet.coordinator import braking, stepping
from inferfleet.coordinator.announcing import Timing, activate_ready
from inferfleet.coordinator.evidence import Feeds, Gathering, evidence_name, is_evidence
from inferfleet.coordinator.stepping import COORDINATOR, Standing
from inferfleet.coordinator.watching import Shown, Watching
from inferfleet.core import rollout as machine
from inferfleet.core.barrier import Barrier, Verdict, ahead, barrier, clock_fault, pool_of
from inferfleet.core.rollout import Step
from inferfleet.core.rollout_moves import abort, load_refused
from inferfleet.errors import ConfigError, ConflictError, ControlError, FencedError
from inferfleet.plane import Change, Lease, Stored, WorkerReport
from inferfleet.ports import Clock
from inferfleet.revisions import RouteLog
from inferfleet.rollouts import Hold, Rollout, decode_rollout

log = structlog.get_logger(__name__)

RESTARTED = "restarted"
"""The kind of the hold that stands while a coordinator that has just taken over looks around."""


class Pace(NamedTuple):
    """How often what is only counted is stored, how long a new leader looks around, and what is kept.

    A step is stored at once. ``kept`` ended rollouts are kept, each at least ``kept_ms``. After ``turn_s`` a
    turn ends, and the next one goes on with the rollouts that were left: the lease has to be renewed between.
    """

    store_s: float = 10.0
    settle_s: float = 10.0
    kept: int = 100
    kept_ms: int = 30 * 86_400_000
    trim_s: float = 600.0
    turn_s: float = 2.0


class _Live:
    """A rollout that goes on, as this leader knows it: the document, what it is now, and its sums."""

    def __init__(self, standing: Standing, gathering: Gathering, evidence_version: int, at: float) -> None:
        self.version = standing.version
        self.rollout = standing.rollout
        self.gathering = gathering
        self.evidence_version = evidence_version
        self.stored_at = at


class _Turn(NamedTuple):
    """What one turn has read, workers before the log, and the lease under which it writes."""

    lease: Lease
    now_ms: int
    workers: Sequence[WorkerReport]
    log: RouteLog
    documents: Mapping[str, Stored]


class Leader:
    """Implements :class:`~inferfleet.coordinator.services.Ticking`. Only one thread may call it.

    ``feeds`` opens labels; without it rollouts that need labels wait for them. ``shown`` exposes how rollouts
    stand.
    """

    def __init__(
        self,
        store: ControlStore,
        clock: Clock,
        timing: Timing | None = None,
        feeds: Feeds | None = None,
        pace: Pace | None = None,
        shown: Shown | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._timing = timing or Timing()
        self._feeds = feeds
        self._pace = pace or Pace()
        self._lease: Lease | None = None
        self._live: dict[str, _Live] = {}
        self._ended: dict[str, Standing] = {}
        self._watching = Watching(shown)
        self._settled_at = 0.0
        self._trim_at = 0.0
        self._told: dict[str, str] = {}
        self._fresh: set[str] = set()
        self._off = False
        self._last = ""

    def __repr__(self) -> str:
        return f"Leader(lease={self._lease}, rollouts={sorted(self._live)})"

    def tick(self, lease: Lease, now_ms: int) -> None:
        """Take every step that is due, each under the lease; what fails for one rollout stops no other.

        Raises FencedError where the lease is gone, ControlError while the store does not answer.
        """
        try:
            self._take_steps(lease, now_ms)
        except ControlError:
            # Workers that the store has forgotten meanwhile have to be heard again before they can be missed.
            self._settled_at = self._clock.monotonic() + self._pace.settle_s
            raise

    def _take_steps(self, lease: Lease, now_ms: int) -> None:
        taken_over = lease != self._lease
        if taken_over:
            self._begin(lease)
        workers, found = self._store.workers(), self._store.load()
        if self._lost(found, workers):
            return
        self._look_at_the_clock(now_ms, workers)
        self._finish_announcements(lease, now_ms, workers, found)
        workers = self._store.workers()
        turn = _Turn(lease, now_ms, workers, self._store.load(), self._store.documents())
        self._forget(turn.documents)
        self._fresh |= {name for name in turn.documents if taken_over}
        self._look_at_all(turn)
        rollouts = [live.rollout for live in self._live.values()]
        ended = [standing.rollout for standing in self._ended.values()]
        self._watching.look(rollouts, ended, workers, now_ms)
        self._resume(turn)
        if self._clock.monotonic() >= self._trim_at:
            self._trim_at = self._clock.monotonic() + self._pace.trim_s
            self._guarded("old rollouts", partial(self._trim, turn))

    def _look_at_all(self, turn: _Turn) -> None:
        """Look at each rollout in turn, first at those that the last turn had no time for."""
        until = self._clock.monotonic() + self._pace.turn_s
        names = sorted(name for name in turn.documents if not is_evidence(name))
        first = bisect_right(names, self._last)
        for name in (*names[first:], *names[:first]):
            self._guarded(name, partial(self._turn, turn, name))
            self._last = name
            if self._clock.monotonic() >= until:
                break

    def _resume(self, turn: _Turn) -> None:
        """Let routes go on that a brake has paused for a version which was taken back since."""
        for name, reason in braking.to_resume(turn.log, turn.workers, turn.now_ms).items():
            if self._store.paused(name) == reason:
                self._guarded(f"route {name}", partial(self._resume_one, turn, name, reason))

    def _resume_one(self, turn: _Turn, name: str, reason: str) -> None:
        entry = braking.resumed(name, reason)
        self._store.commit(Change(actor=COORDINATOR.actor, audit=(entry,), lease=turn.lease))
        self._store.resume(name, reason)
        log.info("route_resumed", route=name, reason=reason)

    def close(self) -> None:
        """Let go of what is read for rollouts."""
        for live in self._live.values():
            live.gathering.close()
        self._live.clear()

    def _begin(self, lease: Lease) -> None:
        """Forget what an earlier lease has known: another may have gone on meanwhile."""
        self.close()
        self._ended.clear()
        self._watching.begin()
        self._lease = lease
        self._settled_at = self._clock.monotonic() + self._pace.settle_s
        self._trim_at = self._clock.monotonic() + self._pace.trim_s

    def _lost(self, found: RouteLog, workers: Sequence[WorkerReport]) -> bool:
        """Say whether workers hold revisions that the store has lost: what they report is not of this log."""
        lost = ahead(found.head, workers)
        said = f"worker {lost[0].worker} {lost[0].text}" if lost else ""
        self._tell("leader_waits_log_lost", said, revision=found.head.number)
        return bool(lost)

    def _look_at_the_clock(self, now_ms: int, workers: Sequence[WorkerReport]) -> None:
        """See whether our clock is the workers': by another one nothing gets a time, and no time passes."""
        said = clock_fault(now_ms, workers) or ""
        self._off = bool(said)
        self._tell("leader_waits_clock_off", said and f"the clock here is {said}")

    def _tell(self, event: str, reason: str, **more: object) -> None:
        """Say once why nothing goes on, until it does."""
        if reason and event not in self._told:
            log.error(event, reason=reason, **more)
            self._told[event] = reason
        elif not reason:
            self._told.pop(event, None)

    def _finish_announcements(
        self, lease: Lease, now_ms: int, workers: Sequence[WorkerReport], found: RouteLog
    ) -> None:
        """Give each announcement its time that no rollout made and that is ready; withdraw hopeless ones."""
        for change, where in activate_ready(found, workers, now_ms, self._timing, COORDINATOR):
            if self._unsure and not where.waiting and not where.refused:
                continue
            self._guarded(where.name, partial(self._store.commit, replace(change, lease=lease)))

    @property
    def _unsure(self) -> bool:
        """Whether workers may be missing that are alive, or our clock is off: no barrier is passed now."""
        return self._off or self._clock.monotonic() < self._settled_at

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        """Call; a conflict is read again in the next turn, and a failure is this one's alone."""
        try:
            call()
        except (FencedError, ControlError):
            raise
        except ConflictError:
            self._drop(name)
        except Exception as error:
            self._drop(name)
            if self._told.get(name) != str(error):
                self._told[name] = str(error)
                log.exception("rollout_not_stepped", document=name)
        else:
            self._told.pop(name, None)

    def _drop(self, name: str) -> None:
        live = self._live.pop(name, None)
        if live is not None:
            with contextlib.suppress(Exception):
                live.gathering.close()

    def _forget(self, documents: Mapping[str, Stored]) -> None:
        for name in [name for name in self._live if name not in documents]:
            self._drop(name)
        for name in [name for name in self._ended if name not in documents]:
            del self._ended[name]

    # One rollout

    def _turn(self, turn: _Turn, name: str) -> None:
        """Look at one rollout once, and take the step that is due."""
        live = self._known(turn, name)
        taken_over = name in self._fresh
        if live is None:
            return
        settling = self._off or (
            self._unsure and (taken_over or any(each.kind == RESTARTED for each in live.rollout.holds))
        )
        if taken_over:
            self._hold_restarted(turn, live)
            self._fresh.discard(name)
        foreign = stepping.displaced(live.rollout, turn.log)
        if foreign:
            self._take(turn, live, stepping.give_way(live.rollout, foreign, turn.now_ms))
            return
        effective = stepping.caught_up(live.rollout, turn.log, turn.now_ms)
        if effective is not live.rollout:
            self._take(turn, live, Step(effective, changed=True))
        stopped = braking.braked(live.rollout, turn.workers)
        if stopped:
            self._take(turn, live, abort(live.rollout, turn.now_ms, stopped))
            return
        if live.rollout.effect == "barrier" and self._at_barrier(turn, live):
            return
        heard = () if self._off else turn.workers
        evidence = live.gathering.gather(live.rollout, heard, turn.now_ms)
        step = machine.advance(live.rollout, evidence, turn.now_ms)
        if step.rollout.phase != "aborted" and (settling or live.gathering.behind):
            # Time that nobody has watched is no time, and what was not read yet is no evidence for going on.
            live.rollout = replace(live.rollout, last_ms=turn.now_ms)
            return
        due = self._clock.monotonic() - live.stored_at >= self._pace.store_s
        if step.changed or due:
            self._take(turn, live, step)
        else:
            live.rollout = step.rollout

    def _known(self, turn: _Turn, name: str) -> _Live | None:
        """Return a rollout that goes on, read anew if somebody else has changed it."""
        stored = turn.documents[name]
        if name in self._ended and self._ended[name].version == stored.version:
            return None
        live = self._live.get(name)
        if live is not None and live.version == stored.version:
            return live
        rollout = decode_rollout(stored.body)
        if rollout.ended:
            self._drop(name)
            self._ended[name] = Standing(stored.version, rollout)
            return None
        self._ended.pop(name, None)
        if live is None:
            kept = turn.documents.get(evidence_name(name))
            gathering = Gathering(rollout, self._store, None if kept is None else kept.body, self._feeds)
            live = self._live[name] = _Live(
                Standing(stored.version, rollout),
                gathering,
                0 if kept is None else kept.version,
                self._clock.monotonic(),
            )
        live.version, live.rollout = stored.version, rollout
        return live

    def _hold_restarted(self, turn: _Turn, live: _Live) -> None:
        """Say in the rollout that its coordinator has changed; the machine ends the hold by its next look."""
        rollout = live.rollout
        hold = Hold(kind=RESTARTED, reason="a coordinator has just taken over", since_ms=turn.now_ms)
        others = tuple(each for each in rollout.holds if each.kind != RESTARTED)
        held = replace(rollout, holds=(*others, hold), last_ms=turn.now_ms)
        self._take(turn, live, Step(held, changed=True))

    def _at_barrier(self, turn: _Turn, live: _Live) -> bool:
        """Give the announced route its time, or end the rollout if a worker refuses it; say if either was.

        What is paused waits, and so does what nobody could have heard.
        """
        found = barrier_of(live.rollout, turn.log, turn.workers)
        if found is None:
            return False
        verdict = found.verdict(turn.now_ms, float("inf"))
        if verdict is Verdict.READY and (self._unsure or live.rollout.paused or not found.workers):
            return False
        if verdict is Verdict.REFUSED:
            self._take(turn, live, load_refused(live.rollout, str(found), turn.now_ms))
        elif verdict is Verdict.READY:
            change = stepping.activation_of(
                live.rollout,
                found.announcement,
                turn.log,
                turn.now_ms,
                self._timing.lead_ms,
                turn.lease,
            )
            self._store.commit(change)
            log.info(
                "rollout_activates",
                rollout=live.rollout.id,
                route=live.rollout.route,
                version=live.rollout.to_version,
                phase=live.rollout.phase,
            )
        return verdict in (Verdict.REFUSED, Verdict.READY)

    def _take(self, turn: _Turn, live: _Live, step: Step) -> None:
        """Write a step down as a whole: state, sums, revision and audit entry."""
        rollout = step.rollout
        name = evidence_name(rollout.id)
        body = None if rollout.ended else live.gathering.body()
        # A rollout that begins and ends between two turns has no sums to take away.
        beside = {name: (live.evidence_version, body)} if body is not None or live.evidence_version else {}
        before = Standing(live.version, live.rollout)
        self._store.commit(
            stepping.change_of(step, before, turn.log, COORDINATOR, lease=turn.lease, beside=beside)
        )
        if rollout.phase != live.rollout.phase or step.route is not None:
            log.info(
                "rollout_steps",
                rollout=rollout.id,
                route=rollout.route,
                version=rollout.to_version,
                phase=rollout.phase,
                percent=rollout.percent,
                reason=rollout.history[-1].reason if rollout.history else "",
            )
        live.version += 1
        live.evidence_version += 1 if beside else 0
        live.rollout = rollout
        live.stored_at = self._clock.monotonic()
        if rollout.ended:
            self._drop(rollout.id)

    # What is old

    def _trim(self, turn: _Turn) -> None:
        """Take away rollouts that have ended long ago, and the sums of those that have ended."""
        ended: list[tuple[int, str]] = []
        for name, stored in turn.documents.items():
            if not is_evidence(name):
                with contextlib.suppress(ConfigError):  # a newer release's is not ours to judge
                    rollout = decode_rollout(stored.body)
                    ended += [(rollout.since_ms, name)] if rollout.ended else []
        ended.sort(reverse=True)
        old = [name for at_ms, name in ended[self._pace.kept :] if turn.now_ms - at_ms > self._pace.kept_ms]
        sums = [evidence_name(name) for _, name in ended if evidence_name(name) in turn.documents]
        for name in (*old, *sums):
            gone = {name: (turn.documents[name].version, None)}
            self._store.commit(Change(actor=COORDINATOR.actor, audit=(), documents=gone, lease=turn.lease))
            log.info("rollout_trimmed", document=name)


def barrier_of(rollout: Rollout, log_: RouteLog, workers: Sequence[WorkerReport]) -> Barrier | None:
    """Return where the announcement that a rollout waits for stands; ``None`` where there is none."""
    announced = log_.announced(rollout.route)
    if announced is None or announced.rollout != rollout.id:
        return None
    return barrier(announced, workers, pool_of(log_, announced))
