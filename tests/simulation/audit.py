"""The judge: it knows what was sent and what stands where, and nothing of how workers think.

Names of the invariants are those of the project's promises: I1 no loss, I2 no duplicate beyond what was in
flight, I3 nothing invented or crossed, I5 the watermark, I6 a clean end, I12 failures are complete. A request
that waits for another attempt is not lost: it is where its last attempt was written.
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
from inferfleet.worker.retries import OURS
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
    retries: Counter[int] = field(default_factory=Counter)
    """How often each attempt but the first was asked for."""

    @property
    def attempt(self) -> int:
        """The latest attempt that was asked for."""
        return max(self.retries, default=1)

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
        retries: Mapping[str, int] | None = None,
    ) -> None:
        """``outputs`` maps result topics to routes, ``retries`` retry topics to the attempt they are for."""
        self._broker = broker
        self._groups = (group, f"{group}.retry")
        self._outputs = outputs
        self._retries = retries or {}
        self._stores = stores
        self._replies = replies
        self._by_place: dict[Place, Request] = {}
        self._by_id: dict[str, Request] = {}
        self.outcomes: dict[str, Outcomes] = {}
        self._by_number: dict[int, Request] = {}
        self.repeats: Counter[Place] = Counter()
        self.versions: dict[str, set[str]] = {}
        self._read: dict[Stream, int] = {}
        self._committed: dict[Stream, int] = {}
        self._standing: dict[tuple[str, str], bytes] = {}
        self.spoilt: set[str] = set()
        """Requests that have failed only because a model failed on everything, on their first attempts."""
        self.may_spoil = 0
        """How many of these the brakes let pass."""
        self.was_broken = False
        self.seen: Counter[str] = Counter()
        """What has happened at all: a run without faults proves little."""

    def sent(self, request: Request, stream: Stream, offset: int) -> None:
        """Remember an input record, and where it stands."""
        request.stream, request.offset = stream, offset
        request.timestamp_ms = self._broker.log(stream).records[-1].timestamp_ms
        if not request.named:
            request.id = f"{stream.source}-{stream.partition}-{offset}"
        self._by_place[stream, offset] = self._by_id[request.id] = request
        self.outcomes[request.id] = Outcomes()
        if request.fails:
            self._by_number[int(request.rows[0][1])] = request

    def may_repeat(self, stream: Stream, offset: int) -> None:
        """Allow one more outcome of a record: it was in flight when its worker let it go."""
        if stream.source in self._retries:
            log = self._broker.log(stream)
            stream, offset = _origin(log.records[log.first_at(offset)])
        self.repeats[stream, offset] += 1

    def attempts(self, number: int) -> int:
        """Return how many attempts the request of this number has had, with the one that was asked for."""
        request = self._by_number[number]
        place = (request.stream, request.offset)
        latest = self.outcomes[request.id].attempt
        for topic, attempt in self._retries.items():
            if attempt > latest and any(_origin(record) == place for record in self._unread(topic)):
                latest = attempt
        return latest

    # After every step

    def look(self) -> None:
        """Judge everything that is new."""
        for topic, route in self._outputs.items():
            for record in self._new(topic):
                if route:
                    self._judge_outcome(record, route)
                else:
                    self._judge_dead_letter(record)
        for topic, attempt in self._retries.items():
            for record in self._new(topic):
                self._judge_retry(record, attempt)
        self._judge_store()
        self._judge_commits()

    def _unread(self, topic: str) -> Iterable[Record]:
        for number in range(self._broker.partitions(topic)):
            stream = Stream(topic, number)
            yield from self._broker.log(stream).records[self._read.get(stream, 0) :]

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
            if Code(code) not in request.expected and not self._spoilt(request, code):
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

    def _spoilt(self, request: Request, code: str, attempt: int = 1) -> bool:
        """Return whether a model that fails on everything may have failed a request, and count it."""
        if not self.was_broken or code != Code.MODEL:
            return False
        if attempt == 1 and self.outcomes[request.id].attempt == 1:
            self.spoilt.add(request.id)
        if len(self.spoilt) > self.may_spoil:
            raise ViolationError(
                f"I12: {request.id} is number {len(self.spoilt)} that a broken model has spoilt; "
                f"the brakes let {self.may_spoil} pass"
            )
        self.seen["spoilt"] += 1
        return True

    def _sent_at(self, record: Record, what: str) -> Request:
        """Return the request that a record says it was; it must be what was sent, behind a leading id."""
        place = _origin(record)
        request = self._by_place.get(place)
        if request is None:
            raise ViolationError(f"I12: {what} for {place}, where nothing was sent")
        if (record.key, record.value) != (request.key, request.value):
            raise ViolationError(f"I12: {what} of {request.id} is not what was sent: {record}")
        return request

    def _judge_dead_letter(self, record: Record) -> None:
        request = self._sent_at(record, "a dead letter")
        headers, found = dict(record.headers or ()), self.outcomes[request.id]
        place = (request.stream, request.offset)
        found.dead_letters += 1
        if (record.headers or [])[: len(request.headers)] != request.headers:
            raise ViolationError(f"I12: the dead letter of {request.id} has other headers: {record.headers}")
        code = Code((headers["inferfleet-code"] or b"").decode())
        attempt = int(headers["inferfleet-attempt"] or b"")
        expected = code in request.expected
        if not expected and not self._spoilt(request, code, attempt):
            raise ViolationError(
                f"I12: a dead letter of {request.id} says {code}; {_codes(request)} expected"
            )
        if attempt != request.attempts and not (self.was_broken and code is Code.MODEL):
            raise ViolationError(
                f"I12: the dead letter of {request.id} is of attempt {attempt}, not {request.attempts}"
            )
        self.seen["used up"] += attempt > 1
        if found.dead_letters > 1 + self.repeats[place]:
            raise ViolationError(f"I2: {request.id} has dead letter number {found.dead_letters}")

    def _judge_retry(self, record: Record, attempt: int) -> None:
        request = self._sent_at(record, "another attempt")
        headers, found = record.headers or [], self.outcomes[request.id]
        own = dict(headers[-len(OURS) :])
        if not request.named:
            if headers[0] != ("inferfleet-id", request.id.encode()):
                raise ViolationError(f"I12: {request.id} is tried again under no name: {headers}")
            headers = headers[1:]
        if headers[: -len(OURS)] != request.headers or tuple(own) != OURS:
            raise ViolationError(f"I12: {request.id} is tried again with other headers: {headers}")
        said = [int(own[f"inferfleet-{name}"] or b"") for name in ("attempt", "origin-timestamp")]
        if said != [attempt, request.timestamp_ms]:
            raise ViolationError(f"I12: {request.id} is tried again as {said}, not {attempt}")
        if attempt > request.attempts or attempt > found.attempt + 1:
            raise ViolationError(f"I12: {request.id} is tried for attempt {attempt} after {found.attempt}")
        found.retries[attempt] += 1
        self.seen["retry"] += 1
        if found.retries[attempt] > 1 + self.repeats[request.stream, request.offset]:
            raise ViolationError(f"I2: {request.id} waits {found.retries[attempt]} times for {attempt}")

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
                    if request.expected == {None} and not self._spoilt(request, Code.MODEL):
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
        for group in self._groups:
            for stream, position in self._broker.committed(group).items():
                before = self._committed.get(stream, 0)
                if position < before:
                    raise ViolationError(
                        f"I5: {stream} was committed to {before}, and goes back to {position}"
                    )
                self._judge_settled(stream, before, position)
                self.seen["commit"] += position > before
                self._committed[stream] = position

    def _judge_settled(self, stream: Stream, before: int, position: int) -> None:
        attempt = self._retries.get(stream.source, 1)
        log = self._broker.log(stream)
        for record in log.records[log.first_at(before) : log.first_at(position)]:
            place = (stream, record.offset) if attempt == 1 else _origin(record)
            request = self._by_place.get(place)
            if request is None or self.outcomes[request.id].attempt > attempt:
                continue  # what waits for its next attempt stands there
            if missing := self.missing(request):
                raise ViolationError(f"I5: {stream} is committed to {position}; {request.id} lacks {missing}")

    def missing(self, request: Request) -> str:
        """Return which durable part of a request's outcome does not exist yet; empty when it is complete."""
        found = self.outcomes[request.id]
        if not found.told:
            return "an outcome"
        buried = found.answers or found.dead_letters
        if not buried and all(RULES[Code(code)].dead_letter for code in found.errors):
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
            if found.dead_letters and not found.errors and not (self.was_broken and again):
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
            if (entry.status == "ok") != (None in request.expected) and not self.was_broken:
                raise ViolationError(
                    f"I3: the client of {request.id} was told {entry.status}: {entry.body!r}"
                )


def _origin(record: Record) -> Place:
    """Return the place that a record says it stood at first: our headers stand behind those of a caller."""
    headers = dict(record.headers or ())
    try:
        parts = [headers[f"inferfleet-origin-{part}"] or b"" for part in ("topic", "partition", "offset")]
        topic, partition, offset = [part.decode() for part in parts]
        return Stream(topic, int(partition)), int(offset)
    except (KeyError, ValueError):
        raise ViolationError(f"I12: {record} does not say where it stood first") from None


def _codes(request: Request) -> str:
    return " or ".join(sorted("an answer" if code is None else code.value for code in request.expected))
