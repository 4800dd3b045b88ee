"""What a dead letter carries: the original record untouched, and beside it where it came from and why."""

from __future__ import annotations

from inferfleet.errors import Code
from inferfleet.records import Chunk, Header

MAX_ERROR_BYTES = 1024


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
