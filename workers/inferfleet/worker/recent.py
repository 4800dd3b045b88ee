"""What was answered a moment ago, for messages that RabbitMQ brings again.

A channel that is lost takes its unacknowledged messages back and delivers them anew, although some are
answered and others are still running here. What was answered is acknowledged without running; what still runs
ends as it began, and the message that came again is settled with it. Only messages that were named by their
sender can be recognised, and only for a while: this is about work, never about the promise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from inferfleet.records import Chunk, Requests
from inferfleet.wire.headers import GENERATED_ID, REPLY
from inferfleet.worker.deadletter import origin_of
from inferfleet.worker.settling import Settling

REMEMBERED = 16_384

_Key = tuple[str, int, str, int, tuple[str | None, str | None, bytes | None]]
"""Source, attempt, id, what this process calls the payload, and where answers are wanted."""
Record = tuple[Chunk, int]


class Seen(NamedTuple):
    """Rows of a chunk that need not run: answered before, or still running for an earlier delivery."""

    answered: list[int]
    running: list[int]


class Recent:
    """Requests answered lately, and those that still run for a delivery that is gone."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._answered: OrderedDict[_Key, None] = OrderedDict()
        self._running: dict[_Key, list[Record]] = {}

    def __repr__(self) -> str:
        return f"Recent(answered={len(self._answered)}, running={len(self._running)})"

    def settled(self, settling: Settling) -> list[Record]:
        """Remember what has its outcomes; return the records that came again meanwhile and share them."""
        chunk = settling.chunk
        answered = any(outcome == "ok" for _, _, outcome in settling.outcomes)
        sharing: list[Record] = []
        for row, request_id in zip(settling.rows, settling.ids, strict=True):
            key = _key(chunk, row, request_id)
            if key is None:
                continue
            # An error is not remembered: a message like it may be its caller's, or an operator's, next try.
            if row in settling.replaced or not answered:
                self._answered.pop(key, None)
            else:
                self._answered[key] = None
                self._answered.move_to_end(key)
            sharing += self._running.pop(key, ())
        while len(self._answered) > self._limit:
            self._answered.popitem(last=False)
        return [(chunk, row) for chunk, row in sharing if chunk.live]

    def orphaned(self, chunk: Chunk, ids: Mapping[int, str | None], gone: Iterable[int]) -> int:
        """A stream was lost: its open records, but for those ``gone``, still run here. Return how many.

        ``ids`` names the chunk's records by row.
        """
        left = set(ids) - set(gone)
        found = 0
        for row in left:
            if not chunk.settled[row]:
                found += 1
                key = _key(chunk, row, ids[row])
                if key is not None:
                    self._running.setdefault(key, [])
        chunk.orphaned = found > 0
        return found

    def seen(self, part: Requests) -> Seen:
        """Return which requests of a part that was read need not run; the running ones share their end."""
        chunk, amqp = part.chunk, part.chunk.amqp
        found = Seen([], [])
        if amqp is None:
            return found
        for index, row in enumerate(part.rows):
            if not amqp[row].redelivered:
                continue
            key = _key(chunk, row, part.ids[index])
            if key in self._answered:
                found.answered.append(index)
            elif key is not None and key in self._running:
                self._running[key].append((chunk, row))
                found.running.append(index)
        return found


def left_of(part: Requests, seen: Seen) -> Requests | None:
    """Return the requests of a part that have to run; ``None`` if there are none."""
    known = {*seen.answered, *seen.running}
    kept: Sequence[int] = [index for index in range(len(part)) if index not in known]
    return part.pick(kept) if kept else None


def _key(chunk: Chunk, row: int, request_id: str | None) -> _Key | None:
    """Return what two deliveries of one message have in common; ``None`` where nobody named it."""
    if chunk.amqp is None or request_id is None or request_id.startswith(GENERATED_ID):
        return None
    amqp = chunk.amqp[row]
    # The attempt too: the next one comes by the same queue, and is settled by nothing but its own outcome.
    attempt = origin_of(chunk, row).attempt
    replies = (amqp.reply_to, amqp.correlation_id, _reply_stream(chunk, row))
    return chunk.stream.source, attempt, request_id, hash(chunk.values[row]), replies


def _reply_stream(chunk: Chunk, row: int) -> bytes | None:
    return next((value for name, value in chunk.headers[row] or () if name == REPLY), None)
