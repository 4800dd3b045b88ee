"""What travels, as types and tables: the source of ``schemas/``.

Requests are read with :class:`~inferfleet.wire.request.InferenceRequest`. Outcomes are written as text by
``encode``, because that is quicker; their types stand here, and a test reads what is written with them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from inferfleet.wire import headers as names
from inferfleet.wire.request import Scalar


class ResponseOutput(msgspec.Struct, forbid_unknown_fields=True):
    """One output of an answer; ``data`` is flat and row-major, and absent where the tensor is binary."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Scalar] | None = None
    data: list[Any] | None = None


class InferenceResponse(msgspec.Struct, forbid_unknown_fields=True):
    """An answer. In the result store ``parameters`` holds the mark of the request that was answered."""

    model_name: str
    model_version: str
    id: str
    outputs: list[ResponseOutput]
    parameters: dict[str, Scalar] | None = None


class ErrorOutcome(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an error outcome; ``parameters`` as in an answer."""

    error: str
    code: str
    id: str
    retryable: bool
    parameters: dict[str, Scalar] | None = None


class HeaderRule(NamedTuple):
    """One header: its name, what it means, and a regular expression for its whole value.

    ``presence`` says when it is there: always, where it was sent, with errors, with binary bodies.
    """

    name: str
    meaning: str
    pattern: str
    presence: Literal["always", "optional", "errors", "binary"] = "optional"


_ID = r"[^\x00-\x20\x7f{}]{1,128}"
_INTEGER = r"-?[0-9]{1,19}"
_NATURAL = r"[0-9]{1,19}"
_TRACE = r".*"
_ERROR_CODE = r"E_[A-Z_]+"
_SERVED = r"route=[^;]*;model=[^;]*;version=[^;]*;variant=[^;]*;revision=[^;]*;worker=[^;]*"

REQUEST_HEADERS = (
    HeaderRule(names.ID, "The request's id; at most 128 bytes of UTF-8.", _ID),
    HeaderRule("ce_id", "The id in CloudEvents' words, where inferfleet-id is absent.", _ID),
    HeaderRule("ce-id", "The same, as some clients spell it.", _ID),
    HeaderRule(
        names.CONTENT_TYPE,
        "application/json (also when absent), or application/octet-stream for binary tensors.",
        r"(application/json|text/json|application/octet-stream)?(\s*;.*)?",
    ),
    HeaderRule(
        names.JSON_LENGTH,
        "Bytes of the JSON part of a body with binary tensors; 0: the body is one raw tensor of one row.",
        _NATURAL,
    ),
    HeaderRule(
        names.DEADLINE,
        "Epoch milliseconds after which an answer is worthless; at most the end of the year 9999.",
        _INTEGER,
    ),
    HeaderRule(
        names.PRIORITY, "1 (highest) to 9; 5 when absent. Orders waiting rows, not the topic.", r"0*[1-9]"
    ),
    HeaderRule(names.REPLY, "The client's reply stream in Redis.", r"[A-Za-z0-9_.-]{1,64}"),
    HeaderRule(names.TRACEPARENT, "W3C trace context; goes on to the outcome.", _TRACE),
    HeaderRule(names.TRACESTATE, "W3C trace context; goes on beside it.", _TRACE),
    HeaderRule(names.PROTOCOL, "The protocol of the body; only v2 is spoken.", r"v2|2"),
    HeaderRule("ce_specversion", "The version of CloudEvents that the sender speaks.", r"1\.0|0\.3"),
    HeaderRule(names.CONTENT_ENCODING, "Bodies are never compressed.", r"(identity)?"),
    HeaderRule("mlserver-model", "Must name the route's model.", r".+"),
    HeaderRule("mlserver-version", "Must name a version that the route serves.", r"[1-9][0-9]*"),
)

AMQP_HEADERS = (
    HeaderRule(
        "inferfleet-key",
        "On RabbitMQ, which has no keys: what stands for the key of a Kafka record, for steering and for "
        "outcomes on Kafka. Of a request's properties, content_type and content_encoding are read as the "
        "headers content-type and content-encoding, and message_id, else correlation_id, names a request "
        "without an id. An outcome's message_id is the request's id, its correlation_id the request's own.",
        r"(?s:.*)",
    ),
)
"""Beside the headers of requests and outcomes, where they travel through RabbitMQ."""

OUTCOME_HEADERS = (
    HeaderRule(names.ID, "The request's id.", _ID, "always"),
    HeaderRule(names.STATUS, "Whether the body is an answer or an error.", r"ok|error", "always"),
    HeaderRule(names.CODE, "The reason of an error.", _ERROR_CODE, "errors"),
    HeaderRule(
        names.SERVED,
        "Which route, model, version, variant, revision and worker made the outcome; version and variant are "
        "empty where none was chosen.",
        _SERVED,
        "always",
    ),
    HeaderRule(
        names.CONTENT_TYPE,
        "Set when binary tensors follow the JSON part.",
        r"application/octet-stream",
        "binary",
    ),
    HeaderRule(names.JSON_LENGTH, "Bytes of the JSON part.", _NATURAL, "binary"),
    HeaderRule(
        names.TRACEPARENT,
        "The request's, when it had one that is valid; its span is the worker's own where that was recorded.",
        _TRACE,
    ),
    HeaderRule(names.TRACESTATE, "The request's, beside traceparent.", _TRACE),
)

DEAD_LETTER_HEADERS = (
    HeaderRule("inferfleet-origin-topic", "Where the request stood.", r".+", "always"),
    HeaderRule("inferfleet-origin-partition", "Its partition.", _NATURAL, "always"),
    HeaderRule("inferfleet-origin-offset", "Its offset.", _NATURAL, "always"),
    HeaderRule(
        "inferfleet-origin-timestamp", "Its broker timestamp, epoch milliseconds.", _INTEGER, "always"
    ),
    HeaderRule(names.CODE, "Why it failed.", _ERROR_CODE, "always"),
    HeaderRule(
        "inferfleet-error",
        "The same in words, at most 1,024 bytes, without the payload.",
        r"(?s:.*)",
        "always",
    ),
    HeaderRule("inferfleet-attempt", "How many attempts were made.", r"[1-9][0-9]*", "always"),
    HeaderRule("inferfleet-failed-at", "When, epoch milliseconds.", _NATURAL, "always"),
    HeaderRule(names.SERVED, "What failed it; see the outcome's header.", _SERVED, "always"),
    HeaderRule(
        "inferfleet-cut",
        "What the dead-letter topic had no room for; the request itself stands at its origin.",
        r"body headers( key)?",
    ),
)
"""Behind the request's own headers, which stay untouched; so in a dead letter the last value wins."""

RETRY_HEADERS = (
    *DEAD_LETTER_HEADERS[:4],
    HeaderRule("inferfleet-attempt", "Which attempt this record asks for.", r"[1-9][0-9]*", "always"),
    HeaderRule(names.NOT_BEFORE, "When it may run, epoch milliseconds.", _NATURAL, "always"),
)
"""Behind the request's own headers in a retry topic or queue, and believed nowhere else."""
