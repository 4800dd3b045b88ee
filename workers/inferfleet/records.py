"""The nouns that move: chunks of records, requests as columns, batches, answers, envelopes.

Everything here is a *column set*: one object stands for many records, so that Python work per record
is list building inside tight loops. Nothing here knows a broker, a clock or a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from inferfleet.chunks import Amqp as Amqp
from inferfleet.chunks import Chunk as Chunk
from inferfleet.chunks import Header as Header
from inferfleet.chunks import Headers as Headers
from inferfleet.chunks import Origin as Origin
from inferfleet.chunks import Stream as Stream
from inferfleet.errors import Code

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = dict[str, Array]


class TensorSpec(NamedTuple):
    """One input or output of a model: ``shape`` is per row, without the batch dimension; -1 varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives, in the Open Inference Protocol's words."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class AnswerForm(NamedTuple):
    """How a request wants its answer: which outputs, and which of them as binary tensors."""

    binary: bool = False
    outputs: tuple[str, ...] | None = None
    binary_outputs: frozenset[str] | None = None


JSON_ANSWER = AnswerForm()
BINARY_ANSWER = AnswerForm(binary=True)


class Served(NamedTuple):
    """Which version answers, and why: the meaning of the ``inferfleet-served`` header.

    ``revision`` is the one in force at the record's time; ``fallback`` says that its version is loaded no
    longer, and the stable one of now answers in its place.
    """

    route: str
    model: str
    version: str
    variant: str
    revision: str
    fallback: bool = False


@dataclass(slots=True)
class Requests:
    """Decoded requests of one chunk with equal tensor shapes, answer form and priority, as columns.

    ``rows`` are ascending indices into the chunk's columns. ``tensors`` maps an input's name to an array
    of shape ``[total_rows, *row shape]``; ``row_counts`` says how many of those rows belong to each
    request (``None``: one each). ``deadlines_ms`` are epoch milliseconds (``None``: nobody set one).
    ``costs`` is the size that length-sorted batching sorts by (``None``: all alike). ``traces`` are those of
    :mod:`inferfleet.trace_context` (``None``: nobody named one).
    """

    chunk: Chunk
    rows: list[int]
    ids: list[str]
    tensors: Tensors
    row_counts: list[int] | None = None
    deadlines_ms: list[int | None] | None = None
    priority: int = 5
    replies: list[str | None] | None = None
    traces: list[bytes | None] | None = None
    costs: list[int] | None = None
    form: AnswerForm = JSON_ANSWER
    served: Served | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.rows)

    @property
    def total_rows(self) -> int:
        """Return the number of tensor rows over all requests."""
        return len(self.rows) if self.row_counts is None else sum(self.row_counts)

    @property
    def first_deadline_ms(self) -> int | None:
        """Return the earliest deadline of any request, epoch milliseconds."""
        if self.deadlines_ms is None:
            return None
        return min((d for d in self.deadlines_ms if d is not None), default=None)

    def bounds(self) -> list[int]:
        """Return the first tensor row of each request, and the total at the end."""
        if self.row_counts is None:
            return list(range(len(self.rows) + 1))
        out = [0]
        for count in self.row_counts:
            out.append(out[-1] + count)
        return out

    def slice(self, low: int, high: int) -> Requests:
        """Return the requests ``low`` to ``high`` (exclusive); tensors are views."""
        if low == 0 and high == len(self.rows):
            return self
        if self.row_counts is None:
            first, last = low, high
        else:
            first = sum(self.row_counts[:low])
            last = first + sum(self.row_counts[low:high])
        return Requests(
            self.chunk,
            self.rows[low:high],
            self.ids[low:high],
            {name: array[first:last] for name, array in self.tensors.items()},
            None if self.row_counts is None else self.row_counts[low:high],
            None if self.deadlines_ms is None else self.deadlines_ms[low:high],
            self.priority,
            None if self.replies is None else self.replies[low:high],
            None if self.traces is None else self.traces[low:high],
            None if self.costs is None else self.costs[low:high],
            self.form,
            self.served,
        )

    def pick(self, indices: Sequence[int]) -> Requests:
        """Return the requests at ``indices`` (ascending); tensors are copied."""
        if len(indices) == len(self.rows):
            return self
        if self.row_counts is None:
            tensor_rows: list[int] | Sequence[int] = list(indices)
        else:
            bounds = self.bounds()
            tensor_rows = [row for i in indices for row in range(bounds[i], bounds[i + 1])]
        return Requests(
            self.chunk,
            [self.rows[i] for i in indices],
            [self.ids[i] for i in indices],
            {name: array[tensor_rows] for name, array in self.tensors.items()},
            None if self.row_counts is None else [self.row_counts[i] for i in indices],
            None if self.deadlines_ms is None else [self.deadlines_ms[i] for i in indices],
            self.priority,
            None if self.replies is None else [self.replies[i] for i in indices],
            None if self.traces is None else [self.traces[i] for i in indices],
            None if self.costs is None else [self.costs[i] for i in indices],
            self.form,
            self.served,
        )


class Failures(NamedTuple):
    """Requests of one chunk that get an error outcome, as columns; ``rows`` ascend.

    An id is ``None`` where it could not be read. ``served`` names the version that failed them, if any did.
    """

    chunk: Chunk
    rows: list[int]
    ids: list[str | None]
    codes: list[Code]
    texts: list[str]
    replies: list[str | None]
    traces: list[bytes | None]
    served: Served | None = None


class Lane(NamedTuple):
    """Rows that may share a batch: one model version, one role, one set of row shapes, one set of limits."""

    model: str
    version: str
    role: str
    shapes: tuple[tuple[int, ...], ...]
    max_batch_size: int
    max_queue_delay_s: float


@dataclass(slots=True)
class Batch:
    """Requests of one lane that run together; ``rows`` is the sum of their tensor rows.

    ``since`` is when the first of them began to wait, monotonic seconds; 0 where that is not known.
    """

    lane: Lane
    parts: list[Requests]
    rows: int
    number: int = 0
    """Which of its engine's batches this is, from 1; 0 before it is given to one."""
    since: float = 0.0

    def tensors(self) -> Tensors:
        """Return the inputs of all parts, joined along the first dimension."""
        if len(self.parts) == 1:
            return self.parts[0].tensors
        return {
            name: np.concatenate([part.tensors[name] for part in self.parts])
            for name in self.parts[0].tensors
        }


class Answer(NamedTuple):
    """Requests with their outputs; each array has exactly ``part.total_rows`` rows, in order."""

    part: Requests
    outputs: Tensors


class RowFailure(NamedTuple):
    """One request (``part`` holds just that one) that the model failed, and why.

    ``retryable``: the same request may pass later (the handler says so, a timeout, an OSError). ``batch`` is
    the number of the batch in which it failed, ``None`` where that is not known.
    """

    part: Requests
    code: Code
    text: str
    retryable: bool = False
    batch: int | None = None


@dataclass(slots=True)
class BatchResult:
    """What became of a batch: every request is in exactly one of ``answers`` and ``failures``."""

    batch: Batch
    answers: list[Answer] = field(default_factory=list)
    failures: list[RowFailure] = field(default_factory=list)
    seconds: float = 0.0
    runs: int = 0
    lane_limit: int | None = None


@dataclass(slots=True)
class Envelopes:
    """Outcomes for one destination, as columns; ``headers`` are ready to be handed to the client.

    ``amqp`` says what a RabbitMQ message keeps of its request: with the destination ``reply:`` it names the
    queue of each. ``expirations_ms`` says how long each message waits in a queue for delayed attempts.
    """

    destination: str
    keys: list[bytes | None]
    values: list[bytes]
    headers: list[list[Header]]
    amqp: list[Amqp] | None = None
    expirations_ms: list[int] | None = None

    def __len__(self) -> int:
        """Return the number of envelopes."""
        return len(self.values)

    def only(self, index: int) -> Envelopes:
        """Return the envelope ``index`` as a column set of its own."""
        return Envelopes(
            self.destination,
            [self.keys[index]],
            [self.values[index]],
            [self.headers[index]],
            None if self.amqp is None else [self.amqp[index]],
            None if self.expirations_ms is None else [self.expirations_ms[index]],
        )


@dataclass(slots=True)
class Results:
    """Outcomes for a result store, as columns.

    ``bodies`` are the outcomes' JSON bodies. ``payload_hashes`` identify the request's bytes, so that
    the same id with another payload is noticed. ``replies`` names each client's reply stream. With
    ``reply_only`` nothing is stored: the bodies go to the reply streams alone, for a client whose id holds
    an answer to another payload.
    """

    route: str
    ids: list[str]
    bodies: list[bytes]
    ok: list[bool]
    payload_hashes: list[str]
    replies: list[str | None] | None
    ttl_s: int
    reply_only: bool = False

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self.ids)
