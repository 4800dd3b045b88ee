"""What a dead letter carries: the original record untouched, and beside it where it came from and why."""

from __future__ import annotations

from inferfleet.addresses import plain
from inferfleet.errors import Code
from inferfleet.records import Amqp, Chunk, Envelopes, Header, Origin

MAX_ERROR_BYTES = 1024
MAX_KEPT_KEY_BYTES = 1024
CUT = "inferfleet-cut"
_OWN_HEADERS = 9
"""How many headers of ours stand behind the original ones."""


def origin_of(chunk: Chunk, row: int) -> Origin:
    """Return where a record stood first, and which attempt at it this is."""
    if chunk.origins is not None:
        return chunk.origins[row]
    source, partition = chunk.stream
    return Origin(source, partition, chunk.positions[row], chunk.timestamps_ms[row], 1)


def dead_letter_headers(
    chunk: Chunk, row: int, code: Code, text: str, served: Header, failed_at_ms: bytes
) -> list[Header]:
    """Return the original headers, then ours. The error text is at most 1 KiB and quotes no payload."""
    origin = origin_of(chunk, row)
    return [
        *(chunk.headers[row] or ()),
        ("inferfleet-origin-topic", plain(origin.source).encode()),
        ("inferfleet-origin-partition", b"%d" % origin.partition),
        ("inferfleet-origin-offset", b"%d" % origin.position),
        ("inferfleet-origin-timestamp", b"%d" % origin.timestamp_ms),
        ("inferfleet-code", code.value.encode()),
        ("inferfleet-error", _clipped(text)),
        ("inferfleet-attempt", b"%d" % origin.attempt),
        ("inferfleet-failed-at", failed_at_ms),
        served,
    ]


def _clipped(text: str) -> bytes:
    """Return ``text`` as UTF-8 of at most ``MAX_ERROR_BYTES``, cut between characters."""
    return text.encode("utf-8", "replace")[:MAX_ERROR_BYTES].decode("utf-8", "ignore").encode()


def cut_letter(letter: Envelopes, index: int) -> Envelopes | None:
    """Return a dead letter without what its topic has no room for; ``None`` if it was cut before.

    A letter is larger than its request, so anybody could send one that no topic takes. What is left says
    where the request stands; ``inferfleet-cut`` names what is missing.
    """
    headers, key = letter.headers[index], letter.keys[index]
    if headers[-1][0] == CUT:
        return None
    cut = [*headers[-_OWN_HEADERS:], (CUT, b"body headers" if _fits(key) else b"body headers key")]
    nothing: list[bytes] = [None]  # type: ignore[list-item]  # a record may have no value
    return Envelopes(letter.destination, [key if _fits(key) else None], nothing, [cut], _named(letter, index))


def cut_outcome(outcome: Envelopes, index: int) -> Envelopes | None:
    """Return an outcome without its large key; ``None`` if the key is not what makes it large."""
    if _fits(outcome.keys[index]):
        return None
    return Envelopes(
        outcome.destination,
        [None],
        [outcome.values[index]],
        [outcome.headers[index]],
        _named(outcome, index),
    )


def _named(envelopes: Envelopes, index: int) -> list[Amqp] | None:
    """Return what names a RabbitMQ message and its caller, without the headers it had."""
    return None if envelopes.amqp is None else [envelopes.amqp[index]._replace(table=None)]


def _fits(key: bytes | None) -> bool:
    return key is None or len(key) <= MAX_KEPT_KEY_BYTES
