"""A log line is one line, of a known shape, and holds no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from inferfleet.telemetry.logs import configure


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


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line_for_both_kinds_of_loggers() -> None:
    """The standard library's records come out in the same shape."""
    stream = io.StringIO()
    configure("json", "info", stream)
    structlog.get_logger().info("batch_closed", rows=3)
    logging.getLogger("library").warning("read %d", 7)
    first, second = lines(stream)

    assert (first["event"], first["rows"], first["level"]) == ("batch_closed", 3, "info")
    assert (second["event"], second["logger"], second["level"]) == ("read 7", "library", "warning")
    assert str(first["timestamp"]).endswith("Z")


def test_the_level_filters_both_kinds() -> None:
    """What is below the level costs nothing and shows nothing."""
    stream = io.StringIO()
    configure("json", "warning", stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")

    assert stream.getvalue() == ""


def test_ecs_renames_the_common_fields() -> None:
    """Elastic's schema has other names for the same things."""
    stream = io.StringIO()
    configure("ecs", "info", stream)
    structlog.get_logger().info("started", route="r")
    (line,) = lines(stream)

    assert (line["message"], line["log.level"], line["route"]) == ("started", "info", "r")
    assert "@timestamp" in line
    assert "ecs.version" in line


def test_auto_is_json_where_nobody_watches() -> None:
    """A stream that is no terminal gets JSON."""
    stream = io.StringIO()
    configure("auto", "info", stream)
    structlog.get_logger().info("started")

    assert lines(stream)[0]["event"] == "started"


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
def test_line_breaks_controls_and_colours_of_strangers_are_taken_out(form: str) -> None:
    """A value cannot forge a line or steer a terminal."""
    stream = io.StringIO()
    configure(form, "info", stream)
    structlog.get_logger().info("event", value="a\r\nforged\x1b[2J\x9b31m\x07z", nested={"k\n": ["x\ny"]})
    text = stream.getvalue()

    assert text.count("\n") == 1
    assert text.isprintable() or text[:-1].isprintable()
    assert "\\u001b" not in text
    assert "a forged" in text


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
def test_a_secret_is_never_found(form: str) -> None:
    """Masked by its key, inside a URL, and wherever a known secret's text appears, tracebacks included."""
    stream = io.StringIO()
    configure(form, "info", stream, secrets=["canary-known", ""])
    log = structlog.get_logger()
    log.info("login", password="canary-key", url="redis://user:canary-url@host/0", text="x canary-known y")
    log.info("nested", settings={"sasl.password": "canary-key"})
    logging.getLogger("library").error("said canary-known")
    try:
        raise ValueError("bad canary-known")
    except ValueError:
        log.exception("failed")

    assert "canary" not in stream.getvalue()
    assert "ValueError: bad ***" in stream.getvalue()


def test_what_json_cannot_carry_is_shown_by_its_repr() -> None:
    """A log call never fails for its arguments."""
    stream = io.StringIO()
    configure("json", "info", stream)
    structlog.get_logger().info("event", kind=ValueError, numbers={1, 2}, nothing=None, share=0.5)
    (line,) = lines(stream)

    assert line["kind"] == "<class 'ValueError'>"
    assert line["numbers"] == [1, 2]
    assert line["nothing"] is None
