"""AMQP bytes against the client library's own: frames cut anywhere, tables of any kind, messages written."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pamqp.decode
import pamqp.encode
import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, header, heartbeat

from inferfleet.brokers.rabbitmq_columns import columns
from inferfleet.brokers.rabbitmq_frames import (
    FrameError,
    Splitter,
    acknowledgement,
    message,
    route,
)
from inferfleet.brokers.rabbitmq_properties import read_properties, write_properties
from inferfleet.brokers.rabbitmq_tables import Opaque, Table, read_table, write_table
from inferfleet.records import Amqp, Header

FRAME_MAX = 131_072
CHANNEL = 3


class Ear:
    """A sink that writes down what it hears."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, bool, bytes, bytes]] = []
        self.returns: list[tuple[int, str, bytes, bytes]] = []
        self.confirmations: list[tuple[int, bool, bool]] = []
        self.flushes = 0
        self.is_closed = False

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        self.messages.append((tag, redelivered, header, body))

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        self.returns.append((code, text, key, body))

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        self.confirmations.append((tag, multiple, accepted))

    def closed(self) -> None:
        self.is_closed = True

    def flush(self) -> None:
        self.flushes += 1


def marshalled(*frames: Any, channel: int = CHANNEL) -> bytes:
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in frames)


def a_message(method: Any, content: bytes, piece: int = FRAME_MAX, **properties: Any) -> bytes:
    head = header.ContentHeader(0, len(content), commands.Basic.Properties(**properties))
    pieces = [body.ContentBody(content[at : at + piece]) for at in range(0, len(content), piece)]
    return marshalled(method, head, *pieces)


def a_delivery(tag: int, content: bytes, piece: int = FRAME_MAX, **properties: Any) -> bytes:
    return a_message(commands.Basic.Deliver("tag", tag, tag % 2 == 0, "", "q"), content, piece, **properties)


def header_of(**properties: Any) -> bytes:
    """Return a header frame's payload as a broker sends it."""
    return header.ContentHeader(0, 0, commands.Basic.Properties(**properties)).marshal()


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 9))
def test_frames_are_cut_alike_wherever_a_read_ends(reads: list[int], piece: int) -> None:
    """Every message, confirmation and return is told once, and all else is handed on to the letter."""
    others = [
        marshalled(heartbeat.Heartbeat(), channel=0),
        marshalled(commands.Basic.ConsumeOk("tag")),
        a_delivery(9, b"somebody else's")[:1] + b"\x00\x07" + marshalled(commands.Basic.QosOk())[3:],
        marshalled(commands.Channel.Close(404, "gone", 60, 20)),
    ]
    parts = [
        a_delivery(1, b""),
        others[0],
        a_delivery(2, b"one piece", message_id="m"),
        others[1],
        a_delivery(3, b"several pieces, one after the other", piece),
        a_message(commands.Basic.Return(312, "NO_ROUTE", "", "nobody"), b"back", piece),
        marshalled(commands.Basic.Ack(5, True), commands.Basic.Nack(6, False), commands.Basic.Ack(7)),
        others[2],
        others[3],
    ]
    data, ear, splitter, passed = b"".join(parts), Ear(), Splitter(1 << 20), b""
    splitter.sinks[CHANNEL] = ear
    for size in [*reads, len(data)]:
        passed += splitter.feed(data[:size])
        data = data[size:]
    assert [(tag, again, content) for tag, again, _, content in ear.messages] == [
        (1, False, b""),
        (2, True, b"one piece"),
        (3, False, b"several pieces, one after the other"),
    ]
    assert read_properties(ear.messages[1][2]).message_id == b"m"
    assert ear.returns == [(312, "NO_ROUTE", b"nobody", b"back")]
    assert ear.confirmations == [(5, True, True), (6, False, False), (7, False, True)]
    assert ear.is_closed
    assert passed == b"".join(others)


def test_bodies_of_two_channels_may_alternate() -> None:
    """What belongs together is told by the channel, not by the order."""
    ears = {3: Ear(), 4: Ear()}
    splitter = Splitter(1 << 20)
    splitter.sinks.update(ears)
    first, second = a_delivery(1, b"abcdef", 2), a_delivery(1, b"uvwxyz", 2).replace(b"\x00\x03", b"\x00\x04")
    cut = len(first) - 3 * 10
    pieces = [first[cut + n * 10 : cut + n * 10 + 10] for n in range(3)]
    others = [second[cut + n * 10 : cut + n * 10 + 10] for n in range(3)]
    mixed = [each for pair in zip(pieces, others, strict=True) for each in pair]
    assert splitter.feed(first[:cut] + second[:cut] + b"".join(mixed)) == b""
    assert [ear.messages[0][3] for ear in ears.values()] == [b"abcdef", b"uvwxyz"]


def test_of_a_body_over_the_bound_the_beginning_is_kept() -> None:
    """Memory is bounded, the length in the header tells the truth, and the next message is whole."""
    ear, splitter = Ear(), Splitter(100)
    splitter.sinks[CHANNEL] = ear
    data = a_delivery(1, b"x" * 1000, 64) + a_delivery(2, b"y" * 101) + a_delivery(3, b"whole")
    for at in range(0, len(data), 50):
        splitter.feed(data[at : at + 50])
    assert [len(content) for _, _, _, content in ear.messages] == [100, 100, 5]
    made = columns([(tag, again, head, content, 5) for tag, again, head, content in ear.messages])
    assert [
        headers is not None and headers[-1] == ("inferfleet-cut", b"body") for headers in made.headers
    ] == [
        True,
        True,
        False,
    ]


def test_bytes_that_are_no_frames_end_the_connection() -> None:
    """A frame without its end, a message without a header: nothing behind it can be trusted."""
    for data in (
        a_delivery(1, b"x")[:-1] + b"\x00",
        marshalled(commands.Basic.Deliver("t", 1, False, "", "q"), body.ContentBody(b"no header")),
    ):
        splitter = Splitter(100)
        splitter.sinks[CHANNEL] = Ear()
        with pytest.raises(FrameError):
            splitter.feed(data + marshalled(commands.Basic.Ack(1)))


def test_the_broker_says_that_it_blocks_publishers_and_that_it_does_not() -> None:
    """The library hears it as well."""
    splitter = Splitter(100)
    blocked, unblocked = commands.Connection.Blocked("low on memory"), commands.Connection.Unblocked()
    data = marshalled(blocked, channel=0)
    assert splitter.feed(data) == data
    assert splitter.blocked
    splitter.feed(marshalled(unblocked, channel=0))
    assert not splitter.blocked


# Tables

SCALARS: dict[str, Any] = {
    "text": "täxt",
    "none": None,
    "yes": True,
    "no": False,
    "tiny": -3,
    "small": -300,
    "whole": 70_000,
    "large": 2**40,
    "real": 0.5,
    "bytes": bytearray(b"\x00\xff"),
}
NESTED: dict[str, Any] = {
    "table": {"a": {"b": [1, "x"]}},
    "list": ["a", 1, None],
    "when": datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
    "price": decimal.Decimal("1.25"),
}


def encoded(table: dict[str, Any]) -> bytes:
    """Return a table as the library writes it, without its length."""
    return pamqp.encode.field_table(table)[4:]


def decoded(raw: bytes) -> Any:
    """Return a table as the library reads it."""
    return pamqp.decode.field_table(len(raw).to_bytes(4, "big") + raw)[1]


def test_scalars_are_read_as_headers_and_nested_values_left_out() -> None:
    """Numbers and truth become text, nothing stays nothing; what is nested is no header."""
    read = read_table(encoded({**SCALARS, **NESTED}))
    assert dict(read.headers) == {
        "text": "täxt".encode(),
        "none": None,
        "yes": b"true",
        "no": b"false",
        "tiny": b"-3",
        "small": b"-300",
        "whole": b"70000",
        "large": b"1099511627776",
        "real": b"0.5",
        "bytes": b"\x00\xff",
        "when": b"1793491200",
    }


@pytest.mark.parametrize(
    "name", ["inferfleet-id", "Content-Type", "traceparent", "tracestate", "ce_id", "mlserver-model"]
)
def test_a_nested_value_under_a_name_of_ours_is_unreadable(name: str) -> None:
    """It is not left out, or a request would lose its header and be answered as if it had none."""
    assert read_table(encoded({name: {"a": 1}})).headers == [(name.lower(), b"\xff")]


def test_depth_costs_nothing() -> None:
    """A table of ten thousand tables is stepped over, and carried along as it is."""
    raw = b""
    for _ in range(10_000):
        raw = b"\x01aF" + len(raw).to_bytes(4, "big") + raw
    assert read_table(raw).headers == []
    assert write_properties([], None, Amqp(table=Table(raw)), None, {}).count(raw) == 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_value_error(raw: bytes) -> None:
    """And a message with them is taken all the same, marked as unreadable."""
    flags = b"\x20\x00"
    payload = bytes(12) + flags + len(raw).to_bytes(4, "big") + raw
    made = columns([(1, False, payload, b"", 5), (2, False, bytes(12) + raw, b"", 5)])
    assert len(made.headers) == 2
    try:
        read_table(raw)
    except ValueError:
        assert made.headers[0] == [("inferfleet-unreadable", b"1")]


def test_a_table_is_a_mapping_of_what_it_holds() -> None:
    """Nested values are opaque; all others are what they are in Python."""
    table = Table(encoded({**SCALARS, **NESTED}))
    assert {name: table[name] for name in SCALARS} == {**SCALARS, "bytes": b"\x00\xff"}
    assert all(isinstance(table[name], Opaque) for name in NESTED)
    assert decoded(write_table(table)) == decoded(table.raw)


# Properties


def test_properties_are_read_as_the_library_writes_them() -> None:
    """All that stand before the last one that is read are stepped over."""
    every: dict[str, Any] = {
        "content_type": "application/json",
        "content_encoding": "identity",
        "headers": {"a": "1"},
        "delivery_mode": 2,
        "priority": 255,
        "correlation_id": "c",
        "reply_to": "r",
        "expiration": "60000",
        "message_id": "m",
        "timestamp": datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
        "message_type": "t",
        "app_id": "a",
    }
    found = read_properties(header_of(**every))
    assert found[:2] == (b"application/json", b"identity")
    assert found[3:6] == (b"c", b"r", b"m")
    assert found.time_s == 1_793_491_200
    assert read_properties(header_of()) == (None,) * 7


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, 5_000_500),
        ({"timestamp": datetime.datetime.fromtimestamp(4_000, datetime.UTC)}, 4_000_999),
        ({"timestamp": datetime.datetime.fromtimestamp(5_000, datetime.UTC)}, 5_000_500),
        ({"timestamp": datetime.datetime.fromtimestamp(9_000, datetime.UTC)}, 5_000_500),
        ({"headers": {"timestamp_in_ms": 123}}, 123),
        ({"headers": {"timestamp_in_ms": "123"}}, 5_000_500),
    ],
)
def test_the_time_is_the_brokers_else_the_senders_and_never_after_arrival(
    properties: dict[str, Any], expected: int
) -> None:
    """A sender's clock counts whole seconds and may be wrong."""
    assert columns([(1, False, header_of(**properties), b"", 5_000_500)]).timestamps_ms == [expected]


def test_ids_of_messages_are_their_own_or_made_up() -> None:
    """message_id, else correlation_id, else a new one; bytes that are no text are shown as such."""
    heads = [
        header_of(message_id="m", correlation_id="c"),
        header_of(correlation_id="c"),
        header_of(),
        header_of(message_id="xy").replace(b"xy", b"x\xff"),
    ]
    made = columns([(n, False, head, b"", 5) for n, head in enumerate(heads)])
    assert made.fallback_ids[:2] == ["m", "c"]
    assert made.fallback_ids[2].startswith("amqp-")
    assert len(made.fallback_ids[2]) == 5 + 32
    assert made.fallback_ids[3] == "x\ufffd"
    assert made.amqp[3].message_id == "x\udcff"


def read_back(headers: list[Header], key: bytes | None = None, amqp: Amqp | None = None, **more: Any) -> Any:
    """Return properties as the library reads what we write."""
    properties = write_properties(headers, key, amqp, more.pop("expiration_ms", None), {}, **more)
    sent = b"".join(message(route(CHANNEL, b"", b"q"), properties, b"body", FRAME_MAX))
    at = pamqp.frame.unmarshal(sent)[0]
    _, channel, head = pamqp.frame.unmarshal(sent[at:])
    assert isinstance(head, header.ContentHeader)
    assert channel == CHANNEL
    assert head.body_size == 4
    return head.properties


def test_an_outcome_is_persistent_json_with_its_id() -> None:
    """What has a property of its own stands there, all else in the table, text as text."""
    found = read_back(
        [("inferfleet-id", b"r-1"), ("inferfleet-status", b"ok"), ("null", None), ("raw", b"\xff")],
        b"k",
        Amqp(correlation_id="c"),
        expiration_ms=1500,
    )
    assert (found.content_type, found.delivery_mode, found.message_id) == ("application/json", 2, "r-1")
    assert (found.correlation_id, found.expiration) == ("c", "1500")
    assert found.headers == {
        "inferfleet-id": "r-1",
        "inferfleet-status": "ok",
        "null": None,
        "raw": bytearray(b"\xff"),
        "inferfleet-key": "k",
    }
    binary = read_back([("content-type", b"application/octet-stream"), ("content-encoding", b"identity")])
    assert (binary.content_type, binary.content_encoding) == ("application/octet-stream", "identity")
    assert not binary.headers


def test_a_request_that_moves_on_keeps_its_table_to_the_letter() -> None:
    """Types and names stay; ours stand beside them, and over them where a value differs."""
    table = {**SCALARS, **NESTED, "Upper": "U", "count": 7, "inferfleet-attempt": "1"}
    request = columns([(1, False, header_of(headers=table, message_id="m"), b"", 5)])
    headers = [*(request.headers[0] or ()), ("inferfleet-attempt", b"2"), ("inferfleet-code", b"E_MODEL")]
    found = read_back(headers, request.keys[0], request.amqp[0])
    expected = {**decoded(encoded(table)), "inferfleet-attempt": "2", "inferfleet-code": "E_MODEL"}
    assert found.headers == expected
    assert found.message_id == "m"


def test_an_answer_to_the_caller_repeats_the_correlation_id_alone() -> None:
    """The caller knows its own headers, and its reply queue."""
    asked = Amqp("queue", "c", "m", Table(encoded({"a": "1"})))
    found = read_back([("inferfleet-id", b"r")], None, asked, reply=True)
    assert (found.correlation_id, found.reply_to, found.message_id) == ("c", None, "r")
    assert found.headers == {"inferfleet-id": "r"}


@pytest.mark.parametrize("lazy", [True, False])
def test_no_caller_makes_us_write_to_a_queue_of_its_choice(lazy: bool) -> None:
    """RabbitMQ copies a message to whatever CC and BCC name, with the rights of whoever publishes it."""
    raw = encoded({"CC": ["victim"], "BCC": ["victim"], "cc": "harmless", "x-delivery-count": 3})
    table = Table(raw) if lazy else dict(Table(raw))
    assert read_back([], None, Amqp(table=table)).headers == {"cc": "harmless"}


def test_what_does_not_fit_into_a_frame_is_refused_before_it_is_sent() -> None:
    """Larger headers would end the whole connection; bodies go in as many frames as they need."""
    wide = write_properties([("wide", b"x" * FRAME_MAX)], None, None, None, {})
    with pytest.raises(ValueError, match="headers of"):
        message(route(1, b"", b"q"), wide, b"", FRAME_MAX)
    with pytest.raises(ValueError, match="300 bytes"):
        route(1, b"", b"k" * 300)
    with pytest.raises(ValueError, match="room for 255"):
        write_properties([("n" * 300, b"v")], None, None, None, {})
    narrow = write_properties([], None, None, None, {})
    sent = b"".join(message(route(1, b"e", b"k"), narrow, b"z" * (FRAME_MAX * 2), FRAME_MAX))
    bodies = []
    while sent:
        size, _, frame = pamqp.frame.unmarshal(sent)
        assert size <= FRAME_MAX
        sent = sent[size:]
        if isinstance(frame, body.ContentBody):
            bodies.append(frame.value)
    assert b"".join(bodies) == b"z" * (FRAME_MAX * 2)


def test_an_acknowledgement_is_of_all_up_to_a_tag() -> None:
    """As the library reads it."""
    _, channel, frame = pamqp.frame.unmarshal(acknowledgement(CHANNEL, 2**40))
    assert channel == CHANNEL
    assert isinstance(frame, commands.Basic.Ack)
    assert (frame.delivery_tag, frame.multiple) == (2**40, True)
