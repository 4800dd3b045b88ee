"""Dead letters as an operator handles them: what they say, which are meant, and what goes out again. Pure."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

from inferfleet.errors import RULES, Code
from inferfleet.records import Amqp, Header
from inferfleet.routes import Route
from inferfleet.wire.headers import CODE, FAR_DEADLINE_MS, ID, NOT_BEFORE, SERVED, Meta, read_headers
from inferfleet.wire.request import find_id
from inferfleet.worker.deadletter import CUT
from inferfleet.worker.retries import ATTEMPT, OFFSET, PARTITION, TIMESTAMP, TOPIC

ERROR = "inferfleet-error"
FAILED_AT = "inferfleet-failed-at"
_ORIGIN = (TOPIC, PARTITION, OFFSET, TIMESTAMP)
_OURS = frozenset((*_ORIGIN, CODE, ERROR, ATTEMPT, FAILED_AT, SERVED))
_ID_HEADERS = frozenset((ID, "ce_id", "ce-id"))
_BROKERS_OWN = ("x-death", "x-delivery-count", "x-first-death-", "x-last-death-", "x-acquired-count")
"""What RabbitMQ adds to a message that waits, is given back, or comes from another queue."""
_SPAN = re.compile(r"(\d{1,6}(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead letter. ``body`` is the request's, untouched; ``headers`` are in order, repeated ones too.

    A letter from a queue has ``amqp``; its ``offset`` is where it stood when the queue was looked at, from 1.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    body: bytes
    headers: tuple[tuple[str, bytes | None], ...]
    amqp: Amqp | None = None
    redriven: bool = False

    def header(self, name: str) -> str:
        """Return a header's text, ``""`` where it is absent; names are compared in lower case.

        The last of that name is taken: inferfleet's own stand behind the caller's.
        """
        for key, value in reversed(self.headers):
            if key.lower() == name:
                return "" if value is None else value.decode(errors="replace")
        return ""

    @property
    def id(self) -> str:
        """The request's id as its headers or its body say it; without one, what it was called instead."""
        named = next((value for name, value in self.headers if name.lower() == ID), None)
        if named:
            return named.decode(errors="replace")
        own = id_of(original_headers(self), self.body)
        if own is not None:
            return own
        if self.amqp is not None:
            return self.amqp.message_id or self.amqp.correlation_id or ""
        names = ("topic", "partition", "offset")
        return "-".join(filter(None, (self.header(f"inferfleet-origin-{name}") for name in names)))

    @property
    def place(self) -> str:
        """What ``show`` and ``redrive`` take: partition and offset, or on RabbitMQ its place in the queue."""
        return f"{self.partition}:{self.offset}" if self.amqp is None else str(self.offset)

    @property
    def code(self) -> str:
        """Why the request failed, such as ``E_MODEL``."""
        return self.header(CODE)

    @property
    def cut(self) -> str:
        """What is missing of the request, ``""`` where nothing is."""
        return self.header(CUT)

    @property
    def origin(self) -> str:
        """Where the request came from, ``topic[partition]@offset``."""
        topic, partition, offset = (self.header(name) for name in (TOPIC, PARTITION, OFFSET))
        return f"{topic}[{partition}]@{offset}" if topic else ""

    @property
    def failed_ms(self) -> int | None:
        """When the request failed, epoch milliseconds."""
        text = self.header(FAILED_AT)
        return int(text) if text.isdecimal() and len(text) < 18 else None

    @property
    def model(self) -> tuple[str, str]:
        """The model and the version that failed the request; no version where none had it yet."""
        said = dict(part.partition("=")[::2] for part in self.header(SERVED).split(";"))
        return said.get("model", ""), said.get("version", "")

    def as_plain(self) -> dict[str, Any]:
        """Return what JSON can carry: bytes that are not UTF-8 stand in base64 under a name that says so."""
        kafka = {"topic": self.topic, "partition": self.partition, "offset": self.offset}
        return {
            **(kafka if self.amqp is None else {"queue": self.topic, "position": self.offset}),
            "place": self.place,
            "id": self.id,
            "failed_at": failed_at(self),
            "redriven": self.redriven,
            **_plain_bytes("key", self.key),
            "headers": [{"name": name, **_plain_bytes("value", value)} for name, value in self.headers],
            **_plain_bytes("body", self.body),
        }


def _plain_bytes(name: str, value: bytes | None) -> dict[str, str | None]:
    try:
        return {name: None if value is None else value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value or b"").decode()}


def failed_at(letter: DeadLetter) -> str:
    """Return when the request failed, ISO 8601; a header of epoch milliseconds is translated."""
    failed_ms = letter.failed_ms
    if failed_ms is None:
        return letter.header(FAILED_AT)
    try:
        return datetime.fromtimestamp(failed_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return letter.header(FAILED_AT)


def instant_ms(text: str, now_ms: int) -> int:
    """Return the epoch milliseconds of an ISO instant (UTC unless it says otherwise), or of ``2h`` ago.

    Raises ValueError for what is neither.
    """
    span = _SPAN.fullmatch(text)
    if span is not None:
        return now_ms - int(float(span[1]) * _SECONDS[span[2]] * 1000)
    instant = datetime.fromisoformat(text)
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp() * 1000)


class Wanted(NamedTuple):
    """Which letters are meant: of these codes, of this model or version, failed within these times."""

    codes: frozenset[str] = frozenset()
    model: str = ""
    since_ms: int | None = None
    until_ms: int | None = None

    def fits(self, letter: DeadLetter) -> bool:
        """Return whether a letter is meant; one that does not say when it failed fits no time."""
        if self.codes and letter.code not in self.codes:
            return False
        if self.model and self.model not in (letter.model[0], ":".join(letter.model)):
            return False
        if self.since_ms is None and self.until_ms is None:
            return True
        failed_ms = letter.failed_ms
        if failed_ms is None:
            return False
        until_ms = FAR_DEADLINE_MS if self.until_ms is None else self.until_ms
        return (self.since_ms or 0) <= failed_ms <= until_ms


EVERYTHING = Wanted()

Verdict = Literal["send", "other", "redriven", "cut", "caller", "late"]


class Choice:
    """Which letters a redrive sends. ``places`` are those named one by one, by place or by id.

    A letter whose fault is its caller's, or whose deadline has passed, would only fail again: it goes if it
    is named. One that was redriven goes again if it is named and ``again`` says so. A cut one never goes.
    """

    def __init__(
        self,
        route: Route,
        wanted: Wanted,
        places: Collection[str] = (),
        *,
        again: bool = False,
        limit: int | None = None,
    ) -> None:
        self.limit = limit
        self.named = frozenset(places)
        self.found: set[str] = set()
        """Which of the named places were there."""
        self.chosen: Counter[str] = Counter()
        """How many go, by code."""
        self.skipped: Counter[str] = Counter()
        """How many do not, by verdict."""
        self.caller_codes: Counter[str] = Counter()
        self.cut: list[str] = []
        """The places of letters that were cut."""
        self._route = route
        self._wanted = wanted
        self._again = again

    @property
    def full(self) -> bool:
        """Whether no more may go."""
        return self.limit is not None and self.chosen.total() >= self.limit

    @property
    def missing(self) -> list[str]:
        """Return the named places that nobody has seen."""
        return sorted(self.named - self.found)

    def takes(self, letter: DeadLetter, now_ms: int) -> bool:
        """Return whether a letter goes, and count it."""
        verdict = self._judge(letter, now_ms)
        if verdict == "send" and not self.full:
            self.chosen[letter.code] += 1
            return True
        if verdict == "cut":
            self.cut.append(letter.place)
        elif verdict == "caller":
            self.caller_codes[letter.code] += 1
        self.skipped["over" if verdict == "send" else verdict] += 1
        return False

    def _judge(self, letter: DeadLetter, now_ms: int) -> Verdict:
        named = self.named & {letter.place, letter.id} if self.named else self.named
        self.found |= named
        if (self.named and not named) or not self._wanted.fits(letter):
            return "other"
        if letter.redriven and not (named and self._again):
            return "redriven"
        if letter.cut:
            return "cut"
        if named:
            return "send"
        if letter.code not in self._wanted.codes and _is_callers(letter.code):
            return "caller"
        return "late" if _is_late(self._route, letter, now_ms) else "send"


def _is_callers(code: str) -> bool:
    return code in set(Code) and RULES[Code(code)].fault == "caller"


def _is_late(route: Route, letter: DeadLetter, now_ms: int) -> bool:
    """Return whether nobody wants the answer any more: by the request's own deadline, else by its route's."""
    deadline_ms = _meta(original_headers(letter)).deadline_ms
    if deadline_ms is None and route.deadline_ms is not None:
        stamp = letter.header(TIMESTAMP)
        sent_ms = int(stamp) if stamp.isdecimal() and len(stamp) < 18 else 0
        deadline_ms = sent_ms + route.deadline_ms if sent_ms > 0 else None
    return deadline_ms is not None and deadline_ms <= now_ms


def original_headers(letter: DeadLetter) -> list[Header]:
    """Return the headers that the caller sent: all but the last of each name that a dead letter adds."""
    ours: set[str] = set()
    original: list[Header] = []
    for name, value in reversed(letter.headers):
        if name in _OURS and name not in ours:
            ours.add(name)
        elif not name.startswith(_BROKERS_OWN):
            original.append((name, value))
    original.reverse()
    return original


def redriven_headers(letter: DeadLetter, now_ms: int) -> list[Header]:
    """Return the headers of the record that asks for a first attempt again, now.

    An id that the request has only by where it stood is put in front.
    """
    original = original_headers(letter)
    named: list[Header] = []
    has_id = any(name.lower() in _ID_HEADERS for name, _ in original)
    if letter.id and not has_id and id_of(original, letter.body) is None:
        named = [(ID, letter.id.encode(errors="replace"))]
    # A letter that is not ours may lack a header; the worker then takes the record for where it stands.
    origin: list[Header] = [(name, letter.header(name).encode()) for name in _ORIGIN if letter.header(name)]
    return [*named, *original, *origin, (ATTEMPT, b"1"), (NOT_BEFORE, b"%d" % now_ms)]


def id_of(original: Sequence[Header], body: bytes) -> str | None:
    """Return the id that a request names itself, in its headers or its body.

    With plain columns a model's own input may be called id; such a text is taken for the request's.
    """
    said = _meta(original)
    return said.id if said.id is not None or said.json_length == 0 else find_id(body[: said.json_length])


def _meta(headers: Sequence[Header]) -> Meta:
    found = read_headers([list(headers) or None]).metas
    return Meta() if found is None else found[0]


def without_ours(amqp: Amqp) -> Amqp:
    """Return what RabbitMQ carries beside a letter, without what we and the broker have added."""
    if amqp.table is None:
        return amqp
    table = {
        name: value
        for name, value in amqp.table.items()
        if name.lower() not in _OURS and not name.startswith(_BROKERS_OWN)
    }
    return amqp._replace(table=table)
