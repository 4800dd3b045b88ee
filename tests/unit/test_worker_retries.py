"""Retry records: what comes back is what was there, whatever a caller has written into its headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.brokers.rabbitmq_columns import columns
from inferfleet.brokers.rabbitmq_properties import write_properties
from inferfleet.brokers.rabbitmq_tables import Table, write_table
from inferfleet.records import Amqp, Chunk, Header, Headers, Origin, Stream
from inferfleet.wire.headers import ID
from inferfleet.worker.deadletter import origin_of
from inferfleet.worker.retries import OURS, restore, retry_headers
from tests.support.builders import NOW_MS, STREAM, chunk

RETRY = Stream("digits.requests.inferfleet.default.retry.5000", 0)
QUEUE, READY = Stream("rabbitmq:q", 1), Stream("rabbitmq:q.g.retry.ready", 2)
NAMED = "digits.requests-3-100"
"""What the record in ``chunk`` is called by its place."""

_names = st.sampled_from([*OURS, ID, "Inferfleet-Attempt", "inferfleet-deadline-ms", "other"]) | st.text(
    st.characters(codec="utf-8"), max_size=12
)
_values = st.none() | st.binary(max_size=20) | st.integers(-5, 10**20).map(lambda n: b"%d" % n)
_headers = st.lists(st.tuples(_names, _values), max_size=8)


def again(of: Chunk, request_id: str, attempt: int, *, stream: Stream = RETRY, at: int = 7) -> Chunk:
    """Send the one record of ``of`` through a Kafka retry topic and read it back."""
    headers = retry_headers(of, 0, request_id, attempt=attempt, not_before_ms=NOW_MS + 5_000)
    back = chunk(
        of.values, [headers], keys=of.keys, first=at, stream=stream, timestamp_ms=NOW_MS + 1_000 * attempt
    )
    restore(back)
    return back


def names(headers: Headers) -> list[str]:
    return [name for name, _ in headers or ()]


# Kafka: headers are a list


@given(_headers, st.integers(1, 5))
def test_any_record_comes_back_as_it_was(original: list[Header], rounds: int) -> None:
    """Headers, key, body, place, time and id survive every round; attempts count up."""
    given_id = ID in [name.lower() for name, _ in original]
    request_id = "from-the-header" if given_id else NAMED
    first = chunk([b"body"], [list(original)])
    now = first
    for attempt in range(2, 2 + rounds):
        now = again(now, request_id, attempt, at=attempt)
        assert now.headers[0] == (original or None)
        assert (now.keys, now.values) == (first.keys, first.values)
        assert now.timestamps_ms == [NOW_MS]
        assert origin_of(now, 0) == Origin(*STREAM, 100, NOW_MS, attempt)
        if not given_id:
            assert now.called(0) == NAMED


def test_ours_stand_behind_the_original_ones_in_their_order() -> None:
    """A caller's headers first, then where it stood, which attempt this is, and not before when."""
    sent: list[Header] = [("inferfleet-attempt", b"9"), ("inferfleet-id", b"mine"), ("x", None)]
    found = retry_headers(chunk([b"b"], [sent]), 0, "mine", attempt=3, not_before_ms=42)
    assert found[:3] == sent
    assert tuple(names(found[3:])) == OURS
    assert [value for _, value in found[3:]] == [
        b"digits.requests",
        b"3",
        b"100",
        b"%d" % NOW_MS,
        b"3",
        b"42",
    ]


@pytest.mark.parametrize(
    ("headers", "request_id", "named"),
    [
        (None, NAMED, True),
        ([("x", b"y")], NAMED, True),
        ([("Inferfleet-ID", b"a")], "a", False),
        ([("ce_id", b"a")], "a", False),
        (None, "from-the-body", False),
    ],
)
def test_an_id_is_written_down_where_only_the_place_gave_it(
    headers: Headers, request_id: str, named: bool
) -> None:
    """Whoever reads the retry topic finds it; where the record says its id itself nothing is added."""
    found = retry_headers(chunk([b"b"], [headers]), 0, request_id, attempt=2, not_before_ms=0)
    assert (found[0] == (ID, request_id.encode())) == named
    assert names(found).count(ID) == int(named)


def test_a_forged_block_changes_nothing() -> None:
    """The last of a name counts, and the last is ours."""
    forged: list[Header] = [(name, b"1") for name in OURS]
    back = again(chunk([b"b"], [forged]), NAMED, 2)
    assert origin_of(back, 0) == Origin(*STREAM, 100, NOW_MS, 2)
    assert back.headers == [forged]


@pytest.mark.parametrize(
    "headers",
    [
        None,
        [("other", b"1")],
        [("inferfleet-attempt", b"3")],
        *[
            [(name, b"1") if name != wrong else (name, value) for name in OURS]
            for wrong, value in (
                ("inferfleet-origin-offset", b"x"),
                ("inferfleet-origin-partition", None),
                ("inferfleet-origin-topic", b"\xff"),
                ("inferfleet-origin-topic", None),
                ("inferfleet-origin-timestamp", b"9" * 30),
                ("inferfleet-origin-offset", b"9" * 5_000),
                ("inferfleet-attempt", b"9" * 30),
            )
        ],
    ],
)
def test_a_record_without_our_block_stands_where_it_stands(headers: Headers) -> None:
    """Somebody put it there by hand: it is a first attempt, read like any other."""
    of = chunk([b"b"], [headers], stream=RETRY)
    restore(of)
    assert origin_of(of, 0) == Origin(*RETRY, 100, NOW_MS, 1)
    assert of.called(0) == f"{RETRY.source}-0-100"
    assert not set(names(of.headers[0])) & set(OURS)


def test_records_of_one_chunk_keep_their_own() -> None:
    """Rows with and without a block, of several partitions, do not mix; shared lists are left alone."""
    one = chunk([b"a"], stream=Stream("s", 1), first=5, timestamp_ms=11)
    two = chunk([b"b"], [[("x", b"y")]], stream=Stream("s", 2), first=6, timestamp_ms=12)
    shared = [("plain", b"1")]
    columns_ = [
        retry_headers(one, 0, "s-1-5", attempt=2, not_before_ms=0),
        shared,
        retry_headers(two, 0, "s-2-6", attempt=4, not_before_ms=0),
        shared,
    ]
    of = chunk([b"a", b"p", b"b", b"q"], columns_, stream=RETRY)
    restore(of)
    assert [origin_of(of, row)[:3] for row in range(4)] == [
        ("s", 1, 5),
        (*RETRY, 101),
        ("s", 2, 6),
        (*RETRY, 103),
    ]
    assert [origin_of(of, row).attempt for row in range(4)] == [2, 1, 4, 1]
    assert of.timestamps_ms == [11, NOW_MS, 12, NOW_MS]
    assert of.headers == [None, shared, [("x", b"y")], shared]
    assert [of.called(row) for row in range(3)] == ["s-1-5", f"{RETRY.source}-0-101", "s-2-6"]


# RabbitMQ: headers are a table


def message(table: bytes, amqp: Amqp, *, tag: int = 1) -> Chunk:
    """Return a chunk of one message with this header table."""
    properties = write_properties([], None, amqp._replace(table=Table(table)), None, {})
    return _read(QUEUE, properties, tag)


def _read(stream: Stream, properties: bytes, tag: int) -> Chunk:
    frame = b"\x00\x3c\x00\x00" + (1).to_bytes(8, "big") + properties
    made = columns([(tag, False, frame, b"b", NOW_MS)])
    return Chunk(
        stream,
        1,
        range(tag, tag + 1),
        made.keys,
        [b"b"],
        made.headers,
        made.timestamps_ms,
        0.0,
        amqp=made.amqp,
        fallback_ids=made.fallback_ids,
    )


def again_on_rabbitmq(of: Chunk, request_id: str, attempt: int, *, tag: int = 9) -> Chunk:
    """Send a message through a delay queue and read it from the ready queue, as RabbitMQ would bring it."""
    assert of.amqp is not None
    headers = retry_headers(of, 0, request_id, attempt=attempt, not_before_ms=NOW_MS)
    properties = write_properties(headers, of.keys[0], of.amqp[0], 5_000, {})
    back = _read(READY, properties, tag)
    assert back.amqp is not None
    table = dict(back.amqp[0].table or {})
    died = {"x-first-death-queue": "q", "x-last-death-reason": "expired", "x-delivery-count": 1}
    back = _read(
        READY,
        write_properties([], None, back.amqp[0]._replace(table=Table(write_table(table | died))), None, {}),
        tag,
    )
    restore(back)
    return back


_table = st.dictionaries(
    st.sampled_from([*OURS, ID, "Inferfleet-Attempt", "other", "Odd", "inferfleet-key"]),
    st.none() | st.text(st.characters(codec="ascii"), max_size=8) | st.integers(-5, 10**15) | st.booleans(),
    max_size=6,
)


def _theirs(of: Chunk) -> dict[str, bytes | None]:
    return {name: value for name, value in of.headers[0] or () if name not in OURS and name != ID}


@given(_table, st.sampled_from([None, "m-1"]), st.sampled_from([None, "c-1"]), st.integers(1, 4))
def test_any_message_comes_back_as_it_was(
    table: dict[str, object], message_id: str | None, correlation_id: str | None, rounds: int
) -> None:
    """All but our own names, and no trace of the broker's; the caller's queue and correlation id stay."""
    first = message(write_table(table), Amqp("amq.gen-x", correlation_id, message_id), tag=3)
    assert first.amqp is not None
    request_id, now = first.called(0), first
    for attempt in range(2, 2 + rounds):
        now = again_on_rabbitmq(now, request_id, attempt)
        assert now.amqp is not None
        assert _theirs(now) == _theirs(first)
        assert now.keys == first.keys
        assert now.timestamps_ms == first.timestamps_ms
        assert now.amqp[0][:2] == first.amqp[0][:2]
        assert origin_of(now, 0) == Origin("rabbitmq:q", 1, 3, first.timestamps_ms[0], attempt)
        if not any(name.lower() == ID for name in table):
            found = dict(now.headers[0] or ()).get(ID)
            assert now.called(0) == request_id
            assert found is None or found.decode() == request_id
        assert not [name for name in now.amqp[0].table or () if name in OURS or name.startswith("x-")]


def test_a_generated_id_stays_the_requests() -> None:
    """What was made up for a message without a name is written down, so every attempt has the same."""
    first = message(b"", Amqp())
    request_id = first.called(0)
    assert request_id.startswith("amqp-")
    back = again_on_rabbitmq(first, request_id, 2)
    assert dict(back.headers[0] or ()).get(ID) == request_id.encode()


def test_what_a_ready_queue_adds_is_not_the_callers() -> None:
    """Neither the table nor the headers keep what the broker wrote while a message waited."""
    first = message(write_table({"x-mine": "kept"}), Amqp(message_id="m"))
    back = again_on_rabbitmq(first, "m", 2)
    assert back.amqp is not None
    assert dict(back.amqp[0].table or {}).keys() == {"x-mine", ID}
    assert names(back.headers[0]) == ["content-type", "x-mine", ID]
