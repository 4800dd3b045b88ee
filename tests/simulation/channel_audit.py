"""The judge of a fleet on RabbitMQ: it knows what was sent, and hears of every message and acknowledgement.

A request is told from others by its key, which every message of its way carries: the ones that come again,
its attempts, its outcomes and its letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from inferfleet.addresses import REPLY
from inferfleet.errors import RULES, Code
from inferfleet.records import Amqp
from inferfleet.testing.checksum import expected_checksum
from tests.simulation.audit import ViolationError
from tests.simulation.rabbit import Message, Rabbit
from tests.simulation.traffic import Request

MINE = "amq.gen-mine"
"""The one queue that a caller may name."""


@dataclass
class Way:
    """One request, and what has become of it."""

    request: Request
    amqp: Amqp
    named: bool
    """Whether a delivery that comes again can be recognised."""
    message: int = 0
    """The number of the message that the caller sent."""
    outcomes: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    letters: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    redelivered: int = 0

    @property
    def attempt(self) -> int:
        return max(self.attempts, default=1)

    @property
    def missing(self) -> str:
        """What is not there yet of a whole outcome."""
        if not self.outcomes:
            return "an outcome"
        if self.amqp.reply_to == MINE and not self.replies:
            return "a reply"
        # One that ends otherwise when it comes again needs none: whoever began it has not ended it.
        buried = all(code != "ok" and RULES[Code(code)].dead_letter for code in self.outcomes)
        return "a dead letter" if buried and not self.letters else ""


class ChannelAudit:
    """Judges all that a broker takes over; ``delays`` maps retry destinations to the attempt they are for.

    ``alone``: there is one worker, and it lives; then whatever has a name and is answered is so exactly once.
    """

    def __init__(self, rabbit: Rabbit, delays: Mapping[str, int], *, alone: bool) -> None:
        self._rabbit = rabbit
        self._delays = delays
        self._alone = alone
        self.ways: dict[bytes, Way] = {}
        self._by_message: dict[int, Way] = {}
        self.was_broken = False
        self.seen: Counter[str] = Counter()

    def sent(self, key: bytes, way: Way) -> None:
        """Remember a request."""
        self.ways[key] = self._by_message[way.message] = way

    def attempts(self, number: int) -> int:
        """Return how many attempts the request of this number has had, with the one that was asked for."""
        way = self.ways[b"key-%d" % number]
        unread = [(self._delays[to], message) for to, message in self._rabbit.published if to in self._delays]
        return max([way.attempt, *[attempt for attempt, message in unread if self._of(message) is way]])

    def _of(self, message: Message) -> Way:
        way = self._by_message.get(message.number)
        if way is None:
            (key,) = message.columns().keys
            if key not in self.ways:
                raise ViolationError(f"I3: a message for {key!r}, which nobody sent")
            way = self._by_message[message.number] = self.ways[key]
        return way

    def redelivered(self, messages: list[Message]) -> None:
        """Hear of messages that will come again."""
        for message in messages:
            self._of(message).redelivered += 1
            self.seen["redelivered"] += 1

    def look(self) -> None:
        """Judge everything that is new."""
        published, self._rabbit.published = self._rabbit.published, []
        for destination, message in published:
            self._judge_message(destination, message)
        acked, self._rabbit.acked = self._rabbit.acked, []
        for message in acked:
            self._judge_ack(message)

    def _judge_message(self, destination: str, message: Message) -> None:
        way = self._of(message)
        (read,) = message.columns().headers
        headers = dict(read or ())
        (amqp,) = message.columns().amqp
        if amqp.correlation_id != way.amqp.correlation_id:
            raise ViolationError(f"I3: {way.request.id} is answered as {amqp.correlation_id}")
        if destination in self._delays:
            self._judge_attempt(way, self._delays[destination], message)
        elif destination.startswith("rabbitmq:/"):
            way.letters += 1
            if message.body != (way.request.value or b"") or amqp.reply_to != way.amqp.reply_to:
                raise ViolationError(f"I12: the dead letter of {way.request.id} is not what was sent")
            self._bounded(way, way.letters, "dead letter")
        else:
            code = (headers.get("inferfleet-code") or b"ok").decode()
            told = way.outcomes if destination != REPLY else way.replies
            told[code] += 1
            self.seen[code] += 1
            if destination == REPLY and way.amqp.reply_to != MINE:
                raise ViolationError(f"I3: {way.request.id} is answered to {way.amqp.reply_to}")
            if (None if code == "ok" else Code(code)) not in way.request.expected and not (
                self.was_broken and code == Code.MODEL
            ):
                raise ViolationError(f"I12: {way.request.id} ends as {code}: {message.body!r}")
            if code == "ok":
                self._judge_answer(way, message.body, headers)
            self._bounded(way, told.total(), "reply" if destination == REPLY else "outcome")

    def _judge_answer(self, way: Way, body: bytes, headers: dict[str, bytes | None]) -> None:
        right = [str(number) for row in way.request.rows for number in expected_checksum("1", row)]
        if way.request.binary or "inference-header-content-length" in headers:
            return
        if ('"data":[' + ",".join(right) + "]").encode() not in body:
            raise ViolationError(f"I3: {way.request.id} got {body!r}; {right} is right")

    def _judge_attempt(self, way: Way, attempt: int, message: Message) -> None:
        (read,) = message.columns().headers
        headers = dict(read or ())
        (amqp,) = message.columns().amqp
        said = headers.get("inferfleet-attempt"), headers.get("inferfleet-origin-topic")
        if said != (b"%d" % attempt, b"q"):
            raise ViolationError(f"I12: {way.request.id} is tried again as {said}, not as {attempt}")
        if message.body != way.request.value or amqp.reply_to != way.amqp.reply_to:
            raise ViolationError(f"I12: {way.request.id} is tried again as another: {message}")
        if attempt > way.request.attempts or attempt > way.attempt + 1:
            raise ViolationError(f"I12: {way.request.id} is tried for {attempt} after {way.attempt}")
        way.attempts[attempt] += 1
        self.seen["retry"] += 1
        self._bounded(way, way.attempts[attempt], f"attempt {attempt}")

    def _bounded(self, way: Way, count: int, what: str) -> None:
        """What was answered is known when it comes again; all else may end once more for each redelivery."""
        answered = way.request.expected == {None} and not way.request.fails and not self.was_broken
        strict = self._alone and way.named and answered
        if count > 1 + (0 if strict else way.redelivered):
            raise ViolationError(
                f"I2: {way.request.id} has {what} number {count} after {way.redelivered} redeliveries"
            )

    def _judge_ack(self, message: Message) -> None:
        way = self._of(message)
        headers = dict(message.columns().headers[0] or ())
        # A caller's own message says what the caller likes.
        attempt = 1 if message.number == way.message else int(headers["inferfleet-attempt"] or b"")
        if way.attempt > attempt:
            return
        if way.missing:
            raise ViolationError(f"I5: {way.request.id} is acknowledged and lacks {way.missing}")

    def close(self) -> None:
        """Judge the whole once nothing moves any longer."""
        self.look()
        for way in self.ways.values():
            if way.missing:
                raise ViolationError(f"I1: {way.request.id} lacks {way.missing}")
