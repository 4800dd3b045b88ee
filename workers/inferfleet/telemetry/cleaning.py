"""What is taken out of log lines before anybody sees them: secrets, line breaks, controls, excess length."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

from structlog.typing import EventDict, WrappedLogger

from inferfleet.tables import masked, secret_name

Formatter = Callable[[WrappedLogger, str, EventDict], EventDict]

MAX_TEXT = 2_000
"""Characters of one value. Container engines cut a line at 16 KiB, and half a line of JSON is none."""
MAX_TRACE = 8_000
"""Characters of a traceback; its end is kept, where the error is."""
MAX_ITEMS = 50

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])?")
# Halves of surrogate pairs are no characters: UTF-8 has no form for them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BREAKS = re.compile(r"[\r\n\t]+")
_secret = lru_cache(maxsize=1024)(secret_name)


class Cleaner:
    """A processor of structlog; ``secrets`` may grow while it is in use."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        self._secrets = secrets
        self._known = -1
        self._hidden: re.Pattern[str] | None = None

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Return the line's keys with values that may be seen."""
        if len(self._secrets) != self._known:
            self._learn()
        return {key: value if key[:1] == "_" else self._value(key, value) for key, value in event.items()}

    def text(self, text: str, *, one_line: bool = True, longest: int = MAX_TEXT) -> str:
        """Return ``text`` as it may be seen."""
        if len(self._secrets) != self._known:
            self._learn()
        return self._text(text, one_line, longest)

    def _learn(self) -> None:
        secrets = tuple(self._secrets)
        # Longest first: a secret may be the beginning of another one.
        hidden = sorted({each for each in secrets if each}, key=len, reverse=True)
        self._hidden = re.compile("|".join(map(re.escape, hidden))) if hidden else None
        # Last: until then every other thread learns for itself.
        self._known = len(secrets)

    def _text(self, text: str, one_line: bool = True, longest: int = MAX_TEXT) -> str:
        if self._hidden is not None:
            text = self._hidden.sub("***", text)
        if not text.isprintable():
            text = _ANSI.sub("", text)
            if one_line:
                text = _BREAKS.sub(" ", text)
            text = _CONTROL.sub("", text)
        if len(text) > longest:
            left_out = len(text) - longest
            if one_line:
                return f"{text[:longest]}... ({left_out} characters left out)"
            return f"({left_out} characters left out) ...{text[-longest:]}"
        return text

    def _value(self, key: str, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if _secret(key):
            return masked(key, value)
        if isinstance(value, str):
            if "://" in value:
                value = masked("", value)
            if key == "exception":
                return self._text(value, False, MAX_TRACE)
            return self._text(value)
        if isinstance(value, int | float):
            return value
        if isinstance(value, dict):
            few = list(value.items())[:MAX_ITEMS]
            return {self._text(str(name)): self._value(str(name), each) for name, each in few}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value(key, each) for each in list(value)[:MAX_ITEMS]]
        return self._value(key, repr(value))
