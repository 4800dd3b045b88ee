"""Handing outcomes over: every record gets exactly one, and is settled when all outlets confirmed it.

An outcome goes to each of its route's outlets at once; a :class:`Settling` counts the receipts that are
out and settles its records when the last one is in. What an outlet refuses is parked and tried again while
that can help (its route says so meanwhile), or becomes an error outcome when it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import structlog

from inferfleet.addresses import REPLY
from inferfleet.core.retry import RetryPolicy
from inferfleet.errors import Code
from inferfleet.ports import Clock, Outlet, Refusal, RefusalKind, ResultOutlet
from inferfleet.records import Answer, Array, Envelopes, Failures, Requests, RowFailure
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.trace_context import trace_of_headers
from inferfleet.wire import headers as names
from inferfleet.wire.encode import STATUS_OK, ok_headers
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.deadletter import cut_letter, cut_outcome
from inferfleet.worker.detached import Detached
from inferfleet.worker.failing import Failing, failures_of
from inferfleet.worker.handover import HandOver
from inferfleet.worker.parking import Parking
from inferfleet.worker.plan import RoutePlan, VariantPlan
from inferfleet.worker.settling import EnvelopeReceipt, ResultReceipt, Settling

__all__ = ["Delivery", "Settling"]

log = structlog.get_logger(__name__)


class Delivery:
    """Joins routes to outlets; owned by the worker loop's thread."""

    def __init__(
        self,
        outlet: Outlet,
        results: ResultOutlet | None,
        metrics: PrometheusMetrics,
        clock: Clock,
        *,
        max_result_bytes: int,
        brakes: Brakes,
        retry: RetryPolicy,
        dead_letter_also: frozenset[str] = frozenset(),
    ) -> None:
        self._to = HandOver(outlet, results)
        self._failing = Failing(self._to, self, brakes, retry, metrics, clock, dead_letter_also)
        self._clock = clock
        self.on_settled: Callable[[Settling], None] = _nobody_listens
        self._max_result_bytes = max_result_bytes
        self._parking = Parking(outlet, clock)
        self.detached: Detached | None = None
        """Where answers of detached shadows go; without it they go nowhere, and their records are settled."""

    # Answers

    def answer(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> list[RowFailure]:
        """Publish the answers of one part; what came too late gets its error instead.

        Returns the requests whose answers are not finite or cannot be written: they failed like those that
        a model raises on, and are to be ended with them.
        """
        part = answer.part
        if not part.chunk.wanted:
            return []
        if plan.route.shadow_of is not None:
            self._shadowed(plan, variant, answer)
            return []
        wrong = self._unfit(plan, variant, answer)
        if not wrong:
            return self._publish_answers(plan, variant, answer)
        late = [index for index, (code, _) in wrong.items() if code is Code.DEADLINE]
        if late:
            self.fail(plan, failures_of(part, late, [wrong[index] for index in late]))
        failed = [RowFailure(part.pick([i]), *wrong[i]) for i in wrong if i not in late]
        kept = [index for index in range(len(part)) if index not in wrong]
        return failed + (self._publish_answers(plan, variant, _pick(answer, kept)) if kept else [])

    def _unfit(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> dict[int, tuple[Code, str]]:
        """Return the requests of a part whose answers may not be given, by index, ascending."""
        part = answer.part
        wrong: dict[int, tuple[Code, str]] = {}
        if not plan.nan_allowed:
            for name, array in answer.outputs.items():
                values = variant.writer.floats(name, array)
                if values is not None and not np.isfinite(values).all():
                    for index in _nonfinite(part, values):
                        wrong[index] = (Code.MODEL_OUTPUT, f"output {name} holds NaN or infinity")
        if part.deadlines_ms is not None:
            now_ms = self._clock.utc_ms()
            for index, deadline in enumerate(part.deadlines_ms):
                if deadline is not None and deadline <= now_ms:
                    wrong[index] = (Code.DEADLINE, "the deadline passed while the model ran")
        return dict(sorted(wrong.items()))

    def _publish_answers(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> list[RowFailure]:
        """Publish answers; return the requests whose answers cannot be written."""
        part = answer.part
        try:
            bodies, lengths, stored = self._written(plan, variant, answer)
        except Exception as error:
            return self._answer_singly(plan, variant, answer, error)
        if max(map(len, bodies)) > self._max_result_bytes:
            return self._split_oversize(plan, variant, answer, bodies)
        outcomes = {(variant.variant.version, variant.variant.name, "ok"): len(part)}
        now = self._clock.monotonic()
        settling = Settling(self, plan, part.chunk, part.rows, outcomes, part.ids, part.served, now)
        settling.traces = part.traces
        if plan.destinations or plan.reply:
            headers = ok_headers(part, variant.header, lengths)
            self._to.outcomes(settling, plan.destinations, part.rows, bodies, headers, reply=plan.reply)
        if stored is not None:
            self._to.store(settling, part.rows, part.ids, stored, [True] * len(part), part.replies)
        settling.close()
        return []

    def _written(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer
    ) -> tuple[list[bytes], list[bytes] | None, list[bytes] | None]:
        """Return the bodies for topics, their JSON lengths if binary, and the bodies for the result store."""
        lengths: list[bytes] | None = None
        if answer.part.form.binary and (plan.destinations or plan.reply):
            bodies, lengths = variant.writer.binary_bodies(answer)
        else:
            bodies = variant.writer.json_bodies(answer)
        if not self._to.stores or not (plan.redis or answer.part.replies is not None):
            return bodies, lengths, None
        return bodies, lengths, bodies if lengths is None else variant.writer.json_bodies(answer)

    def _answer_singly(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer, error: Exception
    ) -> list[RowFailure]:
        """An answer could not be written, which is a fault of ours: keep it from its neighbours."""
        part = answer.part
        if len(part) > 1:
            singles = [_pick(answer, [index]) for index in range(len(part))]
            return [each for single in singles for each in self._publish_answers(plan, variant, single)]
        log.error(
            "answer_not_written",
            route=plan.name,
            model=variant.engine.model,
            version=variant.variant.version,
            exc_info=error,
            private=True,
        )
        text = f"inferfleet could not write the answer ({type(error).__name__})"
        return [RowFailure(part, Code.INTERNAL, text)]

    def _split_oversize(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer, bodies: list[bytes]
    ) -> list[RowFailure]:
        limit = self._max_result_bytes
        large = [index for index, body in enumerate(bodies) if len(body) > limit]
        verdict = (Code.RESULT_TOO_LARGE, f"the answer is larger than {limit} bytes")
        self.fail(plan, failures_of(answer.part, large, [verdict] * len(large)))
        kept = [index for index, body in enumerate(bodies) if len(body) <= limit]
        return self._publish_answers(plan, variant, _pick(answer, kept)) if kept else []

    # Errors

    def row_failures(self, plan: RoutePlan, failures: Sequence[RowFailure], answered: int = 0) -> None:
        """End the requests of a batch that failed alone; ``answered`` first attempts of it did not."""
        if plan.route.shadow_of is not None:
            for each in failures:
                self.fail(plan, failures_of(each.part, [0], [(each.code, each.text)]))
            return
        self._failing.rows(plan, failures, answered)

    def expired(self, plan: RoutePlan, part: Requests) -> None:
        """Publish ``E_DEADLINE`` for requests whose deadline passed before they ran."""
        verdict = (Code.DEADLINE, "the deadline passed before the request ran")
        self.fail(plan, failures_of(part, list(range(len(part))), [verdict] * len(part)))

    def rejected(self, plan: RoutePlan, failures: Failures) -> None:
        """End requests that could not be read; where that is our fault, the route's brake counts it."""
        if plan.route.shadow_of is not None:
            self.fail(plan, failures)
        else:
            self._failing.unread(plan, failures)

    def fail(self, plan: RoutePlan, failures: Failures) -> None:
        """Publish one error outcome for each request, and a dead letter where its code asks for one.

        Of a detached shadow's requests nobody is told: they are counted and settled.
        """
        if plan.route.shadow_of is None:
            self._failing.fail(plan, failures)
        elif failures.chunk.wanted:
            if self.detached is not None:
                self.detached.failed(plan, failures)
            self._failing.settle(plan, failures)

    # Detached shadows

    def _shadowed(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> None:
        part = answer.part
        outcomes = {(variant.variant.version, variant.variant.name, "ok"): len(part)}
        settling = Settling(self, plan, part.chunk, part.rows, outcomes, part.ids, part.served)
        if self.detached is None:
            settling.close()
        else:
            self.detached.answered(plan, answer, settling)

    def hear(self, now: float, *, flush: bool = False, crowded: bool = False) -> None:
        """Let detached shadows hear what their primaries answered."""
        if self.detached is not None:
            self.detached.poll(now, flush=flush, crowded=crowded)

    # What outlets say

    def envelope_refused(self, receipt: EnvelopeReceipt, index: int, refusal: Refusal) -> None:
        """Turn an answer that is too large into an error, cut what else is, and park the rest."""
        settling, envelopes = receipt.settling, receipt.envelopes
        if not settling.chunk.wanted:
            return
        row = receipt.rows[index]
        if refusal.kind is not RefusalKind.TOO_LARGE:
            self._parking.park(receipt, index, refusal)
            return
        plan, destination = settling.plan, envelopes.destination
        if destination in plan.published and STATUS_OK in envelopes.headers[index]:
            text = f"the answer is larger than {destination} accepts"
            error = _said(settling, envelopes, index, row, (Code.RESULT_TOO_LARGE, text))
            first = settling.replace(row, Code.RESULT_TOO_LARGE)
            to_caller = destination == REPLY
            self._failing.publish(
                settling,
                error,
                [] if to_caller else [destination],
                store=False,
                reply=to_caller,
                dead_letters=first,
            )
            return
        if settling.instead is not None:
            self._failing.give_up(settling, settling.instead)
            return
        # An error that is refused as too large is cut, then parked: another error would be no smaller.
        is_letter = destination == plan.dead_letters
        cut = cut_letter(envelopes, index) if is_letter else cut_outcome(envelopes, index)
        if cut is None:
            self._parking.park(receipt, index, refusal)
        else:
            self._to.publish(settling, cut, [row])

    def result_refused(self, receipt: ResultReceipt, index: int, refusal: Refusal) -> None:
        """Answer a reused id with ``E_DUP_ID``: to the waiting client and the dead letters only.

        An error outcome stays what it is: it has its dead letter already, and only its client must hear.
        """
        settling, results = receipt.settling, receipt.results
        if not settling.chunk.wanted:
            return
        row, request_id = receipt.rows[index], results.ids[index]
        reply = results.replies[index] if results.replies is not None else None
        if not results.ok[index]:
            if reply is not None:
                bodies = [results.bodies[index]]
                self._to.store(settling, [row], [request_id], bodies, [False], [reply], reply_only=True)
            return
        error = Failures(settling.chunk, [row], [request_id], [Code.DUP_ID], [refusal.text], [reply], [None])
        settling.replace(row, Code.DUP_ID)
        self._failing.publish(settling, error, [], store=False, reply=False)

    def retry_parked(self, now: float, *, force: bool = False) -> None:
        """Offer again what was refused, where its pause has ended; ``force`` does not wait for that."""
        self._parking.retry(now, force=force)

    def held(self) -> dict[str, str]:
        """Return the routes that must not take now, and why."""
        return self._parking.held()

    def complete(self, settling: Settling) -> None:
        """Every outlet has confirmed: the records are settled."""
        self.on_settled(settling)


def _nobody_listens(settling: Settling) -> None:
    raise RuntimeError(f"{settling.chunk} settled before a loop listens")


def _said(
    settling: Settling, envelopes: Envelopes, index: int, row: int, verdict: tuple[Code, str]
) -> Failures:
    """Return the failure of one record whose envelope no destination takes."""
    request_id = (_header(envelopes, index, names.ID) or b"").decode() or None
    trace = trace_of_headers(envelopes.headers[index])
    return Failures(settling.chunk, [row], [request_id], [verdict[0]], [verdict[1]], [None], [trace])


def _nonfinite(part: Requests, array: Array) -> list[int]:
    bad_rows: Array = np.logical_not(np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    bounds = part.bounds()
    return [i for i in range(len(part)) if bad_rows[bounds[i] : bounds[i + 1]].any()]


def _pick(answer: Answer, kept: list[int]) -> Answer:
    """Return the answers of the requests ``kept``."""
    part = answer.part
    bounds = part.bounds()
    tensor_rows = [row for i in kept for row in range(bounds[i], bounds[i + 1])]
    return Answer(part.pick(kept), {name: array[tensor_rows] for name, array in answer.outputs.items()})


def _header(envelopes: Envelopes, index: int, name: str) -> bytes | None:
    """Return the value of one of our own headers."""
    return next((value for key, value in envelopes.headers[index] if key == name), None)
