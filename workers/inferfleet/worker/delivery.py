"""Handing outcomes over: every record gets exactly one, and is settled when all outlets confirmed it.

An outcome goes to each of its route's outlets at once; a :class:`Settling` counts the receipts that are
out and settles its records when the last one is in. What an outlet refuses is parked and tried again while
that can help (its route says so meanwhile), or becomes an error outcome when it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from inferfleet.errors import RULES, Code
from inferfleet.ports import Clock, Outlet, Refusal, RefusalKind, ResultOutlet
from inferfleet.records import (
    Answer,
    Array,
    Envelopes,
    Failures,
    Header,
    Requests,
    Results,
    RowFailure,
)
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.wire import headers as names
from inferfleet.wire.encode import STATUS_OK, error_body, error_headers, ok_headers
from inferfleet.wire.stored import payload_hash
from inferfleet.worker.deadletter import cut_letter, cut_outcome, dead_letter_headers, default_id
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
        dead_letter_also: frozenset[str] = frozenset(),
    ) -> None:
        self._outlet = outlet
        self._results = results
        self._metrics = metrics
        self._clock = clock
        self.on_settled: Callable[[Settling], None] = _nobody_listens
        self._max_result_bytes = max_result_bytes
        self._dead_letter_also = dead_letter_also
        self._parking = Parking(outlet, clock)

    # Answers

    def answer(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> None:
        """Publish the answers of one part; requests that are late or not finite get errors instead."""
        part = answer.part
        if not part.chunk.live:
            return
        wrong = self._unfit(plan, variant, answer)
        if wrong:
            self.fail(plan, _failures(part, list(wrong), list(wrong.values())))
            kept = [index for index in range(len(part)) if index not in wrong]
            if not kept:
                return
            answer = _pick(answer, kept)
        self._publish_answers(plan, variant, answer)

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

    def _publish_answers(self, plan: RoutePlan, variant: VariantPlan, answer: Answer) -> None:
        part = answer.part
        try:
            bodies, lengths, stored = self._written(plan, variant, answer)
        except Exception as error:
            self._answer_singly(plan, variant, answer, error)
            return
        if max(map(len, bodies)) > self._max_result_bytes:
            self._split_oversize(plan, variant, answer, bodies)
            return
        outcomes = {(variant.variant.version, variant.variant.name, "ok"): len(part)}
        settling = Settling(self, plan, part.chunk, part.rows, outcomes)
        if plan.topics:
            chunk_keys = part.chunk.keys
            keys = [chunk_keys[row] for row in part.rows]
            headers = ok_headers(part, variant.header, lengths)
            for topic in plan.topics:
                envelopes = Envelopes(topic, keys, bodies, headers)
                self._outlet.publish(envelopes, EnvelopeReceipt(settling, envelopes, part.rows))
        if stored is not None:
            self._store(settling, part.rows, part.ids, stored, [True] * len(part), part.replies)
        settling.close()

    def _written(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer
    ) -> tuple[list[bytes], list[bytes] | None, list[bytes] | None]:
        """Return the bodies for topics, their JSON lengths if binary, and the bodies for the result store."""
        lengths: list[bytes] | None = None
        if answer.part.form.binary and plan.topics:
            bodies, lengths = variant.writer.binary_bodies(answer)
        else:
            bodies = variant.writer.json_bodies(answer)
        if self._results is None or not (plan.redis or answer.part.replies is not None):
            return bodies, lengths, None
        return bodies, lengths, bodies if lengths is None else variant.writer.json_bodies(answer)

    def _answer_singly(self, plan: RoutePlan, variant: VariantPlan, answer: Answer, error: Exception) -> None:
        """An answer could not be written, which is a fault of ours: keep it from its neighbours."""
        part = answer.part
        if len(part) > 1:
            for index in range(len(part)):
                self._publish_answers(plan, variant, _pick(answer, [index]))
            return
        log.error("answer_not_written", route=plan.name, error=type(error).__name__, exc_info=error)
        text = f"inferfleet could not write the answer ({type(error).__name__})"
        self.fail(plan, _failures(part, [0], [(Code.INTERNAL, text)]))

    def _split_oversize(
        self, plan: RoutePlan, variant: VariantPlan, answer: Answer, bodies: list[bytes]
    ) -> None:
        limit = self._max_result_bytes
        large = [index for index, body in enumerate(bodies) if len(body) > limit]
        verdict = (Code.RESULT_TOO_LARGE, f"the answer is larger than {limit} bytes")
        self.fail(plan, _failures(answer.part, large, [verdict] * len(large)))
        kept = [index for index, body in enumerate(bodies) if len(body) <= limit]
        if kept:
            self._publish_answers(plan, variant, _pick(answer, kept))

    # Errors

    def row_failures(self, plan: RoutePlan, failures: Sequence[RowFailure]) -> None:
        """Publish the errors of requests that the model failed alone."""
        for failure in failures:
            self.fail(plan, _failures(failure.part, [0], [(failure.code, failure.text)]))

    def expired(self, plan: RoutePlan, part: Requests) -> None:
        """Publish ``E_DEADLINE`` for requests whose deadline passed before they ran."""
        verdict = (Code.DEADLINE, "the deadline passed before the request ran")
        self.fail(plan, _failures(part, list(range(len(part))), [verdict] * len(part)))

    def fail(self, plan: RoutePlan, failures: Failures) -> None:
        """Publish one error outcome for each request, and a dead letter where its code asks for one."""
        chunk = failures.chunk
        if not chunk.live:
            return
        variant = plan.variant_of(failures.served)
        named = ("", "") if variant is None else (variant.variant.version, variant.variant.name)
        outcomes = Counter((*named, code.value) for code in failures.codes)
        settling = Settling(self, plan, chunk, failures.rows, dict(outcomes))
        self._publish_errors(settling, failures, plan.topics, store=plan.redis)
        settling.close()

    def _publish_errors(
        self,
        settling: Settling,
        failures: Failures,
        topics: Sequence[str],
        *,
        store: bool,
        dead_letters: bool = True,
    ) -> None:
        plan, chunk = settling.plan, settling.chunk
        variant = plan.variant_of(failures.served)
        served = plan.failed_header if variant is None else variant.header
        ids = [
            default_id(chunk, row) if found is None else found
            for row, found in zip(failures.rows, failures.ids, strict=True)
        ]
        bodies = [
            error_body(text, code, request_id)
            for text, code, request_id in zip(failures.texts, failures.codes, ids, strict=True)
        ]
        if topics:
            keys = [chunk.keys[row] for row in failures.rows]
            headers = [
                error_headers(request_id, code, served, trace)
                for request_id, code, trace in zip(ids, failures.codes, failures.traces, strict=True)
            ]
            for topic in topics:
                envelopes = Envelopes(topic, keys, bodies, headers)
                self._outlet.publish(envelopes, EnvelopeReceipt(settling, envelopes, failures.rows))
        if dead_letters:
            self._publish_dead_letters(settling, failures, served)
        replies = failures.replies if any(reply is not None for reply in failures.replies) else None
        if self._results is not None and (store or replies is not None):
            self._store(
                settling, failures.rows, ids, bodies, [False] * len(ids), replies, reply_only=not store
            )

    def _publish_dead_letters(self, settling: Settling, failures: Failures, served: Header) -> None:
        plan, chunk = settling.plan, settling.chunk
        kept = [
            index
            for index, code in enumerate(failures.codes)
            if RULES[code].dead_letter or code.value in self._dead_letter_also
        ]
        if not kept:
            return
        failed_at = b"%d" % self._clock.utc_ms()
        rows = [failures.rows[index] for index in kept]
        envelopes = Envelopes(
            plan.dead_letters,
            [chunk.keys[row] for row in rows],
            [chunk.values[row] for row in rows],  # type: ignore[misc]  # a tombstone stays a tombstone
            [
                dead_letter_headers(
                    chunk, failures.rows[i], failures.codes[i], failures.texts[i], served, failed_at
                )
                for i in kept
            ],
        )
        for code, count in Counter(failures.codes[index] for index in kept).items():
            self._metrics.dead_letters(plan.name, code.value, count)
        self._outlet.publish(envelopes, EnvelopeReceipt(settling, envelopes, rows))

    def _store(
        self,
        settling: Settling,
        rows: list[int],
        ids: list[str],
        bodies: list[bytes],
        ok: list[bool],
        replies: list[str | None] | None,
        *,
        reply_only: bool = False,
    ) -> None:
        if self._results is None:
            return
        plan = settling.plan
        values = settling.chunk.values
        hashes: list[str] = [payload_hash(values[row] or b"") for row in rows]
        only = reply_only or not plan.redis
        results = Results(plan.name, ids, bodies, ok, hashes, replies, plan.ttl_s, only)
        self._results.publish(results, ResultReceipt(settling, results, rows))

    # What outlets say

    def envelope_refused(self, receipt: EnvelopeReceipt, index: int, refusal: Refusal) -> None:
        """Turn an answer that is too large into an error, cut what else is, and park the rest."""
        settling, envelopes = receipt.settling, receipt.envelopes
        if not settling.chunk.live:
            return
        row = receipt.rows[index]
        plan = settling.plan
        # An error that is refused as too large is cut, then parked: another error would be no smaller.
        is_answer = envelopes.destination in plan.topics and STATUS_OK in envelopes.headers[index]
        if refusal.kind is RefusalKind.TOO_LARGE and is_answer:
            error = Failures(
                settling.chunk,
                [row],
                [(_header(envelopes, index, names.ID) or b"").decode()],
                [Code.RESULT_TOO_LARGE],
                [f"the answer is larger than {envelopes.destination} accepts"],
                [None],
                [_header(envelopes, index, names.TRACEPARENT)],
            )
            first = settling.replace(row, Code.RESULT_TOO_LARGE)
            self._publish_errors(settling, error, [envelopes.destination], store=False, dead_letters=first)
            return
        if refusal.kind is RefusalKind.TOO_LARGE:
            is_letter = envelopes.destination == plan.dead_letters
            cut = cut_letter(envelopes, index) if is_letter else cut_outcome(envelopes, index)
            if cut is not None:
                self._outlet.publish(cut, EnvelopeReceipt(settling, cut, [row]))
                return
        self._parking.park(receipt, index, refusal)

    def result_refused(self, receipt: ResultReceipt, index: int, refusal: Refusal) -> None:
        """Answer a reused id with ``E_DUP_ID``: to the waiting client and the dead letters only.

        An error outcome stays what it is: it has its dead letter already, and only its client must hear.
        """
        settling, results = receipt.settling, receipt.results
        if not settling.chunk.live:
            return
        row, request_id = receipt.rows[index], results.ids[index]
        reply = results.replies[index] if results.replies is not None else None
        if not results.ok[index]:
            if reply is not None:
                bodies = [results.bodies[index]]
                self._store(settling, [row], [request_id], bodies, [False], [reply], reply_only=True)
            return
        error = Failures(settling.chunk, [row], [request_id], [Code.DUP_ID], [refusal.text], [reply], [None])
        settling.replace(row, Code.DUP_ID)
        self._publish_errors(settling, error, [], store=False)

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


def _failures(part: Requests, indices: list[int], verdicts: Sequence[tuple[Code, str]]) -> Failures:
    return Failures(
        part.chunk,
        [part.rows[i] for i in indices],
        [part.ids[i] for i in indices],
        [code for code, _ in verdicts],
        [text for _, text in verdicts],
        [None if part.replies is None else part.replies[i] for i in indices],
        [None if part.traces is None else part.traces[i] for i in indices],
        part.served,
    )


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
