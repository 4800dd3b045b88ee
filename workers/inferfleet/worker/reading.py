"""From a chunk to requests that wait for a batch: read, checked, steered, and charged to their route."""

from __future__ import annotations

from collections.abc import Collection

from inferfleet.core.admission import Admission
from inferfleet.core.batcher import Batcher
from inferfleet.core.ledger import Ledger
from inferfleet.errors import Code
from inferfleet.ports import Clock
from inferfleet.records import Chunk, Requests
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.failing import failures_of
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.recent import Recent, left_of
from inferfleet.worker.retries import restore


class Reading:
    """Takes chunks apart; owned by the worker loop's thread."""

    def __init__(
        self,
        ledger: Ledger,
        batcher: Batcher,
        admission: Admission,
        delivery: Delivery,
        metrics: PrometheusMetrics,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._batcher = batcher
        self._admission = admission
        self._delivery = delivery
        self._metrics = metrics
        self._clock = clock
        self.recent = Recent()
        self._charged: dict[Chunk, tuple[RoutePlan, int, int]] = {}
        """Of each open chunk: by which plan it was read, and what it counts in flight."""
        self._nobodys: dict[Chunk, list[int]] = {}
        """Rows of open chunks that were held back when their route went: they wait for the stream's end."""

    def read(self, plan: RoutePlan | None, chunk: Chunk) -> None:
        """Decode, steer and queue one chunk."""
        self._ledger.began(chunk)
        if plan is None:  # records that nobody here can answer stay open: somebody else takes them
            return
        started = self._clock.monotonic()
        if chunk.stream.source != plan.source:
            restore(chunk)
        elif plan.route.time == "received":
            chunk.timestamps_ms = [self._clock.utc_ms()] * len(chunk)
        decoded = plan.decoder.decode(chunk)
        rows = len(chunk)
        for part in decoded.requests:
            if part.row_counts is not None:
                rows += part.total_rows - len(part)
        self._charged[chunk] = (plan, rows, chunk.size_bytes)
        self._admission.took(plan.name, rows, chunk.size_bytes)
        for part in decoded.requests if chunk.amqp is None else self._to_run(plan, decoded.requests):
            for variant, piece in plan.steer(part):
                self._batcher.add(variant.lane(piece), piece, started)
        if decoded.rejected is not None:
            self._delivery.rejected(plan, decoded.rejected)
        self._metrics.stage("read", self._clock.monotonic() - started)

    def again(self, plan: RoutePlan | None, part: Requests) -> None:
        """Queue a request that was held back, by the route as it is now; without one it stays open."""
        if plan is None:
            self._nobodys.setdefault(part.chunk, []).extend(part.rows)
            return
        if plan.variant_of(part.served) is None:
            found = self._reread(plan, part)
            if found is None:
                return
            part = found
        for variant, piece in plan.steer(part):
            self._batcher.add(variant.lane(piece), piece, self._clock.monotonic())

    def _reread(self, plan: RoutePlan, part: Requests) -> Requests | None:
        """Read a request by another plan: its version may be gone, and the new one may want other inputs."""
        chunk, row = part.chunk, part.rows[0]
        decoded = plan.decoder.decode(chunk.alone(row))
        if decoded.rejected is not None:
            self._delivery.fail(plan, decoded.rejected._replace(chunk=chunk, rows=[row]))
            return None
        (found,) = decoded.requests
        found.chunk, found.rows = chunk, [row]
        return found

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
            plan, rows, size_bytes = charge
            self._admission.freed(plan.name, rows, size_bytes)

    def orphan(self, chunk: Chunk, dropped: Collection[Requests]) -> int:
        """A RabbitMQ channel is gone: remember which records of it still run here. Return how many.

        To be told before the chunk is released.
        """
        if chunk not in self._charged:
            return 0
        # By the plan that it was read by: another one might find other ids, and nobody would meet them again.
        decoded = self._charged[chunk][0].decoder.decode(chunk)
        ids: dict[int, str | None] = {}
        for part in decoded.requests:
            ids.update(zip(part.rows, part.ids, strict=True))
        if decoded.rejected is not None:
            ids.update(zip(decoded.rejected.rows, decoded.rejected.ids, strict=True))
        gone = [row for part in dropped if part.chunk is chunk for row in part.rows]
        gone += self._nobodys.get(chunk, ())
        return self.recent.orphaned(chunk, ids, gone)
