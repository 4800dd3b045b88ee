"""What becomes of a request that fails: held back by a brake, another attempt later, or its error and letter.

One place decides, so that each failure has exactly one end. A failure of the model is counted by the route's
brake before anything is moved; while a route is braked its failures stay where they are and run again when it
is resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import structlog

from inferfleet.core.retry import RetryAt, RetryPolicy
from inferfleet.errors import RULES, Code
from inferfleet.ports import Clock
from inferfleet.records import Envelopes, Failures, Header, Requests, RowFailure
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.trace_context import trace_id
from inferfleet.wire.encode import error_body, error_headers
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.deadletter import dead_letter_headers, origin_of
from inferfleet.worker.handover import HandOver, carried
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.retries import retry_headers
from inferfleet.worker.settling import Outcome, OutcomeListener, Settling

log = structlog.get_logger(__name__)


class Failing:
    """Ends failed requests; owned by the worker loop's thread. ``listener`` hears what outlets say."""

    def __init__(
        self,
        hand_over: HandOver,
        listener: OutcomeListener,
        brakes: Brakes,
        retry: RetryPolicy,
        metrics: PrometheusMetrics,
        clock: Clock,
        dead_letter_also: frozenset[str],
    ) -> None:
        self._to = hand_over
        self._listener = listener
        self._brakes = brakes
        self._retry = retry
        self._metrics = metrics
        self._clock = clock
        self._dead_letter_also = dead_letter_also

    def rows(self, plan: RoutePlan, failures: Sequence[RowFailure], answered: int = 0) -> None:
        """End requests of a batch that a model, or the writing of its answer, failed alone.

        ``answered`` first attempts of the same batch succeeded.
        """
        live = [failure for failure in failures if failure.part.chunk.wanted]
        for failure in self._brakes.passed(plan.name, live, answered):
            part = failure.part
            deadlines = [None if part.deadlines_ms is None else part.deadlines_ms[0]]
            found = failures_of(part, [0], [(failure.code, failure.text)])
            self.fail(plan, found, retryable=[failure.retryable], deadlines_ms=deadlines, batch=failure.batch)

    def unread(self, plan: RoutePlan, failures: Failures) -> None:
        """End requests that could not be read."""
        ours = [index for index, code in enumerate(failures.codes) if RULES[code].brake]
        if ours and failures.chunk.live:
            self._brakes.unread(plan.name, picked(failures, ours))
        self.fail(plan, failures)

    def fail(
        self,
        plan: RoutePlan,
        failures: Failures,
        *,
        retryable: Sequence[bool] | None = None,
        deadlines_ms: Sequence[int | None] | None = None,
        batch: int | None = None,
    ) -> None:
        """Give each request its end: another attempt where that may help, else its error outcome.

        ``batch`` is the number of the batch in which they failed.
        """
        if not failures.chunk.wanted:
            return
        ended: list[int] = []
        for index, code in enumerate(failures.codes):
            may_pass = RULES[code].retryable or (
                # What a handler says of its own code's faults, never of a caller's.
                code is Code.MODEL and retryable is not None and retryable[index]
            )
            deadline = None if deadlines_ms is None else deadlines_ms[index]
            again = self._again(plan, failures, index, deadline) if may_pass else None
            if again is None:
                ended.append(index)
            else:
                self._delay(plan, failures, index, again)
        if ended:
            found = failures if len(ended) == len(failures.rows) else picked(failures, ended)
            _tell(plan, found, batch)
            self._end(plan, found)

    def _again(
        self, plan: RoutePlan, failures: Failures, index: int, deadline_ms: int | None
    ) -> RetryAt | None:
        if not plan.retries:
            return None
        row = failures.rows[index]
        return self._retry.decide(
            retryable=True,
            attempt=origin_of(failures.chunk, row).attempt,
            request_id=failures.ids[index] or failures.chunk.called(row),
            now_ms=self._clock.utc_ms(),
            deadline_ms=deadline_ms,
        )

    def _delay(self, plan: RoutePlan, failures: Failures, index: int, again: RetryAt) -> None:
        chunk, row = failures.chunk, failures.rows[index]
        request_id = failures.ids[index] or chunk.called(row)
        headers = retry_headers(
            chunk, row, request_id, attempt=again.attempt, not_before_ms=again.not_before_ms
        )
        envelopes = Envelopes(
            plan.retries[again.index],
            [chunk.keys[row]],
            [chunk.values[row]],  # type: ignore[list-item]  # what could not be read may have no body
            [headers],
            carried(chunk, [row]),
            [again.delay_ms],
        )
        settling = Settling(self._listener, plan, chunk, [row], {}, [request_id], failures.served)
        settling.instead = only = picked(failures, [index])
        settling.traces, settling.codes = only.traces, only.codes
        self._to.publish(settling, envelopes, [row])
        self._metrics.retries(plan.name, 1)
        settling.close()

    def give_up(self, settling: Settling, failures: Failures) -> None:
        """End a request after all: the topic of its next attempt has no room for it."""
        plan, settling.instead = settling.plan, None
        settling.outcomes = _counted(plan, failures)
        texts = [f"{text}; it is too large for another attempt" for text in failures.texts]
        self.publish(settling, failures._replace(texts=texts), plan.destinations, store=plan.redis)

    def settle(self, plan: RoutePlan, failures: Failures) -> None:
        """Settle failed requests without telling anybody."""
        outcomes = _counted(plan, failures)
        Settling(
            self._listener, plan, failures.chunk, failures.rows, outcomes, failures.ids, failures.served
        ).close()

    def _end(self, plan: RoutePlan, failures: Failures) -> None:
        outcomes = _counted(plan, failures)
        now, served = self._clock.monotonic(), failures.served
        settling = Settling(
            self._listener, plan, failures.chunk, failures.rows, outcomes, failures.ids, served, now
        )
        settling.traces, settling.codes = failures.traces, failures.codes
        self.publish(settling, failures, plan.destinations, store=plan.redis)
        settling.close()

    def publish(
        self,
        settling: Settling,
        failures: Failures,
        destinations: Sequence[str],
        *,
        store: bool,
        reply: bool = True,
        dead_letters: bool = True,
    ) -> None:
        """Publish error outcomes to ``destinations``, their letters, and what the result store is owed.

        ``reply``: to the queues that the requests name too, where the route allows it.
        """
        plan, chunk = settling.plan, settling.chunk
        variant = plan.variant_of(failures.served)
        served = plan.failed_header if variant is None else variant.header
        ids = [
            chunk.called(row) if found is None else found
            for row, found in zip(failures.rows, failures.ids, strict=True)
        ]
        bodies = [
            error_body(text, code, request_id)
            for text, code, request_id in zip(failures.texts, failures.codes, ids, strict=True)
        ]
        reply = reply and plan.reply
        if destinations or reply:
            headers = [
                error_headers(request_id, code, served, trace)
                for request_id, code, trace in zip(ids, failures.codes, failures.traces, strict=True)
            ]
            self._to.outcomes(settling, destinations, failures.rows, bodies, headers, reply=reply)
        if dead_letters:
            self._letters(settling, failures, served)
        replies = failures.replies if any(reply is not None for reply in failures.replies) else None
        if self._to.stores and (store or replies is not None):
            ok = [False] * len(ids)
            self._to.store(settling, failures.rows, ids, bodies, ok, replies, reply_only=not store)

    def _letters(self, settling: Settling, failures: Failures, served: Header) -> None:
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
            carried(chunk, rows),
        )
        for code, count in Counter(failures.codes[index] for index in kept).items():
            self._metrics.dead_letters(plan.name, code.value, count)
        self._to.publish(settling, envelopes, rows)


def _tell(plan: RoutePlan, failures: Failures, batch: int | None) -> None:
    """Log what failed, one line for each code; the log itself keeps a flood of such lines short.

    The errors' texts are left out: a handler may have put what a caller sent into its own.
    """
    served = failures.served
    for code, count in Counter(failures.codes).items():
        fault = RULES[code].fault
        traces = (
            trace
            for trace, each in zip(failures.traces, failures.codes, strict=True)
            if trace and each is code
        )
        trace = next(traces, None)
        about: dict[str, object] = {"route": plan.name, "code": code.value, "fault": fault, "requests": count}
        if served is not None:
            about |= {"model": served.model, "version": served.version}
        if batch is not None:
            about["batch"] = batch
        if trace:
            about["trace_id"] = trace_id(trace)
        (log.warning if fault in ("caller", "time") else log.error)("requests_failed", **about)


def failures_of(part: Requests, indices: list[int], verdicts: Sequence[tuple[Code, str]]) -> Failures:
    """Return the failures of some requests of a part."""
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


def _counted(plan: RoutePlan, failures: Failures) -> dict[Outcome, int]:
    variant = plan.variant_of(failures.served)
    named = ("", "") if variant is None else (variant.variant.version, variant.variant.name)
    return dict(Counter((*named, code.value) for code in failures.codes))


def picked(failures: Failures, indices: Sequence[int]) -> Failures:
    """Return the failures at ``indices``."""
    return Failures(
        failures.chunk,
        [failures.rows[i] for i in indices],
        [failures.ids[i] for i in indices],
        [failures.codes[i] for i in indices],
        [failures.texts[i] for i in indices],
        [failures.replies[i] for i in indices],
        [failures.traces[i] for i in indices],
        failures.served,
    )
