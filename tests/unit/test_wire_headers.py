"""Headers: what each means, which value wins, and what is refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from inferfleet.records import Headers, TensorSpec
from inferfleet.wire.headers import MAX_HEADER_BYTES, MAX_HEADERS
from tests.support.builders import by_row, chunk, codes, decoder, signature, v2
from tests.support.traces import TRACE

DECODER = decoder(signature(TensorSpec("x", "FP32", (4,))))
BODY = v2([1, 2, 3, 4], [1, 4], request_id="in-body")


def _read(*records: Headers) -> Any:
    return DECODER.decode(chunk([BODY] * len(records), records))


def _codes(*records: Headers) -> dict[int, str]:
    return codes(_read(*records))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([("inferfleet-deadline-ms", b"soon")], "E_HEADER"),
        ([("inferfleet-deadline-ms", b"1.5")], "E_HEADER"),
        ([("inferfleet-deadline-ms", b"")], "E_HEADER"),
        ([("inferfleet-deadline-ms", b"-")], "E_HEADER"),
        ([("inferfleet-deadline-ms", b"9" * 21)], "E_HEADER"),
        ([("inferfleet-deadline-ms", None)], "E_HEADER"),
        ([("inferfleet-deadline-ms", b"\xff")], "E_HEADER"),
        ([("inferfleet-priority", b"0")], "E_HEADER"),
        ([("inferfleet-priority", b"10")], "E_HEADER"),
        ([("inferfleet-priority", b"high")], "E_HEADER"),
        ([("inferfleet-reply", b"")], "E_HEADER"),
        ([("inferfleet-reply", b"a" * 65)], "E_HEADER"),
        ([("inferfleet-reply", b"a:b")], "E_HEADER"),
        ([("inferfleet-reply", b"{a}")], "E_HEADER"),
        ([("inferfleet-reply", b"a\n")], "E_HEADER"),
        ([("inferfleet-reply", None)], "E_HEADER"),
        ([("inference-header-content-length", b"-1")], "E_HEADER"),
        ([("inference-header-content-length", b"x")], "E_HEADER"),
        ([("inferfleet-unreadable", b"1")], "E_HEADER"),
        ([("inferfleet-id", None)], "E_ID"),
        ([("inferfleet-id", b"")], "E_ID"),
        ([("inferfleet-id", b"\xff\xfe")], "E_ID"),
        ([("inferfleet-id", b"a\nb")], "E_ID"),
        ([("inferfleet-id", b"i" * 129)], "E_ID"),
        ([("ce-id", b"a b")], "E_ID"),
        ([("content-type", b"text/csv")], "E_CONTENT_TYPE"),
        ([("content-type", b"\xff")], "E_CONTENT_TYPE"),
        ([("content-type", b"application/x-npy")], "E_CONTENT_TYPE"),
        ([("content-encoding", b"gzip")], "E_CONTENT_TYPE"),
        ([("inferfleet-protocol", b"v3")], "E_PROTOCOL"),
        ([("inferfleet-protocol", None)], "E_PROTOCOL"),
        ([("ce_specversion", b"2.0")], "E_PROTOCOL"),
        ([("mlserver-model", b"other")], "E_MODEL_UNKNOWN"),
        ([("mlserver-model", b"../m")], "E_MODEL_UNKNOWN"),
        ([("mlserver-version", b"9")], "E_MODEL_UNKNOWN"),
        ([("mlserver-version", None)], "E_HEADER"),
        ([(f"h{i}", b"") for i in range(10_000)], "E_HEADER"),
        ([("h", b"x" * 1_000_000)], "E_HEADER"),
        ([("h" * 1_000_000, b"")], "E_HEADER"),
    ],
)
def test_a_bad_header_has_its_code_and_its_neighbours_are_read(headers: Headers, code: str) -> None:
    """Equal headers before and after it are not taken for its own."""
    decoded = _read([("inferfleet-id", b"a")], headers, [("inferfleet-id", b"a")], headers, None)
    assert codes(decoded) == {1: code, 3: code}
    ids = {row: part.ids[index] for row, (part, index) in by_row(decoded).items()}
    assert ids == {0: "a", 2: "a", 4: "in-body"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", b"application/json")],
        [("content-type", b"Application/JSON; charset=utf-8")],
        [("content-type", b"")],
        [("content-type", None)],
        [("content-encoding", b"identity")],
        [("inferfleet-protocol", b"v2"), ("ce_specversion", b"1.0")],
        [("mlserver-model", b"m"), ("mlserver-version", b"2")],
        [("inferfleet-status", b"ok"), ("inferfleet-served", b"forged"), ("inferfleet-code", None)],
        [("reply_to", b"elsewhere"), ("x", b"\xff\x00"), ("", b"")],
        [(f"h{i}", b"") for i in range(MAX_HEADERS)],
        [("h", b"x" * (MAX_HEADER_BYTES - 1))],
        [("inferfleet-priority", b" 5 ")],
    ],
)
def test_what_is_not_wrong_is_accepted(headers: Headers) -> None:
    """Foreign headers are ignored, whatever they hold; just at the limits is fine."""
    assert _codes(headers) == {}


def test_the_first_value_wins_and_case_does_not_matter() -> None:
    """A value that a proxy appends later changes nothing."""
    decoded = _read(
        [("InferFleet-ID", b"first"), ("inferfleet-id", b"second"), ("INFERFLEET-ID", b"a b")],
        [("Inferfleet-Priority", b"2"), ("inferfleet-priority", b"zero")],
    )
    assert codes(decoded) == {}
    found = by_row(decoded)
    assert [part.ids[index] for part, index in (found[0], found[1])] == ["first", "in-body"]
    assert [part.priority for part, _ in (found[0], found[1])] == [5, 2]


def test_the_id_is_the_headers_then_cloudevents_then_the_bodys() -> None:
    """Our own header first; either spelling of the CloudEvents id is read."""
    decoded = _read(
        [("ce_id", b"ce"), ("inferfleet-id", b"ours")], [("ce_id", b"ce")], [("ce-id", "é".encode())], []
    )
    (part,) = decoded.requests
    assert part.ids == ["ours", "ce", "é", "in-body"]


def test_columns_are_there_only_where_a_record_fills_them() -> None:
    """Plain records cost nothing for headers that nobody sent."""
    (part,) = _read(None, []).requests
    assert (part.deadlines_ms, part.replies, part.traces, part.priority) == (None, None, None, 5)
    (part,) = _read(
        None,
        [("inferfleet-reply", b"client-1"), ("traceparent", TRACE), ("inferfleet-deadline-ms", b"9")],
    ).requests
    assert part.replies == [None, "client-1"]
    assert part.traces == [None, TRACE]
    assert part.deadlines_ms == [None, 9]


def test_priorities_split_into_columns_of_their_own() -> None:
    """Each keeps its rows in order."""
    decoded = _read(*[[("inferfleet-priority", b"%d" % p)] for p in (9, 1, 9, 5, 1)])
    assert [(part.priority, part.rows) for part in decoded.requests] == [(1, [1, 4]), (5, [3]), (9, [0, 2])]
    decoded = _read(*[[("inferfleet-priority", b"3")]] * 3)
    assert [(part.priority, part.rows) for part in decoded.requests] == [(3, [0, 1, 2])]


def test_a_refused_record_keeps_its_reply_stream_and_trace_where_they_are_sound() -> None:
    """The client that waits must hear of the failure."""
    decoded = _read(
        [("inferfleet-priority", b"0"), ("inferfleet-reply", b"me"), ("traceparent", TRACE)],
        [("inferfleet-reply", b"a b"), ("inferfleet-id", b"named")],
        [("inferfleet-id", b"a b"), ("inferfleet-reply", b"me")],
        [("inferfleet-reply", b"me"), *[("h", b"")] * 10_000],
    )
    assert decoded.rejected is not None
    assert decoded.rejected.replies == ["me", None, "me", "me"]
    assert decoded.rejected.traces == [TRACE, None, None, None]
    assert decoded.rejected.ids == ["in-body", "named", None, "in-body"]
    assert all(len(text) < 200 for text in decoded.rejected.texts)
