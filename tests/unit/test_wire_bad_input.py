"""Bad input, row by row: each case has its code, and never changes what becomes of its neighbours."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest

from inferfleet.records import Headers, Stream, TensorSpec
from inferfleet.wire.decode import Decoder
from tests.support.builders import (
    NOW_MS,
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

FLOATS = signature(TensorSpec("x", "FP32", (4,)))
INTS = signature(TensorSpec("x", "INT32", (4,)))
TEXTS = signature(TensorSpec("x", "BYTES", (1,)))
VARYING = signature(TensorSpec("x", "FP32", (-1, -1)))
PAIR = signature(TensorSpec("x", "FP32", (4,)), TensorSpec("z", "INT64", (1,)))

GOOD = v2([1, 2, 3, 4], [1, 4], request_id="good")
GOOD_INT = v2([1, 2, 3, 4], [1, 4], "INT32", request_id="good")


def _with(number: str, datatype: str = "FP32", *, nested: bool = False) -> bytes:
    """Return a body whose first element is this text."""
    data = f"[{number},2,3,4]"
    return v2("DATA", [1, 4], datatype).replace(b'"DATA"', (f"[{data}]" if nested else data).encode())


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(4, np.float32))
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.zeros(4, np.float32))
    return file.getvalue()


def _deep(depth: int) -> bytes:
    return v2("DATA", [1, 4]).replace(b'"DATA"', b"[" * depth + b"1" + b"]" * depth)


JSON_CASES: list[tuple[str, bytes, str]] = [
    ("B1 not JSON", b"hello", "E_DECODE"),
    ("B1 cut JSON", GOOD[:-7], "E_DECODE"),
    ("B1 two documents", GOOD + GOOD, "E_DECODE"),
    ("B1 byte order mark", b"\xef\xbb\xbf" + GOOD, "E_DECODE"),
    ("B1 UTF-16 with mark", GOOD.decode().encode("utf-16"), "E_DECODE"),
    ("B1 UTF-16 without mark", GOOD.decode().encode("utf-16-le"), "E_DECODE"),
    ("B1 a list", b"[1,2,3,4]", "E_SCHEMA"),
    ("B1 null", b"null", "E_SCHEMA"),
    ("B2 33 levels", _deep(31), "E_DECODE"),
    ("B2 100,000 levels", b"[" * 100_000, "E_DECODE"),
    ("B2 100,000 levels inside", _deep(30_000), "E_DECODE"),
    ("B2 levels beside an endless text", b"[" * 40 + b'"' + b'\\"' * 40_000, "E_DECODE"),
    ("B2 brackets inside a text are no levels", v2("[" * 500, [1, 4]), "E_DTYPE"),
    ("B3 NaN", _with("NaN"), "E_DECODE"),
    ("B3 Infinity", _with("-Infinity"), "E_DECODE"),
    ("B3 1e999", _with("1e999"), "E_NONFINITE"),
    ("B3 1e999 nested", _with("1e999", nested=True), "E_NONFINITE"),
    ("B3 over FP32", _with("1e39"), "E_NONFINITE"),
    ("B3 over FP32 nested", _with("-1e39", nested=True), "E_NONFINITE"),
    ("B4 10,000 digits for FP32", _with("9" * 10_000), "E_NONFINITE"),
    ("B4 10,000 digits for FP32 nested", _with("9" * 10_000, nested=True), "E_NONFINITE"),
    ("B6 bad UTF-8 in a name", GOOD.replace(b'"x"', b'"\xff"'), "E_DECODE"),
    ("B6 bad UTF-8 in an unknown member", GOOD[:-1] + b',"note":"\xc3("}', "E_DECODE"),
    ("B6 lone surrogate in the id", GOOD.replace(b'"good"', b'"\\ud800"'), "E_DECODE"),
    ("B7 empty id", v2([1, 2, 3, 4], [1, 4], request_id=""), "E_ID"),
    ("B7 1 MB id", v2([1, 2, 3, 4], [1, 4], request_id="i" * 90_000), "E_ID"),
    ("B7 129 bytes", v2([1, 2, 3, 4], [1, 4], request_id="i" * 129), "E_ID"),
    ("B7 129 bytes in 43 characters", v2([1, 2, 3, 4], [1, 4], request_id="€" * 43), "E_ID"),
    ("B7 newline", v2([1, 2, 3, 4], [1, 4], request_id="a\nb"), "E_ID"),
    ("B7 NUL", v2([1, 2, 3, 4], [1, 4], request_id="a\0b"), "E_ID"),
    ("B7 DEL", v2([1, 2, 3, 4], [1, 4], request_id="a\x7f"), "E_ID"),
    ("B7 C1 control", v2([1, 2, 3, 4], [1, 4], request_id="a\x85b"), "E_ID"),
    ("B7 line separator", v2([1, 2, 3, 4], [1, 4], request_id="a\u2028b"), "E_ID"),
    ("B7 braces", v2([1, 2, 3, 4], [1, 4], request_id="{a}"), "E_ID"),
    ("B7 space", v2([1, 2, 3, 4], [1, 4], request_id="a b"), "E_ID"),
    ("B7 a number", GOOD.replace(b'"good"', b"7"), "E_ID"),
    ("B9 unknown model", v2([1, 2, 3, 4], [1, 4], model_name="other"), "E_MODEL_UNKNOWN"),
    ("B9 unknown version", v2([1, 2, 3, 4], [1, 4], model_version="9"), "E_MODEL_UNKNOWN"),
    ("B9 a path as model", v2([1, 2, 3, 4], [1, 4], model_name="../m"), "E_MODEL_UNKNOWN"),
    ("B9 a URI as model", v2([1, 2, 3, 4], [1, 4], model_name="s3://m"), "E_MODEL_UNKNOWN"),
    ("B12 unknown datatype", v2([1, 2, 3, 4], [1, 4], "FLOAT"), "E_DTYPE"),
    ("B12 object", v2([1, 2, 3, 4], [1, 4], "object"), "E_DTYPE"),
    ("B12 complex", v2([1, 2, 3, 4], [1, 4], "complex64"), "E_DTYPE"),
    ("B12 another datatype", v2([1, 2, 3, 4], [1, 4], "FP64"), "E_DTYPE"),
    ("B12 texts for numbers", v2(["1", "2", "3", "4"], [1, 4]), "E_DTYPE"),
    ("B12 truth values for numbers", v2([True, 2, 3, 4], [1, 4]), "E_DTYPE"),
    ("B12 null for a number", v2([None, 2, 3, 4], [1, 4]), "E_DTYPE"),
    ("B12 an object for data", v2({"0": 1}, [1, 4]), "E_DTYPE"),
    ("B12 datatype is a number", GOOD.replace(b'"FP32"', b"32"), "E_DTYPE"),
    ("B13 negative", v2([1, 2, 3, 4], [-1, 4]), "E_SHAPE"),
    ("B13 negative twice", v2([1, 2, 3, 4], [-1, -4]), "E_SHAPE"),
    ("B13 zero rows", v2([], [0, 4]), "E_SHAPE"),
    ("B13 2^31 rows", v2([1, 2, 3, 4], [2**31, 4]), "E_SHAPE"),
    ("B13 2^62", v2([1, 2, 3, 4], [1, 2**62]), "E_SHAPE"),
    ("B13 4,000 digits", v2([1, 2, 3, 4], [1, 4]).replace(b"[1, 4]", b"[1, %b]" % (b"9" * 4000)), "E_SHAPE"),
    ("B13 65 dimensions", v2([1, 2, 3, 4], [1] * 64 + [4]), "E_SHAPE"),
    ("B13 no dimension", v2([1, 2, 3, 4], []), "E_SHAPE"),
    ("B13 a fraction", v2([1, 2, 3, 4], [1, 4.5]), "E_SHAPE"),  # type: ignore[list-item]
    ("B13 a text", GOOD.replace(b"[1, 4]", b'"1,4"'), "E_SHAPE"),
    ("B14 too short", v2([1, 2, 3], [1, 4]), "E_SHAPE"),
    ("B14 too long", v2([1, 2, 3, 4, 5], [1, 4]), "E_SHAPE"),
    ("B14 ragged", v2([[1, 2, 3], [4]], [2, 4]), "E_SHAPE"),
    ("B14 lists and elements", v2([1, [2, 3, 4]], [1, 4]), "E_SHAPE"),
    ("B14 elements first, then lists deep", v2([[1, [2]], [3, [4]]], [1, 4]), "E_SHAPE"),
    ("B15 another width", v2([1, 2, 3], [1, 3]), "E_SHAPE"),
    ("B16 no inputs member", b'{"id":"good"}', "E_SCHEMA"),
    ("B16 no input", b'{"inputs":[]}', "E_SCHEMA"),
    ("B16 unknown input", v2([1, 2, 3, 4], [1, 4], name="y"), "E_SCHEMA"),
    ("B16 no data", b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32"}]}', "E_SCHEMA"),
    ("B16 no shape", b'{"inputs":[{"name":"x","datatype":"FP32","data":[1,2,3,4]}]}', "E_SCHEMA"),
    ("B16 unknown output", v2([1, 2, 3, 4], [1, 4], outputs=[{"name": "nope"}]), "E_SCHEMA"),
    ("B16 an output twice", v2([1, 2, 3, 4], [1, 4], outputs=[{"name": "y"}, {"name": "y"}]), "E_SCHEMA"),
    ("B16 nested parameters", v2([1, 2, 3, 4], [1, 4], parameters={"a": {"b": 1}}), "E_SCHEMA"),
    ("B18 .npy", _npy(), "E_CONTENT_TYPE"),
    ("B18 .npz", _npz(), "E_CONTENT_TYPE"),
    ("B18 pickle", pickle.dumps({"x": [1, 2, 3, 4]}), "E_CONTENT_TYPE"),
    ("B18 gzip", gzip.compress(GOOD), "E_CONTENT_TYPE"),
    ("B19 empty data", v2([], [1, 4]), "E_SHAPE"),
    ("B19 many rows", v2([0] * 65 * 4, [65, 4]), "E_TOO_LARGE"),
    ("B19 many tiny inputs", json.dumps({"inputs": json.loads(GOOD)["inputs"] * 65}).encode(), "E_TOO_LARGE"),
    ("B19 an input twice", json.dumps({"inputs": json.loads(GOOD)["inputs"] * 2}).encode(), "E_SCHEMA"),
    ("B21 over the limit", GOOD + b" " * 100_000, "E_TOO_LARGE"),
    (
        "binary data without a blob",
        GOOD.replace(b'"data"', b'"parameters":{"binary_data_size":16},"data"'),
        "E_SCHEMA",
    ),
]


@pytest.mark.parametrize("general", [False, True], ids=["fast", "general"])
@pytest.mark.parametrize(("body", "code"), [case[1:] for case in JSON_CASES], ids=[c[0] for c in JSON_CASES])
def test_a_bad_body_has_its_code_and_its_neighbours_are_read(body: bytes, code: str, general: bool) -> None:
    """The same on the fast path and the general one, and only for the bad row."""
    forced: Headers = [("mlserver-model", b"m")] if general else None
    decoded = decoder(FLOATS).decode(chunk([GOOD, body, GOOD], [forced] * 3))
    assert codes(decoded) == {1: code}
    _assert_good(decoded, [0, 2])


def _assert_good(decoded: Any, rows: list[int]) -> None:
    found = by_row(decoded)
    assert sorted(found) == rows
    for row in rows:
        part, index = found[row]
        assert part.ids[index] == "good"
        assert tensor_of(part, index).tolist() == [[1, 2, 3, 4]]


INTEGER_CASES = [
    ("2^31", "2147483648"),
    ("2^64", "18446744073709551616"),
    ("below", "-2147483649"),
    ("4,000 digits", "9" * 4_000),
    ("10,000 digits", "9" * 10_000),
    ("1.0", "1.0"),
    ("-0.0", "-0.0"),
    ("1e2", "1e2"),
    ("true", "true"),
]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("number", [case[1] for case in INTEGER_CASES], ids=[c[0] for c in INTEGER_CASES])
def test_b4_integers_never_wrap_and_are_never_rounded(number: str, nested: bool) -> None:
    """What INT32 does not hold, and what is no integer, is E_DTYPE."""
    body = _with(number, "INT32", nested=nested)
    decoded = decoder(INTS).decode(chunk([GOOD_INT, body, GOOD_INT]))
    assert codes(decoded) == {1: "E_DTYPE"}
    _assert_good(decoded, [0, 2])


def test_b4_minus_zero_is_an_integer() -> None:
    """JSON's -0 is the integer 0; nothing is lost by reading it."""
    decoded = decoder(INTS).decode(chunk([_with("-0", "INT32")]))
    assert codes(decoded) == {}
    assert tensor_of(decoded.requests[0], 0).tolist() == [[0, 2, 3, 4]]


def test_b5_the_last_of_duplicate_keys_wins() -> None:
    """On both paths, in every object."""
    body = GOOD.replace(b'{"id": "good"', b'{"id": "old", "id": "good"').replace(
        b'"data"', b'"data": [9, 9, 9, 9], "data"'
    )
    for headers in (None, [("mlserver-model", b"m")]):
        _assert_good(decoder(FLOATS).decode(chunk([body], [headers])), [0])


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_b6_a_lone_surrogate_in_an_element_is_not_text(nested: bool) -> None:
    """It could not be written back, so it is not read."""
    data = '[["\\ud800"]]' if nested else '["\\ud800"]'
    body = v2("DATA", [1, 1], "BYTES").replace(b'"DATA"', data.encode())
    assert codes(decoder(TEXTS).decode(chunk([body]))) == {0: "E_DECODE"}


def test_b7_without_an_id_the_position_is_the_id() -> None:
    """A missing or null id is no error on a log: the record's place names it."""
    plain = v2([1, 2, 3, 4], [1, 4])
    null = plain[:-1] + b',"id":null}'
    decoded = decoder(FLOATS).decode(chunk([plain, null]))
    assert decoded.requests[0].ids == ["digits.requests-3-100", "digits.requests-3-101"]


def test_b7_a_position_is_a_fine_id_however_long_the_topics_name() -> None:
    """Topics may have 249 characters; their requests need no id for that."""
    made = chunk([v2([1, 2, 3, 4], [1, 4]), b"bad"], stream=Stream("t" * 249, 0))
    decoded = decoder(FLOATS).decode(made)
    assert codes(decoded) == {1: "E_DECODE"}
    assert decoded.requests[0].ids == ["t" * 249 + "-0-100"]


def test_b7_an_id_of_exactly_128_bytes_with_a_colon_is_fine() -> None:
    """A colon cannot break a key apart: the id is its last part."""
    request_id = "a:" + "é" * 63
    body = v2([1, 2, 3, 4], [1, 4], request_id=request_id)
    assert decoder(FLOATS).decode(chunk([body])).requests[0].ids == [request_id]


def test_b10_tombstones_and_empty_bodies_are_rejected_and_null_keys_are_fine() -> None:
    """A null key is a request without a key; a null value is no request."""
    decoded = decoder(FLOATS).decode(chunk([GOOD, None, b"", GOOD], keys=[None] * 4))
    assert codes(decoded) == {1: "E_EMPTY", 2: "E_EMPTY"}
    _assert_good(decoded, [0, 3])


def test_b10_an_empty_chunk_is_read_as_nothing() -> None:
    """No record, no outcome, no error."""
    decoded = decoder(FLOATS).decode(chunk([]))
    assert (decoded.requests, decoded.rejected) == ([], None)


def test_b11_deadlines_are_clamped_to_the_calendar() -> None:
    """The far future is the year 9999; a negative deadline is in the past, not an error."""
    stamps = [b"-1", b"0", b"253402300800000", b"9" * 19, b" 1700000000001 "]
    headers: list[Headers] = [[("inferfleet-deadline-ms", stamp)] for stamp in stamps]
    (part,) = decoder(FLOATS).decode(chunk([GOOD] * 5, headers)).requests
    assert part.deadlines_ms == [-1, 0, 253402300799000, 253402300799000, 1700000000001]
    assert part.first_deadline_ms == -1


def test_b11_b31_a_routes_deadline_counts_from_the_record_and_yields_to_the_requests_own() -> None:
    """Records from the far past and future are read; one without a timestamp has no age."""
    own: Headers = [("inferfleet-deadline-ms", b"77")]
    made = chunk([GOOD] * 4, [None, own, None, None])
    made.timestamps_ms[:] = [NOW_MS, NOW_MS, 1, 10**15]
    found = by_row(decoder(FLOATS, deadline_ms=500).decode(made))
    assert [part.deadlines_ms[i] for part, i in map(found.get, range(4))] == [  # type: ignore[index,misc]
        NOW_MS + 500,
        77,
        501,
        10**15 + 500,
    ]
    made.timestamps_ms[:] = [0, -1, NOW_MS, NOW_MS]
    (part,) = decoder(FLOATS, deadline_ms=500).decode(made).requests
    assert part.deadlines_ms == [None, 77, NOW_MS + 500, NOW_MS + 500]


@pytest.mark.parametrize("shape", [[1, 10**9, 10**9], [1, 2**31 - 1, 2**31 - 1], [64, 2**31 - 1, 2**31 - 1]])
def test_b13_a_shape_that_overflows_is_refused_before_anything_is_allocated(shape: list[int]) -> None:
    """The product is taken in exact integers and held against what is there, as JSON and as bytes."""
    body, headers = binary([("x", "FP32", shape, b"\0" * 16)])
    json_body = v2([1, 2], shape)
    big = "9" * 4_000
    huge = json_body.replace(json.dumps(shape).encode(), f"[1, {big}, {big}]".encode())
    decoded = decoder(VARYING).decode(chunk([json_body, body, huge], [None, headers, None]))
    assert codes(decoded) == {0: "E_SHAPE", 1: "E_SHAPE", 2: "E_SHAPE"}


def test_b15_shapes_that_differ_stand_in_columns_of_their_own() -> None:
    """Each is fine alone, so none fails the other."""
    decoded = decoder(VARYING).decode(
        chunk([v2([1, 2], [1, 1, 2]), v2([1, 2, 3], [1, 1, 3]), v2([3, 4], [1, 1, 2])])
    )
    assert codes(decoded) == {}
    assert [(part.rows, part.tensors["x"].shape) for part in decoded.requests] == [
        ([0, 2], (2, 1, 2)),
        ([1], (1, 1, 3)),
    ]


def test_b16_missing_inputs_and_unequal_rows() -> None:
    """A model's inputs must all be there, with the same number of rows."""

    def body(*inputs: tuple[str, str, list[int], list[int]]) -> bytes:
        keys = ("name", "datatype", "shape", "data")
        return json.dumps({"inputs": [dict(zip(keys, each, strict=True)) for each in inputs]}).encode()

    x, z = ("x", "FP32", [1, 4], [1, 2, 3, 4]), ("z", "INT64", [1, 1], [7])
    decoded = decoder(PAIR).decode(
        chunk([body(x, z), body(z, x), body(x), body(x, ("z", "INT64", [2, 1], [7, 8]))])
    )
    assert codes(decoded) == {2: "E_SCHEMA", 3: "E_SHAPE"}
    (part,) = decoded.requests
    assert list(part.tensors) == ["x", "z"], "in the signature's order, whatever the request's"
    assert part.tensors["z"].tolist() == [[7], [7]]


def test_b16_optional_members_and_unknown_ones_are_fine() -> None:
    """V2 lets a request carry parameters and outputs; servers ignore what they do not know."""
    body = v2(
        [1, 2, 3, 4], [1, 4], request_id="good", parameters={"priority": 1, "f": 1.5, "s": "t"}, extra=[{}]
    )
    _assert_good(decoder(FLOATS).decode(chunk([body, v2([[1, 2, 3, 4]], [1, 4], request_id="good")])), [0, 1])


@pytest.mark.parametrize("text", ["not base64!", "YWJj\\n", "YWJ"])
def test_b17_broken_base64_is_e_decode(text: str) -> None:
    """Also where only white space is wrong."""
    body = v2([text.replace("\\n", "\n")], [1, 1], "BYTES").replace(
        b'"data"', b'"parameters": {"encoding": "base64"}, "data"'
    )
    assert codes(decoder(TEXTS).decode(chunk([body]))) == {0: "E_DECODE"}


def test_b21_a_body_just_at_the_limit_is_read() -> None:
    """The limit is inclusive, on JSON and on raw bodies."""
    assert codes(decoder(FLOATS, max_bytes=len(GOOD)).decode(chunk([GOOD]))) == {}
    assert codes(decoder(FLOATS, max_bytes=len(GOOD) - 1).decode(chunk([GOOD]))) == {0: "E_TOO_LARGE"}
    raw = as_wire("FP32", [1, 2, 3, 4])
    assert codes(decoder(FLOATS, max_bytes=16).decode(chunk([raw], [binary_headers(0)]))) == {}
    assert codes(decoder(FLOATS, max_bytes=15).decode(chunk([raw], [binary_headers(0)]))) == {
        0: "E_TOO_LARGE"
    }


def test_b32_half_of_many_may_be_bad() -> None:
    """Each bad row has its error, each good one its place."""
    decoded = decoder(FLOATS).decode(chunk([GOOD if i % 2 else b"bad" for i in range(1_000)]))
    assert codes(decoded) == dict.fromkeys(range(0, 1_000, 2), "E_DECODE")
    assert decoded.requests[0].rows == list(range(1, 1_000, 2))


BINARY_CASES: list[tuple[str, bytes, Headers, str]] = []


def _case(name: str, made: tuple[bytes, Headers], code: str) -> None:
    BINARY_CASES.append((name, *made, code))


_RAW = as_wire("FP32", [1, 2, 3, 4])
_BODY, _HEADERS = binary([("x", "FP32", [1, 4], _RAW)], id="good")
_case("tensor cut", (_BODY[:-1], _HEADERS), "E_SHAPE")
_case("bytes left over", (_BODY + b"\0", _HEADERS), "E_SHAPE")
_case("size for another shape", binary([("x", "FP32", [1, 4], _RAW[:-4])]), "E_SHAPE")
_case("NaN", binary([("x", "FP32", [1, 4], as_wire("FP32", [np.nan, 2, 3, 4]))]), "E_NONFINITE")
_case("length beyond the body", (_BODY, binary_headers(10_000)), "E_HEADER")
_case("length inside the JSON part", (_BODY, binary_headers(10)), "E_DECODE")
_case("no length", (_BODY, [("content-type", b"application/octet-stream")]), "E_CONTENT_TYPE")
_case("raw too short", (_RAW[:-1], binary_headers(0)), "E_SHAPE")
_case("raw too long", (_RAW + _RAW, binary_headers(0)), "E_SHAPE")
_case("raw infinity", (as_wire("FP32", [np.inf, 2, 3, 4]), binary_headers(0)), "E_NONFINITE")
for _size in ("-1", '"16"', "true", "1.5"):
    _changed = _BODY.replace(b'size": 16', b'size": ' + _size.encode())
    _case(f"size {_size}", (_changed, binary_headers(len(_changed) - 16)), "E_SCHEMA")


@pytest.mark.parametrize(
    ("body", "headers", "code"), [case[1:] for case in BINARY_CASES], ids=[case[0] for case in BINARY_CASES]
)
def test_a_bad_binary_body_has_its_code(body: bytes, headers: Headers, code: str) -> None:
    """And its neighbours, raw and JSON + binary, are read."""
    decoded = decoder(FLOATS).decode(chunk([_RAW, body, _BODY], [binary_headers(0), headers, _HEADERS]))
    assert codes(decoded) == {1: code}
    assert sorted(by_row(decoded)) == [0, 2]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form_and_their_nan_is_found(datatype: str) -> None:
    """Binary only; NaN in BF16's bits is NaN too, unless the route allows it."""
    sig = signature(TensorSpec("x", datatype, (2,)))
    nan = as_wire("UINT16", [0x7FC0, 0]) if datatype == "BF16" else as_wire("FP16", [np.nan, 0])
    values: list[bytes | None] = [v2([1, 2], [1, 2], datatype), nan]
    made = chunk(values, [None, binary_headers(0)])
    assert codes(decoder(sig).decode(made)) == {0: "E_DTYPE", 1: "E_NONFINITE"}
    assert codes(decoder(sig, nan_allowed=True).decode(made)) == {0: "E_DTYPE"}


def test_raw_bodies_that_cannot_say_their_shape_are_refused() -> None:
    """Two inputs, two varying dimensions, or several texts a row: raw bytes cannot tell them apart."""
    cases: list[tuple[Decoder, bytes, str]] = [
        (decoder(PAIR), b"\0" * 24, "E_SCHEMA"),
        (decoder(VARYING), b"\0" * 16, "E_SHAPE"),
        (decoder(signature(TensorSpec("x", "BYTES", (2,)))), b"abc", "E_SHAPE"),
        (decoder(signature(TensorSpec("x", "FP32", (-1,)))), b"abc", "E_SHAPE"),
        (decoder(signature(TensorSpec("x", "BOOL", (3,)))), b"\0\1\2", "E_DTYPE"),
    ]
    for reader, body, code in cases:
        assert codes(reader.decode(chunk([body], [binary_headers(0)]))) == {0: code}


def test_the_error_of_a_refused_body_names_its_id() -> None:
    """A client that waits must learn of the failure under the id it sent, on every form of body."""
    wrong, headers = binary([("x", "FP32", [1, 3], _RAW[:12])], id="mine")
    refused: Headers = [("inferfleet-priority", b"0")]
    both: Headers = [("inferfleet-priority", b"0"), ("inferfleet-id", b"from-header")]
    bad_id: Headers = [("inferfleet-id", b"a b")]
    bodies: list[bytes | None] = [v2([1], [1, 1], request_id="mine"), wrong, GOOD, GOOD, GOOD, _RAW[:3]]
    decoded = decoder(FLOATS).decode(chunk(bodies, [None, headers, refused, both, bad_id, binary_headers(0)]))
    assert decoded.rejected is not None
    assert decoded.rejected.ids == ["mine", "mine", "good", "from-header", None, None]
