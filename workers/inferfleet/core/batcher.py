"""Regroups waiting requests into batches, one lane at a time.

Rules kept here:

* Every request that is added leaves exactly once: in a batch or as expired.
* A batch holds one lane, at most ``max_batch_size`` rows; a request stays whole, and one that is larger
  than the limit leaves alone.
* Within a lane: lower priority numbers first, then first in, first out. A lane with costs may pick
  requests of similar cost from the front window instead, but its oldest request is always among them.
* A lane is due when it is full, when its oldest request has waited ``max_queue_delay_s``, or when its
  earliest deadline leaves just the time that a batch is expected to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inferfleet.core.cost import CostLine
from inferfleet.records import Batch, Lane, Requests

COST_WINDOW_BATCHES = 8
NEVER = float("inf")


class _Waiting(NamedTuple):
    part: Requests
    rows: int
    arrived_at: float
    first_deadline_ms: int | None


class _LaneQueue:
    """Waiting requests of one lane, by priority."""

    __slots__ = ("cost", "first_deadline_ms", "lane", "limit", "oldest_at", "queues", "rows")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.limit = lane.max_batch_size
        self.queues: dict[int, deque[_Waiting]] = {}
        self.rows = 0
        self.oldest_at = NEVER
        self.first_deadline_ms: int | None = None
        self.cost = CostLine()

    def refresh(self) -> None:
        """Derive the oldest arrival and the earliest deadline from what waits."""
        fronts = [queue[0].arrived_at for queue in self.queues.values() if queue]
        self.oldest_at = min(fronts, default=NEVER)
        if self.first_deadline_ms is not None:
            deadlines = [
                waiting.first_deadline_ms
                for queue in self.queues.values()
                for waiting in queue
                if waiting.first_deadline_ms is not None
            ]
            self.first_deadline_ms = min(deadlines, default=None)


class Batcher:
    """All lanes of a worker."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _LaneQueue] = {}
        self._by_model: dict[tuple[str, str], list[_LaneQueue]] = {}
        self._limits: dict[tuple[str, str], int] = {}
        self.rows = 0

    def __repr__(self) -> str:
        return f"Batcher(lanes={len(self._lanes)}, rows={self.rows})"

    def add(self, lane: Lane, part: Requests, now: float) -> None:
        """Let the requests of ``part`` wait in ``lane``."""
        queue = self._lanes.get(lane)
        if queue is None:
            queue = self._lanes[lane] = _LaneQueue(lane)
            queue.limit = min(queue.limit, self._limits.get((lane.model, lane.version), queue.limit))
            self._by_model.setdefault((lane.model, lane.version), []).append(queue)
        parts = [part] if part.costs is None else [part.slice(i, i + 1) for i in range(len(part))]
        waiting = queue.queues.setdefault(part.priority, deque())
        for piece in parts:
            rows = piece.total_rows
            deadline = piece.first_deadline_ms
            waiting.append(_Waiting(piece, rows, now, deadline))
            queue.rows += rows
            self.rows += rows
            if deadline is not None and (
                queue.first_deadline_ms is None or deadline < queue.first_deadline_ms
            ):
                queue.first_deadline_ms = deadline
        queue.oldest_at = min(queue.oldest_at, now)

    def limit(self, model: str, version: str, rows: int) -> None:
        """Batches of this version hold at most ``rows`` from now on: the device had no memory for more."""
        self._limits[model, version] = min(rows, self._limits.get((model, version), rows))
        for queue in self._by_model.get((model, version), ()):
            queue.limit = min(queue.limit, rows)

    def observed(self, lane: Lane, rows: int, seconds: float) -> None:
        """Learn what a batch of ``lane`` took."""
        queue = self._lanes.get(lane)
        if queue is not None:
            queue.cost.observed(rows, seconds)

    def due(self, model: str, version: str, now: float, now_ms: int) -> Batch | None:
        """Close and return the most urgent due batch of a version, or ``None``.

        Requests whose deadline has passed must have been taken out by :meth:`expire` at this ``now_ms``.
        """
        best: _LaneQueue | None = None
        best_at = NEVER
        for queue in self._by_model.get((model, version), ()):
            at = self._due_at(queue, now, now_ms)
            if at <= now and at < best_at:
                best, best_at = queue, at
        return None if best is None else self._close(best)

    def next_due(self, model: str, version: str, now: float, now_ms: int) -> float:
        """Return when the version's next batch is due, monotonic seconds; infinity if nothing waits."""
        queues = self._by_model.get((model, version), ())
        return min((self._due_at(queue, now, now_ms) for queue in queues), default=NEVER)

    @staticmethod
    def _due_at(queue: _LaneQueue, now: float, now_ms: int) -> float:
        if not queue.rows:
            return NEVER
        if queue.rows >= queue.limit:
            return queue.oldest_at
        due = queue.oldest_at + queue.lane.max_queue_delay_s
        if queue.first_deadline_ms is not None:
            spare_s = (queue.first_deadline_ms - now_ms) / 1000 - queue.cost.expect(queue.rows)
            due = min(due, now + spare_s)
        return due

    def _close(self, queue: _LaneQueue) -> Batch:
        parts: list[Requests] = []
        rows = 0
        since = NEVER
        for priority in sorted(queue.queues):
            waiting = queue.queues[priority]
            # What is taken at all is taken from the front, or with it.
            arrived_at = waiting[0].arrived_at if waiting else NEVER
            if waiting and waiting[0].part.costs is not None:
                taken = _take_similar(waiting, queue.limit, rows, parts)
            else:
                taken = _take_front(waiting, queue.limit, rows, parts)
            rows += taken
            if taken:
                since = min(since, arrived_at)
            if rows >= queue.limit or (waiting and parts):
                break
        queue.rows -= rows
        self.rows -= rows
        queue.refresh()
        return Batch(queue.lane, parts, rows, since=since)

    def expire(self, now_ms: int) -> list[Requests]:
        """Take out every waiting request whose deadline is not after ``now_ms``."""
        expired: list[Requests] = []
        for queue in self._lanes.values():
            if queue.first_deadline_ms is None or queue.first_deadline_ms > now_ms:
                continue
            for priority, waiting in queue.queues.items():
                kept: deque[_Waiting] = deque()
                for item in waiting:
                    self._expire_item(queue, item, now_ms, kept, expired)
                queue.queues[priority] = kept
            queue.refresh()
        return expired

    def _expire_item(
        self, queue: _LaneQueue, item: _Waiting, now_ms: int, kept: deque[_Waiting], expired: list[Requests]
    ) -> None:
        if item.first_deadline_ms is None or item.first_deadline_ms > now_ms:
            kept.append(item)
            return
        deadlines = item.part.deadlines_ms or []
        late = [i for i, deadline in enumerate(deadlines) if deadline is not None and deadline <= now_ms]
        gone = item.part.pick(late)
        expired.append(gone)
        queue.rows -= gone.total_rows
        self.rows -= gone.total_rows
        if len(late) < len(item.part):
            late_set = set(late)
            rest = item.part.pick([i for i in range(len(item.part)) if i not in late_set])
            kept.append(_Waiting(rest, rest.total_rows, item.arrived_at, rest.first_deadline_ms))

    def drop_dead(self) -> list[Requests]:
        """Forget requests whose chunk was taken away, and return them."""
        return self.withdraw(lambda part: not part.chunk.live)

    def withdraw(self, unwanted: Callable[[Requests], bool]) -> list[Requests]:
        """Take out what waits and is no longer wanted here, and return it."""
        taken: list[Requests] = []
        for queue in self._lanes.values():
            for priority, waiting in queue.queues.items():
                gone = [unwanted(item.part) for item in waiting]
                if any(gone):
                    kept = [item for item, out in zip(waiting, gone, strict=True) if not out]
                    taken += [item.part for item, out in zip(waiting, gone, strict=True) if out]
                    rows = sum(item.rows for item in waiting) - sum(item.rows for item in kept)
                    queue.queues[priority] = deque(kept)
                    queue.rows -= rows
                    self.rows -= rows
            queue.refresh()
        return taken

    def parts(self) -> Iterator[Requests]:
        """Yield all that waits."""
        for queue in self._lanes.values():
            for waiting in queue.queues.values():
                yield from (item.part for item in waiting)

    def tidy(self) -> None:
        """Forget empty lanes, so that many odd shapes do not pile up."""
        for lane in [lane for lane, queue in self._lanes.items() if not queue.rows]:
            queue = self._lanes.pop(lane)
            queues = self._by_model[lane.model, lane.version]
            queues.remove(queue)
            if not queues:
                del self._by_model[lane.model, lane.version]

    def waiting(self, model: str, version: str, role: str | None = None) -> int:
        """Return how many rows wait for a version, or for one role of it."""
        queues = self._by_model.get((model, version), ())
        return sum(queue.rows for queue in queues if role is None or queue.lane.role == role)

    @property
    def lanes(self) -> int:
        """Return how many lanes are known, empty ones included."""
        return len(self._lanes)


def _take_front(waiting: deque[_Waiting], limit: int, held: int, parts: list[Requests]) -> int:
    """Move requests from the front of ``waiting`` to ``parts`` while they fit; return their rows."""
    taken = 0
    while waiting:
        item = waiting[0]
        room = limit - held - taken
        if item.rows <= room:
            parts.append(item.part)
            taken += item.rows
            waiting.popleft()
            continue
        count = _fitting(item.part, room)
        if not count and not parts:
            count = 1  # larger than the limit: it leaves alone, and runs in several calls
        if count:
            head, tail = item.part.slice(0, count), item.part.slice(count, len(item.part))
            parts.append(head)
            taken += head.total_rows
            waiting.popleft()
            if len(tail):
                waiting.appendleft(_Waiting(tail, tail.total_rows, item.arrived_at, tail.first_deadline_ms))
        break
    return taken


def _fitting(part: Requests, room: int) -> int:
    """Return how many requests from the front of ``part`` fit into ``room`` rows."""
    if part.row_counts is None:
        return max(0, min(room, len(part)))
    count = 0
    for rows in part.row_counts:
        room -= rows
        if room < 0:
            break
        count += 1
    return count


def _take_similar(waiting: deque[_Waiting], limit: int, held: int, parts: list[Requests]) -> int:
    """Move the oldest request and those nearest to it in cost to ``parts``; return their rows."""
    if parts and held + waiting[0].rows > limit:
        return 0
    window: list[_Waiting] = []
    rows = 0
    while waiting and rows < limit * COST_WINDOW_BATCHES:
        rows += waiting[0].rows
        window.append(waiting.popleft())
    order = sorted(range(len(window)), key=lambda i: (window[i].part.costs or [0])[0])
    at = order.index(0)
    low = high = at
    taken = window[0].rows
    while True:
        below = window[order[low - 1]] if low > 0 else None
        above = window[order[high + 1]] if high + 1 < len(order) else None
        if below is None and above is None:
            break
        pick_below = above is None or (
            below is not None and _gap(window[order[at]], below) <= _gap(window[order[at]], above)
        )
        neighbour = below if pick_below else above
        if neighbour is None or held + taken + neighbour.rows > limit:
            break
        taken += neighbour.rows
        low, high = (low - 1, high) if pick_below else (low, high + 1)
    chosen = set(order[low : high + 1])
    parts.extend(window[i].part for i in order[low : high + 1])
    waiting.extendleft(window[i] for i in reversed(range(len(window))) if i not in chosen)
    return taken


def _gap(one: _Waiting, other: _Waiting) -> int:
    return abs((one.part.costs or [0])[0] - (other.part.costs or [0])[0])
