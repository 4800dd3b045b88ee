"""Queues and channels as RabbitMQ has them, as far as the record path relies on them, in virtual time.

A message that was handed out is kept until it is acknowledged. A channel that is lost gives back what it had
out, in its place and marked as redelivered; what was acknowledged on it and had not arrived is given back
too. A delay queue lets its first message go when that one's time is over, into the queue that is ready.
Messages are what the real client would write, and chunks what it would read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from inferfleet.addresses import REPLY, exchange_and_key, plain
from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_outlet import MemoryOutlet
from inferfleet.brokers.rabbitmq_columns import Columns, columns
from inferfleet.brokers.rabbitmq_properties import write_properties
from inferfleet.ports import IntakeListener, Refusal
from inferfleet.records import Amqp, Chunk, Envelopes, Header, Stream
from inferfleet.testing.clock import FakeClock

_HEAD = b"\x00\x3c\x00\x00"


class Message(NamedTuple):
    """A message as it lies in a queue; ``number`` is its own for life, ``expires_ms`` when it goes on."""

    number: int
    frame: bytes
    body: bytes
    sent_ms: int
    redelivered: bool = False
    expires_ms: int | None = None

    def columns(self, tag: int = 1) -> Columns:
        """Return what an intake reads of it."""
        return columns([(tag, self.redelivered, self.frame, self.body, self.sent_ms)])


class Rabbit:
    """The broker. ``published`` hears of every message that it has taken over, with its destination."""

    def __init__(self, clock: FakeClock, refuse: Callable[[Envelopes, int], Refusal | None]) -> None:
        self.clock = clock
        self.queues: dict[str, deque[Message]] = {}
        self.ready_of: dict[str, str] = {}
        self.published: list[tuple[str, Message]] = []
        self.acked: list[Message] = []
        self._refuse = refuse
        self._numbers = 0

    def declare(self, name: str, ready: str | None = None) -> None:
        """Create a queue; what has waited in it goes to ``ready``."""
        self.queues[name] = deque()
        if ready is not None:
            self.ready_of[name] = ready

    def send(
        self,
        queue: str,
        headers: Iterable[Header],
        key: bytes | None,
        body: bytes,
        amqp: Amqp | None,
        expiration_ms: int | None = None,
        *,
        reply: bool = False,
    ) -> Message:
        """Put a message into a queue."""
        properties = write_properties(list(headers), key, amqp, expiration_ms, {}, reply=reply)
        now_ms = self.clock.utc_ms()
        expires_ms = None if expiration_ms is None else now_ms + expiration_ms
        self._numbers += 1
        frame = _HEAD + len(body).to_bytes(8, "big") + properties
        message = Message(self._numbers, frame, body, now_ms, False, expires_ms)
        self.queues[queue].append(message)
        return message

    def offer(self, envelopes: Envelopes, row: int) -> Refusal | None:
        """Take over an outcome or another attempt, unless it must be refused."""
        refusal = self._refuse(envelopes, row)
        if refusal is not None:
            return refusal
        amqp = None if envelopes.amqp is None else envelopes.amqp[row]
        destination, reply = envelopes.destination, envelopes.destination == REPLY
        if reply:
            queue = str(amqp and amqp.reply_to)
        else:
            exchange, name = exchange_and_key(destination)
            queue = f"{exchange}/{name}" if exchange else name
        delay_ms = None if envelopes.expirations_ms is None else envelopes.expirations_ms[row]
        body = envelopes.values[row] or b""
        message = self.send(
            queue, envelopes.headers[row], envelopes.keys[row], body, amqp, delay_ms, reply=reply
        )
        self.published.append((destination, message))
        return None

    def tick(self) -> None:
        """Let what has waited go on: in each delay queue the first, as long as its time is over."""
        now_ms = self.clock.utc_ms()
        for name, ready in self.ready_of.items():
            waiting = self.queues[name]
            while waiting and (waiting[0].expires_ms or 0) <= now_ms:
                self.queues[ready].append(waiting.popleft()._replace(expires_ms=None))


class RabbitOutlet(MemoryOutlet):
    """A held-back outlet to a :class:`Rabbit`; confirmations come in ``poll``, as ever."""

    def __init__(self, rabbit: Rabbit) -> None:
        super().__init__(MemoryBroker(rabbit.clock), holding=True)
        self._rabbit = rabbit

    def let_through(self, count: int | None = None) -> int:
        """Bring up to ``count`` queued envelopes to the broker, oldest first."""
        wanted = len(self._queue) if count is None else min(count, len(self._queue))
        for _ in range(wanted):
            sent = self._queue.popleft()
            self._verdicts.append((sent, self._rabbit.offer(sent.envelopes, sent.row)))
        return wanted


class _Channel:
    """One channel on one queue: what it has out, by tag, and up to where an acknowledgement is on its way."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.out: dict[int, Message] = {}
        self.tags = 0
        self.acks_to = 0


class ChannelIntake:
    """Implements :class:`~inferfleet.ports.Intake` on a :class:`Rabbit`, a channel for each queue."""

    def __init__(self, rabbit: Rabbit, prefetch: int) -> None:
        self.rabbit = rabbit
        self.prefetch = prefetch
        self.channels: dict[str, _Channel] = {}
        self.redelivered: list[Message] = []
        self._listener: IntakeListener | None = None
        self._numbers = 0
        self._lost: list[Stream] = []
        self._new: list[Stream] = []
        self._paused: set[str] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"ChannelIntake({ {c.stream: len(c.out) for c in self.channels.values()} })"

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Consume from exactly these queues."""
        self._listener = listener
        for source in sorted(set(sources) - set(self.channels)):
            self._open(source)

    def _open(self, source: str) -> None:
        self._numbers += 1
        stream = Stream(source, self._numbers)
        self.channels[source] = _Channel(stream)
        self._new.append(stream)

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return a chunk for each queue that has brought something; news is told in here."""
        assert not self._closed
        self._hear()
        self.rabbit.tick()
        chunks = []
        for source, channel in self.channels.items():
            waiting = self.rabbit.queues[plain(source)]
            room = min(max_records - sum(map(len, chunks)), self.prefetch - len(channel.out))
            if source not in self._paused and waiting and room > 0:
                chunks.append(
                    self._chunk(channel, [waiting.popleft() for _ in range(min(room, len(waiting)))])
                )
        return chunks

    def _chunk(self, channel: _Channel, messages: list[Message]) -> Chunk:
        first = channel.tags + 1
        for message in messages:
            channel.tags += 1
            channel.out[channel.tags] = message
        made = columns(
            [
                (tag, each.redelivered, each.frame, each.body, each.sent_ms)
                for tag, each in enumerate(messages, first)
            ]
        )
        return Chunk(
            channel.stream,
            1,
            range(first, channel.tags + 1),
            made.keys,
            [each.body for each in messages],
            made.headers,
            made.timestamps_ms,
            self.rabbit.clock.monotonic(),
            amqp=made.amqp,
            fallback_ids=made.fallback_ids,
        )

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Acknowledge everything below each position, on channels that still stand; it takes its time."""
        for stream, position in positions.items():
            channel = self.channels.get(stream.source)
            if channel is not None and channel.stream == stream:
                channel.acks_to = max(channel.acks_to, position)

    def let_acks_arrive(self) -> None:
        """Let what was acknowledged reach the broker."""
        for channel in self.channels.values():
            for tag in [tag for tag in channel.out if tag < channel.acks_to]:
                self.rabbit.acked.append(channel.out.pop(tag))

    def lose(self, source: str, *, acks_arrive: bool) -> None:
        """Lose a channel: all it has out comes again, on another one."""
        if acks_arrive:
            self.let_acks_arrive()
        channel = self.channels[source]
        self._give_back(channel)
        if channel.stream in self._new:
            self._new.remove(channel.stream)  # nobody has heard of it
        else:
            self._lost.append(channel.stream)
        self._open(source)

    def _give_back(self, channel: _Channel) -> None:
        back = [channel.out[tag]._replace(redelivered=True) for tag in sorted(channel.out)]
        self.rabbit.queues[plain(channel.stream.source)].extendleft(reversed(back))
        self.redelivered += back
        channel.out.clear()

    def pause(self, sources: Collection[str]) -> None:
        """Hand nothing out from these queues."""
        self._paused |= set(sources)

    def resume(self, sources: Collection[str]) -> None:
        """Hand out from these queues again."""
        self._paused -= set(sources)

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Nobody asks for it here."""
        raise AssertionError(f"{stream} is to wait at {position} until {until_s}")

    def lag(self) -> dict[Stream, int]:
        """Return what waits in each queue."""
        return {c.stream: len(self.rabbit.queues[plain(c.stream.source)]) for c in self.channels.values()}

    def drained(self, timeout_s: float) -> bool:
        """Return whether all queues are empty."""
        return not any(self.lag().values())

    joined = True
    denied = None

    def close(self) -> None:
        """Let the listener settle what is left, acknowledge it, and give back the rest."""
        self._hear()
        self._closed = True
        streams = [channel.stream for channel in self.channels.values()]
        if self._listener is not None:
            self.settle(self._listener.revoked(streams, 0.5))
        self.let_acks_arrive()
        self.vanish()

    def vanish(self) -> None:
        """End as a killed process does."""
        self._closed = True
        for channel in self.channels.values():
            self._give_back(channel)
        self.channels.clear()

    def _hear(self) -> None:
        lost, self._lost = self._lost, []
        new, self._new = self._new, []
        if self._listener is not None:
            if lost:
                self._listener.lost(lost)
            if new:
                self._listener.assigned(new)
