"""W3C trace context as it goes with requests: bytes in, bytes out, no object for each record.

A ``traceparent`` is ``version-trace id-parent id-flags`` in lower-case hexadecimal. What is not one is
ignored, together with the ``tracestate`` beside it, as the recommendation asks (W3C Trace Context, section
3.2). Within a worker a request's *trace* is its ``traceparent``, and where it has a ``tracestate``, this
behind a line break.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from inferfleet.chunks import Header, Headers

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
LENGTH = 55
"""Bytes of a ``traceparent`` of version 00."""

_IDS = rb"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_FORM = re.compile(rb"00" + _IDS + rb"|(?!00|ff)[0-9a-f]{2}" + _IDS + rb"(?:-[^\n]*)?")
_SAMPLED = frozenset(b"13579bdf")
"""The last digit of flags whose lowest bit is set."""


MOST_PARENT = 256
MOST_STATE = 512
"""The bytes of each header that go on: an outcome carries them, and a topic must have room for it. The W3C
asks for 512 of ``tracestate`` (Trace Context, 3.3.1.5)."""


def trace_of(traceparent: bytes | None, tracestate: bytes | None = None) -> bytes | None:
    """Return the trace that two headers name; ``None`` where the first is none.

    Of a version that is not known yet, what stands at the places of version 00 counts, whatever follows. What
    is longer than :data:`MOST_PARENT` is no trace; a state longer than :data:`MOST_STATE` is left out.
    """
    if traceparent is None or len(traceparent) > MOST_PARENT or not _FORM.fullmatch(traceparent):
        return None
    return traceparent if not tracestate or len(tracestate) > MOST_STATE else traceparent + b"\n" + tracestate


def trace_of_headers(headers: Headers) -> bytes | None:
    """Return the trace that a record's headers name; the first of a name counts."""
    found = {name.lower(): value for name, value in reversed(headers or ())}
    return trace_of(found.get(TRACEPARENT), found.get(TRACESTATE))


def headers_of_trace(trace: bytes) -> list[Header]:
    """Return the headers by which a message goes on with a trace."""
    if len(trace) == LENGTH:
        return [(TRACEPARENT, trace)]
    parent, _, state = trace.partition(b"\n")
    return [(TRACEPARENT, parent), (TRACESTATE, state)] if state else [(TRACEPARENT, parent)]


def is_sampled(trace: bytes) -> bool:
    """Return whether the caller records this trace."""
    return trace[LENGTH - 1] in _SAMPLED


def trace_id(trace: bytes) -> str:
    """Return the trace's id, 32 hexadecimal digits."""
    return trace[3:35].decode()


def span_id(trace: bytes) -> str:
    """Return the id of the span that the trace names, 16 hexadecimal digits."""
    return trace[36:52].decode()


def state_of(trace: bytes) -> str:
    """Return what other systems have said beside the trace."""
    return trace.partition(b"\n")[2].decode("ascii", "replace")


def with_span(trace: bytes, span: int) -> bytes:
    """Return the trace as it goes on behind a span; in the version that is known here."""
    _, line, state = trace.partition(b"\n")
    return b"00-%b-%016x-%b%b%b" % (trace[3:35], span, trace[53:LENGTH], line, state)


def new_trace(trace: int, span: int) -> bytes:
    """Return a sampled trace that begins with ``span``."""
    return b"00-%032x-%016x-01" % (trace, span)


def first_sampled(traces: Sequence[bytes | None]) -> int | None:
    """Return the index of the first trace that its caller records."""
    for index, trace in enumerate(traces):
        if trace is not None and trace[LENGTH - 1] in _SAMPLED:
            return index
    return None
