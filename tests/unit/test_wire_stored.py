"""The payload mark inside a stored body, and the write-once rule as values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.redis_access import JoinPacker
from inferfleet.wire.stored import Verdict, judge, mark, payload_hash, payload_of

OK, ERROR = b'{"model_name":"m"}', b'{"error":"no"}'
ONE, TWO = payload_hash(b"1"), payload_hash(b"2")


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1), st.binary())
def test_a_marked_body_is_the_same_json_plus_the_mark(document: dict[str, object], payload: bytes) -> None:
    """The mark is the last member and is read back from any body."""
    document.pop("parameters", None)
    document["n"] = 1
    body = json.dumps(document).encode()
    marked = mark(body, payload_hash(payload))
    assert json.loads(marked) == {**document, "parameters": {"fleet_payload": payload_hash(payload)}}
    assert payload_of(marked) == payload_hash(payload)


def test_a_mark_deep_inside_a_body_is_not_the_mark() -> None:
    """Text that a request brought along cannot pose as the payload's hash."""
    inside = json.dumps({"error": '"fleet_payload":"0"}}', "id": "x"}).encode()
    assert payload_of(inside) == ""
    assert payload_of(mark(inside, ONE)) == ONE


@pytest.mark.parametrize(
    ("standing", "new", "verdict"),
    [
        (mark(OK, ONE), mark(OK, ONE), Verdict.STOOD),
        (mark(OK, ONE), mark(ERROR, ONE), Verdict.STOOD),
        (mark(OK, ONE), mark(OK, TWO), Verdict.OTHER_PAYLOAD),
        (mark(OK, ONE), mark(ERROR, TWO), Verdict.OTHER_PAYLOAD),
        (mark(ERROR, ONE), mark(OK, ONE), Verdict.WRITTEN),
        (mark(ERROR, ONE), mark(OK, TWO), Verdict.WRITTEN),
        (mark(ERROR, ONE), mark(ERROR, ONE), Verdict.STOOD),
        (mark(ERROR, ONE), mark(ERROR, TWO), Verdict.OTHER_ERROR),
        (OK, mark(OK, TWO), Verdict.STOOD),
        (mark(OK, ONE), OK, Verdict.STOOD),
    ],
)
def test_an_ok_stays_an_error_yields_and_payloads_are_told_apart(
    standing: bytes, new: bytes, verdict: Verdict
) -> None:
    """Every pair of standing and new body has one verdict; an unknown payload never differs."""
    assert judge(standing, new) is verdict


def test_commands_are_packed_as_the_protocol_says() -> None:
    """Words are counted and measured in bytes, and a two-word command is two words."""
    assert JoinPacker().pack("SCRIPT LOAD", "é", 7) == [
        b"*4\r\n$6\r\nSCRIPT\r\n$4\r\nLOAD\r\n$2\r\n\xc3\xa9\r\n$1\r\n7\r\n"
    ]
