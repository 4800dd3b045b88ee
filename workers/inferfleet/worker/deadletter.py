"""What a dead letter carries: the original record untouched, and beside it where it came from and why."""

from __future__ import annotations

from inferfleet.errors import Code
from inferfleet.records import Chunk, Envelopes, Header

MAX_ERROR_BYTES = 1024
MAX_KEPT_KEY_BYTES = 1024
CUT = "inferfleet-cut"
_OWN_HEADERS = 9
"""How many headers of ours stand behind the original ones."""


def default_id(chunk: Chunk, row: int) -> str:
    """Return the id of a record that has none: where it stands."""
    source, partition = chunk.stream
    return f"{source}-{partition}-{chunk.positions[row]}"


def dead_letter_headers(
    chunk: Chunk, row: int, code: Code, text: str, served: Header, failed_at_ms: bytes
) -> list[Header]:
    """Return the original headers, then ours. The error text is at most 1 KiB and quotes no payload."""
    source, partition = chunk.stream
    return [
        *(chunk.headers[row] or ()),
        ("inferfleet-origin-topic", source.encode()),
        ("inferfleet-origin-partition", b"%d" % partition),
        ("inferfleet-origin-offset", b"%d" % chunk.positions[row]),
        ("inferfleet-origin-timestamp", b"%d" % chunk.timestamps_ms[row]),
        ("inferfleet-code", code.value.encode()),
        ("inferfleet-error", _clipped(text)),
        ("inferfleet-attempt", b"1"),
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
    return Envelopes(letter.destination, [key if _fits(key) else None], nothing, [cut])


def cut_outcome(outcome: Envelopes, index: int) -> Envelopes | None:
    """Return an outcome without its large key; ``None`` if the key is not what makes it large."""
    if _fits(outcome.keys[index]):
        return None
    return Envelopes(outcome.destination, [None], [outcome.values[index]], [outcome.headers[index]])


def _fits(key: bytes | None) -> bool:
    return key is None or len(key) <= MAX_KEPT_KEY_BYTES
