"""Taking chunks from RabbitMQ queues: one channel for each queue, owned by one thread for life.

A stream is a channel; its positions are delivery tags. A channel that closes takes its stream along: what was
not acknowledged on it comes again on another one, under a new number, so a late settle of the old one names
nobody. Messages are held here as they came; a chunk is made of them when they are taken.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import structlog

from inferfleet.addresses import exchange_and_key, on_rabbitmq, plain
from inferfleet.brokers.rabbitmq_columns import Message, columns
from inferfleet.brokers.rabbitmq_consumer import Arrivals, Consumer
from inferfleet.brokers.rabbitmq_depths import LAG_EVERY_S, Depths
from inferfleet.brokers.rabbitmq_link import RabbitLink
from inferfleet.ports import IntakeListener
from inferfleet.rabbitmq_access import AMQP_FAILURES
from inferfleet.records import Chunk, Stream

log = structlog.get_logger(__name__)

REVOKE_GRACE_S = 0.5
CLOSE_TIMEOUT_S = 5.0
DEFAULT_PREFETCH = 500
MAX_PREFETCH = 65_535
_EPOCH = 1
"""A stream has one epoch: its number never comes again."""


class RabbitIntake:
    """Implements :class:`~inferfleet.ports.Intake`; sources are ``rabbitmq:QUEUE``.

    ``prefetch`` says how many messages of a source may be out at once; as long as they are, no more come,
    so what is settled should be settled soon. ``delays`` names the queues from which messages of a source
    come back in their time.
    """

    def __init__(
        self,
        link: RabbitLink,
        *,
        prefetch: Mapping[str, int] | Callable[[str], int],
        delays: Mapping[str, Sequence[str]] | None = None,
        lag_every_s: float = LAG_EVERY_S,
    ) -> None:
        self._link = link
        self._prefetch = prefetch
        self._delays = delays or {}
        self._listener: IntakeListener | None = None
        self._consumers: dict[str, Consumer] = {}
        self._leaving: list[Consumer] = []
        self._streams: dict[Stream, Arrivals] = {}
        self._news: deque[tuple[bool, Arrivals]] = deque()
        self._paused: set[str] = set()
        self._deferred: dict[Stream, float] = {}
        self._last: dict[Stream, list[Message]] = {}
        self._turn = 0
        self._bell = threading.Event()
        self._rung = False
        self._choked = False
        self._closed = False
        self._watched: tuple[Consumer, ...] = ()
        self._depths = Depths(link.taking, lag_every_s)
        link.call(self._begin)

    def __repr__(self) -> str:
        return f"RabbitIntake({list(self._consumers.values())})"

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Consume from exactly these queues from now on; the next take tells what that changes."""
        self._listener = listener
        for source in sorted(set(self._consumers) - set(sources)):
            self._leaving.append(self._consumers.pop(source))
        for source in sorted(set(sources) - set(self._consumers)):
            consumer = self._consumers[source] = self._consumer(source)
            if source in self._paused:
                self._link.call(consumer.pause)
            self._link.call(consumer.start)
        self._link.call(self._watch, tuple(self._consumers.values()))

    def _consumer(self, source: str) -> Consumer:
        wanted = self._prefetch(source) if callable(self._prefetch) else self._prefetch.get(source)
        return Consumer(
            self._link,
            source,
            max(1, min(wanted or DEFAULT_PREFETCH, MAX_PREFETCH)),
            assigned=lambda arrivals: self._tell(True, arrivals),
            lost=lambda arrivals: self._tell(False, arrivals),
            arrived=self._arrived,
        )

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return one chunk for each queue that has brought something; news is told in here."""
        if self._closed:
            raise RuntimeError("the intake is closed")
        clock = self._link.clock
        until = clock.monotonic() + max_wait_s
        while True:
            self._bell.clear()
            self._rung = False  # before looking: what arrives from here on rings again
            self._hear()
            chunks = self._collect(max_records, max_bytes)
            if chunks or (left := self._next_due(until) - clock.monotonic()) <= 0:
                self._relieve()
                return chunks
            self._bell.wait(left)

    def _next_due(self, until: float) -> float:
        return min(until, *self._deferred.values()) if self._deferred else until

    def _collect(self, max_records: int, max_bytes: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        left, room = max(1, max_records), max_bytes
        for arrivals in self._in_turn():
            if left <= 0 or (chunks and room <= 0):
                break
            messages = _pop(arrivals, left, room, or_one=not chunks)
            if messages:
                chunk = self._chunk(arrivals.stream, messages)
                self._last[arrivals.stream] = messages
                left -= len(messages)
                room -= chunk.size_bytes
                chunks.append(chunk)
        return chunks

    def _in_turn(self) -> list[Arrivals]:
        """Return what may be taken from, another one first each time."""
        if self._deferred:
            now = self._link.clock.monotonic()
            self._deferred = {s: until_s for s, until_s in self._deferred.items() if until_s > now}
        found = [
            arrivals
            for stream, arrivals in self._streams.items()
            if arrivals.messages
            and arrivals.live
            and stream.source not in self._paused
            and stream not in self._deferred
        ]
        if len(found) > 1:
            self._turn = (self._turn + 1) % len(found)
            return found[self._turn :] + found[: self._turn]
        return found

    def _chunk(self, stream: Stream, messages: list[Message]) -> Chunk:
        made = columns(messages)
        first, last = messages[0][0], messages[-1][0]
        return Chunk(
            stream,
            _EPOCH,
            range(first, last + 1),
            made.keys,
            [message[3] for message in messages],
            made.headers,
            made.timestamps_ms,
            self._link.clock.monotonic(),
            amqp=made.amqp,
            fallback_ids=made.fallback_ids,
        )

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Acknowledge everything below each position, on channels that are still open."""
        for stream, position in positions.items():
            consumer = self._consumers.get(stream.source)
            if consumer is not None and stream in self._streams:
                self._link.call(consumer.ack, stream, position)

    def pause(self, sources: Collection[str]) -> None:
        """Hand nothing out from these queues; what is held for long is given back to them."""
        self._paused |= set(sources)
        for consumer in self._of(sources):
            self._link.call(consumer.pause)

    def resume(self, sources: Collection[str]) -> None:
        """Hand out from these queues again."""
        self._paused -= set(sources)
        for consumer in self._of(sources):
            self._link.call(consumer.resume)

    def _of(self, sources: Iterable[str]) -> list[Consumer]:
        return [self._consumers[source] for source in sources if source in self._consumers]

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Hand nothing more out from this channel until ``until_s``, then from ``position`` again."""
        arrivals, last = self._streams.get(stream), self._last.get(stream)
        if arrivals is None:
            return
        if last is not None:
            put_back(arrivals, last, position)
        self._deferred[stream] = until_s

    def lag(self) -> dict[Stream, int]:
        """Return what waits in each queue, as of some seconds ago, and here."""
        return {
            stream: (consumer.depth or 0) + len(arrivals.messages)
            for stream, arrivals in list(self._streams.items())
            if (consumer := self._consumers.get(stream.source)) is not None
        }

    def drained(self, timeout_s: float) -> bool:
        """Ask the broker whether the queues and their delay queues are empty; nothing may be held here."""
        if self._deferred or any(arrivals.messages for arrivals in self._streams.values()):
            return False
        queues = [plain(source) for source in self._consumers]
        for source in self._consumers:
            queues += [_queue(each) for each in self._delays.get(source, ())]
        return bool(self._link.ask(self._drained(queues), timeout_s))

    async def _drained(self, queues: list[str]) -> bool:
        if any(consumer.out for consumer in self._watched):
            return False
        try:
            return not any([await self._depths.of(queue) for queue in queues])
        except (*AMQP_FAILURES, RuntimeError):
            return False

    @property
    def joined(self) -> bool:
        """Whether every queue is consumed from, or has been given back what it brought."""
        return all(consumer.joined for consumer in self._consumers.values())

    @property
    def denied(self) -> str | None:
        """Return why the broker lets nobody in, or which queue is missing or forbidden, and the mend."""
        if self._link.taking.denied is not None:
            return self._link.taking.denied
        return next((c.denied for c in self._consumers.values() if c.denied is not None), None)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Return the channels that are open, as far as it was told."""
        return tuple(self._streams)

    def close(self) -> None:
        """Let the listener settle what is left, acknowledge it, and close the channels, within a bound."""
        if self._closed:
            return
        self._hear()
        self._closed = True
        positions = self._revoked(list(self._streams))
        self._link.ask(self._leave(tuple(self._consumers.values()), positions), CLOSE_TIMEOUT_S)

    # News: told inside take and close, on the owner's thread.

    def _hear(self) -> None:
        if self._leaving:  # before the news: a queue that is wanted again has another channel by then
            leaving, self._leaving = self._leaving, []
            sources = {consumer.source for consumer in leaving}
            positions = self._revoked([s for s in self._streams if s.source in sources])
            self._link.call(lambda: self._link.keep(self._leave(leaving, positions)))
        while self._news:
            comes, arrivals = self._news.popleft()
            stream = arrivals.stream
            if comes and stream.source in self._consumers:
                self._streams[stream] = arrivals
                log.info("queue_assigned", queue=plain(stream.source), channel=stream.partition)
                if self._listener is not None:
                    self._listener.assigned([stream])
            elif not comes and self._streams.pop(stream, None) is not None:
                self._forget(stream)
                log.info("channel_lost", queue=plain(stream.source), channel=stream.partition)
                if self._listener is not None:
                    self._listener.lost([stream])

    def _revoked(self, streams: list[Stream]) -> Mapping[Stream, int]:
        if not streams:
            return {}
        positions = {} if self._listener is None else self._listener.revoked(streams, REVOKE_GRACE_S)
        for stream in streams:
            del self._streams[stream]
            self._forget(stream)
        return positions

    def _forget(self, stream: Stream) -> None:
        self._deferred.pop(stream, None)
        self._last.pop(stream, None)

    def _relieve(self) -> None:
        """Let the link read again when half of what it may read ahead has been taken."""
        if self._choked and self._held_bytes() < self._link.options.buffer_bytes // 2:
            self._choked = False
            self._link.call(self._breathe)

    def _held_bytes(self) -> int:
        return sum([consumer.held_bytes for consumer in self._watched])

    # What follows runs on the link's thread.

    def _begin(self) -> None:
        self._link.open(self._link.taking)
        self._link.every_tick(self._tick)
        self._link.keep(self._depths.follow(lambda: self._watched))

    def _watch(self, consumers: tuple[Consumer, ...]) -> None:
        self._watched = consumers

    def _tick(self) -> None:
        for consumer in self._watched:
            consumer.tick()
        if self._choked and self._held_bytes() < self._link.options.buffer_bytes // 2:
            self._choked = False
            self._breathe()
        elif self._choked:
            self._choke()  # a queue may have been paused since

    def _tell(self, comes: bool, arrivals: Arrivals) -> None:
        self._news.append((comes, arrivals))
        self._ring()

    def _arrived(self) -> None:
        if self._held_bytes() > self._link.options.buffer_bytes:
            self._choke()
        self._ring()

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.set()
            self._link.wake()

    def _choke(self) -> None:
        """Read no more for now; but a paused queue that fills the room takes back what it has brought."""
        paused = [consumer for consumer in self._watched if consumer.paused]
        hog = max(paused, key=lambda consumer: consumer.held_bytes, default=None)
        others = len(paused) < len(self._watched)
        if (
            others
            and hog is not None
            and hog.held_bytes > self._link.options.buffer_bytes // 2
            and hog.give_back("others need the room that its messages take")
        ):
            return
        connected = self._link.taking.now
        if connected is not None:
            self._choked = True
            connected.tap.hold()

    def _breathe(self) -> None:
        connected = self._link.taking.now
        if connected is not None:
            connected.tap.release()

    async def _leave(self, consumers: Iterable[Consumer], positions: Mapping[Stream, int]) -> None:
        self._breathe()
        by_source = {stream.source: (stream, position) for stream, position in positions.items()}
        await asyncio.gather(*[each.leave(*by_source.get(each.source, ())) for each in consumers])


def _pop(arrivals: Arrivals, count: int, room: int, *, or_one: bool) -> list[Message]:
    """Take messages from the front: at most ``count`` of ``room`` bytes, with ``or_one`` one of any size."""
    waiting = arrivals.messages
    if arrivals.bytes_in - arrivals.bytes_out <= room:
        taken = [waiting.popleft() for _ in range(min(count, len(waiting)))]
    else:
        taken = []
        while waiting and len(taken) < count:
            room -= _size(waiting[0])
            if room < 0 and (taken or not or_one):
                break
            taken.append(waiting.popleft())
    arrivals.bytes_out += sum(map(_size, taken))
    return taken


def put_back(arrivals: Arrivals, last: Sequence[Message], position: int) -> None:
    """Let what the last take brought from ``position`` on be taken again, and nothing of it below."""
    waiting = arrivals.messages
    while waiting and waiting[0][0] <= last[-1][0]:  # it was put back before
        arrivals.bytes_out += _size(waiting.popleft())
    again = [message for message in last if message[0] >= position]
    waiting.extendleft(reversed(again))
    arrivals.bytes_out -= sum(map(_size, again))


def _size(message: Message) -> int:
    return len(message[2]) + len(message[3])


def _queue(address: str) -> str:
    """Return a queue's name, which may be given as the destination that reaches it."""
    return exchange_and_key(address)[1] if on_rabbitmq(address) and "/" in address else plain(address)
