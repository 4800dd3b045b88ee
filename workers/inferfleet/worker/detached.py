"""A shadow in a pool of its own: its answers wait for the primary's, are compared, and go nowhere.

The shadow takes the same requests in a group of its own, so it may lag or lead. Either side waits for the
other, by the request's id, for a bounded time and within bounds of number and bytes; a request whose partner
does not come is counted and given up. Its record is settled then, and nothing was published for it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection

import numpy as np
import structlog

from inferfleet.core.shadow_comparing import Comparer
from inferfleet.errors import InferfleetError
from inferfleet.ports import Clock, OutcomeFeed
from inferfleet.records import Answer, Failures, Served, Tensors, TensorSpec
from inferfleet.summaries import Comparison, Window
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.wire.outcomes import read_outcome
from inferfleet.worker.observing import Observing, shadow_place
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.settling import Settling

log = structlog.get_logger(__name__)

HORIZON_S = 60.0
"""How long either side waits for the other."""
ASK_AGAIN_S = 1.0
LOOK_EVERY_S = 0.02
"""How often all that waits is looked through."""
OPEN_AGAIN_S = 5.0
MOST = 20_000
MOST_BYTES = 64 << 20
"""What may wait of the primary's outcomes; of the shadow's own answers as many, and the older go first."""

Body = tuple[bytes, int | None]


class _Waiting:
    """Answers of one part; ``found`` holds what the primary said of each request, so far."""

    __slots__ = ("answer", "found", "left", "plan", "settling", "until")

    def __init__(self, plan: RoutePlan, answer: Answer, settling: Settling, until: float) -> None:
        self.plan = plan
        self.answer = answer
        self.settling = settling
        self.until = until
        self.found: list[Body | None] = [None] * len(answer.part)
        self.left = len(answer.part)


class _Join:
    """Both sides of one shadow route.

    ``primary`` names the route that it sees the requests of, ``place`` says where that one's answers go.
    """

    def __init__(self, primary: str, place: object) -> None:
        self.primary = primary
        self.place = place
        self.feed: OutcomeFeed | None = None
        self.open_at = 0.0
        self.ask_at = 0.0
        self.look_at = 0.0
        self.mine: deque[_Waiting] = deque()
        self.by_id: dict[str, tuple[_Waiting, int]] = {}
        self.requests = 0
        self.theirs: OrderedDict[str, tuple[Body, float]] = OrderedDict()
        self.bytes = 0

    def add(self, waiting: _Waiting) -> None:
        self.mine.append(waiting)
        self.requests += len(waiting.found)
        for index, request_id in enumerate(waiting.answer.part.ids):
            self.by_id[request_id] = (waiting, index)
            known = self.theirs.pop(request_id, None)
            if known is not None:
                self.bytes -= len(known[0][0])
                self.match(request_id, known[0])

    def match(self, request_id: str, body: Body) -> bool:
        """Give an outcome to the request that waits for it; return whether one does."""
        found = self.by_id.pop(request_id, None)
        if found is None:
            return False
        waiting, index = found
        waiting.found[index] = body
        waiting.left -= 1
        return True

    def keep(self, request_id: str, body: Body, until: float) -> None:
        """Keep an outcome for a request that may come."""
        old = self.theirs.pop(request_id, None)
        self.theirs[request_id] = (body, until)
        self.bytes += len(body[0]) - (0 if old is None else len(old[0][0]))

    def forget(self, now: float) -> None:
        """Let go of outcomes that nobody came for, and of the oldest where there are too many."""
        while self.theirs:
            request_id, (body, until) = next(iter(self.theirs.items()))
            if until > now and len(self.theirs) <= MOST and self.bytes <= MOST_BYTES:
                return
            del self.theirs[request_id]
            self.bytes -= len(body[0])

    def ended(self, now: float, most: int) -> list[_Waiting]:
        """Take out what is complete or has waited long enough."""
        found: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        over = self.requests - most
        for waiting in self.mine:
            if not waiting.left or waiting.until <= now or over > 0 or not waiting.settling.chunk.wanted:
                over -= len(waiting.found)
                found.append(waiting)
            else:
                kept.append(waiting)
        self.mine = kept
        for waiting in found:
            self.requests -= len(waiting.found)
            for request_id in waiting.answer.part.ids:
                if self.by_id.get(request_id, (None, 0))[0] is waiting:
                    del self.by_id[request_id]
        return found


class Detached:
    """The detached shadows of a worker; owned by the worker loop's thread.

    ``open_feed`` returns where the outcomes of a route (by its name) are read; it raises InferfleetError
    where they cannot be. ``place`` says where they are, in any form that differs when they go elsewhere.
    ``most`` bounds the requests that wait for their partners.
    """

    def __init__(
        self,
        open_feed: Callable[[str], OutcomeFeed],
        metrics: PrometheusMetrics,
        clock: Clock,
        *,
        place: Callable[[str], object] = str,
        most: int = MOST,
        horizon_s: float = HORIZON_S,
    ) -> None:
        self.observing: Observing | None = None
        self._open_feed = open_feed
        self._metrics = metrics
        self._clock = clock
        self._place = place
        self._most = most
        self._horizon_s = horizon_s
        self._joins: dict[str, _Join] = {}
        self._comparers: dict[Served, Comparer] = {}

    def __repr__(self) -> str:
        waiting = {name: join.requests for name, join in self._joins.items()}
        return f"Detached({waiting})"

    def answered(self, plan: RoutePlan, answer: Answer, settling: Settling) -> None:
        """Let the answers of a part wait for the primary's."""
        window = self._window(plan, answer.part.served)
        if window is not None:
            window.seen += len(answer.part)
        now = self._clock.monotonic()
        waiting = _Waiting(plan, answer, settling, now + self._horizon_s)
        join = self._join(plan)
        join.add(waiting)
        if join.feed is not None and waiting.left:
            join.feed.ask([i for i, body in zip(answer.part.ids, waiting.found, strict=True) if body is None])

    def failed(self, plan: RoutePlan, failures: Failures) -> None:
        """Count requests that the shadow failed; nobody is told."""
        version = "" if failures.served is None else failures.served.version
        for code in failures.codes:
            self._metrics.shadow_outcomes(plan.route.shadow_of or "", version, code.value, 1)
        window = self._window(plan, failures.served)
        if window is not None:
            window.seen += len(failures.rows)

    def poll(self, now: float, *, flush: bool = False, crowded: bool = False) -> None:
        """Hear what the primaries answered; settle what is compared, or has waited for long enough.

        ``flush`` waits for nobody any longer. ``crowded`` says that what waits here is all that keeps the
        worker from taking more: the older half of it is given up, or one that lags would never catch up.
        """
        for join in self._joins.values():
            self._hear(join, now)
            if flush or now >= join.look_at:
                join.look_at = now + LOOK_EVERY_S
                most = min(self._most, join.requests // 2) if crowded else self._most
                for waiting in join.ended(float("inf") if flush else now, most):
                    self._end(waiting)
            if join.mine and now >= join.ask_at and join.feed is not None:
                join.ask_at = now + ASK_AGAIN_S
                join.feed.ask(list(join.by_id))

    def _join(self, plan: RoutePlan) -> _Join:
        join = self._joins.get(plan.name)
        if join is None:
            primary = plan.route.shadow_of or ""
            join = self._joins[plan.name] = _Join(primary, self._place(primary))
            self._open(join, self._clock.monotonic())
        return join

    def serve(self, plans: Collection[RoutePlan]) -> None:
        """Hear what the primaries of these routes answer, where they do now; no longer those of others."""
        heard = {plan.name: plan.route.shadow_of or "" for plan in plans}
        now = {name: (primary, self._place(primary)) for name, primary in heard.items()}
        for name in [
            name for name, join in self._joins.items() if now.get(name) != (join.primary, join.place)
        ]:
            join = self._joins.pop(name)
            for waiting in join.ended(float("inf"), self._most):
                self._end(waiting)
            if join.feed is not None:
                join.feed.close(wait=False)  # its reader may wait for a server; the loop does not
        for plan in plans:
            self._join(plan)

    def _open(self, join: _Join, now: float) -> None:
        join.open_at = now + OPEN_AGAIN_S
        try:
            join.feed = self._open_feed(join.primary)
        except InferfleetError as error:
            log.error("outcomes_not_followed", route=join.primary, error=str(error))

    def _hear(self, join: _Join, now: float) -> None:
        if join.feed is None:
            if now >= join.open_at:
                self._open(join, now)
            return
        for heard in join.feed.poll():
            for request_id, body, length in zip(heard.ids, heard.bodies, heard.json_lengths, strict=True):
                if not join.match(request_id, (body, length)):
                    join.keep(request_id, (body, length), now + self._horizon_s)
        join.forget(now)

    # Comparing

    def _end(self, waiting: _Waiting) -> None:
        plan, part = waiting.plan, waiting.answer.part
        if waiting.settling.chunk.wanted:
            route, version = plan.route.shadow_of or "", "" if part.served is None else part.served.version
            matched = len(part) - waiting.left
            if matched:
                self._metrics.shadow_outcomes(route, version, "ok", matched)
            if waiting.left:
                self._metrics.shadow_outcomes(route, version, "unmatched", waiting.left)
            window = self._window(plan, part.served)
            if window is not None:
                window.unmatched += waiting.left
                if matched:
                    self._compare(waiting, window)
        waiting.settling.close()

    def _compare(self, waiting: _Waiting, window: Window) -> None:
        part, variant = waiting.answer.part, waiting.plan.variant_of(waiting.answer.part.served)
        if part.served is None or variant is None or variant.engine.signature is None:
            return
        outputs = variant.engine.signature.outputs
        specs = {spec.name: spec for spec in outputs}
        comparer = self._comparers.get(part.served)
        if comparer is None:
            if len(self._comparers) > 64:
                self._comparers.clear()
            comparer = self._comparers[part.served] = Comparer(outputs)
        window.comparison = window.comparison or Comparison()
        before = window.comparison.verdicts
        try:
            for alike in self._alike(waiting, window, specs):
                comparer.compare(window.comparison, *alike)
        except Exception as error:  # their records are settled all the same
            log.error(
                "shadow_not_compared",
                route=part.served.route,
                model=part.served.model,
                version=part.served.version,
                exc_info=error,
                private=True,
            )
        rows = window.comparison.verdicts.since(before)
        self._metrics.shadow_rows(waiting.plan.route.shadow_of or "", part.served.version, *rows)

    def _alike(
        self, waiting: _Waiting, window: Window, specs: dict[str, TensorSpec]
    ) -> list[tuple[list[str], Tensors, Tensors]]:
        """Return the pairs of a part, joined where their outputs have the same shapes."""
        part, own = waiting.answer.part, waiting.answer.outputs
        bounds = part.bounds()
        groups: dict[tuple[object, ...], list[tuple[int, Tensors]]] = {}
        for index, body in enumerate(waiting.found):
            if body is None:
                continue
            outcome = read_outcome(*body, specs)
            window.primary_errors += bool(outcome.code)
            rows = bounds[index + 1] - bounds[index]
            outputs = {name: array for name, array in outcome.outputs.items() if len(array) == rows}
            if outputs:
                shapes = tuple([(name, array.shape[1:]) for name, array in sorted(outputs.items())])
                groups.setdefault(shapes, []).append((index, outputs))
        found: list[tuple[list[str], Tensors, Tensors]] = []
        for members in groups.values():
            rows_of = [row for index, _ in members for row in range(bounds[index], bounds[index + 1])]
            ids = [part.ids[index] for index, _ in members for _ in range(bounds[index], bounds[index + 1])]
            theirs = {
                name: np.concatenate([outputs[name] for _, outputs in members]) for name in members[0][1]
            }
            found.append((ids, theirs, {name: own[name][rows_of] for name in theirs if name in own}))
        return found

    def _window(self, plan: RoutePlan, served: Served | None) -> Window | None:
        if self.observing is None:
            return None
        return self.observing.window(*shadow_place(plan, served))

    def close(self) -> None:
        """Stop hearing."""
        for join in self._joins.values():
            if join.feed is not None:
                join.feed.close()
