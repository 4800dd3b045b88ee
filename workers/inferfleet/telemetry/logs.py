"""Logging of a process: one line per event, no secrets, no control characters, no flood.

The standard library's logging comes out the same way. The keys of lines are those of
:mod:`inferfleet.telemetry.vocabulary`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from inferfleet.config import Config
from inferfleet.telemetry.cleaning import Cleaner
from inferfleet.telemetry.ecs import ecs
from inferfleet.telemetry.limiting import Limiter

REPEAT_LINES, REPEAT_WINDOW_S = 5, 60.0
SERVICE = "inferfleet-"
"""What the name of a service starts with; a shared index has other people's workers too."""

log = structlog.get_logger(__name__)


class Logs:
    """The way of a process's lines; :meth:`finish` tells what was held back at the end."""

    def __init__(self, sink: _Sink, limiter: Limiter) -> None:
        self._sink = sink
        self.limiter = limiter

    def finish(self) -> None:
        """Tell how many repeats were held back since they were last told of; more lines may follow."""
        self.limiter.finish()


def configure_process(config: Config, role: str, node: str, release: str) -> Logs:
    """Let this process log as ``config`` says: ``role`` is ``worker`` or ``coordinator``, ``node`` its id.

    Threads that end by an exception are told of in the log too, and at the end what was held back.
    """
    context = {
        "fleet": config.fleet.name,
        "service": f"{SERVICE}{role}",
        "node": node,
        "release": release,
        "pid": os.getpid(),
    }
    logs = configure(
        config.log.format,
        config.log.level,
        secrets=config.known_secrets,
        context=context,
        repeat_lines=config.log.repeat_lines,
        repeat_window_s=config.log.repeat_window_s,
    )
    threading.excepthook = _thread_failed
    atexit.register(logs.finish)
    return logs


def configure(
    format: str = "auto",  # noqa: A002
    level: str = "info",
    stream: TextIO | None = None,
    secrets: Collection[str] = (),
    *,
    context: Mapping[str, object] | None = None,
    repeat_lines: int = REPEAT_LINES,
    repeat_window_s: float = REPEAT_WINDOW_S,
    clock: Callable[[], float] = time.monotonic,
) -> Logs:
    """Send structlog and the standard library's logging to ``stream`` (default: standard error).

    ``format`` is ``auto`` (console on a terminal, else json), ``json``, ``ecs`` or ``console``; ``secrets``
    are texts that never appear, wherever they come from, and may grow. ``context`` is in every line. Of equal
    warnings or errors ``repeat_lines`` are told in ``repeat_window_s`` seconds by ``clock``.
    """
    out = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    sink = _Sink(out)
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        _told_exception,
        Cleaner(secrets),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with(dict(context or {})),
    ]
    rendered = _renderers(format, out)

    def tell(event: dict[str, Any]) -> None:
        line: Any = event
        for processor in (*shared, *rendered):
            line = processor(sink, "warning", line)
        sink.msg(line)

    limiter = Limiter(repeat_lines, repeat_window_s, clock, tell)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, limiter, *shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    handler = _ToSink(sink)
    handler.addFilter(limiter.filter)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, _suppressed, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.captureWarnings(True)
    return Logs(sink, limiter)


class _Sink:
    """Writes whole lines, one at a time whoever logs.

    A log that cannot be written (a full disk, a reader that has gone) must not end a process that answers
    requests: such lines are lost.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # What interrupts a line, like a destructor that logs, may log on the same thread.
        self._lock = threading.RLock()

    def msg(self, line: str) -> None:
        """Write a line."""
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError, RuntimeError):
                return

    log = debug = info = warn = warning = error = critical = fatal = exception = msg


class _ToSink(logging.Handler):
    """Brings the standard library's lines to the sink."""

    def __init__(self, sink: _Sink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            # The usual handler would print the record's arguments as they are.
            said = (record.name, record.levelno, record.pathname, record.lineno, "log_line_failed: %s")
            line = self.format(logging.LogRecord(*said, (type(error).__name__,), None))
        self._sink.msg(line)


def _with(context: dict[str, object]) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.update(context)
        return event

    return add


def _suppressed(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add what the filter has noted at a library's record."""
    record = event.get("_record")
    count = getattr(record, "suppressed", 0)
    return {**event, "suppressed": count} if count else event


def _told_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace ``exc_info`` by the error's type, text and traceback.

    With ``private`` its text is left out: an error of the record path may quote what a caller has sent.
    """
    info = event.pop("exc_info", None)
    private = event.pop("private", False)
    if not info:
        return event
    error = (
        info if isinstance(info, BaseException) else (info if isinstance(info, tuple) else sys.exc_info())[1]
    )
    if error is None:
        return event
    event.setdefault("kind", type(error).__name__)
    if private:
        frames = traceback.format_list(traceback.extract_tb(error.__traceback__))
        event["exception"] = "".join([*frames, type(error).__name__])
    else:
        event.setdefault("error", str(error))
        event["exception"] = "".join(traceback.format_exception(error)).rstrip("\n")
    return event


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = "" if args.thread is None else args.thread.name
        log.error("thread_failed", thread=name, exc_info=args.exc_value)


def _renderers(format: str, stream: TextIO) -> list[Processor]:  # noqa: A002
    if format == "auto":
        format = "console" if stream.isatty() else "json"  # noqa: A001
    if format == "console":
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    return [ecs if format == "ecs" else _flat, _in_json]


def _flat(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Begin with what a person looks for in a line."""
    first = {key: event.pop(key, None) for key in ("timestamp", "level", "event")}
    return {**first, **event}


def _in_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except Exception:  # numbers beyond 64 bits
        return json.dumps(event, default=repr, ensure_ascii=False)
