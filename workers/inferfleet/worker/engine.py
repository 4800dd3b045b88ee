"""One loaded model version on its own device thread: batches in, results out.

The thread owns the model for life: it loads it, runs every batch, and closes it. A failing batch is halved
here until the bad requests stand alone; running out of memory halves the lane's batch size as well. The
worker loop talks to the thread through two queues and never waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import structlog

from inferfleet.core.isolation import Isolation, Span
from inferfleet.datatypes import DATATYPES
from inferfleet.errors import Code, DeviceOutOfMemoryError, ModelLoadError, RequestError
from inferfleet.ports import Clock, LoadedModel
from inferfleet.records import Answer, Batch, BatchResult, Lane, Requests, RowFailure, Signature, Tensors

log = structlog.get_logger(__name__)

SLOTS = 2
"""Batches an engine holds at once: one running, one ready, so that the device never waits for the loop."""


class Loaded(NamedTuple):
    """An engine finished loading; ``error`` says why it did not succeed."""

    engine: Engine
    error: Exception | None


class Finished(NamedTuple):
    """An engine finished a batch."""

    engine: Engine
    result: BatchResult


News = Loaded | Finished | None
"""What device threads and outlets put into the loop's queue; ``None`` only wakes it."""


_MODEL_FAULTS = BaseException
"""What ends a run and not the thread: a model that calls ``exit()`` or lets a cancellation out fails like
one that raises. Nobody else's signal arrives on a device thread."""


class ModelOutputError(Exception):
    """The model's outputs do not fit its signature or the batch."""


class Engine:
    """A device thread; created by the loop, which alone calls its methods."""

    def __init__(
        self, model: str, version: str, load: Callable[[], LoadedModel], news: SimpleQueue[News], clock: Clock
    ) -> None:
        self.model = model
        self.version = version
        self.signature: Signature | None = None
        self.in_flight = 0
        self.batches = 0
        """How many it was given so far."""
        self.used_at = 0.0
        """When it was last given a batch, monotonic seconds."""
        self.aside = 0
        """Batches among them that no request waits for: those of shadows."""
        self._load = load
        self._news = news
        self._clock = clock
        self._jobs: SimpleQueue[Batch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"engine-{model}-{version}", daemon=True)

    def __repr__(self) -> str:
        return f"Engine({self.model}:{self.version}, in_flight={self.in_flight})"

    def start(self) -> None:
        """Start loading; the outcome arrives as :class:`Loaded`."""
        self._thread.start()

    @property
    def free(self) -> bool:
        """Whether another batch may be submitted."""
        return self.in_flight < SLOTS

    def submit(self, batch: Batch) -> None:
        """Queue a batch; its result arrives as :class:`Finished`."""
        self.in_flight += 1
        self.batches += 1
        batch.number = self.batches
        self._jobs.put(batch)

    def close(self) -> None:
        """Let the thread finish what it has, close the model and end."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; return whether it ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            model = self._load()
            self.signature = model.signature
        except Exception as error:
            self._news.put(Loaded(self, error))
            return
        except BaseException as error:
            said = "called exit()" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
            text = f"model {self.model} version {self.version}: its code {said} while loading"
            self._news.put(Loaded(self, ModelLoadError(text)))
            return
        runner = BatchRunner(model)
        self._news.put(Loaded(self, None))
        while (batch := self._jobs.get()) is not None:
            started = self._clock.monotonic()
            result = runner.run(batch)
            result.seconds = self._clock.monotonic() - started
            self._news.put(Finished(self, result))
            del batch, result
        model.close()


class BatchRunner:
    """Runs batches on a loaded model; every request comes out answered or failed, never shifted."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._signature = model.signature
        self._max_rows: int | None = None

    def run(self, batch: Batch) -> BatchResult:
        """Run ``batch``; never raises."""
        result = BatchResult(batch)
        try:
            self._attempt(batch.parts, batch.tensors(), batch.rows, result)
        except _MODEL_FAULTS as error:
            self._isolate(batch, error, result)
        return result

    def _isolate(self, batch: Batch, first: BaseException, result: BatchResult) -> None:
        count = sum(len(part) for part in batch.parts)
        isolation = Isolation(count)
        last: dict[int, BaseException] = {}
        starved: list[tuple[Span, int]] = []
        if isinstance(first, DeviceOutOfMemoryError):
            starved.append((Span(0, count), min(batch.rows, self._limit(batch.lane))))
        while (span := isolation.next_span()) is not None:
            parts = _span(batch.parts, span.low, span.high)
            rows = sum(part.total_rows for part in parts)
            try:
                self._attempt(parts, Batch(batch.lane, parts, rows).tensors(), rows, result)
            except _MODEL_FAULTS as error:
                isolation.failed(span)
                last[span.low] = error
                if isinstance(error, DeviceOutOfMemoryError) and rows > 1:
                    starved.append((span, min(rows, self._limit(batch.lane))))
        for index in isolation.condemned:
            (part,) = _span(batch.parts, index, index + 1)
            reason = last.get(index, first)
            result.failures.append(RowFailure(part, *_verdict(reason), _may_pass(reason), batch.number))
        # A span with a request that fails even alone says nothing about the size that fits.
        sizes = [rows for span, rows in starved if not any(i in range(*span) for i in isolation.condemned)]
        if sizes:
            self._learn(min(sizes) // 2, result)

    def _learn(self, fits: int, result: BatchResult) -> None:
        """Run at most ``fits`` rows at once from now on: the device had no memory for more."""
        limit = max(1, fits)
        if self._max_rows is None or limit < self._max_rows:
            self._max_rows = result.lane_limit = limit
            lane = result.batch.lane
            log.warning(
                "batch_size_halved",
                model=lane.model,
                version=lane.version,
                batch=result.batch.number,
                limit=limit,
            )

    def _limit(self, lane: Lane) -> int:
        limit = max(lane.max_batch_size, 1)
        return limit if self._max_rows is None else min(limit, self._max_rows)

    def _attempt(self, parts: Sequence[Requests], tensors: Tensors, rows: int, result: BatchResult) -> None:
        limit = min(rows, self._limit(result.batch.lane))
        result.runs += 1
        alone = len(parts) == 1 and len(parts[0]) == 1
        outputs = (
            self._in_halves(tensors, rows, limit, result) if alone else self._in_pieces(tensors, rows, limit)
        )
        at = 0
        for part in parts:
            count = part.total_rows
            result.answers.append(
                Answer(part, {name: array[at : at + count] for name, array in outputs.items()})
            )
            at += count

    def _in_halves(self, tensors: Tensors, rows: int, limit: int, result: BatchResult) -> Tensors:
        """Run one request, in pieces of half the size while the device has no memory for more."""
        size = limit
        while True:
            try:
                outputs = self._in_pieces(tensors, rows, size)
            except DeviceOutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
            else:
                if size < limit:
                    self._learn(size, result)
                return outputs

    def _in_pieces(self, tensors: Tensors, rows: int, limit: int) -> Tensors:
        """Run rows, in several calls where they are more than ``limit``."""
        if rows <= limit:
            return self._checked(self._model.run(tensors, rows), rows)
        pieces: list[Tensors] = []
        for low in range(0, rows, limit):
            high = min(rows, low + limit)
            piece = {name: array[low:high] for name, array in tensors.items()}
            pieces.append(self._checked(self._model.run(piece, high - low), high - low))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _checked(self, outputs: Tensors, rows: int) -> Tensors:
        """Return the declared outputs, or raise when one is missing or does not fit."""
        checked: Tensors = {}
        for spec in self._signature.outputs:
            array = outputs.get(spec.name)
            if array is None:
                raise ModelOutputError(f"output {spec.name} is missing")
            if array.ndim == 0 or array.shape[0] != rows:
                raise ModelOutputError(
                    f"output {spec.name}: shape {list(array.shape)} for a batch of {rows} rows"
                )
            tail = array.shape[1:]
            if len(tail) != len(spec.shape) or any(
                wanted not in (-1, found) for found, wanted in zip(tail, spec.shape, strict=True)
            ):
                raise ModelOutputError(
                    f"output {spec.name}: row shape {list(tail)}; the signature says {list(spec.shape)}"
                )
            if array.dtype != DATATYPES[spec.datatype].numpy:
                raise ModelOutputError(
                    f"output {spec.name}: {array.dtype}; the signature says {spec.datatype}"
                )
            checked[spec.name] = array
        return checked


def _span(parts: Sequence[Requests], low: int, high: int) -> list[Requests]:
    """Return the requests ``low`` to ``high`` counted over all parts."""
    found: list[Requests] = []
    at = 0
    for part in parts:
        first, last = max(low - at, 0), min(high - at, len(part))
        if first < last:
            found.append(part.slice(first, last))
        at += len(part)
        if at >= high:
            break
    return found


def _may_pass(error: BaseException) -> bool:
    """Return whether the same request may pass later: the handler says so, or what it waits for is away."""
    return isinstance(error, TimeoutError | OSError) or getattr(error, "retryable", False) is True


def _verdict(error: BaseException) -> tuple[Code, str]:
    """Return the code and text of a request that failed alone; the text never quotes the payload."""
    if isinstance(error, RequestError):
        return error.code, error.text
    if isinstance(error, ModelOutputError):
        return Code.MODEL_OUTPUT, str(error)
    if isinstance(error, DeviceOutOfMemoryError | MemoryError):
        return Code.MODEL, "the device has no memory for this request alone"
    return Code.MODEL, f"the model raised {type(error).__name__} on this request alone, twice"
