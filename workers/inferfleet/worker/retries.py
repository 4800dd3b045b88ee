"""Records that wait for another attempt: what they carry, and how they are read when they come back.

Behind the original headers stand ours, as with a dead letter: where the record stood first, which attempt it
asks for, and not before when. They are believed only from the pool's own retry topics and queues, where
callers should have no right to write. The last header of a name counts, so nothing that a caller sent poses
as ours.
"""

from __future__ import annotations

from inferfleet.addresses import on_rabbitmq, plain, rabbitmq_source
from inferfleet.records import Amqp, Chunk, Header, Headers, Origin
from inferfleet.wire.headers import ID, NOT_BEFORE
from inferfleet.worker.deadletter import origin_of

TOPIC = "inferfleet-origin-topic"
PARTITION = "inferfleet-origin-partition"
OFFSET = "inferfleet-origin-offset"
TIMESTAMP = "inferfleet-origin-timestamp"
ATTEMPT = "inferfleet-attempt"
OURS = (TOPIC, PARTITION, OFFSET, TIMESTAMP, ATTEMPT, NOT_BEFORE)
_BROKERS_OWN = ("x-death", "x-delivery-count")
"""What RabbitMQ adds while a message waits; ``x-first-`` and ``x-last-death-`` likewise."""
_MOST_DIGITS = 20
"""A sign and 63 bits."""


def retry_headers(
    chunk: Chunk, row: int, request_id: str, *, attempt: int, not_before_ms: int
) -> list[Header]:
    """Return the headers of a record that asks for ``attempt``.

    An id that the record only has by its place, or by what its message was called, is put in front.
    """
    origin = origin_of(chunk, row)
    original = chunk.headers[row] or []
    given = _is_given(chunk, row, request_id)
    named: list[Header] = [(ID, request_id.encode(errors="replace"))] if given else []
    return [
        *named,
        *original,
        (TOPIC, plain(origin.source).encode()),
        (PARTITION, b"%d" % origin.partition),
        (OFFSET, b"%d" % origin.position),
        (TIMESTAMP, b"%d" % origin.timestamp_ms),
        (ATTEMPT, b"%d" % attempt),
        (NOT_BEFORE, b"%d" % not_before_ms),
    ]


def _is_given(chunk: Chunk, row: int, request_id: str) -> bool:
    if any(name.lower() == ID for name, _ in chunk.headers[row] or ()):
        return False
    return request_id == chunk.called(row)


def restore(chunk: Chunk) -> None:
    """Give the records of a retry topic back what they were: headers, time, place, and their attempt."""
    origins: list[Origin] = []
    for row, headers in enumerate(chunk.headers):
        found, original = _split(headers)
        origin = _origin(chunk, row, found)
        chunk.timestamps_ms[row] = origin.timestamp_ms
        origins.append(origin)
        if chunk.amqp is not None:
            chunk.amqp[row] = _cleaned(chunk.amqp[row])
            original = [header for header in original if not _brokers_own(header[0])]
        chunk.headers[row] = original or None
    chunk.origins = origins
    if chunk.fallback_ids is None:
        chunk.fallback_ids = [f"{o.source}-{o.partition}-{o.position}" for o in origins]
        for row, request_id in enumerate(chunk.fallback_ids):
            chunk.headers[row] = _unnamed(chunk.headers[row], request_id)


def _split(headers: Headers) -> tuple[dict[str, bytes | None], list[Header]]:
    """Return our headers, each the last of its name, and what the caller sent."""
    ours: dict[str, bytes | None] = {}
    original: list[Header] = []
    for name, value in reversed(headers or ()):
        if name in OURS and name not in ours:
            ours[name] = value
        else:
            original.append((name, value))
    original.reverse()
    return ours, original


def _unnamed(headers: Headers, request_id: str) -> Headers:
    """Return headers without the id that was put in front: no caller knows what Kafka will call a record."""
    if not headers or headers[0] != (ID, request_id.encode()):
        return headers
    return headers[1:] or None


def _origin(chunk: Chunk, row: int, found: dict[str, bytes | None]) -> Origin:
    """Return where a record stood first; one that does not say stands where it stands."""
    source, partition = chunk.stream
    try:
        name = (found[TOPIC] or b"").decode()
        if not name:
            raise ValueError
        return Origin(
            rabbitmq_source(name) if on_rabbitmq(source) else name,
            _whole(found[PARTITION]),
            _whole(found[OFFSET]),
            _whole(found[TIMESTAMP]),
            max(1, _whole(found[ATTEMPT])),
        )
    except (KeyError, ValueError):
        return Origin(source, partition, chunk.positions[row], chunk.timestamps_ms[row], 1)


def _whole(value: bytes | None) -> int:
    """Return a number as brokers have them. Raises ValueError for any other."""
    if value is None or len(value) > _MOST_DIGITS:
        raise ValueError
    return int(value)


def _brokers_own(name: str) -> bool:
    return name in _BROKERS_OWN or name.startswith(("x-first-death-", "x-last-death-"))


def _cleaned(amqp: Amqp) -> Amqp:
    if amqp.table is None:
        return amqp
    table = {name: value for name, value in amqp.table.items() if name not in OURS and not _brokers_own(name)}
    return amqp._replace(table=table)
