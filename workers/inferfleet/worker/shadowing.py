"""Shadows inside a worker: what was answered runs once more by another version, when there is nothing to do.

A shadow sees copies of requests whose answers are on their way already. It holds no chunk open, is charged to
no route, reaches no outlet, brake or retry, and its failures are counted and that is all. One batch at a time
runs, only when no request of any route waits or runs on this worker, and for a tenth of the route's latency
goal at most; so a request that comes meanwhile waits for no more than that. What finds no room is shed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import structlog

from inferfleet.core.cost import CostLine
from inferfleet.ports import Clock
from inferfleet.records import Answer, Array, Batch, BatchResult, Chunk, Requests, RowFailure, Stream, Tensors
from inferfleet.summaries import Comparison, Window
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.careful import Careful
from inferfleet.worker.dispatching import Dispatching
from inferfleet.worker.engine import Engine, Finished
from inferfleet.worker.observing import Observing, fill_batch
from inferfleet.worker.plan import RoutePlan, VariantPlan
from inferfleet.worker.shadow_plan import ShadowPlan

log = structlog.get_logger(__name__)

MAX_ROWS = 4_096
MAX_BYTES = 32 << 20
"""What may wait for shadows, over all routes of a worker."""
HUNG_S = 30.0
"""After so long a shadow's batch is not waited for any more; nothing runs beside it until it ends."""
MAX_COST_LINES = 256

NOWHERE = Chunk(Stream("", -1), 0, [], [], [], [], [], 0.0)
"""What the requests of shadows belong to: nothing is settled by them, and no record is held."""


class _Copy(NamedTuple):
    """Requests that a shadow is to see, with the outputs of the version that answered them.

    ``theirs`` are the shadow's own outputs, where this waits for the answering version's repetition.
    """

    plan: ShadowPlan
    variant: VariantPlan
    part: Requests
    outputs: Tensors
    rows: int
    size_bytes: int
    theirs: Tensors | None = None

    @property
    def engine(self) -> Engine:
        """The engine that is to run it."""
        return self.plan.engine if self.theirs is None else self.variant.engine

    def cut(self, low: int, high: int) -> _Copy:
        """Return the requests ``low`` to ``high``."""
        bounds = self.part.bounds()
        first, last = bounds[low], bounds[high]
        outputs = {name: array[first:last] for name, array in self.outputs.items()}
        theirs = self.theirs and {name: array[first:last] for name, array in self.theirs.items()}
        part = self.part.slice(low, high)
        size_bytes = self.size_bytes * (last - first) // max(1, self.rows)
        return _Copy(self.plan, self.variant, part, outputs, last - first, size_bytes, theirs)

    def owned(self) -> _Copy:
        """Return it with arrays of its own: a view would keep all of the chunk or batch it is cut from."""
        part = replace(self.part, tensors=_owned(self.part.tensors))
        return self._replace(
            part=part, outputs=_owned(self.outputs), theirs=self.theirs and _owned(self.theirs)
        )


class _Flight(NamedTuple):
    engine: Engine
    batch: Batch
    copies: list[_Copy]
    since: float


class Shadowing:
    """The shadows of a worker and what waits for them; owned by the worker loop's thread.

    ``observing`` is told of comparisons; without it shadows run and are counted, and nothing is compared.
    """

    def __init__(
        self,
        engines: Dispatching,
        careful: Careful,
        metrics: PrometheusMetrics,
        clock: Clock,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.observing: Observing | None = None
        self._engines = engines
        self._careful = careful
        self._metrics = metrics
        self._clock = clock
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._queues: OrderedDict[tuple[object, ...], deque[_Copy]] = OrderedDict()
        self._rows = 0
        self._bytes = 0
        self._flight: _Flight | None = None
        self._costs: dict[tuple[str, str, str, tuple[tuple[int, ...], ...]], tuple[CostLine, int]] = {}
        self._credit: dict[str, float] = {}
        self._shown: set[tuple[str, str]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"Shadowing(rows={self._rows}, bytes={self._bytes}, running={self._flight is not None})"

    # What waits

    def offer(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer, failed: Collection[RowFailure]
    ) -> None:
        """Let the shadows of a route see requests that were answered; ``failed`` of them were not."""
        part = answer.part
        if not part.chunk.wanted:  # it comes again, to somebody else
            return
        bad = {row for failure in failed for row in failure.part.rows}
        answered = [i for i, row in enumerate(part.rows) if row not in bad] if bad else range(len(part))
        for shadow in plan.shadows:
            chosen: Collection[int] = answered
            if not shadow.sees_all:
                inside = shadow.sample(plan.keys(part))
                chosen = inside if not bad else sorted(set(inside) & set(answered))
            if len(chosen):
                self._admit(shadow, variant, answer, list(chosen))

    def _admit(self, plan: ShadowPlan, variant: VariantPlan, answer: Answer, chosen: list[int]) -> None:
        window = self._window(plan)
        if window is not None:
            window.seen += len(chosen)
        # After an unclean end no shadow runs: if it had a part in it, others would be suspected.
        if (
            self._closed
            or self._careful.active
            or self._rows >= self._max_rows
            or self._bytes >= self._max_bytes
        ):
            self._shed(plan, len(chosen))
            return
        copy = _copied(plan, variant, answer, chosen)
        fits = min(self._max_rows - self._rows, copy.rows)
        if copy.size_bytes:
            fits = min(fits, (self._max_bytes - self._bytes) * copy.rows // copy.size_bytes)
        count = int(np.searchsorted(np.array(copy.part.bounds()), fits, side="right")) - 1
        self._shed(plan, len(chosen) - count)
        if count:
            self._queue(copy.cut(0, count))

    def _queue(self, copy: _Copy) -> None:
        shapes = tuple([(name, array.shape[1:]) for name, array in copy.part.tensors.items()])
        outputs = tuple([(name, array.shape[1:]) for name, array in copy.outputs.items()])
        theirs = (
            [] if copy.theirs is None else [(name, array.shape[1:]) for name, array in copy.theirs.items()]
        )
        key = (copy.plan, copy.engine, copy.theirs is None, shapes, outputs, tuple(theirs))
        self._queues.setdefault(key, deque()).append(copy.owned())
        self._rows += copy.rows
        self._bytes += copy.size_bytes

    def _shed(self, plan: ShadowPlan, count: int) -> None:
        if not count:
            return
        self._metrics.shadow_shed(plan.served.route, plan.served.version, count)
        window = self._window(plan)
        if window is not None:
            window.shed += count

    def _window(self, plan: ShadowPlan) -> Window | None:
        return None if self.observing is None else self.observing.window(plan.served, "shadow")

    # What runs

    @property
    def ready(self) -> bool:
        """Whether something could run now, if the worker is idle."""
        return bool(self._queues) and self._flight is None

    def busy(self, now: float) -> bool:
        """Return whether a shadow's batch runs and is waited for."""
        return self._flight is not None and now - self._flight.since < HUNG_S

    def run(self) -> None:
        """Give one batch to an engine; to be called when no request of any route waits or runs."""
        while self.ready:
            key, queue = next(iter(self._queues.items()))
            engine = queue[0].engine
            if not self._engines.watches(engine):  # unloaded meanwhile
                del self._queues[key]
                for copy in queue:
                    self._left(copy)
                    if copy.theirs is None:
                        self._shed(copy.plan, len(copy.part))
                continue
            copies = self._close(queue)
            self._queues.move_to_end(key)
            if not queue:
                del self._queues[key]
            self._submit(engine, copies)

    def _close(self, queue: deque[_Copy]) -> list[_Copy]:
        """Take from the front what is expected to take no more than the cap, and one request at least."""
        first = queue[0]
        line, largest = self._cost(first)
        limit = max(1, min(2 * largest, first.plan.max_batch_size))
        while limit > 1 and line.expect(limit) > first.plan.cap_s:
            limit = limit * 3 // 4
        copies: list[_Copy] = []
        while queue and limit > 0:
            copy = queue.popleft()
            self._left(copy)
            count = int(np.searchsorted(np.array(copy.part.bounds()), limit, side="right")) - 1
            if not count and not copies:
                count = 1
            if count:
                copies.append(copy.cut(0, count))
                limit -= copies[-1].rows
            if count < len(copy.part):
                rest = copy.cut(count, len(copy.part))
                queue.appendleft(rest)
                self._rows += rest.rows
                self._bytes += rest.size_bytes
                break
        return copies

    def _left(self, copy: _Copy) -> None:
        self._rows -= copy.rows
        self._bytes -= copy.size_bytes

    def _cost_key(self, copy: _Copy) -> tuple[str, str, str, tuple[tuple[int, ...], ...]]:
        shapes = tuple([array.shape[1:] for array in copy.part.tensors.values()])
        return (copy.engine.model, copy.engine.version, copy.plan.served.route, shapes)

    def _cost(self, copy: _Copy) -> tuple[CostLine, int]:
        """Return what batches of this kind took, and the rows of the largest: a line says nothing far off."""
        if len(self._costs) > MAX_COST_LINES:
            self._costs.clear()
        return self._costs.setdefault(self._cost_key(copy), (CostLine(), 0))

    def _submit(self, engine: Engine, copies: list[_Copy]) -> None:
        at = 0
        parts: list[Requests] = []
        for copy in copies:
            count = len(copy.part)
            copy.part.rows[:] = range(at, at + count)
            parts.append(copy.part)
            at += count
        role = "shadow" if copies[0].theirs is None else "secondary"
        lane = copies[0].plan.lane(engine, role, parts[0].tensors)
        batch = Batch(lane, parts, sum([copy.rows for copy in copies]))
        self._flight = _Flight(engine, batch, copies, self._clock.monotonic())
        engine.aside += 1
        engine.submit(batch)

    # What became of it

    def finished(self, item: Finished) -> bool:
        """Hear that a batch has ended; return whether it was a shadow's."""
        flight = self._flight
        if flight is None or item.result.batch is not flight.batch:
            return False
        self._flight = None
        item.engine.in_flight -= 1
        item.engine.aside -= 1
        result, lane = item.result, flight.batch.lane
        self._metrics.batch(lane.model, lane.version, lane.role, flight.batch.rows, result.seconds)
        line, largest = self._cost(flight.copies[0])
        line.observed(flight.batch.rows, result.seconds)
        self._costs[self._cost_key(flight.copies[0])] = (line, max(largest, flight.batch.rows))
        try:
            (self._shadowed if lane.role == "shadow" else self._repeated)(flight, result)
        except Exception as error:  # no answer of a shadow may end a worker that serves others
            served = flight.copies[0].plan.served
            log.error(
                "shadow_not_compared",
                route=served.route,
                model=served.model,
                version=served.version,
                exc_info=error,
                private=True,
            )
        return True

    def _shadowed(self, flight: _Flight, result: BatchResult) -> None:
        plan = flight.copies[0].plan
        codes = Counter([failure.code.value for failure in result.failures])
        requests = sum([len(copy.part) for copy in flight.copies])
        if requests > codes.total():
            codes["ok"] = requests - codes.total()
        for code, count in codes.items():
            self._metrics.shadow_outcomes(plan.served.route, plan.served.version, code, count)
        window = self._window(plan)
        if window is None:
            return
        window.requests += requests
        for code, count in codes.items():
            window.codes[code] = window.codes.get(code, 0) + count
        fill_batch(window, requests, flight.batch.rows, result.seconds / requests)
        window.failures.add(requests, len(result.failures))
        if window.comparison is None:
            window.comparison = Comparison()
        before = window.comparison.verdicts
        for pairs in _pairs(flight, result):
            plan.comparer.compare(window.comparison, pairs.ids, pairs.primary, pairs.other)
            if pairs.rows == list(range(flight.batch.rows)):
                self._ask_again(plan, flight, pairs.other)
        rows = window.comparison.verdicts.since(before)
        self._metrics.shadow_rows(plan.served.route, plan.served.version, *rows)

    def _ask_again(self, plan: ShadowPlan, flight: _Flight, theirs: Tensors) -> None:
        """Let the answering version answer a share of the requests once more, to know its own noise."""
        name = f"{plan.served.route}/{plan.shadow.name}"
        credit = self._credit.get(name, 0.0)
        at = 0
        for copy in flight.copies:
            credit += len(copy.part) * plan.shadow.secondary
            count = min(int(credit), len(copy.part))
            if count and not self._closed and self._rows < self._max_rows and self._bytes < self._max_bytes:
                credit -= count
                own = {key: array[at : at + copy.rows] for key, array in theirs.items()}
                self._queue(copy._replace(theirs=own).cut(0, count))
            at += copy.rows
        self._credit[name] = min(credit, 64.0)

    def _repeated(self, flight: _Flight, result: BatchResult) -> None:
        plan = flight.copies[0].plan
        window = self._window(plan)
        if window is None:
            return
        window.secondary = window.secondary or Comparison()
        theirs = _joined([copy.theirs or {} for copy in flight.copies])
        for pairs in _pairs(flight, result):
            plan.comparer.compare(window.secondary, pairs.ids, pairs.primary, pairs.other)
            beside = Comparison()
            shadow = {name: array[pairs.rows] for name, array in theirs.items()}
            plan.comparer.compare(beside, pairs.ids, pairs.primary, shadow, truth=pairs.other)
            window.comparison = window.comparison or Comparison()
            window.comparison.right_wrong += beside.right_wrong
            window.comparison.wrong_right += beside.wrong_right

    def close(self) -> None:
        """Let go of all that waits, as shed; nothing begins any more."""
        self._closed = True
        for queue in self._queues.values():
            for copy in queue:
                self._left(copy)
                if copy.theirs is None:
                    self._shed(copy.plan, len(copy.part))
        self._queues.clear()

    def gauges(self) -> None:
        """Refresh how many rows wait for each shadow."""
        waiting: Counter[tuple[str, str]] = Counter()
        for queue in self._queues.values():
            waiting[queue[0].engine.model, queue[0].engine.version] += sum(copy.rows for copy in queue)
        for name in self._shown - set(waiting):
            self._metrics.queue_gone(*name, "shadow")
        for (model, version), rows in waiting.items():
            self._metrics.queue_rows(model, version, "shadow", rows)
        self._shown = set(waiting)


class _Pairs(NamedTuple):
    """Rows that both have answered: their requests' ids, and where they stand in the batch."""

    ids: list[str]
    rows: list[int]
    primary: Tensors
    other: Tensors


def _pairs(flight: _Flight, result: BatchResult) -> list[_Pairs]:
    """Return what both have answered, together where all answers have one shape."""
    joined = _joined([copy.outputs for copy in flight.copies])
    ids = [request_id for copy in flight.copies for request_id in copy.part.ids]
    counts = [count for copy in flight.copies for count in (copy.part.row_counts or [1] * len(copy.part))]
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    answers = [(answer.part.rows, answer.outputs) for answer in result.answers]
    shapes = {tuple([array.shape[1:] for array in outputs.values()]) for _, outputs in answers}
    if len(shapes) == 1:
        answers = [([row for rows, _ in answers for row in rows], _joined([out for _, out in answers]))]
    found: list[_Pairs] = []
    for requests, outputs in answers:
        rows = [row for request in requests for row in range(starts[request], starts[request + 1])]
        named = [ids[request] for request in requests for _ in range(counts[request])]
        mine = joined if len(rows) == flight.batch.rows and rows == sorted(rows) else _picked(joined, rows)
        found.append(_Pairs(named, rows, mine, outputs))
    return found


def _picked(tensors: Tensors, rows: list[int]) -> Tensors:
    return {name: array[rows] for name, array in tensors.items()}


def _owned(tensors: Tensors) -> Tensors:
    return {name: array if array.flags.owndata else array.copy() for name, array in tensors.items()}


def _joined(pieces: list[Tensors]) -> Tensors:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _copied(plan: ShadowPlan, variant: VariantPlan, answer: Answer, chosen: list[int]) -> _Copy:
    """Return the chosen requests with their answers, apart from the chunk that they came with."""
    part = answer.part
    bounds = part.bounds()
    picked = part.pick(chosen)
    outputs = answer.outputs
    if picked is not part:
        rows = [row for i in chosen for row in range(bounds[i], bounds[i + 1])]
        outputs = _picked(outputs, rows)
    copy = Requests(
        NOWHERE,
        list(range(len(picked))),
        list(picked.ids),
        picked.tensors,
        picked.row_counts,
        costs=None,
        served=plan.served,
    )
    size_bytes = sum([_size(array) for tensors in (copy.tensors, outputs) for array in tensors.values()])
    return _Copy(plan, variant, copy, outputs, copy.total_rows, size_bytes)


def _size(array: Array) -> int:
    if array.dtype != object:
        return int(array.nbytes)
    return sum([len(element) for element in array.reshape(-1).tolist()]) + 8 * array.size
