"""Logging of a process: one line per event, no secrets, no control characters, standard library included."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from inferfleet.tables import masked

Formatter = Callable[[WrappedLogger, str, EventDict], EventDict]

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_BREAKS = re.compile(r"[\r\n\t]+")


def configure(
    format: str = "auto",  # noqa: A002
    level: str = "info",
    stream: TextIO | None = None,
    secrets: Iterable[str] = (),
) -> None:
    """Send structlog and the standard library's logging to ``stream`` (default: standard error).

    ``format`` is ``auto`` (console on a terminal, else json), ``json``, ``ecs`` or ``console``; ``secrets``
    are texts that never appear, wherever they come from.
    """
    out = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        cleaner(secrets),
    ]
    rendered = _renderers(format, out)
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.captureWarnings(True)


def _renderers(format: str, stream: TextIO) -> list[Processor]:  # noqa: A002
    if format == "auto":
        format = "console" if stream.isatty() else "json"  # noqa: A001
    if format == "console":
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    json = structlog.processors.JSONRenderer(serializer=_to_json)
    return [_ecs, json] if format == "ecs" else [json]


def _to_json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()


_ECS_NAMES = {
    "timestamp": "@timestamp",
    "level": "log.level",
    "event": "message",
    "exception": "error.stack_trace",
}


def _ecs(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Rename to Elastic's common schema."""
    return {"ecs.version": "8.11"} | {_ECS_NAMES.get(key, key): value for key, value in event.items()}


def cleaner(secrets: Iterable[str] = ()) -> Formatter:
    """Return a processor that masks secrets and takes out line breaks, controls and ANSI sequences."""
    hidden = sorted({each for each in secrets if each}, key=len, reverse=True)

    def clean_text(text: str, one_line: bool = True) -> str:
        for secret in hidden:
            text = text.replace(secret, "***")
        text = _ANSI.sub("", text)
        if one_line:
            text = _BREAKS.sub(" ", text)
        return _CONTROL.sub("", text)

    def clean_value(key: str, value: Any) -> Any:
        value = masked(key, value)
        if isinstance(value, str):
            return clean_text(value, one_line=key != "exception")
        if isinstance(value, dict):
            return {clean_text(str(name)): clean_value(str(name), each) for name, each in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [clean_value(key, each) for each in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return clean_text(repr(value)) if not isinstance(value, logging.LogRecord) else value

    def clean(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {
            key: value if key.startswith("_") else clean_value(key, value) for key, value in event.items()
        }

    return clean
