"""Decoding as a whole: any bytes have one outcome, neighbours do not matter, and both paths agree."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.datatypes import DATATYPES
from inferfleet.records import BINARY_ANSWER, JSON_ANSWER, AnswerForm, Headers, TensorSpec
from inferfleet.wire.decode import Decoded, Decoder
from inferfleet.wire.request import RequestReader
from tests.support.builders import (
    as_wire,
    binary,
    binary_headers,
    by_row,
    chunk,
    codes,
    decoder,
    signature,
    tensor_of,
    v2,
)

OUTPUTS = (TensorSpec("y", "FP32", (2,)), TensorSpec("label", "BYTES", (1,)))
DECODERS: dict[str, Decoder] = {
    "FP32": decoder(signature(TensorSpec("x", "FP32", (4,)), outputs=OUTPUTS)),
    "INT8": decoder(signature(TensorSpec("x", "INT8", (4,)), outputs=OUTPUTS)),
    "BOOL": decoder(signature(TensorSpec("x", "BOOL", (2, 2)), outputs=OUTPUTS)),
    "BYTES": decoder(signature(TensorSpec("x", "BYTES", (1,)), outputs=OUTPUTS)),
    "varying": decoder(signature(TensorSpec("x", "FP32", (-1, 2)), outputs=OUTPUTS)),
    "two": decoder(signature(TensorSpec("x", "FP32", (4,)), TensorSpec("z", "BYTES", (1,)), outputs=OUTPUTS)),
    "columns": decoder(signature(TensorSpec("x", "FP32", (-1,))), columns=True),
    "deadline": decoder(signature(TensorSpec("x", "FP64", ())), deadline_ms=1_000, max_bytes=200),
}
GENERAL: Headers = [("mlserver-model", b"m")]
"""A record with this header is read by the general reader; the model is the right one."""

# Ingredients for bodies that are nearly right

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
_NESTED = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=5), max_leaves=12)
_SHAPES = st.lists(st.integers(-1, 6), max_size=4) | st.just([1, 4]) | st.just([2, 4]) | st.just([1, 2, 2])
_TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "z", "y", ""]),
        "shape": _SHAPES | _SCALARS,
        "datatype": st.sampled_from([*DATATYPES, "object"]) | _SCALARS,
        "data": _NESTED | st.lists(st.integers(-3, 3), min_size=4, max_size=8),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "encoding", "a"]), _SCALARS | st.just("base64"), max_size=2
        ),
    },
)
_OUTPUTS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["y", "label", "no"])},
        optional={"parameters": st.dictionaries(st.just("binary_data"), _SCALARS, max_size=1)},
    ),
    max_size=3,
)
_DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8) | _SCALARS,
        "inputs": st.lists(_TENSORS, max_size=3) | _SCALARS,
        "outputs": _OUTPUTS | _SCALARS,
        "parameters": st.dictionaries(st.just("binary_data_output"), _SCALARS, max_size=1),
        "x": _NESTED,
        "model_name": st.sampled_from(["m", "other"]),
    },
)
_GOOD = st.sampled_from(
    [
        v2([1, 2, 3, 4], [1, 4], request_id="a"),
        v2([[1, 2, 3, 4], [5, 6, 7, 8]], [2, 4], request_id="b"),
        v2([1, 0, 1, 1], [1, 4], "INT8"),
        v2([True, False, True, True], [1, 2, 2], "BOOL"),
        v2(["a"], [1, 1], "BYTES"),
        v2([1, 2], [1, 1, 2]),
        b'{"x":[1,2,3]}',
        b'{"x":[1,2,3],"id":"c"}',
        as_wire("FP32", [1, 2, 3, 4]),
        binary([("x", "FP32", [1, 4], as_wire("FP32", [1, 2, 3, 4]))])[0],
    ]
)
_JSON = _DOCUMENTS.map(lambda document: json.dumps(document).encode())


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A body with one stretch replaced."""
    body = draw(_GOOD | _JSON)
    low = draw(st.integers(0, len(body)))
    high = draw(st.integers(low, min(len(body), low + 6)))
    return (
        body[:low]
        + draw(st.binary(max_size=4) | st.sampled_from([b"[", b"1e999", b"\\ud800", b"9" * 50]))
        + body[high:]
    )


_BODIES = st.none() | st.binary(max_size=60) | _GOOD | _JSON | _mutated()
_NAMES = st.sampled_from(
    [
        "inferfleet-id",
        "Inferfleet-ID",
        "ce_id",
        "content-type",
        "inference-header-content-length",
        "inferfleet-deadline-ms",
        "inferfleet-priority",
        "inferfleet-reply",
        "inferfleet-protocol",
        "ce_specversion",
        "content-encoding",
        "traceparent",
        "mlserver-model",
        "mlserver-version",
        "inferfleet-unreadable",
    ]
) | st.text(max_size=5)
_VALUES = (
    st.none()
    | st.binary(max_size=12)
    | st.sampled_from(
        [
            b"0",
            b"1",
            b"5",
            b"9",
            b"-1",
            b"99999999999999999999999",
            b"m",
            b"2",
            b"v2",
            b"1.0",
            b"gzip",
            b"application/json; charset=utf-8",
            b"application/octet-stream",
            b"100",
            b"\xd9\xa3",
        ]
    )
)
_HEADERS = st.none() | st.lists(st.tuples(_NAMES, _VALUES), max_size=5)
_RECORDS = st.lists(st.tuples(_BODIES, _HEADERS), min_size=1, max_size=8)


def _outcomes(decoded: Decoded, rows: int) -> list[Any]:
    """Return each row's whole outcome as a value, after checking that it has exactly one."""
    out: dict[int, Any] = {}
    if decoded.rejected is not None:
        failures = decoded.rejected
        assert failures.rows == sorted(failures.rows)
        assert len({len(column) for column in failures[1:7] if column is not None}) == 1
        for index, row in enumerate(failures.rows):
            out[row] = tuple(column[index] for column in failures[2:7])
    for part in decoded.requests:
        assert part.rows == sorted(part.rows)
        for array in part.tensors.values():
            assert len(array) == part.total_rows
        for index, row in enumerate(part.rows):
            assert row not in out
            out[row] = (
                part.ids[index],
                {name: (a.dtype, tensor_of(part, index, name).tolist()) for name, a in part.tensors.items()},
                part.deadlines_ms[index] if part.deadlines_ms else None,
                part.priority,
                part.replies[index] if part.replies else None,
                part.traces[index] if part.traces else None,
                part.form,
            )
    assert sorted(out) == list(range(rows))
    return [out[row] for row in range(rows)]


@pytest.mark.parametrize("name", DECODERS)
@given(records=_RECORDS)
def test_any_record_has_one_outcome_and_the_same_one_as_alone(
    name: str, records: list[tuple[bytes | None, Headers]]
) -> None:
    """No exception escapes for any bytes and headers, and no row changes what becomes of another."""
    reader = DECODERS[name]
    made = chunk([body for body, _ in records], [headers for _, headers in records])
    together = _outcomes(reader.decode(made), len(records))
    for row, (body, headers) in enumerate(records):
        (alone,) = _outcomes(reader.decode(chunk([body], [headers], first=100 + row)), 1)
        assert repr(alone) == repr(together[row])


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "columns"])
@given(body=_GOOD | _JSON | _mutated())
def test_both_readers_agree_on_any_json_body(name: str, body: bytes) -> None:
    """What the fast path accepts the general reader accepts alike, and what it refuses has one reason."""
    fast, general = _outcomes(DECODERS[name].decode(chunk([body, body], [None, GENERAL])), 2)
    if isinstance(fast[0], str) and fast[0].startswith("digits.requests"):
        fast, general = fast[1:], general[1:]  # the default id names the row
    assert repr(fast) == repr(general)


# What valid requests become

NUMERIC = [name for name in DATATYPES if name not in ("BYTES", "FP16", "BF16")]


def _elements(datatype: str) -> st.SearchStrategy[Any]:
    found = DATATYPES[datatype]
    if datatype == "BOOL":
        return st.booleans()
    if found.is_int:
        return st.integers(int(found.low or 0), int(found.high or 0))
    return st.floats(allow_nan=False, allow_infinity=False, width=32 if datatype == "FP32" else 64)


@pytest.mark.parametrize("datatype", NUMERIC)
@given(data=st.data(), row_shape=st.lists(st.integers(1, 3), max_size=3), rows=st.integers(1, 3))
def test_every_form_of_a_numeric_request_gives_the_same_tensor(
    datatype: str, data: st.DataObject, row_shape: list[int], rows: int
) -> None:
    """Flat or nested, fast or general, JSON, JSON + binary, or raw: equal to the last bit."""
    shape = [rows, *row_shape]
    count = int(np.prod(shape))
    values = data.draw(st.lists(_elements(datatype), min_size=count, max_size=count))
    expected = np.array(values, DATATYPES[datatype].numpy).reshape(shape)
    nested = np.array(values, dtype=object).reshape(shape).tolist()
    body, headers = binary([("x", datatype, shape, expected.tobytes())])
    flat = v2(values, shape, datatype)
    bodies: list[bytes | None] = [flat, flat, v2(nested, shape, datatype), body]
    all_headers = [None, GENERAL, None, headers]
    if rows == 1:
        bodies += [expected.tobytes(), expected.tobytes()]
        all_headers += [binary_headers(0), [*(binary_headers(0) or ()), *(GENERAL or ())]]
    decoded = decoder(signature(TensorSpec("x", datatype, tuple(row_shape)))).decode(
        chunk(bodies, all_headers)
    )
    assert codes(decoded) == {}
    for row, (part, index) in by_row(decoded).items():
        found = tensor_of(part, index)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert part.form == (JSON_ANSWER if row < 3 else BINARY_ANSWER)


@given(elements=st.lists(st.binary(max_size=8), min_size=1, max_size=4))
def test_bytes_travel_as_base64_and_binary_and_raw(elements: list[bytes]) -> None:
    """Any bytes, zeros at the end included; text travels plain."""
    import base64

    shape = [len(elements), 1]
    wire = b"".join(len(each).to_bytes(4, "little") + each for each in elements)
    encoded = v2([base64.b64encode(each).decode() for each in elements], shape, "BYTES").replace(
        b'"data"', b'"parameters": {"encoding": "base64"}, "data"'
    )
    body, headers = binary([("x", "BYTES", shape, wire)])
    plain = v2([each.hex() for each in elements], shape, "BYTES")
    made = chunk([encoded, body, plain, elements[0] or b"-"], [None, headers, None, binary_headers(0)])
    found = by_row(DECODERS["BYTES"].decode(made))
    assert [tensor_of(*found[row]).tolist() for row in range(4)] == [
        [[each] for each in elements],
        [[each] for each in elements],
        [[each.hex().encode()] for each in elements],
        [[elements[0] or b"-"]],
    ]
    assert all(part.costs is not None for part, _ in found.values()), "texts are sorted by length"


@pytest.mark.parametrize("wire", [b"\5\0\0\0abc", b"\1\0\0", b"\1\0\0\0a" * 2, b"", b"\xff\xff\xff\xffa"])
def test_length_prefixes_that_do_not_fill_the_tensor_are_e_shape(wire: bytes) -> None:
    """Over-long, cut, too many, none: nothing is read past the end."""
    body, headers = binary([("x", "BYTES", [1, 1], wire)])
    assert codes(DECODERS["BYTES"].decode(chunk([body], [headers]))) == {0: "E_SHAPE"}


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_travel_binary_and_raw(datatype: str) -> None:
    """BF16 is carried as its bits."""
    wire = as_wire("FP16", [0.5, -2]) if datatype == "FP16" else as_wire("UINT16", [0x3F00, 0xC000])
    body, headers = binary([("x", datatype, [1, 2], wire)])
    found = by_row(
        decoder(signature(TensorSpec("x", datatype, (2,)))).decode(
            chunk([body, wire], [headers, binary_headers(0)])
        )
    )
    for part, index in found.values():
        assert tensor_of(part, index).tobytes() == wire


def test_a_mixed_body_carries_json_and_binary_tensors() -> None:
    """The binary ones lie behind the JSON part in the order in which they are listed."""
    wire = as_wire("FP32", [1, 2, 3, 4])
    text = json.dumps(
        {
            "inputs": [
                {"name": "z", "shape": [1, 1], "datatype": "BYTES", "data": ["t"]},
                {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
            ]
        }
    ).encode()
    (part,) = DECODERS["two"].decode(chunk([text + wire], [binary_headers(len(text))])).requests
    assert list(part.tensors) == ["x", "z"]
    assert part.tensors["x"].tolist() == [[1, 2, 3, 4]]
    assert part.tensors["z"].tolist() == [[b"t"]]


def test_a_raw_row_takes_its_one_varying_dimension_from_its_size() -> None:
    """Two rows of different length stand in columns of their own."""
    made = chunk(
        [as_wire("FP32", range(4)), as_wire("FP32", range(6)), as_wire("FP32", range(3))],
        [binary_headers(0)] * 3,
    )
    decoded = DECODERS["varying"].decode(made)
    assert codes(decoded) == {2: "E_SHAPE"}
    assert [part.tensors["x"].shape for part in decoded.requests] == [(1, 2, 2), (1, 3, 2)]


@pytest.mark.parametrize(
    ("members", "is_binary", "form"),
    [
        ({}, False, JSON_ANSWER),
        ({}, True, BINARY_ANSWER),
        ({"outputs": []}, False, JSON_ANSWER),
        ({"outputs": [{"name": "label"}]}, False, AnswerForm(False, ("label",))),
        ({"outputs": [{"name": "label"}, {"name": "y"}]}, True, AnswerForm(True, ("label", "y"))),
        ({"parameters": {"binary_data_output": True}}, False, BINARY_ANSWER),
        ({"parameters": {"binary_data_output": False}}, True, JSON_ANSWER),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": True}}, {"name": "label"}]},
            False,
            AnswerForm(True, ("y", "label"), frozenset({"y"})),
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": False}}, {"name": "label"}]},
            True,
            AnswerForm(True, ("y", "label"), frozenset({"label"})),
        ),
    ],
)
def test_the_caller_chooses_outputs_and_their_form(
    members: dict[str, Any], is_binary: bool, form: AnswerForm
) -> None:
    """The default follows the request's form; a request's parameter and then each output's overrule it."""
    wire = as_wire("FP32", [1, 2, 3, 4])
    if is_binary:
        body, headers = binary([("x", "FP32", [1, 4], wire)], **members)
    else:
        body, headers = v2([1, 2, 3, 4], [1, 4], **members), None
    (part,) = DECODERS["FP32"].decode(chunk([body], [headers])).requests
    assert part.form == form


@pytest.mark.parametrize(
    ("document", "outcome"),
    [
        ({"x": [1, 2]}, [[1, 2]]),
        ({"x": 1}, [[1]]),
        ({"x": []}, "E_SHAPE"),
        ({"x": [[1, 2]]}, "E_SHAPE"),
        ({"x": ["a"]}, "E_DTYPE"),
        ({"x": None}, "E_DTYPE"),
        ({"x": {"a": 1}}, "E_DTYPE"),
        ({"y": [1]}, "E_SCHEMA"),
        ({"x": [1], "y": [1]}, "E_SCHEMA"),
        ({}, "E_SCHEMA"),
        ([1], "E_SCHEMA"),
        ({"x": [1], "id": "mine"}, [[1]]),
        ({"x": [1], "id": 7}, "E_ID"),
        ({"x": [1], "id": "a b"}, "E_ID"),
    ],
)
def test_columns_are_plain_json_named_as_in_the_signature(document: Any, outcome: Any) -> None:
    """One row; a varying dimension takes what is there; ``id`` is the id where no input is called so."""
    decoded = DECODERS["columns"].decode(chunk([json.dumps(document).encode()]))
    if isinstance(outcome, str):
        assert codes(decoded) == {0: outcome}
    else:
        (part,) = decoded.requests
        assert part.tensors["x"].tolist() == outcome
        assert part.ids == ["mine" if "id" in document else "digits.requests-3-100"]


@pytest.mark.parametrize(
    ("text", "code"), [("1e999", "E_NONFINITE"), ("9" * 10_000, "E_NONFINITE"), ('"\\ud800"', "E_DECODE")]
)
def test_columns_with_numbers_out_of_range_have_the_codes_of_v2(text: str, code: str) -> None:
    """A varying dimension is looked for first, and must not hide what is wrong."""
    assert codes(DECODERS["columns"].decode(chunk([b'{"x":[%b]}' % text.encode()]))) == {0: code}


@pytest.mark.parametrize("headers", [None, GENERAL], ids=["fast", "general"])
def test_columns_on_a_v2_route_are_told_what_takes_them(headers: Headers) -> None:
    """The hint stands where a key is an input of the model, and nowhere else; ids are found all the same."""
    bodies: list[bytes | None] = [
        b'{"x":[1,2,3,4],"id":"c"}',
        b'{"y":[1,2,3,4]}',
        b'{"x":[1,2,3,4]}]',
        b'[{"x":1}]',
        b'{"inputs":[{"x":1}]}',
    ]
    rejected = DECODERS["FP32"].decode(chunk(bodies, [headers] * len(bodies))).rejected
    assert rejected is not None
    assert rejected.texts[0] == (
        "Object missing required field `inputs`; plain columns need a route with "
        'input = "columns", this one reads V2'
    )
    assert rejected.codes[:2] == ["E_SCHEMA", "E_SCHEMA"]
    assert rejected.ids[0] == "c"
    assert not any("columns" in text for text in rejected.texts[1:])


def test_columns_of_a_model_with_an_input_called_id() -> None:
    """There the member is data, and so it is in the error of a refused row."""
    sig = signature(TensorSpec("id", "BYTES", (1,)), TensorSpec("n", "INT64", (2, 2)))
    bodies: list[bytes | None] = [b'{"id":"a b","n":[[1,2],[3,4]]}', b'{"id":"a","n":[[1,2]]}']
    decoded = decoder(sig, columns=True).decode(chunk(bodies))
    (part,) = decoded.requests
    assert part.ids == ["digits.requests-3-100"]
    assert part.tensors["id"].tolist() == [[b"a b"]]
    assert decoded.rejected is not None
    assert decoded.rejected.ids == [None]


def test_a_fault_of_our_own_is_kept_to_the_record_that_brings_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that breaks on one body gives that one E_INTERNAL; its neighbours are read as ever."""
    whole = RequestReader.json

    def breaks(self: RequestReader, body: bytes) -> Any:
        if b'"id":"bad"' in body:
            raise ZeroDivisionError
        return whole(self, body)

    monkeypatch.setattr(RequestReader, "json", breaks)
    sig = signature(TensorSpec("x", "FP32", (-1,)))
    bodies = [
        b'{"id":"%b","inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1]}]}' % name
        for name in (b"a", b"bad", b"c")
    ]
    decoded = decoder(sig).decode(chunk(bodies))

    assert codes(decoded) == {1: "E_INTERNAL"}
    assert [(part.rows, part.ids) for part in decoded.requests] == [([0], ["a"]), ([2], ["c"])]
