"""Requests as bytes, results as arrays, and the bounded flight of ``map``."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from inferfleet.client.outcome import ClientError, Outcome, Result
from inferfleet.client.request import Request, body_of, headers_of
from inferfleet.client.session import open_session
from inferfleet.client.window import Window
from inferfleet.errors import ConfigError
from tests.support.traces import TRACE, TRACE_ID


def tensor_of(inputs: dict[str, Any]) -> dict[str, Any]:
    body, described = body_of(Request(inputs), columns=False)
    assert described == {}
    (tensor,) = json.loads(body)["inputs"]
    return tensor


@pytest.mark.parametrize(
    ("value", "datatype", "shape", "data"),
    [
        (np.array([[1, 2]], np.float32), "FP32", [1, 2], [1.0, 2.0]),
        (np.array([[1.5]], np.float64), "FP64", [1, 1], [1.5]),
        (np.array([[1.5]], ">f4"), "FP32", [1, 1], [1.5]),
        (np.array([True, False]), "BOOL", [2], [True, False]),
        (np.array([[3]], np.uint8), "UINT8", [1, 1], [3]),
        ([[1.5, 2]], "FP32", [1, 2], [1.5, 2.0]),
        ([[1, 2]], "INT64", [1, 2], [1, 2]),
        (["a", "é"], "BYTES", [2], ["a", "é"]),
        ([b"a"], "BYTES", [1], ["a"]),
    ],
)
def test_arrays_and_lists_become_tensors(
    value: Any, datatype: str, shape: list[int], data: list[Any]
) -> None:
    """The datatype is the array's own; lists take the one that models usually want."""
    assert tensor_of({"x": value}) == {"name": "x", "datatype": datatype, "shape": shape, "data": data}


def test_columns_and_documents_are_sent_as_they_are() -> None:
    """A route of plain columns gets plain columns; a V2 document and bytes are not touched."""
    assert json.loads(body_of(Request({"image": np.array([1, 2])}), columns=True)[0]) == {"image": [1, 2]}
    document = {"inputs": [], "id": "x"}
    assert json.loads(body_of(Request(document), columns=False)[0]) == document
    assert body_of(Request(b"\x00raw"), columns=False) == (b"\x00raw", {})


def test_binary_tensors_stand_behind_their_json() -> None:
    """Blobs follow in the order listed, little-endian, with their sizes and the JSON's length declared."""
    inputs = {"x": np.array([[1, 2]], ">f4"), "t": np.array(["ab", ""], object)}
    body, headers = body_of(Request(inputs, binary=True), columns=False)
    length = int(headers["inference-header-content-length"])
    sizes = [tensor["parameters"]["binary_data_size"] for tensor in json.loads(body[:length])["inputs"]]
    assert sizes == [8, 10]
    blobs = body[length:]
    assert np.frombuffer(blobs[:8], "<f4").tolist() == [1.0, 2.0]
    assert blobs[8:] == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


def test_headers_that_are_the_clients_own_are_refused() -> None:
    """An id in the headers would not be the id that is waited for."""
    with pytest.raises(ValueError, match="inferfleet-id"):
        headers_of(Request(b"", headers={"Inferfleet-Id": "x"}), "y", None)
    assert headers_of(Request(b"", headers={"A": "1"}), "y", "c") == {
        "inferfleet-id": b"y",
        "inferfleet-reply": b"c",
        "a": b"1",
    }


def test_outputs_are_arrays_of_their_datatype() -> None:
    """Text is text, base64 is bytes, numbers keep type and shape."""
    outputs = [
        {"name": "p", "datatype": "FP32", "shape": [2, 1], "data": [1, 2]},
        {"name": "t", "datatype": "BYTES", "shape": [1], "data": ["é"]},
        {
            "name": "b",
            "datatype": "BYTES",
            "shape": [1],
            "data": ["/w=="],
            "parameters": {"encoding": "base64"},
        },
    ]
    result = Result(
        "i", "r", json.dumps({"model_name": "m", "model_version": "3", "outputs": outputs}).encode()
    )
    assert result.outputs["p"].dtype == np.float32
    assert result.outputs["p"].tolist() == [[1.0], [2.0]]
    assert result.outputs["t"].tolist() == ["é"]
    assert result.outputs["b"].tolist() == [b"\xff"]
    assert result.model_version == "3"
    with pytest.raises(ClientError, match="the result of i on route r is not JSON"):
        _ = Result("i", "r", b"garbage").document


@given(st.permutations(range(12)), st.integers(1, 12), st.booleans())
def test_a_window_hands_out_each_once_and_never_exceeds_its_bound(
    arrival: list[int], limit: int, ordered: bool
) -> None:
    """Whatever the order of arrival; in order if asked for."""
    window = Window(limit, 10.0, ordered=ordered)
    taken: list[Outcome] = []
    order = list(arrival)
    while len(taken) < 12:
        while window.number < 12 and window.has_room:
            window.sent(f"id-{window.number}", 0.0)
        assert len(window.ids()) <= limit
        outcome = window.take()
        if outcome is not None:
            taken.append(outcome)
            continue
        number = next(n for n in order if n < window.number)
        order.remove(number)
        window.arrived(number, Result(f"id-{number}", "r", b""))
        window.arrived(number, Result("again", "r", b""))
    assert window.empty
    ids = [taken_one.id for taken_one in taken if isinstance(taken_one, Result)]
    expected = [f"id-{n}" for n in range(12)]
    assert (ids if ordered else sorted(ids)) == (expected if ordered else sorted(expected))


def test_a_session_needs_an_address(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without configuration and without a broker the error says what was looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFERFLEET_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"fleet\.toml"):
        open_session(None)


def test_a_session_reads_routes_and_addresses_from_the_configuration(tmp_path: Any) -> None:
    """The topic of a route is its source; arguments overrule the file."""
    (tmp_path / "fleet.toml").write_text('[fleet]\nname = "f"\n[kafka]\nbootstrap_servers = "h:1"\n')
    (tmp_path / "routes.toml").write_text(
        '[[route]]\nname = "digits"\nsource = "kafka:digits.requests"\nresults = ["redis"]\n'
        'model = "digits"\nversion = "1"\ninput = "columns"\n'
    )
    session = open_session(tmp_path / "fleet.toml", redis_url="redis://other:1/0")
    assert (session.fleet, session.kafka["bootstrap.servers"]) == ("f", "h:1")
    assert session.place.url == "redis://other:1/0"
    message, _ = session.prepare("digits", Request({"image": [1]}, id="a", key="k"))
    assert (message.topic, message.key, message.value) == ("digits.requests", b"k", b'{"image":[1]}')


def test_inputs_of_another_type_are_named() -> None:
    """A bare string is a mistake, and is told so before anything is sent."""
    with pytest.raises(TypeError, match="not str"):
        Request("hello")  # type: ignore[arg-type]


def test_a_request_goes_on_with_the_callers_current_trace() -> None:
    """Where the program traces; what the caller gives by hand counts before it."""
    current = NonRecordingSpan(SpanContext(int(TRACE_ID, 16), 7, is_remote=False, trace_flags=TraceFlags(1)))
    with use_span(current):
        found = headers_of(Request(b""), "a", None)
        given = headers_of(Request(b"", headers={"Traceparent": TRACE}), "a", None)

    assert found["traceparent"] == f"00-{TRACE_ID}-0000000000000007-01".encode()
    assert given["traceparent"] == TRACE
    assert "traceparent" not in headers_of(Request(b""), "a", None)


def test_a_program_that_does_not_trace_pays_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry is not imported for its sake."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)

    assert headers_of(Request(b""), "a", None) == {"inferfleet-id": b"a"}
    assert "opentelemetry.trace" not in sys.modules
