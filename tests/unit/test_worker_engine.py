"""Running batches: the bad stand alone, sizes are learned, and no answer is ever another request's."""

from __future__ import annotations

import math
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.errors import Code, DeviceOutOfMemoryError, ModelLoadError, RequestError
from inferfleet.records import Array, Batch, BatchResult, Requests, Signature, Tensors, TensorSpec
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.puppet import PuppetModel, Script
from inferfleet.worker.engine import BatchRunner, Engine, Finished, Loaded, News
from tests.support.builders import chunk, lane, requests

DOUBLED = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),))


def _doubled(tensors: Tensors) -> Tensors:
    return {"y": tensors["x"] * 2}


def _puppet(**script: object) -> PuppetModel:
    return PuppetModel("1", Script(answer=_doubled, **script), DOUBLED)  # type: ignore[arg-type]


def _batch(counts: Sequence[int], *, limit: int = 64, parts: int = 1) -> Batch:
    """Return requests of these row counts, in as many parts; request ``i`` holds ``i`` in every element."""
    of = chunk([b"{}"] * len(counts), first=0)
    cuts = [round(i * len(counts) / parts) for i in range(parts + 1)]
    made: list[Requests] = []
    for low, high in pairwise(cuts):
        if low < high:
            some = list(counts[low:high])
            made.append(requests(of, range(low, high), counts=None if max(some) == 1 else some))
    return Batch(lane(max_batch_size=limit), made, sum(counts))


def _outcomes(result: BatchResult) -> dict[int, Array | Code]:
    """Return each request's outputs or code, after checking that it has exactly one of them."""
    found: dict[int, Array | Code] = {}
    for part, outputs in result.answers:
        bounds = part.bounds()
        assert {len(array) for array in outputs.values()} == {part.total_rows}
        for index, row in enumerate(part.rows):
            assert row not in found
            found[row] = outputs["y"][bounds[index] : bounds[index + 1]]
    for failure in result.failures:
        assert len(failure.part) == 1
        assert failure.part.rows[0] not in found
        found[failure.part.rows[0]] = failure.code
    assert sorted(found) == sorted(row for part in result.batch.parts for row in part.rows)
    return found


def _check(result: BatchResult, counts: Sequence[int], bad: dict[int, Code]) -> None:
    """Every good request got twice its own number, on as many rows as it has; the bad got their codes."""
    for row, outcome in _outcomes(result).items():
        if row in bad:
            assert outcome == bad[row]
        else:
            assert isinstance(outcome, np.ndarray)
            assert outcome.tolist() == [[row * 2.0] * 4] * counts[row]


_COUNTS = st.lists(st.integers(1, 3), min_size=1, max_size=40)


@given(_COUNTS, st.sets(st.integers(0, 39), max_size=5), st.integers(1, 5))
def test_bad_requests_stand_alone_and_their_neighbours_are_answered(
    counts: list[int], bad: set[int], parts: int
) -> None:
    """For any batch and any culprits: exactly they fail, at a cost of O(k log n) runs."""
    bad &= set(range(len(counts)))
    puppet = _puppet(fail_on=frozenset(map(float, bad)))
    result = BatchRunner(puppet).run(_batch(counts, parts=parts, limit=200))
    _check(result, counts, dict.fromkeys(bad, Code.MODEL))
    assert [failure.part.rows[0] for failure in result.failures] == sorted(bad)
    assert result.runs == len(puppet.runs) <= 3 + len(bad) * (2 * math.ceil(math.log2(len(counts) + 1)) + 1)
    assert result.lane_limit is None


def test_a_lone_request_has_two_tries() -> None:
    """The run of its batch of one was the first."""
    puppet = _puppet(fail_on=frozenset([0.0]))
    result = BatchRunner(puppet).run(_batch([1]))
    assert puppet.runs == [1, 1]
    assert [(f.code, f.text) for f in result.failures] == [
        (Code.MODEL, "the model raised PuppetError on this request alone, twice")
    ]


class _Failing(PuppetModel):
    """Raises what ``errors`` holds, one a run, before it answers right."""

    def __init__(self, *errors: Exception | None) -> None:
        super().__init__("1", Script(answer=_doubled), DOUBLED)
        self.errors = list(errors)

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        outputs = super().run(tensors, rows)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return outputs


def test_a_second_try_alone_may_succeed() -> None:
    """A passing fault costs a run and condemns nobody."""
    result = BatchRunner(_Failing(ValueError("flaky"))).run(_batch([1]))
    _check(result, [1], {})
    result = BatchRunner(_Failing(ValueError("a"), ValueError("b"), ValueError("c"))).run(_batch([1, 1]))
    _check(result, [1, 1], {0: Code.MODEL})


def test_a_handlers_request_error_keeps_its_code_and_text() -> None:
    """A tokenizer that refuses a text says so itself."""
    puppet = _puppet(fail_on=frozenset([3.0]), error=RequestError(Code.TOO_LARGE, "600 tokens"))
    result = BatchRunner(puppet).run(_batch([1] * 8))
    _check(result, [1] * 8, {3: Code.TOO_LARGE})
    assert result.failures[0].text == "600 tokens"


def test_the_text_of_a_failure_never_quotes_what_the_model_raised() -> None:
    """Exceptions of libraries quote the payload."""
    puppet = _puppet(fail_on=frozenset([0.0]), error=ValueError("secret payload"))
    (failure,) = BatchRunner(puppet).run(_batch([1])).failures
    assert "secret" not in failure.text


# Memory


@given(_COUNTS, st.integers(1, 12), st.integers(1, 64))
def test_out_of_memory_halves_the_size_and_everybody_is_answered(
    counts: list[int], capacity: int, limit: int
) -> None:
    """Whatever the device holds, down to one row; what was learned is never over twice too small."""
    puppet = _puppet(oom_above=capacity)
    runner = BatchRunner(puppet)
    result = runner.run(_batch(counts, limit=limit))
    _check(result, counts, {})
    largest = min(limit, sum(counts))
    if largest <= capacity:
        assert result.lane_limit is None
    else:
        assert result.lane_limit is not None
        assert 1 <= result.lane_limit < largest


def test_the_learned_size_holds_for_the_next_batches() -> None:
    """They are run in pieces of it, though the lane still builds larger ones, and it is told once."""
    puppet = _puppet(oom_above=9)
    runner = BatchRunner(puppet)
    assert runner.run(_batch([1] * 32)).lane_limit == 8
    puppet.runs.clear()
    result = runner.run(_batch([1] * 32))
    _check(result, [1] * 32, {})
    assert puppet.runs == [8, 8, 8, 8]
    assert result.lane_limit is None


def test_one_large_request_runs_in_smaller_and_smaller_pieces() -> None:
    """It cannot be halved by requests, so it is halved by rows, and answered once."""
    puppet = _puppet(oom_above=5)
    result = BatchRunner(puppet).run(_batch([64]))
    _check(result, [64], {})
    assert result.lane_limit == 4
    assert len(result.answers) == 1


def test_a_request_that_has_no_memory_even_alone_does_not_shrink_the_lane() -> None:
    """The others fitted as they were; only the culprit says nothing about the size."""
    puppet = _puppet(fail_on=frozenset([5.0]), error=DeviceOutOfMemoryError("no"))
    result = BatchRunner(puppet).run(_batch([1] * 32))
    _check(result, [1] * 32, {5: Code.MODEL})
    assert result.failures[0].text == "the device has no memory for this request alone"
    assert result.lane_limit is None


def test_a_request_larger_than_the_limit_runs_in_several_calls_and_is_answered_once() -> None:
    """Its rows come back in order."""
    puppet = _puppet()
    batch = _batch([20], limit=8)
    batch.parts[0].tensors["x"][:, 0] = np.arange(20)
    (answer,) = BatchRunner(puppet).run(batch).answers
    assert puppet.runs == [8, 8, 4]
    assert answer.outputs["y"][:, 0].tolist() == [2.0 * i for i in range(20)]


# Wrong answers


def _spoil(outputs: Tensors, bad: Array, how: Callable[[Array], Tensors]) -> Tensors:
    return how(outputs["y"]) if bad.any() else outputs


WRONG: dict[str, Callable[[Array], Tensors]] = {
    "a row too few": lambda y: {"y": y[:-1]},
    "a row too many": lambda y: {"y": np.concatenate([y, y[:1]])},
    "another width": lambda y: {"y": y[:, :3]},
    "a dimension too few": lambda y: {"y": y[:, 0]},
    "a dimension too many": lambda y: {"y": y[:, :, None]},
    "no dimension": lambda y: {"y": y.sum()},  # type: ignore[dict-item]
    "FP64": lambda y: {"y": y.astype(np.float64)},
    "integers": lambda y: {"y": y.astype(np.int32)},
    "another name": lambda y: {"z": y},
    "nothing": lambda _: {},
}


@pytest.mark.parametrize("error", [SystemExit(0), CancelledError()], ids=repr)
def test_a_model_that_calls_exit_fails_like_one_that_raises(error: Any) -> None:
    """The device thread lives on, and the neighbours are answered."""
    puppet = _puppet(fail_on=frozenset([2.0]), error=error)
    _check(BatchRunner(puppet).run(_batch([1] * 5)), [1] * 5, {2: Code.MODEL})


@pytest.mark.parametrize("how", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_its_culprits_fault_alone(how: Callable[[Array], Tensors]) -> None:
    """Count, shape, type or name: rows are never dealt out by position when something does not fit."""

    def answer(tensors: Tensors) -> Tensors:
        return _spoil(_doubled(tensors), tensors["x"][:, 0] == 5, how)

    counts = [1, 2, 1, 1, 2, 2, 1, 1]
    runner = BatchRunner(PuppetModel("1", Script(answer=answer), DOUBLED))
    result = runner.run(_batch(counts, parts=3))
    _check(result, counts, {5: Code.MODEL_OUTPUT})
    assert result.failures[0].text.startswith("output y")


def test_outputs_that_nobody_declared_are_left_out() -> None:
    """A graph may give more than its signature names."""
    puppet = PuppetModel("1", Script(answer=lambda t: _doubled(t) | {"debug": t["x"]}), DOUBLED)
    (answer,) = BatchRunner(puppet).run(_batch([1, 1])).answers
    assert list(answer.outputs) == ["y"]


def test_a_model_that_always_answers_wrong_fails_everybody_and_ends() -> None:
    """Each request alone, each with its code."""
    puppet = PuppetModel("1", Script(answer=lambda _: {}), DOUBLED)
    counts = [1] * 16
    _check(BatchRunner(puppet).run(_batch(counts)), counts, dict.fromkeys(range(16), Code.MODEL_OUTPUT))


def test_parts_that_cannot_be_joined_fail_as_requests_do() -> None:
    """A lane's rows have one shape; should they not, everybody is still answered."""
    batch = _batch([1, 1], parts=2)
    batch.parts[1].tensors["x"] = batch.parts[1].tensors["x"][:, :3]
    result = BatchRunner(_puppet()).run(batch)
    assert [part.rows for part, _ in result.answers] == [[0]]
    assert [failure.code for failure in result.failures] == [Code.MODEL_OUTPUT]


# The thread around it


def test_an_engine_loads_runs_and_closes_on_its_own_thread() -> None:
    """News come in order; closing lets what was submitted finish."""
    news: SimpleQueue[News] = SimpleQueue()
    puppet = _puppet()
    engine = Engine("m", "1", lambda: puppet, news, FakeClock())
    engine.start()
    loaded = news.get(timeout=10)
    assert loaded == Loaded(engine, None)
    assert engine.signature == DOUBLED
    puppet.hold()
    for _ in range(2):
        assert engine.free
        engine.submit(_batch([1, 1]))
    assert not engine.free
    puppet.wait_until_held()
    engine.close()
    puppet.release()
    for _ in range(2):
        finished = news.get(timeout=10)
        assert isinstance(finished, Finished)
        _check(finished.result, [1, 1], {})
    assert engine.join(10)
    assert puppet.closed
    assert repr(engine) == "Engine(m:1, in_flight=2)"


@pytest.mark.parametrize("error", [ModelLoadError("no"), SystemExit(0), CancelledError()])
def test_a_model_that_does_not_load_is_news_too(error: BaseException) -> None:
    """The error arrives as one that a person can read, and the thread ends."""

    def load() -> PuppetModel:
        raise error

    news: SimpleQueue[News] = SimpleQueue()
    engine = Engine("m", "1", load, news, FakeClock())
    engine.start()
    loaded = news.get(timeout=10)
    assert isinstance(loaded, Loaded)
    assert isinstance(loaded.error, ModelLoadError)
    assert engine.join(10)
