"""Which revision of each route a worker has taken over: loaded first, steered by then, never gone back.

A route's revisions are taken over as soon as every version is loaded that they need now or later. Those that
left force are served while their versions are there, and by the stable version of now afterwards. An
announced revision is only made ready. Whatever cannot be taken over is tried again, and what was taken over
before goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import structlog

from inferfleet.config import Config
from inferfleet.core.revisions import Timeline, timeline
from inferfleet.errors import InferfleetError
from inferfleet.plane import version_name
from inferfleet.ports import BatchingWishes
from inferfleet.revisions import EMPTY_LOG, Revision, RouteLog
from inferfleet.routes import Route
from inferfleet.variants import BUCKETS, Variant
from inferfleet.worker.engine import Engine
from inferfleet.worker.plan import Decoders, RoutePlan
from inferfleet.worker.schedule import Schedule
from inferfleet.worker.versions import Version, Wanted

log = structlog.get_logger(__name__)

FOREVER = float("inf")
Check = Callable[[RoutePlan], None]


class Span(NamedTuple):
    """A revision and the routing times at which it is in force: from ``start_ms`` up to ``end_ms``."""

    revision: Revision
    start_ms: float
    end_ms: float


def spans(line: Timeline) -> list[Span]:
    """Return the spans of a timeline; its first revision answers all times before it too."""
    if not line.revisions:
        return []
    ends = (*line.starts_ms[1:], FOREVER)
    starts = (-FOREVER, *line.starts_ms[1:])
    return [Span(*each) for each in zip(line.revisions, starts, ends, strict=True)]


class _Taken(NamedTuple):
    """What a worker steers a route by: ``newest`` has the highest number; ``label`` is that of a file."""

    newest: Revision
    line: Timeline
    label: str


class Adopting:
    """The routes of one worker's pool; owned by the worker loop's thread.

    ``check`` raises :class:`~inferfleet.errors.InferfleetError` for a plan that this worker cannot serve.
    """

    def __init__(self, config: Config, wishes: Callable[[str, str], BatchingWishes], check: Check) -> None:
        self._config = config
        self._pool = config.worker.pool
        self._wishes = wishes
        self._check = check
        self._decoders = Decoders()
        self.log: RouteLog = EMPTY_LOG
        self.label = ""
        """What people call the routes that are served: the log's number, or the hash of a file."""
        self._mine: dict[str, tuple[Revision, ...]] = {}
        self._taken: dict[str, _Taken] = {}
        self._plans: dict[tuple[object, ...], RoutePlan] = {}
        self._ready: dict[str, int] = {}
        self.refused: dict[str, InferfleetError] = {}
        """Routes that cannot be served as their newest revision says, and why."""

    def found(self, found: RouteLog) -> None:
        """Hear of a newer log."""
        self.log = found
        self._mine = {
            name: revisions
            for name, revisions in found.kept.items()
            if name in self._taken or any(self._serves(each.route) for each in revisions)
        }

    def _serves(self, route: Route | None) -> bool:
        return route is not None and route.pool == self._pool

    @property
    def adopted(self) -> dict[str, int]:
        """The number of each route's newest revision that is taken over or, announced, is ready."""
        numbers = {name: taken.newest.number for name, taken in self._taken.items()}
        return {name: max(number, self._ready.get(name, 0)) for name, number in numbers.items()} | {
            name: number for name, number in self._ready.items() if name not in numbers
        }

    @property
    def names(self) -> list[str]:
        """The routes that this pool's workers may have to serve."""
        return sorted(self._mine)

    # Versions

    def wanted(self, now_ms: int) -> Wanted:
        """Return which versions are needed, for what is taken over and for what is to be."""
        live: dict[Version, None] = {}
        warm: dict[Version, None] = {}
        past: dict[Version, None] = {}
        announced: dict[Version, None] = {}
        horizon_ms = self._config.routing.horizon_s * 1000
        for line in [each.line for each in self._taken.values()] + [
            timeline(revisions) for revisions in self._mine.values()
        ]:
            for span in spans(line):
                if span.end_ms > now_ms:
                    live.update(dict.fromkeys(self._versions(span.revision.route)))
                    warm.update(dict.fromkeys(self._warm(span.revision.route)))
                elif now_ms - span.end_ms < horizon_ms:
                    past.update(dict.fromkeys(self._versions(span.revision.route)))
        for revision in self._announced():
            announced.update(dict.fromkeys(self._versions(revision.route) + self._warm(revision.route)))
        # What is to be gone back to loads last, and is let go as little as what answers.
        return Wanted([*live, *(each for each in warm if each not in live)], list(announced), list(past))

    def _announced(self) -> list[Revision]:
        found = [self.log.announced(name) for name in self._mine]
        return [each for each in found if each is not None]

    def _versions(self, route: Route | None, *, shadows: bool = True) -> list[Version]:
        """Return the versions of a route of this pool, primary ones first."""
        if route is None or route.pool != self._pool:
            return []
        versions = [each.version for each in route.variants]
        versions += [each.version for each in route.shadows] if shadows else []
        return [(route.model, version) for version in versions]

    def _warm(self, route: Route | None) -> list[Version]:
        """Return the versions that a route of this pool wants loaded although they answer nobody."""
        if route is None or route.pool != self._pool:
            return []
        return [(route.model, version) for version in route.warm]

    def missing(self, loaded: Mapping[Version, Engine], now_ms: int) -> set[Version]:
        """Return the versions that are not there and that the newest revisions need, now or later."""
        return {
            version
            for revisions in self._mine.values()
            for version in self._needed(timeline(revisions), now_ms)
            if version not in loaded
        }

    def _needed(self, line: Timeline, now_ms: int) -> list[Version]:
        return [
            version
            for span in spans(line)
            if span.end_ms > now_ms
            for version in self._versions(span.revision.route, shadows=False)
        ]

    # Taking over

    def schedules(self, loaded: Mapping[Version, Engine], now_ms: int) -> list[Schedule]:
        """Take over what can be, and return the routes that are served now.

        Raises InferfleetError where the routes of a file cannot be served as they are: they are one whole.
        """
        whole = self.log.head.number == 0
        taken: dict[str, _Taken] = {}
        for name in {**self._taken, **self._mine}:
            newest = self._newest(name, loaded, now_ms)
            if newest is not None:
                taken[name] = newest
            if whole and name in self._mine and (newest is None or newest.newest not in self._mine[name]):
                return self._built(self._taken, loaded, now_ms, whole=True)
        self.refused.clear()
        made = self._built(taken, loaded, now_ms, whole=whole)
        self.label = self.log.label
        return made

    def late(self, loaded: Mapping[Version, Engine]) -> dict[str, tuple[int, list[str]]]:
        """Return which routes have a newer revision than is taken over: its number, what it lacks."""
        found: dict[str, tuple[int, list[str]]] = {}
        for name in self._mine:
            newest, taken = self.log.newest(name), self._taken.get(name)
            if (
                newest is not None
                and newest.number
                and (taken is None or _order(newest) != _order(taken.newest))
            ):
                versions = self._versions(newest.route, shadows=False)
                found[name] = (newest.number, [version_name(*v) for v in versions if v not in loaded])
        return found

    def _newest(self, name: str, loaded: Mapping[Version, Engine], now_ms: int) -> _Taken | None:
        """Return the newest state of a route that can be served: the log up to some revision of it."""
        standing = self._taken.get(name)
        timed = [each for each in self._mine.get(name, ()) if each.effective_from_ms is not None]
        for count in range(len(timed), 0, -1):
            newest = timed[count - 1]
            if standing is not None and _order(newest) < _order(standing.newest):
                return standing
            line = timeline(timed[:count])
            if all(version in loaded for version in self._needed(line, now_ms)):
                return _Taken(newest, line, self.log.label)
        return standing if name in self._mine else None

    def _built(
        self, taken: Mapping[str, _Taken], loaded: Mapping[Version, Engine], now_ms: int, *, whole: bool
    ) -> list[Schedule]:
        made: list[Schedule] = []
        plans: dict[tuple[object, ...], RoutePlan] = {}
        kept = dict(taken)
        for name, each in taken.items():
            try:
                schedule = self._schedule(each, loaded, now_ms, plans)
            except InferfleetError as error:
                if whole:
                    raise
                self.refused[name] = error
                kept.pop(name)
                if name not in self._taken:
                    continue
                kept[name] = self._taken[name]
                schedule = self._schedule(kept[name], loaded, now_ms, plans)
            if schedule is not None:
                made.append(schedule)
        self._taken, self._plans = kept, plans
        self._announce(loaded, plans)
        return made

    def _schedule(
        self,
        taken: _Taken,
        loaded: Mapping[Version, Engine],
        now_ms: int,
        plans: dict[tuple[object, ...], RoutePlan],
    ) -> Schedule | None:
        """Return a route's plans; ``None`` where nothing of it is to be served here now."""
        line, label = taken.line, taken.label
        now = line.at(now_ms)
        if not self._serves(now.route):
            return None
        current = self._plan(now, label, loaded, None, plans)
        made: list[RoutePlan] = []
        for each, _, end_ms in spans(line):
            try:
                made.append(current if each is now else self._plan(each, label, loaded, current, plans))
            except InferfleetError:
                if end_ms > now_ms:
                    raise
                # What is over keeps nothing later from being taken over: the stable version answers for it.
                made.append(self._plan(each, label, {}, current, plans))
        return Schedule(current, line.starts_ms, made)

    def _plan(
        self,
        revision: Revision,
        label: str,
        loaded: Mapping[Version, Engine],
        current: RoutePlan | None,
        plans: dict[tuple[object, ...], RoutePlan],
    ) -> RoutePlan:
        """Return the plan of a revision, the same one as before if nothing of it has changed."""
        versions = set(self._versions(revision.route, shadows=False))
        whole = bool(versions) and all(version in loaded for version in versions)
        engines = {key: loaded[key] for key in self._versions(revision.route) if key in loaded}
        label = str(revision.number) if revision.number else label
        key = (revision.epoch, label, revision.name, *engines.values(), None if whole else current)
        known = plans.get(key) or self._plans.get(key)
        if known is None:
            known = self._made(revision, label, engines, None if whole else current)
        plans[key] = known
        return known

    def _made(
        self, revision: Revision, label: str, engines: Mapping[Version, Engine], instead: RoutePlan | None
    ) -> RoutePlan:
        def plan(route: Route, with_engines: Mapping[Version, Engine]) -> RoutePlan:
            return RoutePlan(
                route,
                label,
                with_engines,
                self._wishes,
                self._config,
                number=revision.number,
                decoders=self._decoders,
                instead=instead,
            )

        if instead is None:
            if revision.route is None:
                raise LookupError(f"revision {revision.number} takes route {revision.name} away")
            made = plan(revision.route, engines)
            self._check(made)
            return made
        if revision.route is not None and engines:
            try:
                made = plan(msgspec.structs.replace(revision.route, shadows=()), engines)
                self._check(made)
                return made
            except InferfleetError:
                pass  # the stable version of now takes other requests than those that are left
        stable = instead.route.variants[0]
        only = Variant(stable.name, stable.version, 1.0, ((0, BUCKETS),))
        return plan(msgspec.structs.replace(instead.route, variants=(only,), shadows=()), {})

    def _announce(self, loaded: Mapping[Version, Engine], plans: dict[tuple[object, ...], RoutePlan]) -> None:
        """Find out which announced revisions could be served at once."""
        ready: dict[str, int] = {}
        for revision in self._announced():
            newest, taken = self.log.newest(revision.name), self._taken.get(revision.name)
            behind = newest is not None and (taken is None or _order(taken.newest) != _order(newest))
            versions = self._versions(revision.route)
            needed = versions + self._warm(revision.route)
            if behind or not versions or not all(version in loaded for version in needed):
                continue
            try:
                self._plan(revision, self.log.label, loaded, None, plans)
            except InferfleetError as error:
                self.refused[revision.name] = error
            else:
                ready[revision.name] = revision.number
        self._ready = ready

    def refusals(self, versions: Mapping[Version, InferfleetError]) -> dict[str, str]:
        """Return why versions are refused, by name: they do not load, or their route cannot be served."""
        found = {version_name(*key): str(error) for key, error in versions.items()}
        for name, error in dict(self.refused).items():
            revisions = self._mine.get(name, ())
            for version in self._versions(revisions[-1].route) if revisions else ():
                found.setdefault(version_name(*version), str(error))
        return found


def _order(revision: Revision) -> tuple[int, int]:
    return revision.epoch, revision.number
