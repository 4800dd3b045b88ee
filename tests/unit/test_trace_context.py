"""W3C trace context: which headers are one, what is kept of them, and what a span of ours changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet import trace_context as context
from tests.support.traces import TRACE, TRACE_ID

_DIGITS = "0123456789abcdef"
_STATE = st.none() | st.binary(max_size=40)


def hexadecimal(length: int) -> st.SearchStrategy[str]:
    return st.text(_DIGITS, min_size=length, max_size=length)


ids = st.tuples(
    hexadecimal(32).filter(lambda text: text.strip("0")), hexadecimal(16).filter(lambda text: text.strip("0"))
)


@given(ids, hexadecimal(2), _STATE)
def test_a_valid_header_is_kept_to_the_letter_with_its_state(
    named: tuple[str, str], flags: str, state: bytes | None
) -> None:
    """What goes on is what came; the lowest flag says whether the caller records."""
    header = f"00-{named[0]}-{named[1]}-{flags}".encode()
    trace = context.trace_of(header, state)

    assert trace is not None
    assert (context.trace_id(trace), context.span_id(trace)) == named
    assert context.is_sampled(trace) is bool(int(flags, 16) & 1)
    assert context.headers_of_trace(trace) == [
        ("traceparent", header),
        *([("tracestate", state)] if state else []),
    ]


@given(ids, hexadecimal(2), _STATE, st.integers(1, 2**64 - 1))
def test_a_span_of_ours_takes_the_callers_place_and_nothing_else(
    named: tuple[str, str], flags: str, state: bytes | None, span: int
) -> None:
    """Trace, flags and state stay."""
    trace = context.trace_of(f"00-{named[0]}-{named[1]}-{flags}".encode(), state)
    assert trace is not None
    behind = context.with_span(trace, span)

    (_, parent), *others = context.headers_of_trace(behind)
    assert parent == f"00-{named[0]}-{span:016x}-{flags}".encode()
    assert others == ([("tracestate", state)] if state else [])
    assert context.trace_of(parent) == parent


@given(st.binary(max_size=60) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{30,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}"))
def test_no_header_breaks_anything(header: bytes | str) -> None:
    """Whatever is taken for a trace can be read as one."""
    raw = header.encode() if isinstance(header, str) else header
    trace = context.trace_of(raw, b"a=1")
    if trace is not None:
        int(context.trace_id(trace), 16)
        int(context.span_id(trace), 16)
        assert len(context.with_span(trace, 7)) == 55 + len(b"\na=1")
        assert context.headers_of_trace(trace)[0] == ("traceparent", raw)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"00-ab",
        TRACE.upper(),
        b" " + TRACE,
        TRACE + b"-more",
        TRACE + b"\n",
        b"ff" + TRACE[2:],
        TRACE.replace(b"-", b"_"),
        b"00-" + b"0" * 32 + TRACE[35:],
        TRACE[:36] + b"0" * 16 + TRACE[52:],
        TRACE[:-1],
    ],
)
def test_what_is_no_trace_context_is_ignored_with_its_state(header: bytes | None) -> None:
    """As the recommendation has it: the receiver goes on as if there were none."""
    assert context.trace_of(header, b"vendor=1") is None
    assert context.trace_of_headers([("traceparent", header), ("tracestate", b"vendor=1")]) is None


def test_a_later_version_is_read_by_the_places_of_this_one() -> None:
    """It goes on as it is; a span of ours speaks the version that is known here."""
    later = b"cc" + TRACE[2:] + b"-what-comes"

    assert context.trace_of(later) == later
    assert context.trace_of(later[:-11] + b"what") is None
    assert context.trace_id(later) == TRACE_ID
    assert context.headers_of_trace(later) == [("traceparent", later)]
    assert context.with_span(later, 1) == TRACE[:36] + b"0000000000000001-01"


def test_the_first_of_a_repeated_header_counts_in_any_case() -> None:
    """As with all headers of a request."""
    other = TRACE.replace(b"4bf9", b"0000")
    headers = [("TraceParent", TRACE), ("traceparent", other), ("Tracestate", b"a=1"), ("tracestate", b"b=2")]

    assert context.trace_of_headers(headers) == TRACE + b"\na=1"
    assert context.trace_of_headers(None) is None


def test_what_a_caller_sends_leaves_room_for_the_answer() -> None:
    """An outcome carries the trace: one that any caller could make too large would be refused for ever."""
    header = b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"
    later = b"01" + header[2:] + b"-" + b"x" * context.MOST_PARENT

    assert context.trace_of(header, b"a" * context.MOST_STATE) == header + b"\n" + b"a" * context.MOST_STATE
    assert context.trace_of(header, b"a" * (context.MOST_STATE + 1)) == header
    assert context.trace_of(later) is None
