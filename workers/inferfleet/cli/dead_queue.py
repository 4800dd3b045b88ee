"""Dead letters in a RabbitMQ queue: looked at and given back, or moved to the pool's ready retries.

A queue has no place to read from. Looking takes letters without acknowledging them, up to a bound, and closes
the channel, which gives all of them back to where they stood.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, TypeVar

from aiormq.exceptions import ChannelNotFoundEntity

from inferfleet.brokers.rabbitmq_properties import write_properties
from inferfleet.cli.amqp_line import Arrived, Confirms, Line, open_line
from inferfleet.cli.letters import EVERYTHING, Choice, DeadLetter, Wanted, redriven_headers, without_ours
from inferfleet.cli.pace import Pace
from inferfleet.config import Config
from inferfleet.errors import BrokerError
from inferfleet.rabbitmq_access import AMQP_FAILURES, amqp_failure, amqp_place, ends_are_failures

MOST_HELD = 10_000
"""How many letters are held at a time: a broker keeps count of each."""
MOST_HELD_BYTES = 256_000_000
_IDLE_S = 3.0
"""Nothing more comes when nothing came for so long: somebody else has what was counted."""
_AT_ONCE = 100

T = TypeVar("T")


class Held(NamedTuple):
    """A letter that is out of the queue until it is acknowledged or the channel closes."""

    tag: int
    letter: DeadLetter


class DeadQueue:
    """The dead-letter queue of one route; every call opens a connection and closes it."""

    def __init__(self, config: Config, queue: str) -> None:
        self.queue = queue
        self.looked_at = 0
        """How many letters the last call saw."""
        self.held = 0
        """How many the queue held then."""
        self.refused: dict[str, str] = {}
        """Why letters could not go, by place."""
        self._config = config

    @property
    def seen(self) -> str:
        """What the last call saw, in words."""
        part = f"the first {self.looked_at} of " if self.looked_at < self.held else ""
        return f"{part}{self.held} letters in {self.queue}"

    def newest(self, limit: int, wanted: Wanted = EVERYTHING) -> list[DeadLetter]:
        """Return the ``limit`` newest wanted letters, oldest first, of those that are held at a time."""

        async def look(line: Line) -> list[DeadLetter]:
            kept: deque[DeadLetter] = deque(maxlen=limit)
            async for held in self._take(line):
                if wanted.fits(held.letter):
                    kept.append(held.letter)
            return list(kept)

        return self._run(look)

    def named(self, place: str) -> DeadLetter:
        """Return the letter of an id, else the one that stands at a place counted from 1."""

        async def look(line: Line) -> DeadLetter:
            standing: DeadLetter | None = None
            async for held in self._take(line):
                if held.letter.id == place:
                    return held.letter
                if held.letter.place == place:
                    standing = held.letter
            if standing is None:
                raise BrokerError(f"there is no letter {place} among {self.seen}")
            return standing

        return self._run(look)

    def choose(self, choice: Choice, now_ms: int) -> None:
        """Look at the letters and let ``choice`` count what it takes; all of them are given back."""

        async def look(line: Line) -> None:
            async for held in self._take(line):
                choice.takes(held.letter, now_ms)

        self._run(look)

    def redrive(self, choice: Choice, to: str, now_ms: int, pace: Pace, told: Callable[[int], None]) -> int:
        """Move what ``choice`` takes to the queue ``to`` and return how many went.

        A letter is acknowledged when its retry is confirmed: it is moved, so it cannot go twice, unless the
        connection breaks between the two. ``told`` hears after each batch how many have gone. Raises
        BrokerError.
        """
        moved = 0
        most = pace.most_within(self._config.rabbitmq.consumer_timeout_s / 2)

        async def move(line: Line) -> None:
            nonlocal moved
            out = await Confirms.opened(line, to, self._config.rabbitmq.publish_timeout_s)
            batch: list[Held] = []
            async for held in self._take(line, most):
                if choice.takes(held.letter, now_ms):
                    batch.append(held)
                if choice.full:
                    break
                if len(batch) >= min(_AT_ONCE, pace.batch):
                    moved += await self._move(line, out, batch, now_ms)
                    told(moved)
                    batch = []
                    await asyncio.sleep(pace.delay_s(moved))
            moved += await self._move(line, out, batch, now_ms)
            told(moved)

        try:
            self._run(move)
        except BrokerError as error:
            raise BrokerError(f"{error} (moved before that: {moved})") from None
        return moved

    async def _move(self, line: Line, out: Confirms, batch: list[Held], now_ms: int) -> int:
        if not batch:
            return 0
        results = await out.publish([(_properties(held.letter, now_ms), held.letter.body) for held in batch])
        for held, refusal in zip(batch, results, strict=True):
            if refusal:
                self.refused[held.letter.place] = refusal
            else:
                await line.channel.basic_ack(held.tag)
        return results.count("")

    async def _take(self, line: Line, most: int | None = None) -> AsyncIterator[Held]:
        """Yield the letters that stand in the queue now, as many as may be held, each once."""
        try:
            found = await line.channel.queue_declare(self.queue, passive=True)
        except ChannelNotFoundEntity:
            raise BrokerError(
                f"queue {self.queue} does not exist; `inferfleet topics plan` prints how to create it"
            ) from None
        self.looked_at, self.held = 0, found.message_count or 0
        wanted = min(self.held, MOST_HELD, MOST_HELD if most is None else most)
        if not wanted:
            return
        arrivals = await line.consume(self.queue, wanted)
        size = 0
        while self.looked_at < wanted and size <= MOST_HELD_BYTES:
            came = await arrivals.next(_IDLE_S)
            if came is None:
                return
            self.looked_at += 1
            size += len(came.body)
            yield Held(came.tag, letter_of(self.queue, self.looked_at, came))

    def _run(self, work: Callable[[Line], Awaitable[T]]) -> T:
        async def connected() -> T:
            line = await open_line(self._config)
            try:
                async with ends_are_failures():
                    return await work(line)
            except AMQP_FAILURES as error:
                raise amqp_failure(amqp_place(self._config), error) from error
            finally:
                await line.close()

        return asyncio.run(connected())


def letter_of(queue: str, position: int, came: Arrived) -> DeadLetter:
    """Return the dead letter that a message is."""
    return DeadLetter(queue, 0, position, came.key, came.body, tuple(came.headers or ()), came.amqp)


def _properties(letter: DeadLetter, now_ms: int) -> bytes:
    amqp = None if letter.amqp is None else without_ours(letter.amqp)
    return write_properties(redriven_headers(letter, now_ms), letter.key, amqp, None, {})
