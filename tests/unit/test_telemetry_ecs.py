"""A line is a document that Elastic's common schema knows, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.telemetry.ecs import ecs
from inferfleet.telemetry.logs import configure
from inferfleet.telemetry.vocabulary import KEYS, NAMESPACE, Key

CONTEXT = {"fleet": "f", "service": "inferfleet-worker", "node": "w-1", "release": "1.0", "pid": 7}

# The fields of ECS 8.11 that lines use, with their types there (https://www.elastic.co/guide/en/ecs/8.11).
FIELDS = {
    "@timestamp": "date", "message": "text", "log.level": "keyword", "log.logger": "keyword",
    "ecs.version": "keyword", "service.name": "keyword", "service.node.name": "keyword",
    "service.version": "keyword", "event.action": "keyword", "event.reason": "keyword",
    "trace.id": "keyword", "span.id": "keyword", "error.message": "text", "error.type": "keyword",
    "error.code": "keyword", "error.stack_trace": "text", "process.pid": "long",
    "process.thread.name": "keyword", "http.request.method": "keyword", "url.path": "keyword",
    "http.response.status_code": "long", "file.path": "keyword",
}  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "keyword": (str,), "text": (str,), "date": (str,), "long": (int,), "double": (int, float),
    "boolean": (bool,),
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def flat(document: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted name."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from flat(value, f"{at}{key}.")
        else:
            yield at + key, value


def check(document: dict[str, Any]) -> None:
    """Hold a document to the schema: known names, one type for each, no name both object and value."""
    ours = {key.name(name): key.type for name, key in KEYS.items()}
    assert list(document)[:4] == ["@timestamp", "log.level", "message", "ecs.version"]
    for name, value in flat(document):
        kind = FIELDS.get(name) or (ours[name] if name.startswith(f"{NAMESPACE}.") else "")
        if not kind:
            assert name.startswith("labels."), name
            kind = "keyword"
        for each in value if isinstance(value, list) else [value]:
            assert isinstance(each, TYPES[kind]), (name, value)
            assert isinstance(each, bool) == (kind == "boolean"), (name, value)


def test_the_vocabulary_agrees_with_the_schema() -> None:
    """A key with a name in Elastic's schema has its type there."""
    assert {n: (k.ecs, k.type) for n, k in KEYS.items() if k.ecs and FIELDS.get(k.ecs) != k.type} == {}


def test_a_line_has_the_fields_that_the_schema_wants() -> None:
    """Who, when, how bad, what; route and the like in our own namespace; trace and error in theirs."""
    stream = io.StringIO()
    configure("ecs", "info", stream, context=CONTEXT)
    try:
        raise ValueError("no")
    except ValueError:
        structlog.get_logger().exception(
            "requests_failed", route="r", batch=3, code="E_MODEL", trace_id="a" * 32, span_id="b" * 16
        )
    logging.getLogger("library").warning("said %s", "so")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    # A thread that another test has left behind may log, too.
    first, second = [each for each in found if each.get("log", {"logger": "library"})["logger"] == "library"]

    check(first)
    check(second)
    assert first["ecs.version"].count(".") == 2
    assert (first["log.level"], first["message"]) == ("error", "requests_failed")
    assert first["event"] == {"action": "requests_failed"}
    assert first["service"] == {"name": "inferfleet-worker", "node": {"name": "w-1"}, "version": "1.0"}
    assert (first["trace"], first["span"]) == ({"id": "a" * 32}, {"id": "b" * 16})
    assert first["inferfleet"] == {"route": "r", "batch": 3, "fleet": "f"}
    assert {"type": "ValueError", "message": "no", "code": "E_MODEL"}.items() <= first["error"].items()
    assert (second["message"], second["log"]) == ("said so", {"logger": "library"})
    assert "event" not in second


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(min_size=1, max_size=12), ANYTHING, max_size=8)
)
def test_no_value_brings_a_field_of_another_type(event: dict[str, object]) -> None:
    """Whatever somebody logs, an index that took one line takes the next."""
    line = {**event, "event": "e", "level": "info", "timestamp": "2026-11-25T00:00:00Z"}
    check(ecs(None, "info", line))


@pytest.mark.parametrize(("name", "key"), KEYS.items(), ids=list(KEYS))
def test_every_key_reaches_its_field(name: str, key: Key) -> None:
    """A value of the right type stands where the vocabulary says."""
    value = {"long": 3, "double": 0.5, "boolean": True}.get(key.type, "x")
    found = dict(flat(ecs(None, "info", {"event": "e", "level": "info", "timestamp": "t", name: value})))

    assert found[key.name(name)] == value
