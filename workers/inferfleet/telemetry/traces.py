"""Traces of the record path: every name of a span and of an attribute, and what is recorded of whom.

Names are those of OpenTelemetry's conventions for messaging (status: development; there is one set of names,
so ``OTEL_SEMCONV_STABILITY_OPT_IN`` changes nothing), ``inferfleet.`` stands before our own. A request gets a
span if its caller records its trace, or if it has none and is drawn by our own ratio. Each batch with such
requests gets one, in a trace of its own, and either side links to the other. For all other requests nothing
is made, whatever their headers say.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from inferfleet import trace_context
from inferfleet.addresses import on_rabbitmq, plain
from inferfleet.errors import Code
from inferfleet.records import BatchResult, Chunk, Served

MAX_LINKS = 128
"""How many requests a batch links to, and how many of one part get a span."""
MAX_OPEN = 4096
"""Requests in flight of which it is known in which batch they ran."""

PROCESS = "process"
PREDICT = "predict"
SYSTEM = "messaging.system"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
PARTITION = "messaging.destination.partition.id"
GROUP = "messaging.consumer.group.name"
MESSAGE_ID = "messaging.message.id"
MESSAGE_COUNT = "messaging.batch.message_count"
KAFKA_OFFSET = "messaging.kafka.offset"
RABBITMQ_TAG = "messaging.rabbitmq.message.delivery_tag"
ERROR_TYPE = "error.type"
ROUTE = "inferfleet.route"
MODEL = "inferfleet.model"
VERSION = "inferfleet.version"
VARIANT = "inferfleet.variant"
REVISION = "inferfleet.revision"
ROLE = "inferfleet.role"
OUTCOME = "inferfleet.outcome"
ATTEMPT = "inferfleet.attempt"
ROWS = "inferfleet.rows"
BATCH = "inferfleet.batch"
RUNS = "inferfleet.runs"
FAILED = "inferfleet.failed"

Attributes = Mapping[str, str | int]


class Context(NamedTuple):
    """What names a span: 32 and 16 hexadecimal digits, and what other systems have said beside them."""

    trace_id: str
    span_id: str
    state: str = ""


class Span(NamedTuple):
    """A span that has ended; ``error`` says why it failed, and is empty if it did not. Epoch nanoseconds."""

    name: str
    kind: Literal["consumer", "internal"]
    context: Context
    parent: Context | None
    start_ns: int
    end_ns: int
    attributes: Attributes
    links: Sequence[Context] = ()
    error: str = ""


class Ended(NamedTuple):
    """Requests of one chunk that have ended, as columns.

    ``codes`` says why each failed, and is ``None`` where all were answered; with ``again`` they go on to
    another attempt.
    """

    chunk: Chunk
    rows: Sequence[int]
    ids: Sequence[str | None]
    traces: Sequence[bytes | None]
    route: str
    served: Served | None
    codes: Sequence[Code | None] | None
    again: bool = False


class Traces(Protocol):
    """What the record path tells of its requests; owned by the worker loop's thread."""

    on: bool
    """Whether anything is recorded: while it is not, nothing else need be called."""

    def began(self, traces: list[bytes | None] | None, count: int) -> list[bytes | None] | None:
        """``count`` requests of a chunk were read; return their trace headers, with spans of ours in them."""

    def batch(self, result: BatchResult, end_ns: int) -> None:
        """A batch has run."""

    def ended(self, ended: Ended, start_ns: int, end_ns: int) -> None:
        """Outcomes are confirmed; the requests were taken at ``start_ns``."""


class NoTraces:
    """Records nothing."""

    on = False

    def began(self, traces: list[bytes | None] | None, count: int) -> list[bytes | None] | None:
        """Return what came."""
        del count
        return traces

    def batch(self, result: BatchResult, end_ns: int) -> None:
        """Do nothing."""

    def ended(self, ended: Ended, start_ns: int, end_ns: int) -> None:
        """Do nothing."""


NO_TRACES = NoTraces()


class RecordTraces:
    """Makes spans of what is sampled and gives each to ``export``; see :class:`Traces`.

    ``ratio`` is the share of requests without a trace for which one begins here. ``random_bits`` returns that
    many random bits.
    """

    on = True

    def __init__(
        self,
        export: Callable[[Span], None],
        group: str,
        ratio: float = 0.0,
        random_bits: Callable[[int], int] = random.getrandbits,
    ) -> None:
        self._export = export
        self._group = group
        self._ratio = ratio
        self._bits = random_bits
        self._skip = self._drawn()
        self._batches: OrderedDict[str, tuple[Context, int]] = OrderedDict()

    def began(self, traces: list[bytes | None] | None, count: int) -> list[bytes | None] | None:
        """Give a span to what its caller records, at most ``MAX_LINKS`` of a part, and to what is drawn."""
        fresh: list[bytes | None] | None = None
        if traces is not None:
            left = MAX_LINKS
            for index, trace in enumerate(traces):
                if trace is not None and trace_context.is_sampled(trace):
                    fresh = list(traces) if fresh is None else fresh
                    fresh[index] = trace_context.with_span(trace, self._id(64))
                    left -= 1
                    if not left:
                        break
        if self._ratio:
            fresh = self._begin_some(traces if fresh is None else fresh, count)
        return traces if fresh is None else fresh

    def _begin_some(self, traces: list[bytes | None] | None, count: int) -> list[bytes | None] | None:
        """Begin traces for requests that are drawn: how many to pass over is drawn, not each request."""
        while self._skip < count:
            traces = [None] * count if traces is None else traces
            if traces[self._skip] is None:
                traces[self._skip] = trace_context.new_trace(self._id(128), self._id(64))
            self._skip += 1 + self._drawn()
        self._skip -= count
        return traces

    def _drawn(self) -> int:
        """Return how many requests are passed over before the next one: geometric, so that each is alike."""
        if not 0 < self._ratio < 1:
            return 0
        # The inverse of the distribution, at a share in (0, 1].
        share = (self._bits(53) + 1) / (1 << 53)
        return int(math.log(share) / math.log1p(-self._ratio))

    def _id(self, bits: int) -> int:
        return self._bits(bits) or 1

    def batch(self, result: BatchResult, end_ns: int) -> None:
        """Record a batch if it ran requests that are recorded, at most ``MAX_LINKS`` of which it links to."""
        links: list[Context] = []
        for part in result.batch.parts:
            if part.traces is None:
                continue
            for trace in part.traces:
                if trace is not None and trace_context.is_sampled(trace):
                    links.append(Context(trace_context.trace_id(trace), trace_context.span_id(trace)))
                    if len(links) == MAX_LINKS:
                        break
            if len(links) == MAX_LINKS:
                break
        if not links:
            return
        batch, lane = result.batch, result.batch.lane
        context = Context(f"{self._id(128):032x}", f"{self._id(64):016x}")
        for link in links:
            self._batches[link.span_id] = (context, batch.number)
        while len(self._batches) > MAX_OPEN:
            self._batches.popitem(last=False)
        attributes: dict[str, str | int] = {
            OPERATION: PREDICT,
            OPERATION_TYPE: PROCESS,
            MESSAGE_COUNT: sum(map(len, batch.parts)),
            MODEL: lane.model,
            VERSION: lane.version,
            ROLE: lane.role,
            ROWS: batch.rows,
            BATCH: batch.number,
            RUNS: result.runs,
            FAILED: len(result.failures),
        }
        start_ns = end_ns - round(result.seconds * 1e9)
        name = f"{PREDICT} {lane.model}"
        self._export(Span(name, "internal", context, None, start_ns, end_ns, attributes, links))

    def ended(self, ended: Ended, start_ns: int, end_ns: int) -> None:
        """Record each request that has a span of ours."""
        for index, trace in enumerate(ended.traces):
            if trace is not None and trace_context.is_sampled(trace):
                self._request(ended, index, trace, start_ns, end_ns)

    def _request(self, ended: Ended, index: int, trace: bytes, start_ns: int, end_ns: int) -> None:
        chunk, row = ended.chunk, ended.rows[index]
        parent = trace_context.trace_of_headers(chunk.headers[row])
        if parent == trace:  # one too many of its part: it passes through
            return
        destination = plain(chunk.stream.source)
        code = None if ended.codes is None else ended.codes[index]
        span_id = trace_context.span_id(trace)
        batch, number = self._batches.pop(span_id, (None, 0))
        attributes: dict[str, str | int] = {
            **_place(chunk, row),
            OPERATION: PROCESS,
            OPERATION_TYPE: PROCESS,
            DESTINATION: destination,
            GROUP: self._group,
            MESSAGE_ID: ended.ids[index] or chunk.called(row),
            ROUTE: ended.route,
            OUTCOME: "retry" if ended.again else "ok" if code is None else code.value,
            ATTEMPT: 1 if chunk.origins is None else chunk.origins[row].attempt,
        }
        if ended.served is not None:
            attributes |= _answered_by(ended.served)
        if number:
            attributes[BATCH] = number
        if code is not None:
            attributes[ERROR_TYPE] = code.value
        self._export(
            Span(
                f"{PROCESS} {destination}",
                "consumer",
                _context(trace),
                None if parent is None else _context(parent),
                start_ns,
                end_ns,
                attributes,
                () if batch is None else (batch,),
                "" if code is None else code.value,
            )
        )


def _context(trace: bytes) -> Context:
    ids = trace_context.trace_id(trace), trace_context.span_id(trace)
    return Context(*ids, trace_context.state_of(trace))


def _place(chunk: Chunk, row: int) -> dict[str, str | int]:
    """Return where a message stood, in the words of its broker."""
    source, partition = chunk.stream
    if on_rabbitmq(source):
        return {SYSTEM: "rabbitmq", RABBITMQ_TAG: chunk.positions[row]}
    return {SYSTEM: "kafka", PARTITION: str(partition), KAFKA_OFFSET: chunk.positions[row]}


def _answered_by(served: Served) -> dict[str, str | int]:
    return {
        MODEL: served.model,
        VERSION: served.version,
        VARIANT: served.variant,
        REVISION: served.revision,
    }
