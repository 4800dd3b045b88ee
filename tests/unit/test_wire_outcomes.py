"""Outcomes are read back as they were written, and what is none harms nobody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.datatypes import DATATYPES, fp32_to_bf16
from inferfleet.errors import Code
from inferfleet.records import BINARY_ANSWER, JSON_ANSWER, Answer, Array, Requests, Signature, TensorSpec
from inferfleet.wire.encode import AnswerWriter, error_body
from inferfleet.wire.outcomes import read_outcome
from inferfleet.wire.stored import mark
from tests.support.builders import chunk

KINDS = ["FP32", "FP64", "FP16", "BF16", "INT64", "UINT8", "BOOL", "BYTES"]


def array_of(kind: str, rows: int, values: list[int]) -> Array:
    numbers = np.array(values, np.int64).reshape(rows, -1)
    if kind == "BYTES":
        found = np.empty(numbers.shape, object)
        found[:] = [[b"\xff" * 2 if n == 7 else b"t%d" % n for n in row] for row in numbers.tolist()]
        return found
    if kind == "BF16":
        return fp32_to_bf16(numbers.astype(np.float32) / 4)
    return (numbers / 4 if DATATYPES[kind].is_float else numbers % 2).astype(DATATYPES[kind].numpy)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans(), st.data())
def test_what_is_written_is_read_back(kinds: list[str], binary: bool, data: st.DataObject) -> None:
    """Any datatypes, one row or several, as JSON or with binary tensors behind it; marked as in Redis."""
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    rows = sum(counts)
    specs = tuple(TensorSpec(f"o{i}", kind, (2,)) for i, kind in enumerate(kinds))
    number = st.lists(st.integers(0, 9), min_size=2 * rows, max_size=2 * rows)
    outputs = {spec.name: array_of(spec.datatype, rows, data.draw(number)) for spec in specs}
    part = Requests(
        chunk([b"{}"] * len(counts)),
        list(range(len(counts))),
        [f"id{i}" for i in range(len(counts))],
        {},
        None if set(counts) == {1} else counts,
        form=BINARY_ANSWER if binary else JSON_ANSWER,
    )
    writer = AnswerWriter("m", "1", Signature((), specs))
    lengths: list[bytes | None] = [None] * len(counts)
    if binary:
        bodies, found = writer.binary_bodies(Answer(part, outputs))
        lengths = list(found)
    else:
        bodies = [mark(body, "ab") for body in writer.json_bodies(Answer(part, outputs))]
    bounds = part.bounds()
    for index, (body, length) in enumerate(zip(bodies, lengths, strict=True)):
        read = read_outcome(body, None if length is None else int(length), {s.name: s for s in specs})
        assert read.code == ""
        assert set(read.outputs) == set(outputs)
        for name, array in read.outputs.items():
            assert array.dtype == outputs[name].dtype
            np.testing.assert_array_equal(array, outputs[name][bounds[index] : bounds[index + 1]])


def test_an_error_is_its_code() -> None:
    read = read_outcome(error_body("no", Code.MODEL, "a"), None, {})

    assert (read.outputs, read.code) == ({}, "E_MODEL")


SPECS = {"y": TensorSpec("y", "FP32", (2,)), "t": TensorSpec("t", "BYTES", ())}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"outputs":3}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,3],"data":[1,2]}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[1]}]}',
        b'{"outputs":[{"name":"y","datatype":"FP64","shape":[1,2],"data":[1,2]}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":["a",2]}]}',
        b'{"outputs":[{"name":"y","datatype":"WRONG","shape":[1,2],"data":[1,2]}]}',
        b'{"outputs":[{"name":"t","datatype":"BYTES","shape":[1],"data":[7]}]}',
        b'{"outputs":[{"name":"t","datatype":"BYTES","shape":[1],"data":["\\u00e9"],'
        b'"parameters":{"encoding":"base64"}}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":-8}}]}',
    ],
)
def test_what_cannot_be_read_is_left_out(body: bytes) -> None:
    assert read_outcome(body, None, SPECS).outputs == {}


@given(st.binary(max_size=60), st.none() | st.integers(0, 80))
def test_any_bytes_harm_nobody(body: bytes, length: Any) -> None:
    read_outcome(b'{"outputs":[{"name":"t","datatype":"BYTES","shape":[1],' + body, length, SPECS)
    read_outcome(body, length, SPECS)
