"""Answers: JSON that parses, numbers equal to the last bit, ids unharmed, binary parts of the right size."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inferfleet.datatypes import DATATYPES, bf16_to_fp32
from inferfleet.errors import RULES, Code
from inferfleet.records import Answer, AnswerForm, Array, Requests, Served, Signature, TensorSpec
from inferfleet.wire.encode import AnswerWriter, error_body, error_headers, ok_headers, served_header
from inferfleet.wire.headers import check_id
from tests.support.builders import chunk, requests
from tests.support.traces import TRACE

SERVED = served_header(Served("digits", "m", "2", "canary", "17"), "w-3")


def _writer(*specs: TensorSpec) -> AnswerWriter:
    return AnswerWriter("m", "2", Signature((), specs))


def _part(count: int, counts: list[int] | None = None, **columns: Any) -> Requests:
    return requests(chunk([b"{}"] * count), range(count), counts=counts, **columns)


def _valid_id(text: str) -> bool:
    try:
        return bool(check_id(text))
    except Exception:
        return False


_IDS = st.lists(
    st.text(st.sampled_from('",\\[]:a/é€\U0001f600'), min_size=1, max_size=6).filter(_valid_id),
    min_size=1,
    max_size=6,
)


@given(_IDS, st.booleans())
def test_any_legal_id_survives_to_body_and_header(ids: list[str], binary: bool) -> None:
    """Quotes, commas and backslashes look like borders between ids, and are none."""
    part = _part(len(ids))
    part.ids[:] = ids
    answer = Answer(part, {"y": np.arange(len(ids) * 2, dtype=np.float32).reshape(-1, 2)})
    writer = _writer(TensorSpec("y", "FP32", (2,)))
    bodies, lengths = writer.binary_bodies(answer) if binary else (writer.json_bodies(answer), None)
    parsed = [
        json.loads(body if lengths is None else body[: int(lengths[i])]) for i, body in enumerate(bodies)
    ]
    assert [each["id"] for each in parsed] == ids
    assert [dict(made)["inferfleet-id"] for made in ok_headers(part, SERVED, lengths)] == [
        i.encode() for i in ids
    ]
    assert json.loads(error_body("no", Code.SHAPE, ids[0]))["id"] == ids[0]


def test_ids_that_mimic_a_border_are_not_cut() -> None:
    """An id that ends in a quote and a comma once moved its neighbour's border."""
    part = _part(2)
    part.ids[:] = ['",', "b"]
    bodies = _writer(TensorSpec("y", "INT64", (1,))).json_bodies(Answer(part, {"y": np.array([[1], [2]])}))
    assert [json.loads(body)["id"] for body in bodies] == ['",', "b"]


NUMERIC = [name for name in DATATYPES if name != "BYTES"]


def _arrays(datatype: str, rows: int, row_shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    kind = DATATYPES[datatype].numpy
    elements = (
        npst.from_dtype(kind, allow_nan=False, allow_infinity=False)
        if datatype != "BF16"
        else st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
    )
    return npst.arrays(kind, (rows, *row_shape), elements=elements)


def _from_json(output: dict[str, Any]) -> Array:
    return np.array(output["data"], DATATYPES[output["datatype"]].numpy).reshape(output["shape"])


@pytest.mark.parametrize("datatype", NUMERIC)
@given(
    data=st.data(),
    row_shape=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_json_and_binary_answers_equal_the_outputs(
    datatype: str, data: st.DataObject, row_shape: tuple[int, ...], counts: list[int]
) -> None:
    """For any shape, single and several rows; FP16 and BF16 are widened in JSON and themselves in binary."""
    array = data.draw(_arrays(datatype, sum(counts), row_shape))
    part = _part(len(counts), None if max(counts) == 1 else counts)
    writer = _writer(TensorSpec("y", datatype, row_shape))
    answer = Answer(part, {"y": array})
    wide = bf16_to_fp32(array) if datatype == "BF16" else array
    shown = "FP32" if datatype in ("FP16", "BF16") else datatype
    bounds = part.bounds()
    blobs, lengths = writer.binary_bodies(answer)
    for index, body in enumerate(writer.json_bodies(answer)):
        rows = slice(bounds[index], bounds[index + 1])
        document = json.loads(body)
        assert list(document) == ["model_name", "model_version", "id", "outputs"]
        assert (document["model_name"], document["model_version"]) == ("m", "2")
        (output,) = document["outputs"]
        assert (output["name"], output["datatype"]) == ("y", shown)
        assert output["shape"] == [counts[index], *row_shape]
        expected = wide[rows].astype(np.float32) if shown == "FP32" else wide[rows]
        assert _from_json(output).tobytes() == expected.tobytes()

        head, blob = blobs[index][: int(lengths[index])], blobs[index][int(lengths[index]) :]
        (output,) = json.loads(head)["outputs"]
        assert output["datatype"] == datatype
        assert output["shape"] == [counts[index], *row_shape]
        assert output["parameters"] == {"binary_data_size": len(blob)}
        assert blob == array[rows].tobytes()


@given(elements=st.lists(st.binary(max_size=6) | st.text(max_size=4).map(str.encode), min_size=1, max_size=5))
def test_bytes_are_text_where_they_are_utf8_and_base64_where_not(elements: list[bytes]) -> None:
    """Each tensor says by its own parameter which it is; binary carries length prefixes."""
    array = np.empty((len(elements), 1), object)
    array[:, 0] = elements
    answer = Answer(_part(len(elements)), {"t": array})
    writer = _writer(TensorSpec("t", "BYTES", (1,)))
    blobs, lengths = writer.binary_bodies(answer)
    for index, body in enumerate(writer.json_bodies(answer)):
        (output,) = json.loads(body)["outputs"]
        (text,) = output["data"]
        encoded = output.get("parameters") == {"encoding": "base64"}
        assert (base64.b64decode(text) if encoded else text.encode()) == elements[index]
        assert not (encoded and _is_utf8(elements[index]))
        blob = blobs[index][int(lengths[index]) :]
        assert blob == len(elements[index]).to_bytes(4, "little") + elements[index]


def _is_utf8(element: bytes) -> bool:
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


_BOTH = (TensorSpec("p", "FP32", (2,)), TensorSpec("t", "BYTES", ()))


def _both() -> dict[str, Array]:
    return {
        "p": np.array([[0.5, 1], [2, 3], [4, 5]], np.float32),
        "t": np.array([b"a", b"\xff", b"c"], object),
    }


@pytest.mark.parametrize("counts", [None, [2, 1]])
@pytest.mark.parametrize("chosen", [None, ("t",), ("t", "p"), ("p",)])
@pytest.mark.parametrize("binary_names", [None, frozenset(), frozenset({"p"}), frozenset({"t"})])
def test_requested_outputs_come_in_the_callers_order_and_form(
    counts: list[int] | None, chosen: tuple[str, ...] | None, binary_names: frozenset[str] | None
) -> None:
    """Binary tensors lie behind the JSON in the order listed; the others stay in it."""
    form = AnswerForm(True, chosen, binary_names)
    answer = Answer(_part(3 if counts is None else 2, counts, form=form), _both())
    bodies, lengths = _writer(*_BOTH).binary_bodies(answer)
    texts = _writer(*_BOTH).json_bodies(answer)
    for body, length, text in zip(bodies, lengths, texts, strict=True):
        outputs = json.loads(body[: int(length)])["outputs"]
        plain = json.loads(text)["outputs"]
        assert [each["name"] for each in outputs] == list(chosen or ("p", "t"))
        at = int(length)
        for output, json_output in zip(outputs, plain, strict=True):
            if binary_names is not None and output["name"] not in binary_names:
                assert output == json_output
                continue
            size = output["parameters"]["binary_data_size"]
            if output["name"] == "p":
                assert np.frombuffer(body[at : at + size], "<f4").tolist() == json_output["data"]
            at += size
        assert at == len(body)


def test_nan_that_a_route_allows_is_null_in_json() -> None:
    """JSON has no NaN; binary answers carry it."""
    answer = Answer(_part(1), {"y": np.array([[np.nan, 1]], np.float32)})
    writer = _writer(TensorSpec("y", "FP32", (2,)))
    assert json.loads(writer.json_bodies(answer)[0])["outputs"][0]["data"] == [None, 1.0]
    assert np.isnan(writer.floats("y", answer.outputs["y"])).any()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("datatype", "array", "found"),
    [("BF16", [0x7FC0, 0x3F80], [True, False]), ("FP16", [0, 1], [False, False]), ("UINT16", [0x7FC0], None)],
)
def test_which_outputs_may_hold_nan(datatype: str, array: list[int], found: list[bool] | None) -> None:
    """BF16 is carried as integers and is a float all the same."""
    values = _writer(TensorSpec("y", datatype, ())).floats("y", np.array(array, DATATYPES[datatype].numpy))
    assert (None if values is None else np.isnan(values).tolist()) == found


@pytest.mark.parametrize("code", list(Code))
def test_an_error_body_has_four_members(code: Code) -> None:
    """Text, code, id, and whether trying again can help; the text starts the body and is always UTF-8."""
    body = error_body('no "x" \ud800', code, "i")
    assert body.startswith(b'{"error"')
    assert json.loads(body) == {
        "error": 'no "x" ?',
        "code": code.value,
        "id": "i",
        "retryable": RULES[code].retryable,
    }


def test_headers_are_few_and_in_text() -> None:
    """Three on a plain answer; more only where something is to be said."""
    part = _part(2, traces=[None, TRACE])
    assert SERVED == (
        "inferfleet-served",
        b"route=digits;model=m;version=2;variant=canary;revision=17;worker=w-3",
    )
    plain, traced = ok_headers(part, SERVED)
    assert plain == [("inferfleet-id", b"id-100"), ("inferfleet-status", b"ok"), SERVED]
    assert traced[3:] == [("traceparent", TRACE)]
    assert ok_headers(part, SERVED, [b"10", b"11"])[1][3:] == [
        ("content-type", b"application/octet-stream"),
        ("inference-header-content-length", b"11"),
        ("traceparent", TRACE),
    ]
    assert error_headers("i", Code.SHAPE, SERVED, TRACE) == [
        ("inferfleet-id", b"i"),
        ("inferfleet-status", b"error"),
        ("inferfleet-code", b"E_SHAPE"),
        SERVED,
        ("traceparent", TRACE),
    ]
    assert len(error_headers("i", Code.SHAPE, SERVED, None)) == 4
