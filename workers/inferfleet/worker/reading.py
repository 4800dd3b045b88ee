"""From a chunk to requests that wait for a batch: read, checked, steered, and charged to their route."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from inferfleet.core.admission import Admission
from inferfleet.core.batcher import Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.errors import Code
from inferfleet.ports import Clock
from inferfleet.records import Chunk, Failures, Requests
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.telemetry.traces import NO_TRACES, Traces
from inferfleet.wire.decode import Decoded, Decoder
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.failing import failures_of, picked
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.recent import Recent, left_of
from inferfleet.worker.retries import restore
from inferfleet.worker.schedule import Schedule, Way


class _Charge(NamedTuple):
    """What an open chunk counts in flight, and how it was read."""

    route: str
    rows: int
    size_bytes: int
    ways: list[Way]


class Reading:
    """Takes chunks apart; owned by the worker loop's thread. ``steered`` hears of what each variant gets."""

    def __init__(
        self,
        ledger: Ledger,
        batcher: Batcher,
        admission: Admission,
        delivery: Delivery,
        metrics: PrometheusMetrics,
        clock: Clock,
        steered: Callable[[RoutePlan, Requests], None] = lambda _plan, _piece: None,
        traces: Traces = NO_TRACES,
    ) -> None:
        self._ledger = ledger
        self._batcher = batcher
        self._admission = admission
        self._delivery = delivery
        self._metrics = metrics
        self._clock = clock
        self._steered = steered
        self._traces = traces
        self.recent = Recent()
        self._charged: dict[Chunk, _Charge] = {}
        self._nobodys: dict[Chunk, list[int]] = {}
        """Rows of open chunks whose route has gone: they wait for the stream's end, or for another route."""

    def read(self, schedule: Schedule | None, chunk: Chunk) -> None:
        """Decode, steer and queue one chunk, each record by the plan of its own time."""
        self._ledger.began(chunk)
        if schedule is None:  # records that nobody here can answer stay open: somebody else takes them
            self._nobodys[chunk] = list(range(len(chunk)))
        else:
            self._read(schedule, chunk)

    def back(self, schedules: Mapping[str, Schedule]) -> None:
        """Read what had stayed open without a route, and whose source is served again, whoever serves it.

        Its stream may never have been taken away, and nothing would be settled past it.
        """
        for chunk in [each for each in self._nobodys if each.stream.source in schedules]:
            rows, schedule = self._nobodys.pop(chunk), schedules[chunk.stream.source]
            if chunk not in self._charged:
                self._read(schedule, chunk)
                continue
            for plan, indices in schedule.ways([chunk.timestamps_ms[row] for row in rows]):
                found = rows if indices is None else [rows[index] for index in indices]
                self._reread(plan, chunk, sorted(found))

    def _read(self, schedule: Schedule, chunk: Chunk) -> None:
        started = self._clock.monotonic()
        self._metrics.stage("take", max(0.0, started - chunk.taken_at))
        if schedule.brings_retries(chunk.stream.source):
            restore(chunk)
        elif schedule.plan.route.time == "received":
            chunk.timestamps_ms = [self._clock.utc_ms()] * len(chunk)
        self._metrics.records(schedule.name, len(chunk))
        ways = schedule.ways(chunk.timestamps_ms)
        read = list(_decoded(ways, chunk))
        rows = len(chunk)
        for _, decoded in read:
            for part in decoded.requests:
                if part.row_counts is not None:
                    rows += part.total_rows - len(part)
        self._charged[chunk] = _Charge(schedule.name, rows, chunk.size_bytes, ways)
        self._admission.took(schedule.name, rows, chunk.size_bytes)
        for plan, decoded in read:
            for part in decoded.requests if chunk.amqp is None else self._to_run(plan, decoded.requests):
                self._steer(plan, part, started)
            if decoded.rejected is not None:
                self._delivery.rejected(plan, self._traced(decoded.rejected))
        self._metrics.stage("read", self._clock.monotonic() - started)

    def _steer(self, plan: RoutePlan, part: Requests, since: float) -> None:
        for variant, piece in plan.steer(part):
            self._steered(plan, piece)
            if self._traces.on:
                piece.traces = self._traces.began(piece.traces, len(piece))
            self._batcher.add(variant.lane(piece), piece, since)

    def _traced(self, failures: Failures) -> Failures:
        if not self._traces.on:
            return failures
        traces = self._traces.began(failures.traces, len(failures.rows))
        return failures if traces is None else failures._replace(traces=traces)

    def again(self, schedule: Schedule | None, parts: Collection[Requests]) -> None:
        """Queue requests that were steered before, by the route as it is now; without one they stay open.

        Whoever reads them as they were read need not read them again. Another plan has to: their version
        may be gone, and the new one may want other inputs.
        """
        if schedule is None:
            for part in parts:
                self._nobodys.setdefault(part.chunk, []).extend(part.rows)
            return
        unread: dict[tuple[Chunk, RoutePlan], list[int]] = {}
        for part in parts:
            times_ms = [part.chunk.timestamps_ms[row] for row in part.rows]
            for plan, indices in schedule.ways(times_ms):
                piece = part if indices is None else part.pick(indices)
                if plan.variant_of(piece.served) is not None or self._reads_alike(plan, piece.chunk):
                    self._steer(plan, piece, self._clock.monotonic())
                else:
                    unread.setdefault((piece.chunk, plan), []).extend(piece.rows)
        for (chunk, plan), rows in unread.items():
            self._reread(plan, chunk, sorted(rows))

    def _reads_alike(self, plan: RoutePlan, chunk: Chunk) -> bool:
        charge = self._charged.get(chunk)
        return charge is not None and all(way.plan.decoder is plan.decoder for way in charge.ways)

    def _reread(self, plan: RoutePlan, chunk: Chunk, rows: list[int]) -> None:
        decoded = _only(plan.decoder.decode(chunk), rows)
        if decoded.rejected is not None:
            self._delivery.fail(plan, self._traced(decoded.rejected))
        for part in decoded.requests:
            self._steer(plan, part, self._clock.monotonic())

    def _to_run(self, plan: RoutePlan, parts: Collection[Requests]) -> list[Requests]:
        """Return the requests of RabbitMQ messages that have to run, and end the others."""
        found: list[Requests] = []
        for part in parts:
            left = self._not_again(plan, part)
            if left is not None and plan.reply:
                left = self._addressed(plan, left)
            if left is not None:
                found.append(left)
        return found

    def _addressed(self, plan: RoutePlan, part: Requests) -> Requests | None:
        """Refuse what names a queue that it may not name, or none where the answer has no other way."""
        amqp = part.chunk.amqp or []
        elsewhere = bool(plan.destinations) or plan.redis
        wrong: dict[int, tuple[Code, str]] = {}
        for index, row in enumerate(part.rows):
            queue = amqp[row].reply_to
            if queue and not plan.may_reply(amqp[row]):
                wrong[index] = (Code.ROUTE, "reply_to names a queue that is not the caller's own")
            elif not queue and not elsewhere:
                wrong[index] = (Code.ROUTE, "reply_to names no queue, and the answer has no other way")
        if not wrong:
            return part
        self._delivery.fail(plan, failures_of(part, list(wrong), list(wrong.values())))
        kept = [index for index in range(len(part)) if index not in wrong]
        return part.pick(kept) if kept else None

    def _not_again(self, plan: RoutePlan, part: Requests) -> Requests | None:
        """Take out what was answered before its message came again, or still runs for an earlier delivery."""
        seen = self.recent.seen(part)
        if not seen.answered and not seen.running:
            return part
        self._metrics.redeliveries(plan.name, len(seen.answered) + len(seen.running))
        self.settle(part.chunk, [part.rows[index] for index in seen.answered])
        return left_of(part, seen)

    def settle(self, chunk: Chunk, rows: list[int]) -> bool:
        """Settle records and return whether any of them was open until now."""
        newly = self._ledger.settle(chunk, rows) if rows else 0
        if newly and not chunk.open:
            self.release(chunk)
        return newly > 0

    def release(self, chunk: Chunk) -> None:
        """Charge a chunk to nobody any longer."""
        self._nobodys.pop(chunk, None)
        charge = self._charged.pop(chunk, None)
        if charge is not None:
            self._admission.freed(charge.route, charge.rows, charge.size_bytes)

    def orphan(self, chunk: Chunk, dropped: Collection[Requests]) -> int:
        """A RabbitMQ channel is gone: remember which records of it still run here. Return how many.

        To be told before the chunk is released.
        """
        if chunk not in self._charged:
            return 0
        # As it was read: another plan might find other ids, and nobody would meet them again.
        ids: dict[int, str | None] = {}
        for _, decoded in _decoded(self._charged[chunk].ways, chunk):
            for part in decoded.requests:
                ids.update(zip(part.rows, part.ids, strict=True))
            if decoded.rejected is not None:
                ids.update(zip(decoded.rejected.rows, decoded.rejected.ids, strict=True))
        gone = [row for part in dropped if part.chunk is chunk for row in part.rows]
        gone += self._nobodys.get(chunk, ())
        return self.recent.orphaned(chunk, ids, gone)


def _decoded(ways: Collection[Way], chunk: Chunk) -> Iterator[tuple[RoutePlan, Decoded]]:
    """Yield what each plan reads of a chunk; what several of them read alike is read once."""
    known: dict[Decoder, Decoded] = {}
    for plan, rows in ways:
        decoded = known.get(plan.decoder)
        if decoded is None:
            decoded = known[plan.decoder] = plan.decoder.decode(chunk)
        yield plan, decoded if rows is None else _only(decoded, rows)


def _only(decoded: Decoded, rows: Collection[int]) -> Decoded:
    """Return what became of some rows of a chunk."""
    wanted = frozenset(rows)
    requests: list[Requests] = []
    for part in decoded.requests:
        kept = [index for index, row in enumerate(part.rows) if row in wanted]
        if kept:
            requests.append(part.pick(kept))
    rejected: Failures | None = None
    if decoded.rejected is not None:
        kept = [index for index, row in enumerate(decoded.rejected.rows) if row in wanted]
        rejected = picked(decoded.rejected, kept) if kept else None
    return Decoded(requests, rejected)
