"""The judge: it knows what was sent and what stands where, and nothing of how workers think.

Names of the invariants are those of the project's promises: I1 no loss, I2 no duplicate beyond what was in
flight, I3 nothing invented or crossed, I5 the watermark, I6 a clean end, I12 failures are complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from inferfleet.brokers.memory import MemoryBroker, Record
from inferfleet.errors import RULES, Code
from inferfleet.records import Stream
from inferfleet.results.memory import Reply, Stored
from inferfleet.testing.checksum import expected_checksum
from inferfleet.wire.stored import is_error
from tests.simulation.traffic import Request

Place = tuple[Stream, int]


class ViolationError(AssertionError):
    """An invariant is broken."""


@dataclass
class Outcomes:
    """What became of one request so far."""

    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    dead_letters: int = 0

    @property
    def told(self) -> int:
        """How many outcomes a reader of the result topic sees."""
        return self.answers + self.errors.total()


class Audit:
    """Reads the logs of the broker and the result store; raises :class:`ViolationError`."""

    def __init__(
        self,
        broker: MemoryBroker,
        group: str,
        outputs: Mapping[str, str],
        stores: Mapping[str, dict[tuple[str, str], Stored]],
        replies: Mapping[str, list[Reply]],
    ) -> None:
        self._broker = broker
        self._group = group
        self._outputs = outputs
        self._stores = stores
        self._replies = replies
        self._by_place: dict[Place, Request] = {}
        self._by_id: dict[str, Request] = {}
        self.outcomes: dict[str, Outcomes] = {}
        self.repeats: Counter[Place] = Counter()
        self.versions: dict[str, set[str]] = {}
        self._read: dict[Stream, int] = {}
        self._committed: dict[Stream, int] = {}
        self._standing: dict[tuple[str, str], bytes] = {}
        self.seen: Counter[str] = Counter()
        """What has happened at all: a run without faults proves little."""

    def sent(self, request: Request, stream: Stream, offset: int) -> None:
        """Remember an input record, and where it stands."""
        request.stream, request.offset = stream, offset
        self._by_place[stream, offset] = self._by_id[request.id] = request
        self.outcomes[request.id] = Outcomes()

    def may_repeat(self, stream: Stream, offset: int) -> None:
        """Allow one more outcome of a record: it was in flight when its worker let it go."""
        self.repeats[stream, offset] += 1

    # After every step

    def look(self) -> None:
        """Judge everything that is new."""
        for topic, route in self._outputs.items():
            for record in self._new(topic):
                if route:
                    self._judge_outcome(record, route)
                else:
                    self._judge_dead_letter(record)
        self._judge_store()
        self._judge_commits()

    def _new(self, topic: str) -> Iterable[Record]:
        for number in range(self._broker.partitions(topic)):
            stream = Stream(topic, number)
            records = self._broker.log(stream).records
            yield from records[self._read.get(stream, 0) :]
            self._read[stream] = len(records)

    def _judge_outcome(self, record: Record, route: str) -> None:
        headers = dict(record.headers or ())
        request = self._request((headers["inferfleet-id"] or b"").decode(), route)
        if record.key != request.key:
            raise ViolationError(
                f"I3: {request.id} is answered under key {record.key!r}, not {request.key!r}"
            )
        found = self.outcomes[request.id]
        if headers["inferfleet-status"] == b"ok":
            found.answers += 1
            self.seen["answer"] += 1
            self._judge_answer(request, record.value or b"", headers)
            if None not in request.expected:
                raise ViolationError(f"I12: {request.id} is answered; {_codes(request)} expected")
        else:
            code = (headers["inferfleet-code"] or b"").decode()
            found.errors[code] += 1
            self.seen[code] += 1
            body = json.loads(record.value or b"")
            if (body["id"], body["code"]) != (request.id, code):
                raise ViolationError(f"I3: the error of {request.id} says {body}")
            if Code(code) not in request.expected:
                raise ViolationError(
                    f"I12: {request.id} ends as {code} ({body['error']}); {_codes(request)} expected"
                )
        self.seen["repeated outcome"] += found.told > 1
        if found.told > 1 + self.repeats[request.stream, request.offset]:
            raise ViolationError(
                f"I2: {request.id} has outcome number {found.told} without having been in flight"
            )

    def _request(self, request_id: str, route: str) -> Request:
        request = self._by_id.get(request_id)
        if request is None or request.route != route:
            raise ViolationError(f"I3: an outcome of route {route} for {request_id}, which nobody sent there")
        return request

    def _judge_answer(self, request: Request, body: bytes, headers: Mapping[str, bytes | None]) -> None:
        length = headers.get("inference-header-content-length")
        text = json.loads(body if length is None else body[: int(length)])
        served = dict(part.split("=") for part in (headers["inferfleet-served"] or b"").decode().split(";"))
        version = served["version"]
        if (text["id"], text["model_version"], served["route"]) != (request.id, version, request.route):
            raise ViolationError(f"I3: {request.id} is answered by {served} with {text}")
        if length is None:
            found = text["outputs"][0]["data"]
        else:
            found = np.frombuffer(body[int(length) :], "<i8").tolist()
        right = [number for row in request.rows for number in expected_checksum(version, row)]
        if found != right:
            raise ViolationError(f"I3: {request.id} got {found}; version {version} must answer {right}")
        if version not in self.versions.get(request.route, {version}):
            raise ViolationError(f"I3: {request.id} is answered by version {version}, which serves nothing")

    def _judge_dead_letter(self, record: Record) -> None:
        headers = dict(record.headers or ())
        origin = [(headers[f"inferfleet-origin-{part}"] or b"").decode() for part in _ORIGIN]
        place = (Stream(origin[0], int(origin[1])), int(origin[2]))
        request = self._by_place.get(place)
        if request is None:
            raise ViolationError(f"I12: a dead letter for {place}, where nothing was sent")
        found = self.outcomes[request.id]
        found.dead_letters += 1
        if (record.key, record.value) != (request.key, request.value):
            raise ViolationError(f"I12: the dead letter of {request.id} is not what was sent: {record}")
        if (record.headers or [])[: len(request.headers)] != request.headers:
            raise ViolationError(f"I12: the dead letter of {request.id} has other headers: {record.headers}")
        code = Code((headers["inferfleet-code"] or b"").decode())
        if code not in request.expected:
            raise ViolationError(
                f"I12: a dead letter of {request.id} says {code}; {_codes(request)} expected"
            )
        if found.dead_letters > 1 + self.repeats[place]:
            raise ViolationError(f"I2: {request.id} has dead letter number {found.dead_letters}")

    def _judge_store(self) -> None:
        for route, store in self._stores.items():
            for key, (body, _) in store.items():
                before = self._standing.get(key)
                if body is before:
                    continue
                if before is not None and not is_error(before):
                    raise ViolationError(
                        f"I2: the stored answer of {key} has changed: {before!r} to {body!r}"
                    )
                request = self._request(key[1], route)
                self._standing[key] = body
                if is_error(body):
                    if request.expected == {None}:
                        raise ViolationError(f"I12: the store holds an error for {request.id}: {body!r}")
                elif request.rows:
                    self._judge_stored(request, body)
                else:
                    raise ViolationError(f"I12: the store holds an answer for {request.id}: {body!r}")

    def _judge_stored(self, request: Request, body: bytes) -> None:
        text = json.loads(body)
        found = text["outputs"][0]["data"]
        right = [number for row in request.rows for number in expected_checksum(text["model_version"], row)]
        if (text["id"], found) != (request.id, right):
            raise ViolationError(f"I3: the store holds {text} for {request.id}; {right} is right")

    def _judge_commits(self) -> None:
        for stream, position in self._broker.committed(self._group).items():
            before = self._committed.get(stream, 0)
            if position < before:
                raise ViolationError(f"I5: {stream} was committed to {before}, and goes back to {position}")
            for offset in range(before, position):
                request = self._by_place.get((stream, offset))
                if request is not None and (missing := self.missing(request)):
                    raise ViolationError(
                        f"I5: {stream} is committed to {position}; {request.id} lacks {missing}"
                    )
            self.seen["commit"] += position > before
            self._committed[stream] = position

    def missing(self, request: Request) -> str:
        """Return which durable part of a request's outcome does not exist yet; empty when it is complete."""
        found = self.outcomes[request.id]
        if not found.told:
            return "an outcome"
        buried = found.answers or found.dead_letters
        if not buried and any(RULES[Code(code)].dead_letter for code in found.errors):
            return "a dead letter"
        if request.route in self._stores and (request.route, request.id) not in self._stores[request.route]:
            return "a stored result"
        return ""

    # At the end

    def close(self) -> None:
        """Judge the whole once nothing moves any longer."""
        self.look()
        for request in self._by_id.values():
            if lacks := self.missing(request):
                raise ViolationError(f"I1: {request.id} at {request.stream}@{request.offset} lacks {lacks}")
            found = self.outcomes[request.id]
            again = self.repeats[request.stream, request.offset]
            if found.answers and found.errors and not again:
                raise ViolationError(f"I12: {request.id} has answers and errors: {found}")
            if found.dead_letters and not found.errors:
                raise ViolationError(f"I12: {request.id} has a dead letter and no error: {found}")
            if request.reply is not None:
                self._judge_reply(request)

    def _judge_reply(self, request: Request) -> None:
        entries = [each for each in self._replies.get(request.reply or "", ()) if each.id == request.id]
        if not entries:
            raise ViolationError(f"I1: the client of {request.id} got no reply on {request.reply}")
        # The store has no limit of its own: an answer too large for the topic is told to the client.
        if len(request.expected) > 1 or Code.RESULT_TOO_LARGE in request.expected:
            return
        for entry in entries:
            if (entry.status == "ok") != (None in request.expected):
                raise ViolationError(
                    f"I3: the client of {request.id} was told {entry.status}: {entry.body!r}"
                )


_ORIGIN = ("topic", "partition", "offset")


def _codes(request: Request) -> str:
    return " or ".join(sorted("an answer" if code is None else code.value for code in request.expected))
