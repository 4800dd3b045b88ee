"""Labels and outcomes as they stand in topics, read for a rollout's evidence."""

from __future__ import annotations

from typing import Any

import msgspec

from inferfleet.feedback import FIRST, Answered, Label, Sought
from inferfleet.records import Headers
from inferfleet.wire import headers as names

MAX_VALUES = 32
MAX_ROWS = 1024
MAX_VALUE = 1e100
"""Above it squares may not be finite any more, and a sum of them would say nothing."""
MAX_CLASS = 2**53
MAX_DIGITS = 18

_LABEL = msgspec.json.Decoder(dict[str, Any])


class _Output(msgspec.Struct):
    name: str = ""
    shape: list[int] = []
    data: list[Any] = []


class _Outputs(msgspec.Struct):
    outputs: list[_Output] = []
    model_version: str = ""


_OUTPUTS = msgspec.json.Decoder(_Outputs)


def read_label(body: bytes, headers: Headers | None, at_ms: int) -> Label | None:
    """Return the label that a message holds, ``None`` where it holds none.

    The body is a JSON object. Its id stands in the header ``inferfleet-id`` or under ``id``; ``label`` is the
    true class, one for each row; every other number, true or false is the value of a metric.
    """
    try:
        said = _LABEL.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    request_id = _text(headers, names.ID) or said.pop("id", "")
    said.pop("id", None)
    classes = _classes(said.pop("label", None))
    values = {
        key: float(value)
        for key, value in said.items()
        if isinstance(value, int | float) and abs(value) <= MAX_VALUE
    }
    if not isinstance(request_id, str) or not request_id or len(values) > MAX_VALUES:
        return None
    if len(request_id.encode()) > names.MAX_ID_BYTES:
        return None
    if not values and classes is None:
        return None
    return Label(request_id, at_ms, values, classes)


class AnswerReader:
    """Reads outcomes of a route; outcomes of others, and of revisions before the rollout, are ``None``.

    What was served by the stable version because its own was gone (``fallback=1``) counts for nobody.
    """

    def __init__(self, sought: Sought) -> None:
        self._sought = sought
        self._served: dict[str, tuple[str, str] | None] = {}

    def read(self, key: bytes | None, headers: Headers | None, body: bytes, at_ms: int) -> Answered | None:
        """Return who answered which request; the classes too where they are wanted and stand there."""
        request_id, served = _text(headers, names.ID), _text(headers, names.SERVED)
        if not request_id or not served or len(request_id.encode()) > names.MAX_ID_BYTES:
            return None
        if served not in self._served:
            if len(self._served) > 10_000:
                self._served.clear()
            self._served[served] = self._who(served)
        who = self._served[served]
        if who is None:
            return None
        classes = None
        if self._sought.output:
            failed = _text(headers, names.STATUS) == "error"
            classes = () if failed else classes_of(body, self._sought.output)
        return Answered(request_id, *who, key or request_id.encode(), at_ms, classes)

    def _who(self, served: str) -> tuple[str, str] | None:
        said = dict(part.partition("=")[::2] for part in served.split(";"))
        version, revision = said.get("version", ""), said.get("revision", "")
        if said.get("route") != self._sought.route or version not in self._sought.versions:
            return None
        if "fallback" in said or not revision.isdecimal() or len(revision) > MAX_DIGITS:
            return None
        if int(revision) < self._sought.since_revision:
            return None
        return version, said.get("variant", "")


def classes_of(body: bytes, output: str) -> tuple[int, ...] | None:
    """Return the largest entry of each row of an output in a JSON answer; ``None`` where it is not there.

    An output of one number for each row holds the class itself.
    """
    try:
        found = _OUTPUTS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    for each in found.outputs:
        if output in (each.name, FIRST) and each.shape and 0 < each.shape[0] <= MAX_ROWS:
            rows = each.shape[0]
            width = len(each.data) // rows
            if width < 1 or width * rows != len(each.data):
                return None
            if not all(isinstance(value, int | float) for value in each.data):
                return None
            if width == 1:
                return tuple(int(value) for value in each.data)
            parts = (each.data[row * width : (row + 1) * width] for row in range(rows))
            return tuple(part.index(max(part)) for part in parts)
    return None


def _classes(value: object) -> tuple[int, ...] | None:
    listed: list[object] = value if isinstance(value, list) else [value]
    whole = [int(each) for each in listed if isinstance(each, int | float) and _is_class(each)]
    return tuple(whole) if 0 < len(whole) == len(listed) <= MAX_ROWS else None


def _is_class(value: float) -> bool:
    return abs(value) <= MAX_CLASS and float(value).is_integer()


def _text(headers: Headers | None, name: str) -> str:
    for key, value in headers or ():
        if value is not None and key.lower() == name:
            return value.decode("utf-8", "replace")
    return ""
