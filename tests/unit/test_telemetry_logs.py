"""A log line is one line, of a known shape, and holds no secret."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from inferfleet.config import parse
from inferfleet.telemetry.cleaning import MAX_ITEMS, MAX_TEXT, MAX_TRACE
from inferfleet.telemetry.logs import configure, configure_process


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
    """Return the lines so far; a thread that another test has left behind may log, too."""
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in found if line.get("logger", "library") == "library"]


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


def test_the_process_is_named_in_each_line() -> None:
    """Lines of libraries too, and whichever thread they come from."""
    stream = io.StringIO()
    configure("json", "info", stream, context={"fleet": "f", "service": "inferfleet-worker", "node": "w-1"})
    structlog.get_logger().info("one")
    logging.getLogger("library").warning("two")
    thread = threading.Thread(target=lambda: structlog.get_logger().info("three"))
    thread.start()
    thread.join()

    assert [(line["fleet"], line["node"]) for line in lines(stream)] == [("f", "w-1")] * 3


def test_what_a_thread_has_bound_is_in_its_lines() -> None:
    """Batch and trace are bound where a batch runs."""
    stream = io.StringIO()
    configure("json", "info", stream)
    with structlog.contextvars.bound_contextvars(batch=7, trace_id="0" * 32):
        structlog.get_logger().info("inside")
    structlog.get_logger().info("outside")
    inside, outside = lines(stream)

    assert (inside["batch"], inside["trace_id"]) == (7, "0" * 32)
    assert "batch" not in outside


@pytest.mark.parametrize("form", ["json", "ecs"])
def test_a_traceback_is_part_of_its_line(form: str) -> None:
    """With the error's type and text beside it, to be searched for."""
    stream = io.StringIO()
    configure(form, "info", stream)
    try:
        raise KeyError("shelf")
    except KeyError:
        structlog.get_logger().exception("failed", route="r")
    (line,) = lines(stream)
    error = line["error"] if form == "ecs" else None
    found = error if isinstance(error, dict) else {
        "type": line.get("kind"), "message": line.get("error"), "stack_trace": line.get("exception")
    }  # fmt: skip

    assert (found["type"], found["message"]) == ("KeyError", "'shelf'")
    assert str(found["stack_trace"]).startswith("Traceback")
    assert "\n" in str(found["stack_trace"])


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
def test_a_private_error_shows_its_place_and_not_its_words(form: str) -> None:
    """An error of the record path may quote what a caller has sent, its causes too."""
    stream = io.StringIO()
    configure(form, "info", stream)
    words = ["canary", "one", "two"]
    try:
        try:
            int("-".join(words))
        except ValueError as error:
            raise KeyError(*words) from error
    except KeyError as error:
        structlog.get_logger().error("answer_not_written", exc_info=error, private=True)

    assert "canary-one" not in stream.getvalue()
    assert "KeyError" in stream.getvalue()
    assert "test_telemetry_logs.py" in stream.getvalue()


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
def test_a_line_has_a_bound(form: str) -> None:
    """Container engines cut lines at 16 KiB: what is too long is cut before, and says so."""
    stream = io.StringIO()
    configure(form, "info", stream)
    try:
        raise ValueError("y" * 1_000_000)
    except ValueError:
        structlog.get_logger().exception("failed", error="x" * 1_000_000, ids=["i" * 5] * 10_000)
    text = stream.getvalue()

    assert len(text) < MAX_TEXT + MAX_TRACE + MAX_ITEMS * 10 + 1000
    assert "characters left out" in text


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
@pytest.mark.parametrize("value", [2**80, "\ud800", b"\xff\x00", float("inf"), object(), {1: {2: {3}}}])
def test_no_value_makes_a_log_call_fail(form: str, value: object) -> None:
    """Nor does it break the line."""
    stream = io.StringIO()
    configure(form, "info", stream)
    structlog.get_logger().warning("odd", reason=value, strange=value)

    assert len(stream.getvalue().splitlines()) == 1
    stream.getvalue().encode()


class Full(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    """A full disk costs lines, never an answer."""
    configure("json", "info", Full())
    structlog.get_logger().error("lost")
    logging.getLogger("library").error("lost too")


@pytest.mark.parametrize("form", ["json", "ecs", "console"])
def test_a_librarys_line_that_cannot_be_formatted_is_one_line_without_its_arguments(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual handler prints them on standard error, whatever they hold."""
    stream = io.StringIO()
    configure(form, stream=stream)
    broken = ("%d of %s", "marked-1", "marked-2", "marked-3")
    logging.getLogger("library").error(*broken)

    (line,) = stream.getvalue().splitlines()
    assert "log_line_failed" in line
    assert "marked" not in line + "".join(capsys.readouterr())


def test_what_interrupts_a_line_may_log_on_the_same_thread() -> None:
    """A destructor may: its line must not wait for the one that it interrupts."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "first" in text:
                structlog.get_logger().warning("second")
            return super().write(text)

    stream = Interrupted()
    configure("json", stream=stream)
    caller = threading.Thread(target=lambda: structlog.get_logger().warning("first"), daemon=True)
    caller.start()
    caller.join(20)
    assert not caller.is_alive()
    assert sorted(json.loads(line)["event"] for line in stream.getvalue().splitlines()) == ["first", "second"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_masks_what_it_reads_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Passwords in URLs, in files, and in files that were rotated meanwhile; a thread's end is one line."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    (tmp_path / "password").write_text("canary-first\n")
    config = parse(
        """
        [redis]
        url = "rediss://user:canary%2Furl@host/0"
        password_file = "password"
        [rabbitmq]
        url = "amqp://u:canary-a@one/, amqp://u:canary-b@two/"
        [kafka.client]
        "sasl.password" = "canary-sasl"
        [log]
        format = "json"
        """,
        base=tmp_path,
    )
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    configure_process(config, "worker", "w-1", "1.0")
    log = structlog.get_logger()
    log.info("before", reason="canary-first canary/url canary%2Furl canary-a canary-b canary-sasl")
    (tmp_path / "password").write_text("canary-second\n")
    assert config.current("redis.password") == "canary-second"
    log.info("after", reason="canary-first canary-second")

    def fail() -> None:
        raise ValueError("canary-second")

    thread = threading.Thread(target=fail, name="t-1")
    thread.start()
    thread.join()
    found = lines(stream)

    assert "canary" not in stream.getvalue()
    assert (found[-1]["event"], found[-1]["thread"], found[-1]["error"]) == ("thread_failed", "t-1", "***")
    assert found[0]["service"] == "inferfleet-worker"
    assert capsys.readouterr().err == ""
