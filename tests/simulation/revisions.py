"""A worker whose routes change while records flow: announced, timed, aborted, heard of late, out of date.

What every batch may hold is judged when it is given to a device, by brute force over the whole log: which
revision is in force at a record's own time, for a worker that has taken over what it says it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from inferfleet.config import Config
from inferfleet.control_ports import RouteFeed
from inferfleet.core.ranges import replan
from inferfleet.core.revisions import appended, in_force, timeline
from inferfleet.core.routing import bucket
from inferfleet.records import Batch, Requests
from inferfleet.revisions import EMPTY_LOG, Revision, RouteLog, sealed
from inferfleet.routes import Destination, Route, Shadow, Variant
from inferfleet.variants import BUCKETS, Ranges
from tests.simulation.audit import ViolationError
from tests.simulation.life import RESULTS, SOURCE, HandEngine, Life
from tests.simulation.traffic import make

LEAD_MS = 2_000
HOUR_MS = 3_600_000
NAME = "a"


class Shown:
    """A feed that shows what the world lets it, as if news were slow."""

    def __init__(self, world: LogLife) -> None:
        self._world = world

    def log(self) -> RouteLog:
        """Return what has been heard."""
        return self._world.offered

    @property
    def stale(self) -> str:
        """Why it may be old."""
        return "" if self._world.offered is self._world.log else "news are slow"

    @property
    def refused(self) -> str:
        """Nothing is."""
        return ""

    def close(self) -> None:
        """Nothing to let go of."""


class LogLife(Life):
    """A topic, one worker after another, and a log of revisions of one route."""

    strict = False

    def __init__(self, seed: int, config: Config, patch: pytest.MonkeyPatch) -> None:
        super().__init__(seed, config, patch)
        self.horizon_ms = config.routing.horizon_s * 1000
        self.logs: list[RouteLog] = [EMPTY_LOG]
        """The log after each number."""
        self.offered = EMPTY_LOG
        self.heard = EMPTY_LOG
        self.stable, self.candidate, self.rollout = 1, 0, ""
        self.ranges: dict[str, Ranges] = {"stable": ((0, BUCKETS),)}
        self.rollout_from_ms = 0
        self.announced: Route | None = None
        self.arms: dict[tuple[str, bytes], tuple[int, str]] = {}
        self.seen: Counter[str] = Counter()
        self.versions = self.audit.versions[NAME] = {"1"}
        patch.setattr(HandEngine, "submit", _judged(self, HandEngine.submit))
        patch.setattr(HandEngine, "close", _let_go(self, HandEngine.close))
        self.append(self.route(), 0)
        self.hear()

    @property
    def log(self) -> RouteLog:
        """The newest log."""
        return self.logs[-1]

    def feed(self) -> RouteFeed:
        """Return the log, as the world shows it."""
        return Shown(self)

    # The log

    def route(self) -> Route:
        """Return the route as it is meant to be now."""
        versions = {"stable": self.stable, "control": self.stable, "canary": self.candidate}
        variants = tuple(
            Variant(name, str(versions[name]), 1.0, ranges) for name, ranges in self.ranges.items()
        )
        shadows = (Shadow("next", "7"),) if self.rng.random() < 0.2 else ()
        return Route(
            name=NAME,
            source=Destination("kafka", SOURCE),
            results=(Destination("kafka", RESULTS),),
            model="m",
            variants=variants,
            shadows=shadows,
            salt="inferfleet/a",
        )

    def append(self, route: Route, from_ms: int | None) -> None:
        """Append a revision of the route."""
        self.versions.update(variant.version for variant in route.variants)
        revision = Revision(
            number=len(self.logs),
            epoch=0,
            name=NAME,
            route=route,
            effective_from_ms=from_ms,
            at_ms=self.clock.utc_ms(),
            author="test",
            action="step",
            rollout=self.rollout,
            horizon_ms=self.horizon_ms,
            previous=self.log.head.hash,
        )
        self.logs.append(appended(self.log, [sealed(revision)]))

    # What may happen

    def step(self) -> None:
        """Do the next thing to the route that makes sense."""
        now_ms = self.clock.utc_ms()
        if self.announced is not None:
            if self.rng.random() < 0.5:
                self.rollout_from_ms = self.rollout_from_ms or now_ms + LEAD_MS
                self.append(self.announced, now_ms + LEAD_MS)
                self.announced = None
                self.seen["timed"] += 1
        elif not self.rollout:
            self.begin()
        else:
            self.rng.choice([self.grow, self.promote, self.abort, self.abort])()

    def begin(self) -> None:
        """Announce a canary, or another version for everybody."""
        self.rollout, self.rollout_from_ms = f"rollout-{len(self.logs)}", 0
        self.candidate = self.rng.choice([version for version in range(1, 7) if version != self.stable])
        if self.rng.random() < 0.3:
            self.before = self.stable
            self.stable, self.candidate, self.rollout = self.candidate, 0, ""
            self.seen["blue/green"] += 1
        else:
            self._share(self.rng.choice([500, 3_000]))
        self.announced = self.route()
        self.append(self.announced, None)

    def grow(self) -> None:
        """Give the canary more."""
        size = sum(high - low for low, high in self.ranges["canary"])
        self._share(min(5_000, size * 2))
        self.append(self.route(), self.clock.utc_ms() + LEAD_MS)
        self.seen["grown"] += 1

    def promote(self) -> None:
        """The canary answers everybody."""
        self.stable, self.candidate, self.rollout = self.candidate, 0, ""
        self.ranges = {"stable": ((0, BUCKETS),)}
        self.append(self.route(), self.clock.utc_ms() + LEAD_MS)
        self.seen["promoted"] += 1

    def abort(self) -> None:
        """Take the whole rollout back, from its first revision on."""
        self.ranges, self.candidate, self.rollout = {"stable": ((0, BUCKETS),)}, 0, ""
        self.append(self.route(), self.rollout_from_ms)
        self.seen["aborted"] += 1

    def _share(self, size: int) -> None:
        wanted = {"stable": BUCKETS - 2 * size, "control": size, "canary": size}
        self.ranges = replan(self.ranges, {name: count for name, count in wanted.items() if count})

    def hear(self) -> None:
        """Let the news arrive."""
        self.offered = self.heard = self.log

    def go_back(self) -> None:
        """Offer an older copy of the log, as a store does after a failover; the next news end it."""
        self.offered = self.rng.choice(self.logs[1:])
        self.seen["older log offered"] += self.offered.head.number < self.heard.head.number

    def break_version(self) -> None:
        """Let a version be broken on disk, or mended."""
        version = str(self.rng.randrange(2, 8))
        self.broken ^= {version}

    def send(self, count: int) -> None:
        """Send requests whose producers' clocks may be wrong."""
        for _ in range(count):
            self.sent += 1
            request = make(self.rng, self.sent, NAME, self.clock.utc_ms(), faults=self.rng.random() < 0.3)
            stream, offset = self.broker.append(
                SOURCE, request.value, key=request.key, headers=request.headers
            )
            records = self.broker.log(stream).records
            wrong_ms = self.rng.choice([0, 0, 0, -HOUR_MS, HOUR_MS, -3_000, 3_000, -40_000])
            records[-1] = records[-1]._replace(timestamp_ms=records[-1].timestamp_ms + wrong_ms)
            self.audit.sent(request, stream, offset)

    # The judge

    def judge(self, batch: Batch) -> None:
        """Judge what is given to a device."""
        number = self.running.status().adopted.get(NAME, 0)
        for part in batch.parts:
            for row, request_id in zip(part.rows, part.ids, strict=True):
                try:
                    self._judge_row(part, row, request_id, number)
                except ViolationError:
                    self.ending = True  # what the worker does on its way out is judged no longer
                    raise

    def _judge_row(self, part: Requests, row: int, request_id: str, number: int) -> None:
        served, time_ms = part.served, part.chunk.timestamps_ms[row]
        allowed = {str(each.number): each for each in self._expected(number, time_ms)}
        if served is None or served.revision not in allowed:
            raise ViolationError(
                f"I7: {request_id} of {time_ms} runs under {served}; with {number} adopted, "
                f"{sorted(allowed)} is in force"
            )
        expected = allowed[served.revision]
        if expected.route is None:
            raise ViolationError(f"I7: {request_id} runs under {served}, which takes the route away")
        key = part.chunk.keys[row]
        key = request_id.encode() if key is None else key
        right = expected.route.variant_at(bucket(expected.route.salt, key))
        if served.fallback:
            self.seen["fallback"] += 1
            # It was steered some moments ago, by the stable version of then.
            stables = {r.route.variants[0].version for r in self.logs[number].kept[NAME] if r.route}
            if served.version not in stables:
                raise ViolationError(f"fallback: {request_id} is answered by {served}, not by {stables}")
            return
        if (served.variant, served.version) != (right.name, right.version):
            raise ViolationError(f"I10: {request_id} is answered by {served}; {right} owns its key")
        self._judge_arm(expected, key, right.name)

    def _expected(self, number: int, time_ms: int) -> list[Revision]:
        """Return what may answer a time once ``number`` is taken over.

        Just one revision, but before the kept log: there its oldest, of whichever log it was taken from.
        """
        newest = self.running._adopting.log
        logs = [self.logs[number]]
        if time_ms < timeline(newest.kept[NAME]).starts_ms[0]:
            logs = self.logs[number : newest.head.number + 1]
        found = [in_force([r for r in log.kept[NAME] if r.number <= number], time_ms) for log in logs]
        return [each for each in found if each is not None]

    def _judge_arm(self, revision: Revision, key: bytes, arm: str) -> None:
        """Within a rollout a key that has met the canary, or its control, stays there."""
        if not revision.rollout:
            return
        number, before = self.arms.get((revision.rollout, key), (0, "stable"))
        if number <= revision.number and before not in ("stable", arm):
            raise ViolationError(f"I10: key {key!r} leaves {before} for {arm} at {revision.number}")
        if number <= revision.number:
            self.arms[revision.rollout, key] = (revision.number, arm)

    def judge_closed(self, engine: HandEngine) -> None:
        """Judge that a version may be let go: no revision of now or later needs it."""
        if self.running.health().reasons[-1:] == ("draining",) or self.ending:
            return
        number = self.running.status().adopted.get(NAME, 0)
        line = timeline(self.logs[number].kept.get(NAME, ()))
        ends = (*line.starts_ms[1:], float("inf"))[: len(line.revisions)]
        for revision, end_ms in zip(line.revisions, ends, strict=True):
            needs = {variant.version for variant in revision.route.variants} if revision.route else set()
            if engine.version in needs and end_ms > self.clock.utc_ms():
                raise ViolationError(f"memory: {engine} is closed, and {revision.number} needs it")
        self.seen["unloaded"] += 1

    ending = False


def _judged(
    world: LogLife, right: Callable[[HandEngine, Batch], None]
) -> Callable[[HandEngine, Batch], None]:
    def submit(engine: HandEngine, batch: Batch) -> None:
        if batch.lane.role not in ("shadow", "secondary"):
            world.judge(batch)
        right(engine, batch)

    return submit


def _let_go(world: LogLife, right: Callable[[HandEngine], None]) -> Callable[[HandEngine], None]:
    def close(engine: HandEngine) -> None:
        world.judge_closed(engine)
        right(engine)

    return close


def run(seed: int, config: Config, patch: pytest.MonkeyPatch) -> LogLife:
    """Let one worker after another live in a world of this seed, and judge the whole."""
    life = LogLife(seed, config, patch)
    usual: list[Callable[[], object]] = [
        lambda: life.send(life.rng.choice([1, 4, 20])) if life.sent < 400 else None,
        life.step,
        life.hear,
    ]
    faults = [life.go_back, life.break_version, lambda: life.clock.advance(life.rng.choice([1, 20, 70]))]
    life.happens += usual + [fault for fault in faults if life.rng.random() < 0.6]
    for number in range(life.rng.randrange(1, 4)):
        worker = life.worker(f"w{number}")
        until = life.sent + life.rng.choice([60, 150])
        life.happens.append(lambda u=until, w=worker: w.stop() if life.sent >= min(u, 400) else None)
        life.ending = False
        worker.run()
        life.happens.pop()
        life.seen["restarts"] += 1
    life.happens.clear()
    life.broken.clear()
    life.stable, life.candidate, life.rollout = 1, 0, ""
    life.ranges = {"stable": ((0, BUCKETS),)}
    life.append(life.route(), 0)
    life.hear()
    life.ending = True
    if life.worker("last").run(until_idle_s=1.0):
        raise ViolationError("I6: the last worker gives records back")
    if life.lag:
        raise ViolationError(f"I6: {life.lag} records are left")
    life.audit.close()
    return life
